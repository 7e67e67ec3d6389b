// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.adapter.LoraAdapter;
import io.octolora.cli.Terminal.Tone;
import io.octolora.mapping.LoraDelta;
import io.octolora.mapping.MappingReport;
import io.octolora.mapping.ModuleMap;
import java.io.IOException;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;

/** Shows a person or a program where every key of an adapter landed. */
final class MappingView {
  private final LoraAdapter adapter;
  private final ModuleMap map;

  MappingView(LoraAdapter adapter, ModuleMap map) {
    this.adapter = adapter;
    this.map = map;
  }

  /** "52 of 52 keys landed on 26 modules". */
  String summary() {
    int keys = map.report().entries().size();
    return "%d of %d keys landed on %d modules".formatted(keys - map.report().unmapped().size(), keys,
        map.modules().size());
  }

  boolean complete() {
    return map.report().unmapped().isEmpty() && !map.modules().isEmpty();
  }

  /** A line for each module and low-rank pair; with verbose also one for each key. */
  void print(Terminal terminal, boolean verbose) {
    Map<String, Integer> suffixes = new TreeMap<>();
    Table table = new Table("MODULE", "KEYS", "ROWS OF B", "RANKS", ">RANK", ">SCALE");
    for (String module : map.modules()) {
      for (LoraDelta delta : map.deltas(module)) {
        String a = delta.a().tensor().name();
        String b = delta.b().tensor().name();
        int stem = stem(a, b);
        suffixes.merge(a.substring(stem) + " and " + b.substring(stem), 1, Integer::sum);
        table.add(module, starred(a.substring(0, stem), module), range(delta.b().firstRow(), delta.n(),
            Math.toIntExact(delta.b().tensor().dimension(0)), delta.b().rotation()), range(delta.a().firstRow(),
            delta.rank(), Math.toIntExact(delta.a().tensor().dimension(0)), 0), delta.rank(), number(delta.scale()));
      }
    }
    if (!suffixes.isEmpty()) {
      terminal.out().println("keys end in " + String.join("; ", suffixes.keySet()) + "; * is the module's name");
      table.lines().forEach(line -> terminal.out().println(line));
    }
    if (verbose) {
      printKeys(terminal);
    }
    for (MappingReport.Entry entry : map.report().unmapped()) {
      terminal.out().println(terminal.paint(Tone.BAD, "landed nowhere: ") + Table.printable(entry.key() + ": "
          + entry.why() + (entry.nearest().isEmpty() ? "" : "; nearest: " + String.join(", ", entry.nearest()))));
    }
    adapter.notes().forEach(note -> terminal.out().println("note: " + Table.printable(note)));
    map.report().notes().forEach(note -> terminal.out().println("note: " + Table.printable(note)));
  }

  private void printKeys(Terminal terminal) {
    terminal.out().println();
    Table keys = new Table("KEY", "LANDS ON", "ROWS", "RANKS");
    for (MappingReport.Entry entry : map.report().entries()) {
      for (MappingReport.Landing landing : entry.landings()) {
        keys.add(entry.key(), landing.module(), landing.rowBegin() + ".." + landing.rowEnd()
            + (landing.halvesSwapped() ? " swapped" : ""), landing.rankBegin() + ".." + landing.rankEnd());
      }
    }
    keys.lines().forEach(line -> terminal.out().println(line));
  }

  void write(JsonGenerator json, float weight) throws IOException {
    json.writeStartObject();
    json.writeStringField("path", adapter.path().toString());
    json.writeStringField("format", adapter.format().name().toLowerCase(Locale.ROOT));
    json.writeNumberField("weight", weight);
    json.writeNumberField("keys", map.report().entries().size());
    json.writeNumberField("mapped", map.report().entries().size() - map.report().unmapped().size());
    json.writeArrayFieldStart("modules");
    for (String module : map.modules()) {
      for (LoraDelta delta : map.deltas(module)) {
        json.writeStartObject();
        json.writeStringField("module", module);
        json.writeStringField("a", delta.a().tensor().name());
        json.writeStringField("b", delta.b().tensor().name());
        json.writeNumberField("firstRow", delta.b().firstRow());
        json.writeNumberField("rows", delta.n());
        json.writeNumberField("rotation", delta.b().rotation());
        json.writeNumberField("firstRank", delta.a().firstRow());
        json.writeNumberField("rank", delta.rank());
        json.writeNumberField("scale", delta.scale());
        json.writeBooleanField("bias", delta.bias() != null);
        json.writeEndObject();
      }
    }
    json.writeEndArray();
    json.writeArrayFieldStart("unmapped");
    for (MappingReport.Entry entry : map.report().unmapped()) {
      json.writeStartObject();
      json.writeStringField("key", entry.key());
      json.writeStringField("why", entry.why());
      json.writeArrayFieldStart("nearest");
      for (String near : entry.nearest()) {
        json.writeString(near);
      }
      json.writeEndArray();
      json.writeEndObject();
    }
    json.writeEndArray();
    json.writeArrayFieldStart("notes");
    for (String note : adapter.notes()) {
      json.writeString(note);
    }
    for (String note : map.report().notes()) {
      json.writeString(note);
    }
    json.writeEndArray();
    json.writeEndObject();
  }

  /** Where the names of A and B part, moved back to the last dot: "x.lora_A.weight", "x.lora_B.weight" part after x. */
  private static int stem(String a, String b) {
    int same = 0;
    while (same < Math.min(a.length(), b.length()) && a.charAt(same) == b.charAt(same)) {
      same++;
    }
    return Math.max(0, a.lastIndexOf('.', same));
  }

  private static String starred(String stem, String module) {
    return stem.endsWith(module) ? stem.substring(0, stem.length() - module.length()) + "*" : stem;
  }

  private static String range(int first, int count, int total, int rotation) {
    String text = first == 0 && count == total ? "all " + total
        : "%d..%d of %d".formatted(first, first + count, total);
    return rotation == 0 ? text : text + ", halves swapped";
  }

  /** Up to six significant digits, without trailing zeros. */
  static String number(double value) {
    if (value == Math.rint(value) && Math.abs(value) < 1e6) {
      return String.valueOf((long) value);
    }
    String text = "%.6g".formatted(value);
    return text.contains("e") ? text : text.replaceFirst("0+$", "").replaceFirst("\\.$", "");
  }
}
