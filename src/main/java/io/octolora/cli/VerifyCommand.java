// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.adapter.LoraPair;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Tensor;
import io.octolora.cli.Terminal.Tone;
import io.octolora.cli.Verification.Recorded;
import io.octolora.cli.Verification.Result;
import io.octolora.cli.Verification.Weighted;
import io.octolora.mapping.LoraDelta;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.PeftReference.BaseTool;
import io.octolora.oracle.Recording;
import io.octolora.runtime.Device;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;
import picocli.CommandLine.Command;
import picocli.CommandLine.Model.CommandSpec;
import picocli.CommandLine.Option;
import picocli.CommandLine.ParameterException;
import picocli.CommandLine.Parameters;
import picocli.CommandLine.ParentCommand;
import picocli.CommandLine.Spec;

/** Runs layers of a checkpoint with their adapters and judges every result. */
@Command(name = "verify", abbreviateSynopsis = true,
    description = {"Run every adapted linear (without adapters: every int8 linear) and compare with a double-precision "
        + "oracle, and with recorded outputs of the real tools.",
        "An error is given in units of its bound, what roundings of the number formats can explain: 1 passes."})
final class VerifyCommand implements Callable<Integer> {
  private static final int MAX_ROWS = 1 << 16;
  /** Of x or y: as bytes they are in one array. */
  private static final int MAX_NUMBERS = Integer.MAX_VALUE / 4;

  @ParentCommand
  private Main main;

  @Spec
  private CommandSpec spec;

  @Parameters(index = "0", paramLabel = "CHECKPOINT",
      description = "The int8 model: a .safetensors or .gguf file, an index of shards, or a folder with them.")
  private Path checkpoint;

  @Parameters(index = "1..*", paramLabel = "ADAPTER[=SCALE]",
      description = "LoRA files or PEFT folders, all active at once; SCALE is 1 where absent.")
  private List<String> adapters = new ArrayList<>();

  @Option(names = "--golden", paramLabel = "FILE",
      description = "Recorded inputs and outputs: FILE.safetensors with FILE.json beside it. Without it, x is made up.")
  private @Nullable Path golden;

  @Option(names = "--threshold", paramLabel = "T",
      description = "Outlier threshold in place of the checkpoint's; 0 turns outlier columns off.")
  private @Nullable Float threshold;

  @Option(names = "--device", paramLabel = "cpu|cuda:N", description = "Default: the first CUDA device, else the CPU.")
  private @Nullable String device;

  @Option(names = "--rows", paramLabel = "M", defaultValue = "8",
      description = "Rows of made-up activations (default: ${DEFAULT-VALUE}).")
  private int rows;

  @Option(names = "--seed", paramLabel = "S", defaultValue = "1",
      description = "Seed of made-up activations (default: ${DEFAULT-VALUE}).")
  private long seed;

  @Option(names = "--report", paramLabel = "FILE.html",
      description = "Also write a page for a browser: errors, what the adapters change, outlier columns.")
  private @Nullable Path report;

  @Option(names = "--base", paramLabel = "MODEL",
      description = "The model before it was quantized: the report then shows what int8 costs.")
  private @Nullable Path original;

  @Option(names = "--lenient",
      description = "Accept that keys which land nowhere are left out, as long as some of each adapter land.")
  private boolean lenient;

  @Option(names = "--rename", paramLabel = "FROM=TO",
      description = "Read FROM in the names of the adapters' modules as TO; may be given several times.")
  private Map<String, String> renames = new LinkedHashMap<>();

  @Option(names = {"-v", "--verbose"}, description = "Also one line for every adapter key.")
  private boolean verbose;

  @Option(names = "--json", description = "Print one JSON object instead of tables.")
  private boolean json;

  @Override
  public Integer call() throws IOException {
    if (threshold != null && !(threshold >= 0 && Float.isFinite(threshold))) {
      throw usage("--threshold " + threshold + ": expected 0 or above");
    }
    if (rows < 1 || rows > MAX_ROWS) {
      throw usage("--rows %d: expected 1 to %d".formatted(rows, MAX_ROWS));
    }
    if (original != null && report == null) {
      throw usage("--base %s: the comparison is part of the report, which --report asks for".formatted(original));
    }
    if (report != null) {
      requireWritable(report);
    }
    List<AdapterArgument> arguments = new ArrayList<>();
    for (String text : adapters) {
      try {
        arguments.add(AdapterArgument.parse(text));
      } catch (IllegalArgumentException e) {
        throw usage(e.getMessage());
      }
    }
    try (Checkpoint base = Checkpoint.open(checkpoint); Closeables opened = new Closeables()) {
      List<MappingView> views = new ArrayList<>();
      for (AdapterArgument argument : arguments) {
        LoraAdapter adapter = opened.add(LoraAdapter.open(argument.path()));
        requireFinite(adapter);
        views.add(MappingView.of(base, adapter, renames, lenient));
      }
      Recording recording = golden == null ? null : opened.add(Recording.open(golden));
      if (threshold != null && base.linears().values().stream().noneMatch(CheckpointText::hasThreshold)) {
        throw usage("--threshold %s: %s has no layer with an outlier threshold (%s)".formatted(threshold, checkpoint,
            base.format()));
      }
      Checkpoint unquantized = original == null ? null : opened.add(Checkpoint.open(original));
      Device on = opened.add(open(device));
      Map<String, String> skipped = new LinkedHashMap<>();
      List<BaseLinear> layers = layers(base, views, recording, skipped);
      if (recording == null) {
        layers.forEach(this::requireRows);
      }
      if (unquantized != null && !layers.isEmpty()
          && layers.stream().noneMatch(layer -> unquantized.linears().containsKey(layer.name()))) {
        throw usage("--base %s: it has none of the %d layers, such as %s".formatted(original, layers.size(),
            layers.get(0).name()));
      }
      VerifyOutcome outcome = new VerifyOutcome(base, on, arguments, views, recording, unquantized,
          new ArrayList<>(), new LinkedHashMap<>(), skipped);
      if (!json) {
        printInputs(outcome);
      }
      for (BaseLinear layer : layers) {
        main.terminal.progress(layer.name(), outcome.results().size() + 1, layers.size());
        run(outcome, layer);
      }
      main.terminal.clearProgress();
      if (report != null) {
        HtmlReport.write(report, outcome, inputs(outcome));
      }
      if (json) {
        write(outcome);
      } else {
        printResults(outcome);
      }
      return outcome.ok() ? Main.OK : Main.FAILED;
    }
  }

  private void requireRows(BaseLinear linear) {
    int most = MAX_NUMBERS / Math.max(linear.k(), linear.n());
    if (rows > most) {
      throw usage("--rows %d: expected at most %d for %s".formatted(rows, most, linear));
    }
  }

  /** Before the layers run: they may take minutes. */
  private void requireWritable(Path file) {
    if (Files.exists(file) && !Files.isRegularFile(file)) { // which the page would take the place of
      throw usage("--report %s: %s, expected the name of a file".formatted(file,
          Files.isDirectory(file) ? "a folder" : "a pipe, socket or device"));
    }
    Path folder = file.toAbsolutePath().getParent();
    if (!Files.isDirectory(folder)) {
      throw usage("--report %s: there is no folder %s".formatted(file, folder));
    }
  }

  /** No result says anything about a factor with NaN or infinity in it: the oracle's is not finite either. */
  private static void requireFinite(LoraAdapter adapter) {
    for (LoraPair pair : adapter.pairs()) {
      requireFinite(adapter, pair.a());
      requireFinite(adapter, pair.b());
      for (Tensor vector : new Tensor[] {pair.bias(), pair.magnitude()}) {
        if (vector != null) {
          requireFinite(adapter, vector);
        }
      }
    }
  }

  private static void requireFinite(LoraAdapter adapter, Tensor tensor) {
    float[] values = tensor.toFloats();
    for (int i = 0; i < values.length; i++) {
      if (!Float.isFinite(values[i])) {
        throw new FormatException("%s: %s: element %d of %d is %s, expected a finite number".formatted(adapter.path(),
            tensor.name(), i, values.length, values[i]));
      }
    }
  }

  /** Adapted layers and recorded ones; every int8 layer where neither is asked for. In the checkpoint's order. */
  private List<BaseLinear> layers(Checkpoint base, List<MappingView> views, @Nullable Recording recording,
      Map<String, String> skipped) {
    List<BaseLinear> layers = new ArrayList<>();
    if (recording != null) {
      recording.layers().keySet().forEach(base::linear); // names the nearest layers where one is unknown
    }
    for (BaseLinear linear : base.linears().values()) {
      boolean adapted = views.stream().anyMatch(view -> view.modules().contains(linear.name()));
      boolean recorded = recording != null && recording.layers().containsKey(linear.name());
      boolean all = views.isEmpty() && recording == null;
      if (linear.quantized() && (adapted || recorded || all)) {
        layers.add(linear);
      } else if (adapted || recorded) {
        skipped.put(linear.name(), "the weight is %s, not int8".formatted(linear.weight().type()));
      }
    }
    return layers;
  }

  private void run(VerifyOutcome outcome, BaseLinear linear) {
    List<Weighted> active = new ArrayList<>();
    for (int i = 0; i < outcome.views().size(); i++) {
      for (LoraDelta delta : outcome.views().get(i).deltas(linear.name())) {
        active.add(new Weighted(delta, outcome.arguments().get(i).scale()));
      }
    }
    Device on = outcome.device();
    Quantization how = linear.quantization();
    if (threshold != null && CheckpointText.hasThreshold(linear)) {
      how = how.withOutlierThreshold(threshold);
    }
    Recording.Layer layer = outcome.recording() == null ? null : outcome.recording().layers().get(linear.name());
    FloatFormat format = layer == null ? FloatFormat.BFLOAT16 : layer.xFormat();
    float[] x;
    Recorded recorded = null;
    int count = rows;
    if (layer == null) {
      x = Activations.random(seed + linear.name().hashCode(), rows, linear.k(), format);
    } else {
      requireFits(layer, linear);
      x = layer.x().toFloats();
      count = layer.rows();
      recorded = new Recorded(layer.tool(), layer.y().toFloats(), factorFormats(layer, active.size()));
    }
    outcome.results().add(Verification.check(on, linear, how, active, x, count, format, format, recorded));
    if (report != null) {
      outcome.figures().put(linear.name(), LayerFigures.of(linear, how, active, x, count, format,
          Verification.arithmetic(on), originalOf(outcome, linear)));
    }
  }

  /** The layer before it was quantized; null where nobody gave it, or it is not in there. */
  private @Nullable BaseLinear originalOf(VerifyOutcome outcome, BaseLinear linear) {
    BaseLinear before = outcome.original() == null ? null : outcome.original().linears().get(linear.name());
    if (before == null) {
      return null;
    }
    if (before.quantized() || before.n() != linear.n() || before.k() != linear.k()) {
      throw new FormatException("%s: %s, expected the unquantized layer [%d, %d]".formatted(original, before,
          linear.n(), linear.k()));
    }
    return before;
  }

  private void requireFits(Recording.Layer layer, BaseLinear linear) {
    BaseTool tool = switch (linear.format()) {
      case BITSANDBYTES_INT8 -> BaseTool.BITSANDBYTES;
      case QUANTO_QINT8 -> BaseTool.QUANTO;
      default -> throw new FormatException(Status.UNSUPPORTED,
          "%s: %s is %s; recordings are understood of bitsandbytes and Quanto layers".formatted(golden,
              layer.module(), linear.format().label()));
    };
    if (layer.tool() != tool) {
      throw new FormatException("%s: %s was recorded from %s, but %s holds %s".formatted(golden, layer.module(),
          layer.tool() == null ? "an unquantized layer" : layer.tool(), checkpoint, linear.format().label()));
    }
    if (tool == BaseTool.QUANTO && linear.quantization().mode() != Quantization.Mode.W8A16) {
      throw new FormatException(("%s: %s has calibrated activations; recordings are understood of weight-only Quanto "
          + "layers").formatted(golden, layer.module()));
    }
    long k = layer.x().dimension(layer.x().dimensions() - 1);
    long n = layer.y().dimension(layer.y().dimensions() - 1);
    if (k != linear.k() || n != linear.n()) {
      throw new FormatException("%s: %s was recorded with K %d and N %d, but %s has K %d and N %d".formatted(golden,
          layer.module(), k, n, checkpoint, linear.k(), linear.n()));
    }
  }

  /** The types in which the tools ran the adapters; where the recording has fewer, fp32, which rounds least. */
  private static List<FloatFormat> factorFormats(Recording.Layer layer, int count) {
    List<FloatFormat> formats = new ArrayList<>();
    layer.adapters().values().forEach(adapter -> formats.add(adapter.factorFormat()));
    while (formats.size() < count) {
      formats.add(FloatFormat.FLOAT32);
    }
    return formats.subList(0, count);
  }

  private Device open(@Nullable String name) {
    if (name == null) {
      return Device.best();
    }
    if (name.equals("cpu")) {
      return Device.cpu();
    }
    if (name.matches("cuda(:\\d{1,4})?")) {
      return Device.cuda(name.equals("cuda") ? 0 : Integer.parseInt(name.substring("cuda:".length())));
    }
    throw usage("--device %s: expected cpu or cuda:N".formatted(name));
  }

  private ParameterException usage(String message) {
    return new ParameterException(spec.commandLine(), message);
  }

  // ---- Tables

  /** What was run, by title. */
  private Map<String, String> inputs(VerifyOutcome outcome) {
    Map<String, String> inputs = new LinkedHashMap<>();
    inputs.put("checkpoint", checkpoint + "  " + CheckpointText.describe(outcome.base())
        + (threshold == null ? "" : ", here " + MappingView.number(threshold)));
    inputs.put("device", outcome.device()
        + cudaAbsence(outcome.device()).map(why -> "; CUDA is absent: " + why).orElse(""));
    if (outcome.recording() != null) {
      inputs.put("recording", golden + "  " + describe(outcome.recording()));
    } else {
      inputs.put("activations", "made up: %d rows, seed %d, bf16, with outlier columns".formatted(rows, seed));
    }
    if (outcome.original() != null) {
      inputs.put("unquantized", original + "  " + CheckpointText.describe(outcome.original()));
    }
    return inputs;
  }

  private void printInputs(VerifyOutcome outcome) {
    Terminal terminal = main.terminal;
    inputs(outcome).forEach(this::line);
    for (int i = 0; i < outcome.views().size(); i++) {
      AdapterArgument argument = outcome.arguments().get(i);
      terminal.out().println();
      MappingView view = outcome.views().get(i);
      line("adapter", "%s  %s, scale %s: %s".formatted(argument.path(), view.adapter().format().label(),
          MappingView.number(argument.scale()), view.summary()));
      view.print(terminal, verbose);
    }
    outcome.skipped().forEach((module, why) -> terminal.out().println(
        terminal.paint(Tone.WARNING, "not run: ") + Table.printable(module + ": " + why)));
    terminal.out().println();
    terminal.out().flush();
  }

  private void line(String title, String text) {
    main.terminal.out().println(main.terminal.paint(Tone.TITLE, "%-12s".formatted(title)) + Table.printable(text));
  }

  private void printResults(VerifyOutcome outcome) {
    Terminal terminal = main.terminal;
    boolean recorded = outcome.recording() != null;
    List<String> columns = new ArrayList<>(List.of("MODULE", ">N", ">K", ">ROWS", ">RANK", ">FROM ORACLE", ">/ BOUND"));
    columns.addAll(recorded ? List.of(">FROM RECORDED", ">/ BOUND", "") : List.of(""));
    Table table = new Table(columns.toArray(String[]::new));
    for (Result result : outcome.results()) {
      List<Object> cells = new ArrayList<>(List.of(result.module(), result.n(), result.k(), result.rows(),
          result.ranks().isEmpty() ? "-" : result.ranks().stream().map(String::valueOf)
              .collect(Collectors.joining("+"))));
      cells.add(Numbers.error(result.oracle().maxError()));
      cells.add(Numbers.ratio(result.oracle().maxRatio()));
      if (recorded) {
        Deviation fromRecorded = result.recorded();
        cells.add(fromRecorded == null ? "-" : Numbers.error(fromRecorded.maxError()));
        cells.add(fromRecorded == null ? "-" : Numbers.ratio(fromRecorded.maxRatio()));
      }
      cells.add(result.withinBounds() ? "ok" : "OUTSIDE");
      table.add(cells.toArray());
    }
    if (!outcome.results().isEmpty()) {
      for (String line : table.lines(terminal.width())) {
        terminal.out().println(line.endsWith("  OUTSIDE") ? terminal.paint(Tone.BAD, line) : line);
      }
      terminal.out().println();
    }
    if (report != null) {
      line("report", report.toString());
    }
    terminal.out().println((outcome.ok() ? terminal.paint(Tone.GOOD, "OK") : terminal.paint(Tone.BAD, "FAILED")) + ": "
        + outcome.verdict());
  }

  private static String describe(Recording recording) {
    return "%s with %s%s, %d layers".formatted(recording.base(), recording.adapter(),
        recording.adapterWeights().isEmpty() ? "" : " at " + recording.adapterWeights().stream()
            .map(MappingView::number).collect(Collectors.joining(" and ")), recording.layers().size());
  }

  private static Optional<String> cudaAbsence(Device device) {
    return device.info().isCuda() ? Optional.empty() : Device.cudaUnavailableReason();
  }

  // ---- JSON

  private void write(VerifyOutcome outcome) throws IOException {
    try (JsonGenerator out = CheckpointText.generator(main.terminal)) {
      out.writeStartObject();
      out.writeStringField("command", "verify");
      CheckpointText.write(out, outcome.base());
      if (threshold == null) {
        out.writeNullField("threshold");
      } else {
        out.writeNumberField("threshold", threshold);
      }
      out.writeObjectFieldStart("device");
      out.writeStringField("id", outcome.device().info().id());
      out.writeStringField("name", outcome.device().info().name());
      out.writeStringField("kernels", outcome.device().info().kernels());
      writeText(out, "cudaAbsent", cudaAbsence(outcome.device()).orElse(null));
      out.writeEndObject();
      writeText(out, "recording", golden == null ? null : golden.toString());
      out.writeArrayFieldStart("adapters");
      for (int i = 0; i < outcome.views().size(); i++) {
        outcome.views().get(i).write(out, outcome.arguments().get(i).scale());
      }
      out.writeEndArray();
      out.writeArrayFieldStart("layers");
      for (Result result : outcome.results()) {
        write(out, result);
      }
      out.writeEndArray();
      out.writeArrayFieldStart("notRun");
      for (Map.Entry<String, String> entry : outcome.skipped().entrySet()) {
        out.writeStartObject();
        out.writeStringField("module", entry.getKey());
        out.writeStringField("why", entry.getValue());
        out.writeEndObject();
      }
      out.writeEndArray();
      out.writeBooleanField("ok", outcome.ok());
      out.writeStringField("verdict", outcome.verdict());
      out.writeEndObject();
    }
    main.terminal.out().println();
  }

  private static void write(JsonGenerator out, Result result) throws IOException {
    out.writeStartObject();
    out.writeStringField("module", result.module());
    out.writeNumberField("n", result.n());
    out.writeNumberField("k", result.k());
    out.writeNumberField("rows", result.rows());
    out.writeArrayFieldStart("ranks");
    for (int rank : result.ranks()) {
      out.writeNumber(rank);
    }
    out.writeEndArray();
    writeDeviation(out, "oracle", result.oracle());
    writeDeviation(out, "recorded", result.recorded());
    out.writeBooleanField("ok", result.withinBounds());
    out.writeEndObject();
  }

  private static void writeDeviation(JsonGenerator out, String name, @Nullable Deviation deviation)
      throws IOException {
    if (deviation == null) {
      out.writeNullField(name);
      return;
    }
    out.writeObjectFieldStart(name);
    writeNumber(out, "maxError", deviation.maxError());
    writeNumber(out, "boundRatio", deviation.maxRatio());
    out.writeNumberField("row", deviation.row());
    out.writeNumberField("channel", deviation.channel());
    out.writeEndObject();
  }

  /** JSON has no infinity: null stands for a distance without measure, such as NaN against a number. */
  private static void writeNumber(JsonGenerator out, String name, double value) throws IOException {
    if (Double.isFinite(value)) {
      out.writeNumberField(name, value);
    } else {
      out.writeNullField(name);
    }
  }

  private static void writeText(JsonGenerator out, String name, @Nullable String value) throws IOException {
    if (value == null) {
      out.writeNullField(name);
    } else {
      out.writeStringField(name, value);
    }
  }
}
