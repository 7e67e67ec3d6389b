// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.cli.LayerFigures.Cost;
import io.octolora.cli.LayerFigures.Effect;
import io.octolora.cli.LayerFigures.Outliers;
import io.octolora.cli.Verification.Result;
import io.octolora.mapping.MappingReport;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.function.Function;
import java.util.function.Predicate;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import org.jetbrains.annotations.Nullable;

/**
 * One page, HTML that is also well-formed XML, without scripts and without anything from elsewhere. Charts are SVG
 * without text, so that they stretch to any width; what they say in words and numbers stands beside them in HTML.
 */
final class HtmlReport {
  /** Rows of a chart, and keys, before the rest is folded away. */
  private static final int SHOWN_ROWS = 40;

  private final VerifyOutcome outcome;
  private final Map<String, String> inputs;
  private final StringBuilder page = new StringBuilder();

  private HtmlReport(VerifyOutcome outcome, Map<String, String> inputs) {
    this.outcome = outcome;
    this.inputs = inputs;
  }

  /** Replaces the file as a whole. */
  static void write(Path file, VerifyOutcome outcome, Map<String, String> inputs) throws IOException {
    Path whole = file.resolveSibling(file.getFileName() + ".unfinished");
    try {
      Files.writeString(whole, new HtmlReport(outcome, inputs).render());
      Files.move(whole, file, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE);
    } catch (FileSystemException e) {
      throw e;
    } catch (IOException e) { // of the channel, which does not know its name
      throw new IOException("%s: %s".formatted(whole, e.getMessage()), e);
    } finally {
      Files.deleteIfExists(whole);
    }
  }

  private String render() throws IOException {
    add("""
        <!DOCTYPE html>
        <html lang="en">
        <head>
        <meta charset="utf-8"/>
        <meta name="viewport" content="width=device-width, initial-scale=1"/>
        <meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
        <title>octolora verify: %s</title>
        <style>
        %s</style>
        </head>
        <body>
        <main>
        """, outcome.ok() ? "OK" : "FAILED", new Raw(css()));
    header();
    tiles();
    errors();
    effects();
    outliers();
    costs();
    adapters();
    numbers();
    add("<footer>Written by octolora verify</footer>\n</main>\n</body>\n</html>\n");
    return page.toString();
  }

  // ---- Sections

  private void header() {
    boolean ok = outcome.ok();
    add("<header>\n<p class=\"kicker\">octolora verify</p>\n"
        + "<h1><span class=\"pill %s\">%s</span> %s</h1>\n<p>%s.</p>\n",
        ok ? "good" : "bad", ok ? "✓ OK" : "✕ FAILED",
        headline(),
        capitalized(outcome.verdict()));
    add("<dl class=\"facts\">\n");
    inputs.forEach((title, text) -> add("<dt>%s</dt><dd>%s</dd>\n", title, text));
    outcome.skipped().forEach((module, why) -> add("<dt>not run</dt><dd>%s: %s</dd>\n", module, why));
    add("</dl>\n</header>\n");
  }

  private String headline() {
    int layers = outcome.results().size();
    long outside = layers - outcome.within();
    if (layers == 0) {
      return "No layer was run";
    }
    if (outside > 0) {
      return "%d of %d layers %s outside the bounds".formatted(outside, layers, outside == 1 ? "is" : "are");
    }
    return outcome.mapped() ? "Every layer is within bounds" : "Adapter keys landed nowhere";
  }

  private void tiles() {
    add("<div class=\"tiles\">\n");
    if (!outcome.results().isEmpty()) {
      tile(ratio(worst(result -> result.oracle().maxRatio())), "of the oracle's bound at worst; 1 passes",
          worst(result -> result.oracle().maxRatio()) > 1);
      if (recorded()) {
        tile(ratio(worst(HtmlReport::recordedRatio)), "of the recording's bound at worst; 1 passes",
            worst(HtmlReport::recordedRatio) > 1);
      }
    }
    if (!outcome.views().isEmpty()) {
      int keys = outcome.views().stream().mapToInt(view -> view.report().entries().size()).sum();
      int lost = outcome.views().stream().mapToInt(view -> view.report().unmapped().size()).sum();
      tile("%d / %d".formatted(keys - lost, keys), "adapter keys landed", lost > 0);
    }
    List<Effect> effects = figures(LayerFigures::effect);
    if (!effects.isEmpty()) {
      tile(Numbers.percent(median(effects.stream().map(Effect::share).toList())),
          "change by the adapters, relative to the output, in the median layer", false);
    }
    List<Outliers> outliers = figures(LayerFigures::outliers);
    if (!outliers.isEmpty()) {
      long with = outliers.stream().filter(found -> found.columns().length > 0).count();
      tile("%d / %d".formatted(with, outliers.size()), "layers meet outlier columns", false);
    }
    List<Cost> costs = figures(LayerFigures::cost);
    if (!costs.isEmpty()) {
      tile(Numbers.percent(median(costs.stream().map(Cost::output).toList())),
          "of the output lost to int8, in the median layer", false);
    }
    add("</div>\n");
  }

  private void errors() {
    if (outcome.results().isEmpty()) {
      return;
    }
    double worst = Math.max(worst(result -> result.oracle().maxRatio()), worst(HtmlReport::recordedRatio));
    Axis axis = worst <= 1 ? Axis.linear(1)
        : Axis.logarithmic(-3, 1 + 2 * (int) Math.floor(Math.log10(Math.min(worst, 1e12)) / 2));
    section("Errors", "How far each layer is from where it should be, in units of what roundings of the number formats "
        + "can explain. Left of the red line is within bounds. The worst layers come first.");
    add("<ul class=\"legend\"><li><i class=\"a\"></i>from the oracle</li>%s</ul>\n",
        new Raw(recorded() ? "<li><i class=\"b\"></i>from the recording</li>" : ""));
    List<Result> sorted = outcome.results().stream()
        .sorted(Comparator.comparingDouble((Result r) -> -Math.max(r.oracle().maxRatio(), recordedRatio(r)))).toList();
    rows(sorted, axis, recorded() ? "oracle · recording" : "oracle", result -> {
      double oracle = result.oracle().maxRatio();
      Double recording = result.recorded() == null ? null : result.recorded().maxRatio();
      String words = "%s of the oracle's bound".formatted(ratio(oracle))
          + (recording == null ? "" : ", %s of the recording's".formatted(ratio(recording)));
      String bars = recording == null ? bar("a", 20, 60, axis.at(oracle))
          : bar("a", 0, 44, axis.at(oracle)) + bar("b", 56, 44, axis.at(recording));
      return new Row(result.module(), bars + line("limit", axis.at(1), -10, 110), words,
          recording == null ? ratio(oracle) : ratio(oracle) + " · " + ratio(recording), !result.withinBounds());
    });
    add("</section>\n");
  }

  private void effects() {
    List<Result> adapted = outcome.results().stream()
        .filter(result -> figuresOf(result) != null && figuresOf(result).effect() != null).toList();
    if (adapted.isEmpty()) {
      return;
    }
    section("What the adapters change", "Every element of every output, with adapters against without, in units of "
        + "the layer's typical output (root mean square). 100 % would be a change as large as the output itself.");
    long[] histogram = new long[Effect.DECADES * Effect.BINS_PER_DECADE];
    adapted.forEach(result -> IntStream.range(0, histogram.length)
        .forEach(i -> histogram[i] += figuresOf(result).effect().histogram()[i]));
    histogram(histogram);
    add("<h3>By layer</h3>\n<ul class=\"legend\"><li><i class=\"c\"></i>middle of the changes</li>"
        + "<li><i class=\"c soft\"></i>from the 5th to the 95th percentile</li>"
        + "<li>r.m.s.: root mean square of the changes</li></ul>\n");
    Axis axis = Axis.logarithmic(Effect.FIRST_DECADE, Effect.FIRST_DECADE + Effect.DECADES);
    List<Result> sorted = adapted.stream()
        .sorted(Comparator.comparingDouble((Result result) -> -figuresOf(result).effect().share())).toList();
    rows(sorted, axis.inPercent(), "r.m.s.", result -> {
      Effect effect = figuresOf(result).effect();
      double low = axis.at(effect.low());
      double high = axis.at(effect.high());
      double middle = axis.at(effect.median());
      String shapes = "<rect class=\"c soft\" x=\"%s\" y=\"20\" width=\"%s\" height=\"60\"/>".formatted(
          coordinate(low), coordinate(Math.max(0.3, high - low)))
          + "<rect class=\"c\" x=\"%s\" y=\"0\" width=\"1\" height=\"100\"/>".formatted(coordinate(middle - 0.5));
      return new Row(result.module(), shapes, "median %s, from %s to %s".formatted(Numbers.percent(effect.median()),
          Numbers.percent(effect.low()), Numbers.percent(effect.high())), Numbers.percent(effect.share()), false);
    });
    add("</section>\n");
  }

  private void histogram(long[] counts) {
    long largest = Math.max(1, IntStream.range(0, counts.length).mapToLong(i -> counts[i]).max().orElse(1));
    long total = IntStream.range(0, counts.length).mapToLong(i -> counts[i]).sum();
    int peak = IntStream.range(0, counts.length).boxed().max(Comparator.comparingLong(i -> counts[i])).orElse(0);
    StringBuilder shapes = new StringBuilder();
    for (int decade = 0; decade <= Effect.DECADES; decade++) {
      shapes.append(line("grid", 100.0 * decade / Effect.DECADES, 0, 100));
    }
    double width = 100.0 / counts.length;
    for (int i = 0; i < counts.length; i++) {
      double height = 100.0 * counts[i] / largest;
      shapes.append("<rect class=\"c\" x=\"%s\" y=\"%s\" width=\"%s\" height=\"%s\"/>".formatted(
          coordinate(i * width + 0.1 * width), coordinate(100 - height), coordinate(0.8 * width), coordinate(height)));
    }
    double at = Math.pow(10, Effect.FIRST_DECADE + (peak + 0.5) / Effect.BINS_PER_DECADE);
    add("<div class=\"histogram chart\">%s<div class=\"ticks\" aria-hidden=\"true\">%s</div></div>\n",
        new Raw(svg(shapes.toString(), "Distribution of %d changes; most are near %s".formatted(total,
            Numbers.percent(at)))),
        new Raw(Axis.logarithmic(Effect.FIRST_DECADE, Effect.FIRST_DECADE + Effect.DECADES).inPercent().ticks()));
  }

  private void outliers() {
    if (outcome.figures().isEmpty()) {
      return;
    }
    List<Outliers> all = figures(LayerFigures::outliers);
    boolean active = all.stream().anyMatch(Outliers::active);
    String thresholds = all.stream().map(found -> MappingView.number(found.threshold())).distinct()
        .collect(Collectors.joining(" or "));
    section("Outlier columns", ("Columns of the input with a value of %s or more: left is the first column, right the "
        + "last, and a higher tick is a larger value. ").formatted(thresholds) + (active
            ? "They stay out of the int8 product and join it unquantized."
            : "These layers do not treat them apart; they are what stretches the scale of a row."));
    List<Result> with = outcome.results().stream().filter(result -> figuresOf(result).outliers().columns().length > 0)
        .sorted(Comparator.comparingDouble((Result result) ->
            -(double) figuresOf(result).outliers().columns().length / result.k())).toList();
    float largest = 1;
    for (Outliers found : all) {
      for (float value : found.largest()) {
        largest = Math.max(largest, Float.isFinite(value) ? value : 1);
      }
    }
    float top = largest;
    rows(with, null, "columns", result -> {
      Outliers found = figuresOf(result).outliers();
      StringBuilder shapes = new StringBuilder("<rect class=\"track\" width=\"100\" height=\"100\"/>");
      for (int i = 0; i < found.columns().length; i++) {
        double height = 35 + 65 * Math.log1p(Math.min(found.largest()[i], top)) / Math.log1p(top);
        shapes.append(line("tick", 100 * (found.columns()[i] + 0.5) / result.k(), 100 - height, 100));
      }
      return new Row(result.module(), shapes.toString(), "%d of %d columns: %s".formatted(found.columns().length,
          result.k(), IntStream.of(found.columns()).limit(12).mapToObj(String::valueOf)
              .collect(Collectors.joining(", ")) + (found.columns().length > 12 ? ", …" : "")),
          "%d of %d".formatted(found.columns().length, result.k()), false);
    });
    int without = outcome.results().size() - with.size();
    if (without > 0) {
      add("<p class=\"lead\">%s no outlier column.</p>\n", without == 1 ? "One layer has" : without + " layers have");
    }
    add("</section>\n");
  }

  private void costs() {
    List<Result> compared = outcome.results().stream()
        .filter(result -> figuresOf(result) != null && figuresOf(result).cost() != null).toList();
    if (outcome.original() == null) {
      return;
    }
    section("What int8 costs", "The layers without adapters against the unquantized model: how much of the weights and "
        + "of the outputs is lost (norm of the difference over norm).");
    if (compared.isEmpty()) {
      add("<p>The unquantized model has none of these layers.</p>\n</section>\n");
      return;
    }
    double worst = compared.stream().map(HtmlReport.this::figuresOf)
        .mapToDouble(of -> Math.max(of.cost().weight(), of.cost().output())).filter(Double::isFinite).max().orElse(0);
    Axis axis = Axis.linear(roundUp(worst));
    add("<ul class=\"legend\"><li><i class=\"d\"></i>of the output</li><li><i class=\"d soft\"></i>of the weights</li>"
        + "</ul>\n");
    List<Result> sorted = compared.stream()
        .sorted(Comparator.comparingDouble((Result result) -> -figuresOf(result).cost().output())).toList();
    rows(sorted, axis.inPercent(), "output · weights", result -> {
      Cost cost = figuresOf(result).cost();
      return new Row(result.module(),
          bar("d", 0, 44, axis.at(cost.output())) + bar("d soft", 56, 44, axis.at(cost.weight())),
          "%s of the output, %s of the weights".formatted(Numbers.percent(cost.output()),
              Numbers.percent(cost.weight())),
          Numbers.percent(cost.output()) + " · " + Numbers.percent(cost.weight()), false);
    });
    int missing = outcome.results().size() - compared.size();
    if (missing > 0) {
      add("<p class=\"lead\">%d of the layers are not in the unquantized model.</p>\n", missing);
    }
    add("</section>\n");
  }

  private void adapters() {
    if (outcome.views().isEmpty()) {
      return;
    }
    section("Adapters", "Where the keys of every file landed.");
    for (int i = 0; i < outcome.views().size(); i++) {
      MappingView view = outcome.views().get(i);
      add("<h3>%s</h3>\n<p>%s, scale %s: %s.</p>\n", breakable(outcome.arguments().get(i).path().toString()),
          view.adapter().format().label(), MappingView.number(outcome.arguments().get(i).scale()), view.summary());
      list(List.copyOf(view.advice().entrySet()), line -> "<b>%s</b>: %s".formatted(
          escape(capitalized(line.getKey())), escape(line.getValue())));
      list(view.report().unmapped(), entry -> "<code>%s</code> landed nowhere: %s".formatted(
          breakable(entry.key()).html(), escape(view.explanation(entry))));
      list(view.report().notes(), note -> escape("Note: " + note));
    }
    add("</section>\n");
  }

  private <T> void list(List<T> items, Function<T, String> html) {
    if (!items.isEmpty()) {
      add("<ul class=\"keys\">\n");
      items.stream().limit(SHOWN_ROWS).forEach(item -> add("<li>%s</li>\n", new Raw(html.apply(item))));
      add("</ul>\n");
      if (items.size() > SHOWN_ROWS) {
        add("<details>\n<summary>Show %d more</summary>\n<ul class=\"keys\">\n", items.size() - SHOWN_ROWS);
        items.stream().skip(SHOWN_ROWS).forEach(item -> add("<li>%s</li>\n", new Raw(html.apply(item))));
        add("</ul>\n</details>\n");
      }
    }
  }

  private void numbers() {
    if (outcome.results().isEmpty()) {
      return;
    }
    boolean effect = !figures(LayerFigures::effect).isEmpty();
    boolean cost = !figures(LayerFigures::cost).isEmpty();
    List<String> columns = new ArrayList<>(List.of("Layer", "N", "K", "Rows", "Rank", "From oracle", "/ bound"));
    columns.addAll(recorded() ? List.of("From recorded", "/ bound") : List.of());
    columns.addAll(effect ? List.of("Changed by adapters") : List.of());
    columns.add("Outlier columns");
    columns.addAll(cost ? List.of("Lost of W", "Lost of y") : List.of());
    add("<section>\n<h2>All numbers</h2>\n<details>\n<summary>Show the table of %d layers</summary>\n"
        + "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"All numbers\">\n<table>\n<thead><tr>",
        outcome.results().size());
    columns.forEach(column -> add("<th scope=\"col\">%s</th>", column));
    add("</tr></thead>\n<tbody>\n");
    for (Result result : outcome.results()) {
      LayerFigures figures = figuresOf(result);
      add("<tr><th scope=\"row\">%s</th>", breakable(result.module()));
      List<String> cells = new ArrayList<>(List.of(String.valueOf(result.n()), String.valueOf(result.k()),
          String.valueOf(result.rows()), result.ranks().isEmpty() ? "–"
              : result.ranks().stream().map(String::valueOf).collect(Collectors.joining("+")),
          Numbers.error(result.oracle().maxError()), ratio(result.oracle().maxRatio())));
      if (recorded()) {
        cells.add(result.recorded() == null ? "–" : Numbers.error(result.recorded().maxError()));
        cells.add(result.recorded() == null ? "–" : ratio(result.recorded().maxRatio()));
      }
      if (effect) {
        cells.add(figures.effect() == null ? "–" : Numbers.percent(figures.effect().share()));
      }
      cells.add(String.valueOf(figures.outliers().columns().length));
      if (cost) {
        cells.add(figures.cost() == null ? "–" : Numbers.percent(figures.cost().weight()));
        cells.add(figures.cost() == null ? "–" : Numbers.percent(figures.cost().output()));
      }
      cells.forEach(cell -> add("<td%s>%s</td>", new Raw(result.withinBounds() ? "" : " class=\"bad\""), cell));
      add("</tr>\n");
    }
    add("</tbody>\n</table>\n</div>\n</details>\n</section>\n");
  }

  // ---- Parts

  /** A layer's line in a chart; shapes are in a box of 100 x 100, words are for those who cannot see them. */
  private record Row(String module, String shapes, String words, String value, boolean bad) {}

  /** Positions from 0 to 100. */
  private record Axis(boolean logarithmic, double first, double last, boolean percent) {
    static Axis linear(double last) {
      return new Axis(false, 0, last, false);
    }

    /** From 10^first to 10^last, an even number of decades if there are more than five. */
    static Axis logarithmic(int first, int last) {
      return new Axis(true, first, last, false);
    }

    Axis inPercent() {
      return new Axis(logarithmic, first, last, true);
    }

    double at(double value) {
      double place = logarithmic ? Math.log10(value) : value;
      double share = Double.isNaN(place) ? 1 : (place - first) / (last - first);
      return 100 * Math.max(0, Math.min(1, share));
    }

    String ticks() {
      StringBuilder ticks = new StringBuilder();
      int count = logarithmic ? (int) (last - first) : 4;
      int step = count > 5 ? 2 : 1; // labels keep apart from each other on a phone
      for (int i = 0; i <= count; i += step) {
        double place = first + (last - first) * i / count;
        double value = logarithmic ? Math.pow(10, place) : place;
        ticks.append("<span style=\"left:%s%%\">%s</span>".formatted(coordinate(100.0 * i / count),
            percent ? plain(100 * value) + "\u00a0%" : plain(value)));
      }
      return ticks.toString();
    }

    private static String plain(double value) {
      return value >= 1e5 ? "%.0e".formatted(value) : MappingView.number(Math.round(value * 1e6) / 1e6);
    }
  }

  private void tile(String number, String words, boolean bad) {
    add("<div class=\"tile%s\"><b>%s</b><span>%s</span></div>\n", bad ? " bad" : "", number, words);
  }

  private void section(String title, String lead) {
    add("<section>\n<h2>%s</h2>\n<p class=\"lead\">%s</p>\n", title, lead);
  }

  private <T> void rows(List<T> items, @Nullable Axis axis, String values, Function<T, Row> row) {
    add("<ul class=\"rows\">\n");
    add("<li class=\"row axis\" aria-hidden=\"true\"><span></span><span class=\"chart ticks\">%s</span>"
        + "<span class=\"value\">%s</span></li>\n", new Raw(axis == null ? "" : axis.ticks()), values);
    items.stream().limit(SHOWN_ROWS).forEach(item -> row(row.apply(item)));
    add("</ul>\n");
    if (items.size() > SHOWN_ROWS) {
      add("<details>\n<summary>Show %d more</summary>\n<ul class=\"rows\">\n", items.size() - SHOWN_ROWS);
      items.stream().skip(SHOWN_ROWS).forEach(item -> row(row.apply(item)));
      add("</ul>\n</details>\n");
    }
  }

  private void row(Row row) {
    add("<li class=\"row\"><span class=\"name\">%s</span><span class=\"chart\">%s</span>"
        + "<span class=\"value%s\">%s</span></li>\n", breakable(row.module()),
        new Raw(svg(row.shapes(), row.module() + ": " + row.words())), row.bad() ? " bad" : "", row.value());
  }

  private static String svg(String shapes, String words) {
    return "<svg viewBox=\"0 0 100 100\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"%s\">%s</svg>"
        .formatted(escape(words), shapes);
  }

  /** A bar from the left on its track. */
  private static String bar(String colour, int y, int height, double width) {
    return "<rect class=\"track\" y=\"" + y + "\" width=\"100\" height=\"" + height + "\"/><rect class=\"" + colour
        + "\" y=\"" + y + "\" width=\"" + coordinate(width) + "\" height=\"" + height + "\"/>";
  }

  private static String line(String kind, double x, double from, double to) {
    return "<line class=\"%s\" x1=\"%s\" x2=\"%s\" y1=\"%s\" y2=\"%s\"/>".formatted(kind, coordinate(x),
        coordinate(x), coordinate(from), coordinate(to));
  }

  private static String coordinate(double value) {
    return String.format(Locale.ROOT, "%.2f", value).replaceFirst("\\.?0+$", "");
  }

  // ---- Figures

  private boolean recorded() {
    return outcome.results().stream().anyMatch(result -> result.recorded() != null);
  }

  private @Nullable LayerFigures figuresOf(Result result) {
    return outcome.figures().get(result.module());
  }

  private <T> List<T> figures(Function<LayerFigures, T> figure) {
    return outcome.figures().values().stream().map(figure).filter(Predicate.not(value -> value == null)).toList();
  }

  private double worst(Function<Result, Double> of) {
    return outcome.results().stream().mapToDouble(of::apply).max().orElse(0);
  }

  private static double recordedRatio(Result result) {
    return result.recorded() == null ? 0 : result.recorded().maxRatio();
  }

  private static double median(List<Double> values) {
    return values.stream().sorted().skip((values.size() - 1) / 2).findFirst().orElseThrow();
  }

  private static String ratio(double value) {
    return Double.isFinite(value) ? Numbers.ratio(value) : "∞";
  }

  /** The next of 1, 2, 4, 5 and 10 times a power of ten. */
  private static double roundUp(double value) {
    double power = Math.pow(10, Math.floor(Math.log10(value > 0 ? value : 1)));
    for (int digit : new int[] {1, 2, 4, 5}) {
      if (value <= digit * power) {
        return digit * power;
      }
    }
    return 10 * power;
  }

  // ---- Text

  /** HTML as it is; everything else that goes into the page is escaped. */
  private record Raw(String html) {}

  private void add(String template, Object... values) {
    Object[] safe = new Object[values.length];
    for (int i = 0; i < values.length; i++) {
      safe[i] = values[i] instanceof Raw raw ? raw.html()
          : values[i] instanceof Integer ? values[i] : escape(String.valueOf(values[i]));
    }
    page.append(safe.length == 0 ? template : template.formatted(safe));
  }

  /** A name that may break behind its dots, slashes and underscores. */
  private static Raw breakable(String name) {
    return new Raw(escape(name).replaceAll("(?<=[./_])(?=[^./_])", "<wbr/>"));
  }

  static String escape(String text) {
    return Table.printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        .replace("\"", "&quot;").replace("'", "&#39;");
  }

  private static String capitalized(String text) {
    return text.isEmpty() ? text : Character.toUpperCase(text.charAt(0)) + text.substring(1);
  }

  private static String css() throws IOException {
    try (InputStream in = HtmlReport.class.getResourceAsStream("report.css")) {
      return new String(in.readAllBytes(), StandardCharsets.UTF_8);
    }
  }
}
