// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.plots;

import io.octolora.benchmarks.plots.Results.Row;
import io.octolora.benchmarks.plots.Results.Shape;
import io.octolora.benchmarks.plots.Svg.Anchor;
import io.octolora.benchmarks.plots.Svg.Ink;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Optional;
import java.util.function.DoubleUnaryOperator;
import java.util.function.ToDoubleFunction;

/**
 * Draws {@code h200_compare.csv} of a folder: {@code h200_shapes.svg}, {@code h200_decode.svg} and
 * {@code h200_flux_step.svg} beside it.
 *
 * <pre>java -cp benchmarks/target/benchmarks.jar io.octolora.benchmarks.plots.Plots benchmarks/results</pre>
 */
public final class Plots {
  private static final int WIDTH = 900;
  private static final int MARGIN = 24;
  private static final Map<Shape, String> NAMES = Map.of(
      new Shape(4608, 3072, 3072), "FLUX q, k, v, out", new Shape(4608, 3072, 12288), "FLUX up",
      new Shape(4608, 12288, 3072), "FLUX down", new Shape(4608, 3072, 21504), "FLUX q, k, v and mlp",
      new Shape(4608, 15360, 3072), "FLUX single out", new Shape(4608, 3072, 9216), "FLUX q, k, v as one",
      new Shape(2048, 4096, 4096), "LLM q, out", new Shape(2048, 4096, 14336), "LLM gate, up",
      new Shape(2048, 14336, 4096), "LLM down", new Shape(4096, 8192, 28672), "LLM 70B gate, up");

  private Plots() {}

  public static void main(String[] args) throws IOException {
    Locale.setDefault(Locale.ROOT);
    if (args.length != 1) {
      System.err.println("usage: Plots FOLDER, which holds h200_compare.csv");
      System.exit(2);
    }
    Path folder = Path.of(args[0]);
    Results results = Results.read(folder.resolve("h200_compare.csv"));
    Map<String, Svg> plots = Map.of("h200_shapes.svg", shapes(results), "h200_decode.svg", decode(results),
        "h200_flux_step.svg", fluxStep(results));
    for (Map.Entry<String, Svg> plot : plots.entrySet()) {
      Files.writeString(folder.resolve(plot.getKey()), plot.getValue().toString());
      System.out.println(folder.resolve(plot.getKey()));
    }
  }

  private static void heading(Svg svg, String title, String how) {
    svg.text(MARGIN, 34, 17, Ink.TEXT, Anchor.START, true, title);
    svg.text(MARGIN, 54, 12, Ink.MUTED, Anchor.START, false, how);
  }

  private static String micros(double us) {
    return us < 100 ? "%.1f".formatted(us) : "%.0f".formatted(us);
  }

  // ---- Microseconds by shape

  /** A mark of one system: what it is in the results, and how it is drawn. */
  private record Mark(String system, String adapters, String label, Ink ink) {}

  private static final List<Mark> MARKS = List.of(
      new Mark("bf16 PEFT", "r16", "torch bf16 + PEFT r16", Ink.ADAPTER),
      new Mark("bf16 linear", "", "torch bf16, no adapter", Ink.BASE),
      new Mark("w8a8", "r16", "Octolora W8A8 + LoRA r16", Ink.OURS));

  /** Each shape is a line on one logarithmic axis: the floor, then the systems. */
  static Svg shapes(Results results) {
    List<Row> ours = new ArrayList<>();
    for (String part : List.of("flux", "prefill")) {
      for (Shape shape : results.shapes(part)) {
        results.find(part, "", shape, "w8a8", "r16").ifPresent(ours::add);
      }
    }
    int left = 210;
    int top = 138;
    int step = 46;
    int bottom = top + step * ours.size() - 12;
    Svg svg = new Svg(WIDTH, bottom + 62, "Microseconds a call, by shape",
        "For each shape M × K × N the floor by the data sheet, Octolora with an adapter, and torch with and without");
    heading(svg, "Microseconds a call, by shape M × K × N",
        "bf16 in, bf16 out, quantization included; medians of graph replays in one process; logarithmic axis");
    double least = ours.stream().mapToDouble(row -> Double.isNaN(row.floorUs()) ? row.us() : row.floorUs()).min()
        .orElseThrow() * 0.85;
    double most = ours.stream().mapToDouble(row -> MARKS.stream()
        .mapToDouble(mark -> mark(results, row, mark).map(Row::us).orElse(0.0)).max().orElseThrow()).max()
        .orElseThrow() * 1.15;
    DoubleUnaryOperator x = us -> left + Math.log(us / least) / Math.log(most / least) * (WIDTH - MARGIN - 16 - left);
    for (int tick : new int[] {10, 20, 50, 100, 200, 500, 1000, 2000, 5000}) {
      if (tick > least && tick < most) {
        double at = x.applyAsDouble(tick);
        svg.line(at, top - 24, at, bottom, Ink.GRID, 1, false);
        svg.text(at, bottom + 18, 11, Ink.MUTED, Anchor.MIDDLE, false, tick + (tick == 100 ? " µs" : ""));
      }
    }
    for (int i = 0; i < ours.size(); i++) {
      Row row = ours.get(i);
      double y = top + step * i;
      svg.text(MARGIN, y - 2, 13, Ink.TEXT, Anchor.START, false, NAMES.getOrDefault(row.shape(), ""));
      svg.text(MARGIN, y + 13, 11, Ink.MUTED, Anchor.START, false, row.shape().toString());
      double floor = Double.isNaN(row.floorUs()) ? row.us() : row.floorUs();
      double end = MARKS.stream().mapToDouble(mark -> mark(results, row, mark).map(Row::us).orElse(0.0)).max()
          .orElseThrow();
      svg.line(x.applyAsDouble(floor), y, x.applyAsDouble(end), y, Ink.GRID, 2, false);
      svg.line(x.applyAsDouble(floor), y - 8, x.applyAsDouble(floor), y + 8, Ink.FLOOR, 2, false);
      svg.text(x.applyAsDouble(floor) - 6, y + 4, 11, Ink.MUTED, Anchor.END, false, micros(floor));
      double right = Double.POSITIVE_INFINITY; // from here on the numbers above the line are taken
      for (Mark mark : MARKS) {
        Optional<Row> found = mark(results, row, mark);
        if (found.isEmpty()) {
          continue;
        }
        double at = x.applyAsDouble(found.get().us());
        String text = micros(found.get().us());
        if (mark.ink() == Ink.OURS) {
          svg.dot(at, y, 6, mark.ink());
          svg.text(at, y + 20, 12, mark.ink(), Anchor.MIDDLE, true, text);
        } else {
          svg.dot(at, y, 5, mark.ink());
          double half = Svg.widthOf(text, 11) / 2;
          double middle = Math.min(at, right - half - 6);
          svg.text(middle, y - 10, 11, mark.ink(), Anchor.MIDDLE, false, text);
          right = middle - half;
        }
      }
    }
    double at = MARGIN;
    svg.line(at + 4, 76, at + 4, 90, Ink.FLOOR, 2, false);
    at = legend(svg, at, Ink.TEXT, "floor by the data sheet");
    for (int i = MARKS.size() - 1; i >= 0; i--) {
      svg.dot(at + 5, 83, MARKS.get(i).ink() == Ink.OURS ? 6 : 5, MARKS.get(i).ink());
      at = legend(svg, at, MARKS.get(i).ink(), MARKS.get(i).label());
    }
    svg.text(MARGIN, bottom + 46, 11, Ink.MUTED, Anchor.START, false, results.source());
    return svg;
  }

  private static Optional<Row> mark(Results results, Row row, Mark mark) {
    return results.find(row.part(), "", row.shape(), mark.system(), mark.adapters());
  }

  /** The name beside a mark at x; returns where the next mark goes. */
  private static double legend(Svg svg, double x, Ink ink, String text) {
    svg.text(x + 16, 87, 12, ink, Anchor.START, true, text);
    return x + 16 + Svg.widthOf(text, 12) + 24;
  }

  // ---- Decode

  /** A line of a panel, and what its last point is called. */
  private record Series(String system, String adapters, String label, Ink ink, boolean dashed) {}

  private static final List<Series> SERIES = List.of(
      new Series("plain read", "r64", "plain read", Ink.FLOOR, true),
      new Series("w8a8", "r64", "Octolora + r64", Ink.OURS, false),
      new Series("bf16 linear", "", "torch bf16", Ink.BASE, false));

  /** Bandwidth of the int8 call's bytes against M, a panel for each K × N. */
  static Svg decode(Results results) {
    List<Shape> panels = results.shapes("decode").stream().map(shape -> new Shape(0, shape.k(), shape.n())).distinct()
        .sorted(Comparator.comparingLong(shape -> (long) shape.k() * shape.n())).toList();
    int wide = (WIDTH - 2 * MARGIN - 20) / 2;
    int high = 196;
    int top = 78;
    int count = (panels.size() + 1) / 2;
    Svg svg = new Svg(WIDTH, top + count * (high + 24) + 22, "Bandwidth of decoding against M",
        "For each K × N and M from 1 to 64: bytes of the int8 call a second, beside a plain read and torch in bf16");
    heading(svg, "Decoding: TB/s against M",
        "bytes of the int8 call (W, adapter r64, x, y) over time, also for torch, whose W has twice the bytes");
    for (int i = 0; i < panels.size(); i++) {
      panel(svg, results, panels.get(i), MARGIN + i % 2 * (wide + 20), top + i / 2 * (high + 24), wide, high);
    }
    svg.text(MARGIN, top + count * (high + 24) + 6, 11, Ink.MUTED, Anchor.START, false, results.source());
    return svg;
  }

  private static void panel(Svg svg, Results results, Shape panel, int left, int top, int wide, int high) {
    svg.text(left, top + 12, 13, Ink.TEXT, Anchor.START, true, "K %d, N %d".formatted(panel.k(), panel.n()));
    double x0 = left + 18;
    double x1 = left + wide - 118;
    double y0 = top + high - 20;
    double y1 = top + 24;
    DoubleUnaryOperator x = m -> x0 + (m - 1) / 63 * (x1 - x0);
    DoubleUnaryOperator y = terabytes -> y0 - terabytes / 5 * (y0 - y1);
    for (int tick = 0; tick <= 5; tick++) {
      svg.line(x0, y.applyAsDouble(tick), x1, y.applyAsDouble(tick), Ink.GRID, 1, false);
      svg.text(x0 - 6, y.applyAsDouble(tick) + 4, 11, Ink.MUTED, Anchor.END, false, String.valueOf(tick));
    }
    for (int tick : new int[] {1, 16, 32, 48, 64}) {
      svg.text(x.applyAsDouble(tick), y0 + 16, 11, Ink.MUTED, Anchor.MIDDLE, false,
          tick == 1 ? "M = 1" : String.valueOf(tick));
    }
    Map<Series, Double> ends = new LinkedHashMap<>();
    for (Series series : SERIES) {
      List<Row> points = results.rows().stream().filter(row -> row.part().equals("decode")
          && row.shape().k() == panel.k() && row.shape().n() == panel.n() && row.system().equals(series.system())
          && row.adapters().equals(series.adapters())).sorted(Comparator.comparingInt(row -> row.shape().m())).toList();
      if (points.isEmpty()) {
        continue;
      }
      StringBuilder line = new StringBuilder();
      StringBuilder upper = new StringBuilder();
      StringBuilder lower = new StringBuilder();
      for (Row row : points) {
        double at = x.applyAsDouble(row.shape().m());
        ToDoubleFunction<Double> of = us -> y.applyAsDouble(bytes(row.shape()) / us / 1e6);
        line.append(Svg.point(at, of.applyAsDouble(row.us())));
        upper.append(Svg.point(at, of.applyAsDouble(row.p10())));
        lower.insert(0, Svg.point(at, of.applyAsDouble(row.p90())));
      }
      svg.area(upper.append(lower).toString().strip(), series.ink());
      svg.path(line.toString().strip(), series.ink(), series.ink() == Ink.OURS ? 2.5 : 1.5, series.dashed());
      Row last = points.get(points.size() - 1);
      ends.put(series, bytes(last.shape()) / last.us() / 1e6);
    }
    double below = Double.NEGATIVE_INFINITY;
    for (Map.Entry<Series, Double> end : ends.entrySet().stream()
        .sorted(Map.Entry.<Series, Double>comparingByValue().reversed()).toList()) {
      double at = Math.max(y.applyAsDouble(end.getValue()), below + 15);
      svg.text(x1 + 8, at + 4, 12, end.getKey().ink(), Anchor.START, end.getKey().ink() == Ink.OURS,
          "%s %.1f".formatted(end.getKey().label(), end.getValue()));
      below = at;
    }
  }

  /** Of the int8 call with a rank 64 adapter. */
  private static double bytes(Shape shape) {
    double sides = shape.k() + shape.n();
    return (double) shape.n() * shape.k() + 2 * 64 * sides + 2 * shape.m() * sides;
  }

  // ---- The FLUX step

  private record Stage(String label, double ms, Ink ink) {}

  private record Bar(String label, List<Stage> stages) {
    double ms() {
      return stages.stream().mapToDouble(Stage::ms).sum();
    }
  }

  /** Every block linear of one step, a bar for each system, cut into what its stages add. */
  static Svg fluxStep(Results results) {
    double base = step(results, "bf16 linear", "");
    double peft = step(results, "bf16 PEFT", "r16");
    double quantize = step(results, "w8a8 quantize", "");
    double plain = step(results, "w8a8", "");
    double adapted = step(results, "w8a8", "r16");
    double floor = results.shapes("flux").stream().mapToDouble(shape -> results.find("flux", "", shape, "w8a8", "r16")
        .map(row -> row.times() * row.floorUs()).orElse(Double.NaN)).sum() / 1e3;
    List<Bar> bars = new ArrayList<>();
    bars.add(new Bar("torch bf16 + PEFT r16",
        List.of(new Stage("product", base, Ink.BASE), new Stage("adapter", peft - base, Ink.ADAPTER))));
    bars.add(new Bar("torch bf16, no adapter", List.of(new Stage("product", base, Ink.BASE))));
    bars.add(new Bar("Octolora W8A8 + LoRA r16", stages(quantize, plain, adapted)));
    double groupedPlain = grouped(results, "");
    double groupedAdapted = grouped(results, "r16");
    if (!Double.isNaN(groupedAdapted)) {
      bars.add(new Bar("the same, q/k/v grouped", stages(groupedQuantize(results), groupedPlain, groupedAdapted)));
    }
    if (!Double.isNaN(floor)) {
      bars.add(new Bar("floor by the data sheet", List.of(new Stage("", floor, Ink.FLOOR))));
    }
    int left = 236;
    int top = 98;
    int step = 46;
    int bottom = top + step * bars.size() - 14;
    Svg svg = new Svg(WIDTH, bottom + 62, "The block linears of one FLUX.1 step",
        "Milliseconds by system, stacked by what quantizing, the product and the adapter add");
    heading(svg, "The block linears of one FLUX.1 step at 4608 tokens, in milliseconds",
        "19 × (4 · 3072×3072, up, down) + 38 × (3072→21504, 15360→3072); a stage is what it adds to the call");
    double most = bars.stream().mapToDouble(Bar::ms).max().orElseThrow();
    DoubleUnaryOperator x = ms -> left + ms / most * (WIDTH - MARGIN - 160 - left);
    for (int tick = 0; tick <= most; tick += 20) {
      svg.line(x.applyAsDouble(tick), top - 14, x.applyAsDouble(tick), bottom, Ink.GRID, 1, false);
      svg.text(x.applyAsDouble(tick), bottom + 18, 11, Ink.MUTED, Anchor.MIDDLE, false, tick == 0 ? "0 ms" : "" + tick);
    }
    for (int i = 0; i < bars.size(); i++) {
      Bar bar = bars.get(i);
      double y = top + step * i;
      boolean ours = bar.stages().stream().anyMatch(stage -> stage.ink() == Ink.OURS);
      boolean isFloor = bar.stages().get(0).ink() == Ink.FLOOR;
      svg.text(left - 12, y + 16, 13, Ink.TEXT, Anchor.END, ours, bar.label());
      double at = 0;
      for (Stage stage : bar.stages()) {
        double from = x.applyAsDouble(at);
        double to = x.applyAsDouble(at + stage.ms());
        if (isFloor) {
          svg.line(to, y - 2, to, y + 24, Ink.FLOOR, 2, false);
          svg.line(from, y + 11, to, y + 11, Ink.FLOOR, 1, true);
        } else {
          svg.bar(from, y, Math.max(to - from - 1, 0.5), 22, stage.ink());
          svg.text(from + 1, y + 35, 11, stage.ink(), Anchor.START, false, stage.label());
          String value = "%.1f".formatted(stage.ms());
          if (Svg.widthOf(value, 11) + 3 < to - from) {
            svg.text((from + to - 1) / 2, y + 15, 11, Ink.CARD, Anchor.MIDDLE, true, value);
          }
        }
        at += stage.ms();
      }
      svg.text(x.applyAsDouble(bar.ms()) + 8, y + 16, 13, isFloor ? Ink.MUTED : Ink.TEXT, Anchor.START, ours,
          "%.1f".formatted(bar.ms()) + (i == 1 || isFloor ? "" : "  (%.2f of bf16)".formatted(bar.ms() / base)));
    }
    svg.text(MARGIN, bottom + 46, 11, Ink.MUTED, Anchor.START, false, results.source());
    return svg;
  }

  /** quantize NaN: it was not measured alone. */
  private static List<Stage> stages(double quantize, double plain, double adapted) {
    Stage adapter = new Stage("adapter", adapted - plain, Ink.ADAPTER);
    return Double.isNaN(quantize) ? List.of(new Stage("quantize and product", plain, Ink.OURS), adapter)
        : List.of(new Stage("quantize", quantize, Ink.QUANTIZE), new Stage("product", plain - quantize, Ink.OURS),
            adapter);
  }

  /** Milliseconds of a step of single linears; NaN where one was not measured. */
  private static double step(Results results, String system, String adapters) {
    return results.shapes("flux").stream().mapToDouble(shape -> results.find("flux", "", shape, system, adapters)
        .map(row -> row.times() * row.us()).orElse(Double.NaN)).sum() / 1e3;
  }

  /**
   * Milliseconds of a step in which what shares an input runs as one call. Of the four square linears of a double block
   * three are a group; the wide linear of a single block is one of four.
   */
  private static double grouped(Results results, String adapters) {
    return groupedSum(results, row -> results.us("flux", "", row.shape(), "w8a8", adapters).orElse(Double.NaN))
        + results.rows().stream().filter(row -> row.part().equals("groups") && row.system().equals("w8a8")
            && row.adapters().equals(adapters)).mapToDouble(row -> row.times() * row.us()).reduce(Double::sum)
        .orElse(Double.NaN) / 1e3;
  }

  private static double groupedQuantize(Results results) {
    ToDoubleFunction<Row> single =
        row -> results.us("flux", "", row.shape(), "w8a8 quantize", "").orElse(Double.NaN);
    double square = results.us("flux", "", new Shape(4608, 3072, 3072), "w8a8 quantize", "").orElse(Double.NaN);
    return groupedSum(results, single) + results.rows().stream().filter(row -> row.part().equals("groups")
        && row.system().equals("w8a8") && row.adapters().isEmpty()).mapToInt(Row::times).sum() * square / 1e3;
  }

  /** Milliseconds of the linears that stay alone: the last of the square ones, and all but the wide one. */
  private static double groupedSum(Results results, ToDoubleFunction<Row> us) {
    double sum = 0;
    for (Shape shape : results.shapes("flux")) {
      Row row = results.find("flux", "", shape, "w8a8", "").orElseThrow();
      int alone = shape.k() != 3072 || shape.n() == 12288 ? row.times() : shape.n() == 3072 ? row.times() / 4 : 0;
      sum += alone == 0 ? 0 : alone * us.applyAsDouble(row) / 1e3;
    }
    return sum;
  }
}
