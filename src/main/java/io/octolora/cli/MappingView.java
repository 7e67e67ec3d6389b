// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.adapter.LoraAdapter;
import io.octolora.adapter.LoraPair;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.cli.Terminal.Tone;
import io.octolora.mapping.LoraDelta;
import io.octolora.mapping.MappingException;
import io.octolora.mapping.MappingReport;
import io.octolora.mapping.ModuleMap;
import java.io.IOException;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;

/** Shows a person or a program where every key of an adapter landed. */
final class MappingView {
  private final Checkpoint base;
  private final LoraAdapter adapter;
  private final @Nullable ModuleMap map;
  private final MappingReport report;
  private final boolean lenient;

  private MappingView(Checkpoint base, LoraAdapter adapter, @Nullable ModuleMap map, MappingReport report,
      boolean lenient) {
    this.base = base;
    this.lenient = lenient;
    this.adapter = adapter;
    this.map = map;
    this.report = report;
  }

  /**
   * Maps what fits, be it nothing.
   *
   * @param renames how the user wants names to be read
   * @param lenient whether the user accepts that keys are left out
   */
  static MappingView of(Checkpoint base, LoraAdapter adapter, Map<String, String> renames, boolean lenient) {
    try {
      ModuleMap map = ModuleMap.lenient(base, adapter, renames);
      return new MappingView(base, adapter, map, map.report(), lenient);
    } catch (MappingException e) {
      return new MappingView(base, adapter, null, e.report(), lenient);
    }
  }

  LoraAdapter adapter() {
    return adapter;
  }

  MappingReport report() {
    return report;
  }

  /** In the checkpoint's order. */
  Set<String> modules() {
    return map == null ? Set.of() : map.modules();
  }

  /** The parts of the adapter that serve a module; none where it serves none. */
  List<LoraDelta> deltas(String module) {
    return map != null && map.modules().contains(module) ? map.deltas(module) : List.of();
  }

  /** "52 of 52 keys landed on 26 modules". */
  String summary() {
    int keys = report.entries().size();
    return "%d of %d keys landed on %d modules".formatted(keys - report.unmapped().size(), keys, modules().size());
  }

  /** Whether every key landed, or those that did not may be left out; an adapter without effect never is. */
  boolean complete() {
    return (lenient || report.unmapped().isEmpty()) && !modules().isEmpty();
  }

  /** Of several adapters: "every adapter key landed", or what did not. */
  static String verdict(List<MappingView> views) {
    int lost = views.stream().mapToInt(view -> view.report.unmapped().size()).sum();
    if (lost == 0) {
      return views.stream().allMatch(MappingView::complete) ? "every adapter key landed" : "an adapter has no effect";
    }
    if (views.stream().allMatch(MappingView::complete)) {
      return "%d adapter keys left out, as asked".formatted(lost);
    }
    return "%d adapter keys landed nowhere and would be dropped%s".formatted(lost,
        views.stream().filter(view -> view.modules().isEmpty()).findFirst()
            .map(view -> ": %s may be for another model".formatted(view.adapter.path()))
            .orElse(" (--lenient accepts that)"));
  }

  /** A line for each module and low-rank pair; with verbose also one for each key. */
  void print(Terminal terminal, boolean verbose) {
    Table table = new Table("MODULE", "KEYS", "ROWS OF B", "RANKS", ">RANK", ">SCALE");
    for (String module : modules()) {
      for (LoraDelta delta : deltas(module)) {
        String key = delta.a().tensor().name();
        table.add(module, starred(key.substring(0, stem(key, delta.b().tensor().name())), module),
            range(delta.b().firstRow(), delta.n(), Math.toIntExact(delta.b().tensor().dimension(0)),
                delta.b().rotation()),
            range(delta.a().firstRow(), delta.rank(), Math.toIntExact(delta.a().tensor().dimension(0)), 0),
            delta.rank(), number(delta.scale()));
      }
    }
    if (!modules().isEmpty()) {
      terminal.out().println("keys end in %s; * is the module's name".formatted(String.join(", ", suffixes())));
      table.lines(terminal.width()).forEach(line -> terminal.out().println(line));
    }
    if (verbose) {
      printKeys(terminal);
    }
    for (MappingReport.Entry entry : report.unmapped()) {
      terminal.out().println(terminal.paint(Tone.BAD, "landed nowhere: ") + Table.printable(entry.key() + ": "
          + explanation(entry)));
    }
    advice().forEach((title, text) -> terminal.out().println(terminal.paint(Tone.WARNING, title + ": ")
        + Table.printable(text)));
    report.notes().forEach(note -> terminal.out().println("note: " + Table.printable(note)));
  }

  /** Why a key landed nowhere, what is near, of what shape, and which of {@link #advice} is for it. */
  String explanation(MappingReport.Entry entry) {
    String near = entry.nearest().stream().map(name -> "%s [%d, %d]".formatted(name, base.linear(name).n(),
        base.linear(name).k())).collect(Collectors.joining(", "));
    return entry.why() + (near.isEmpty() ? "" : "; nearest: " + near)
        + "; fix " + (List.copyOf(remedies().keySet()).indexOf(entry.remedy()) + 1);
  }

  /** For keys that landed nowhere: how names were read, and what would accept them; titles with texts. */
  Map<String, String> advice() {
    Map<String, String> advice = new LinkedHashMap<>();
    if (!report.unmapped().isEmpty()) {
      advice.put("names were read as " + adapter.format().label(),
          report.unmapped().stream().map(MappingReport.Entry::rule).distinct().collect(Collectors.joining("; ")));
    }
    remedies().forEach((remedy, keys) -> advice.put("fix %d, for %d %s".formatted(advice.size(), keys,
        keys == 1 ? "key" : "keys"), remedy));
    return advice;
  }

  /** With the number of keys, in the order of the first of them. */
  private Map<String, Long> remedies() {
    return report.unmapped().stream().collect(
        Collectors.groupingBy(MappingReport.Entry::remedy, LinkedHashMap::new, Collectors.counting()));
  }

  /** What follows the name of a pair in the keys it was made of, such as ".lora_A.weight" and ".alpha". */
  private Set<String> suffixes() {
    Set<String> suffixes = new TreeSet<>();
    for (LoraPair pair : adapter.pairs()) {
      int stem = stem(pair.a().name(), pair.b().name());
      for (String key : pair.keys()) {
        suffixes.add(Table.printable(key.substring(Math.min(stem, key.length()))));
      }
    }
    return suffixes;
  }

  /** Whole keys, however long: a line each, and one for each module they serve. */
  private void printKeys(Terminal terminal) {
    terminal.out().println();
    for (MappingReport.Entry entry : report.entries()) {
      terminal.out().println(Table.printable(entry.key()));
      for (MappingReport.Landing landing : entry.landings()) {
        terminal.out().println("  lands on %s, rows %d..%d%s, ranks %d..%d%s".formatted(
            Table.printable(landing.module()), landing.rowBegin(), landing.rowEnd(),
            landing.halvesSwapped() ? " with halves swapped" : "", landing.rankBegin(), landing.rankEnd(),
            landing.moduleRow() == 0 ? "" : ", from the module's row %d on".formatted(landing.moduleRow())));
      }
    }
  }

  void write(JsonGenerator json, float weight) throws IOException {
    json.writeStartObject();
    json.writeStringField("path", adapter.path().toString());
    json.writeStringField("format", adapter.format().name().toLowerCase(Locale.ROOT));
    json.writeStringField("recognition", adapter.recognition());
    json.writeNumberField("weight", weight);
    json.writeNumberField("keys", report.entries().size());
    json.writeNumberField("mapped", report.entries().size() - report.unmapped().size());
    json.writeArrayFieldStart("modules");
    for (String module : modules()) {
      for (LoraDelta delta : deltas(module)) {
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
    for (MappingReport.Entry entry : report.unmapped()) {
      json.writeStartObject();
      json.writeStringField("key", entry.key());
      json.writeStringField("why", entry.why());
      json.writeArrayFieldStart("nearest");
      for (String near : entry.nearest()) {
        json.writeString(near);
      }
      json.writeEndArray();
      json.writeStringField("rule", entry.rule());
      json.writeStringField("remedy", entry.remedy());
      json.writeEndObject();
    }
    json.writeEndArray();
    json.writeArrayFieldStart("notes");
    for (String note : report.notes()) {
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
