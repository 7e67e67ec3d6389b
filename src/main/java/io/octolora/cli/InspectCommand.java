// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.FormatException;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.cli.Terminal.Tone;
import java.io.IOException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.Callable;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;
import picocli.CommandLine.Parameters;
import picocli.CommandLine.ParentCommand;

/** What is in these files, and where the adapters' keys would land. */
@Command(name = "inspect",
    description = "Show what is in a checkpoint, and where every key of the adapters lands on it.")
final class InspectCommand implements Callable<Integer> {
  @ParentCommand
  private Main main;

  @Parameters(index = "0", paramLabel = "CHECKPOINT",
      description = "The model: a .safetensors or .gguf file, an index of shards, or a folder with them.")
  private Path checkpoint;

  @Parameters(index = "1..*", paramLabel = "ADAPTER", description = "LoRA files or PEFT folders.")
  private List<Path> adapters = new ArrayList<>();

  @Option(names = "--lenient",
      description = "Accept that keys which land nowhere are left out, as long as some of each adapter land.")
  private boolean lenient;

  @Option(names = "--rename", paramLabel = "FROM=TO",
      description = "Read FROM in the names of the adapters' modules as TO; may be given several times.")
  private Map<String, String> renames = new LinkedHashMap<>();

  @Option(names = {"-v", "--verbose"}, description = "One line for every layer and every key.")
  private boolean verbose;

  @Option(names = "--json", description = "Print one JSON object instead of tables.")
  private boolean json;

  @Override
  public Integer call() throws IOException {
    try (Checkpoint base = Checkpoint.open(checkpoint); Closeables opened = new Closeables()) {
      List<MappingView> views = new ArrayList<>();
      List<String> titles = new ArrayList<>();
      boolean complete = true;
      for (Path path : adapters) {
        LoraAdapter adapter = opened.add(LoraAdapter.open(path));
        MappingView view = MappingView.of(base, adapter, renames, lenient);
        views.add(view);
        titles.add("%s (%s)".formatted(path, adapter.format().label()));
        complete &= view.complete();
      }
      if (json) {
        write(base, views, complete);
      } else {
        print(base, views, titles, complete);
      }
      return complete ? Main.OK : Main.FAILED;
    }
  }

  private void print(Checkpoint base, List<MappingView> views, List<String> titles, boolean complete)
      throws IOException {
    Terminal terminal = main.terminal;
    terminal.out().println(terminal.paint(Tone.TITLE, "checkpoint  ")
        + Table.printable(checkpoint + "  " + CheckpointText.describe(base)));
    terminal.out().println("read as     " + Table.printable(base.recognition()));
    base.notes().forEach(note -> terminal.out().println("note: " + Table.printable(note)));
    if (adapters.isEmpty()) {
      asAdapter(base).ifPresent(note -> terminal.out().println("note: " + Table.printable(note)));
    }
    if (!base.linears().isEmpty()) {
      modules(base).lines(terminal.width()).forEach(line -> terminal.out().println(line));
    }
    for (int i = 0; i < views.size(); i++) {
      terminal.out().println();
      terminal.out().println(terminal.paint(Tone.TITLE, "adapter     ") + Table.printable(titles.get(i)) + "  "
          + views.get(i).summary());
      terminal.out().println("read as     " + Table.printable(views.get(i).adapter().recognition()));
      views.get(i).print(terminal, verbose);
    }
    if (!views.isEmpty()) {
      terminal.out().println();
      terminal.out().println((complete ? terminal.paint(Tone.GOOD, "OK") : terminal.paint(Tone.BAD, "FAILED")) + ": "
          + MappingView.verdict(views));
    }
  }

  /** For who gave an adapter alone: its factors look like linear layers. */
  private Optional<String> asAdapter(Checkpoint base) throws IOException {
    if (base.linears().values().stream().anyMatch(BaseLinear::quantized)) {
      return Optional.empty();
    }
    try (LoraAdapter adapter = LoraAdapter.open(checkpoint)) {
      return Optional.of("this is an adapter, and needs its checkpoint before it: " + adapter.recognition());
    } catch (FormatException e) {
      return Optional.empty();
    }
  }

  /** Layers that differ in block numbers alone share a line, unless all are asked for. */
  private Table modules(Checkpoint base) {
    record Kind(String name, int n, int k, String format, String activations, boolean bias) {}
    Map<Kind, Integer> kinds = new LinkedHashMap<>();
    for (BaseLinear linear : base.linears().values()) {
      String name = verbose ? linear.name() : linear.name().replaceAll("(?<=blocks\\.|layers\\.)\\d+(?=\\.)", "*");
      kinds.merge(new Kind(name, linear.n(), linear.k(), format(linear), activations(linear), linear.bias() != null), 1,
          Integer::sum);
    }
    Table table = new Table("MODULE", ">LAYERS", ">N", ">K", "WEIGHT", "ACTIVATIONS", "BIAS");
    kinds.forEach((kind, count) -> table.add(kind.name(), count, kind.n(), kind.k(), kind.format(), kind.activations(),
        kind.bias() ? "yes" : "no"));
    return table;
  }

  private static String format(BaseLinear linear) {
    return linear.quantized() ? linear.format().label() : linear.weight().type() + ", not quantized";
  }

  private static String activations(BaseLinear linear) {
    Quantization how = linear.quantization();
    if (how == null) {
      return "-";
    }
    return switch (how.mode()) {
      case W8A16 -> "float (W8A16)";
      case W8A8_STATIC -> "int8, scale " + MappingView.number(how.xScale());
      case W8A8_DYNAMIC -> "int8 per row" + (how.outlierThreshold() > 0
          ? ", outliers from " + MappingView.number(how.outlierThreshold()) : "");
    };
  }

  private void write(Checkpoint base, List<MappingView> views, boolean complete) throws IOException {
    try (JsonGenerator out = CheckpointText.generator(main.terminal)) {
      out.writeStartObject();
      out.writeStringField("command", "inspect");
      CheckpointText.write(out, base);
      out.writeArrayFieldStart("adapters");
      for (MappingView view : views) {
        view.write(out, 1);
      }
      out.writeEndArray();
      out.writeBooleanField("ok", complete);
      out.writeEndObject();
    }
    main.terminal.out().println();
  }
}
