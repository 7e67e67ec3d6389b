// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import static org.junit.jupiter.api.Assertions.assertEquals;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.constraints.CharRange;
import net.jqwik.api.constraints.StringLength;
import org.junit.jupiter.api.Test;

class NamesTest {
  @Test
  void blocksAreOrderedByNumber() {
    List<String> names = new ArrayList<>(List.of("b.10.x", "b.2.y", "b.2.x", "a.11", "b.2", "b.02",
        "b.99999999999999999"));
    names.sort(Names.NATURAL);
    assertEquals(List.of("a.11", "b.02", "b.2", "b.2.x", "b.2.y", "b.10.x", "b.99999999999999999"), names);
  }

  @Property
  void orderIsTotalAndSeesEveryDifference(@ForAll @StringLength(max = 5) @CharRange(from = '/', to = ':') String a,
      @ForAll @StringLength(max = 5) @CharRange(from = '/', to = ':') String b,
      @ForAll @StringLength(max = 5) @CharRange(from = '/', to = ':') String c) {
    assertEquals(Integer.signum(Names.NATURAL.compare(a, b)), -Integer.signum(Names.NATURAL.compare(b, a)));
    assertEquals(a.equals(b), Names.NATURAL.compare(a, b) == 0);
    List<String> sorted = new ArrayList<>(List.of(a, b, c));
    sorted.sort(Names.NATURAL);
    assertEquals(true, Names.NATURAL.compare(sorted.get(0), sorted.get(2)) <= 0);
    Collections.reverse(sorted);
    List<String> again = new ArrayList<>(sorted);
    again.sort(Names.NATURAL);
    Collections.reverse(again);
    assertEquals(sorted, again);
  }

  @Test
  void nearestPrefersDottedEndsThenFewEdits() {
    List<String> modules = List.of("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
        "layers.0.self_attn.q_pro", "lm_head");
    assertEquals(List.of("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_pro"),
        Names.nearest("layers.0.self_attn.q_proj", modules, 2));
    assertEquals(List.of("model.layers.0.self_attn.k_proj"),
        Names.nearest("model_layers_0_self_attn_k_prox", modules, 1));
    assertEquals(List.of(), Names.nearest("x", List.of(), 3));
  }

  @Property
  void distanceIsThatOfTheDefinition(@ForAll @StringLength(max = 6) @CharRange(from = 'a', to = 'c') String a,
      @ForAll @StringLength(max = 6) @CharRange(from = 'a', to = 'c') String b) {
    assertEquals(edits(a, b), Names.distance(a, b, Integer.MAX_VALUE));
  }

  private static int edits(String a, String b) {
    if (a.isEmpty() || b.isEmpty()) {
      return a.length() + b.length();
    }
    int substituted = edits(a.substring(1), b.substring(1)) + (a.charAt(0) == b.charAt(0) ? 0 : 1);
    return Math.min(substituted, 1 + Math.min(edits(a.substring(1), b), edits(a, b.substring(1))));
  }
}
