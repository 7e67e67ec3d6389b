// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.cli.Terminal.Tone;
import io.octolora.quantize.Quantizer;
import io.octolora.quantize.TargetFormat;
import java.io.IOException;
import java.math.BigDecimal;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;
import picocli.CommandLine.Command;
import picocli.CommandLine.Model.CommandSpec;
import picocli.CommandLine.Option;
import picocli.CommandLine.ParameterException;
import picocli.CommandLine.Parameters;
import picocli.CommandLine.ParentCommand;
import picocli.CommandLine.Spec;

/** Writes a float checkpoint as int8. */
@Command(name = "quantize",
    description = {"Write an fp32, fp16 or bf16 checkpoint as int8, as the format's own tool would.",
        "Tensors are read and written piece by piece: memory does not grow with them. Until all is written the result "
        + "is OUT.partial; --resume goes on with what an interrupted run left there."})
final class QuantizeCommand implements Callable<Integer> {
  private static final Pattern SIZE =
      Pattern.compile("(\\d+(?:\\.\\d+)?)\\s*([KMGT]?)(i?)B?", Pattern.CASE_INSENSITIVE);
  private static final float DEFAULT_THRESHOLD = 6;

  @ParentCommand
  private Main main;

  @Spec
  private CommandSpec spec;

  @Parameters(index = "0", paramLabel = "MODEL",
      description = "A .safetensors file, an index of shards, or a folder with them.")
  private Path in;

  @Parameters(index = "1", paramLabel = "OUT", description = "A folder to be made.")
  private Path out;

  @Option(names = "--format", required = true, paramLabel = "FORMAT",
      description = "bitsandbytes, quanto or compressed-tensors.")
  private String format;

  @Option(names = "--skip", paramLabel = "PATTERN",
      description = {"Layers to leave as they are; may be given several times, and takes the place of the tool's own "
          + "list (such as lm_head). Read as the tool reads its list: bitsandbytes and Quanto in diffusers: the last "
          + "name of a path; bitsandbytes in transformers: the start of a path as a regular expression, or its end; "
          + "Quanto elsewhere: a shell pattern; compressed-tensors: a whole path, or re: and a regular expression."})
  private List<String> skip = new ArrayList<>();

  @Option(names = "--threshold", paramLabel = "T",
      description = "Outlier threshold written to bitsandbytes' configuration (default: 6).")
  private @Nullable Float threshold;

  @Option(names = "--max-shard-size", paramLabel = "SIZE",
      description = "Such as 5GB or 500MiB (default: 10GB for diffusers, 50GB for transformers).")
  private @Nullable String maxShardSize;

  @Option(names = "--resume", description = "Go on with an interrupted run of the same job, if there is one.")
  private boolean resume;

  @Option(names = {"-v", "--verbose"}, description = "Also name every layer.")
  private boolean verbose;

  @Option(names = "--json", description = "Print one JSON object instead of text.")
  private boolean json;

  @Override
  public Integer call() throws IOException {
    TargetFormat target = Arrays.stream(TargetFormat.values()).filter(value -> value.tool().equals(format)).findFirst()
        .orElseThrow(() -> usage("--format %s: expected %s".formatted(format, Arrays.stream(TargetFormat.values())
            .map(TargetFormat::tool).collect(Collectors.joining(", ")))));
    if (threshold != null && target != TargetFormat.BITSANDBYTES) {
      throw usage("--threshold %s: %s has no outlier threshold, bitsandbytes has".formatted(threshold, target));
    }
    if (threshold != null && !(threshold >= 0 && Float.isFinite(threshold))) {
      throw usage("--threshold " + threshold + ": expected 0 or above");
    }
    Quantizer.Options options = new Quantizer.Options(target, skip,
        threshold == null ? DEFAULT_THRESHOLD : threshold, maxShardSize == null ? null : bytes(maxShardSize));
    long start = System.nanoTime();
    ProgressBar bar = new ProgressBar(main.terminal);
    Quantizer.Result result;
    try {
      result = Quantizer.run(in, out, options, resume, bar::at);
    } finally {
      main.terminal.clearProgress();
    }
    double seconds = (System.nanoTime() - start) / 1e9;
    if (json) {
      write(target, result, seconds);
    } else {
      print(target, result, seconds);
    }
    return Main.OK;
  }

  /** "5GB" is 5·10⁹, "5GiB" is 5·2³⁰; at least 1. */
  private long bytes(String text) {
    Matcher matcher = SIZE.matcher(text.strip());
    if (matcher.matches()) {
      boolean binary = !matcher.group(3).isEmpty();
      int power = matcher.group(2).isEmpty() ? 0 : "KMGT".indexOf(matcher.group(2).toUpperCase(Locale.ROOT)) + 1;
      BigDecimal size = new BigDecimal(matcher.group(1)).multiply(BigDecimal.valueOf(binary ? 1024 : 1000).pow(power));
      if ((!binary || power > 0) && size.compareTo(BigDecimal.ONE) >= 0
          && size.compareTo(BigDecimal.valueOf(Long.MAX_VALUE)) < 0) {
        return size.longValue();
      }
    }
    throw usage("--max-shard-size %s: expected a size such as 5GB or 500MiB".formatted(text));
  }

  private void print(TargetFormat target, Quantizer.Result result, double seconds) {
    Terminal terminal = main.terminal;
    if (verbose) {
      result.quantized().forEach(module -> terminal.out().println("int8:  " + Table.printable(module)));
      result.left().forEach(module -> terminal.out().println("float: " + Table.printable(module)));
    } else if (!result.left().isEmpty()) {
      terminal.out().println("left as they are: " + Table.printable(String.join(", ", result.left().subList(0,
          Math.min(5, result.left().size())))) + (result.left().size() > 5
          ? " and %d more".formatted(result.left().size() - 5) : ""));
    }
    result.unusedSkips().forEach(pattern -> terminal.out().println(terminal.paint(Tone.WARNING, "note") + ": "
        + Table.printable("--skip %s fits no layer".formatted(pattern))));
    terminal.out().println(terminal.paint(Tone.GOOD, "OK") + ": " + Table.printable(
        "%s: %d layers in %s int8, %d tensors copied; %s from %s in %d %s%s, %.1f s".formatted(out,
            result.quantized().size(), target, result.copied(), ProgressBar.size(result.writtenBytes()),
            ProgressBar.size(result.sourceBytes()), result.shards(), result.shards() == 1 ? "file" : "files",
            result.resumedShards() == 0 ? "" : " (%d of an earlier run)".formatted(result.resumedShards()), seconds)));
  }

  private void write(TargetFormat target, Quantizer.Result result, double seconds) throws IOException {
    try (JsonGenerator json = CheckpointText.generator(main.terminal)) {
      json.writeStartObject();
      json.writeStringField("command", "quantize");
      json.writeStringField("path", out.toString());
      json.writeStringField("format", target.tool());
      for (Map.Entry<String, List<String>> names
          : List.of(Map.entry("int8", result.quantized()), Map.entry("float", result.left()),
              Map.entry("unusedSkips", result.unusedSkips()))) {
        json.writeArrayFieldStart(names.getKey());
        for (String module : names.getValue()) {
          json.writeString(module);
        }
        json.writeEndArray();
      }
      json.writeNumberField("copied", result.copied());
      json.writeNumberField("files", result.shards());
      json.writeNumberField("resumedFiles", result.resumedShards());
      json.writeNumberField("sourceBytes", result.sourceBytes());
      json.writeNumberField("writtenBytes", result.writtenBytes());
      json.writeNumberField("seconds", seconds);
      json.writeBooleanField("ok", true);
      json.writeEndObject();
    }
    main.terminal.out().println();
  }

  private ParameterException usage(String message) {
    return new ParameterException(spec.commandLine(), message);
  }
}
