// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.internal.InputFiles;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.jetbrains.annotations.Nullable;

/**
 * The float checkpoint and what lies beside it.
 *
 * @param config config.json; empty where there is none
 * @param companions other files that belong to the model, such as tokenizers
 */
record Source(Checkpoint checkpoint, Map<String, Object> config, boolean diffusers, List<Path> companions) {
  private static final String CONFIG = "config.json";
  private static final String DIFFUSERS_STEM = "diffusion_pytorch_model";
  private static final Set<String> COMPANION_ENDS = Set.of("json", "txt", "model", "jinja", "tiktoken");

  static Source of(Checkpoint checkpoint) throws IOException {
    Path path = checkpoint.path();
    if (checkpoint.isGguf()) {
      throw new FormatException(Status.UNSUPPORTED, "%s: this is a GGUF file, expected safetensors".formatted(path));
    }
    Path folder = Files.isDirectory(path) ? path : path.toAbsolutePath().getParent();
    boolean model = folder == path || stem(path) != null;
    Path configFile = folder.resolve(CONFIG);
    InputFiles.refuseSpecial(configFile);
    Map<String, Object> config = model && Files.exists(configFile)
        ? PythonJson.readObject(Files.readAllBytes(configFile), configFile.toString()) : new LinkedHashMap<>();
    if (config.get("quantization_config") != null) {
      throw new FormatException(Status.UNSUPPORTED, "%s: quantization_config: this checkpoint is quantized already"
          .formatted(configFile));
    }
    Object modelType = config.get("model_type");
    if ("gpt2".equals(modelType)) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: model_type gpt2 stores its linear weights transposed, expected [out, in]".formatted(configFile));
    }
    boolean diffusers = config.isEmpty() ? DIFFUSERS_STEM.equals(stem(firstFile(checkpoint)))
        : config.containsKey("_class_name") || config.containsKey("_diffusers_version");
    return new Source(checkpoint, config, diffusers, model ? companions(folder) : List.of());
  }

  /** "model" of transformers or "diffusion_pytorch_model" of diffusers. */
  String stem() {
    return diffusers ? DIFFUSERS_STEM : "model";
  }

  /** Of transformers' config.json; empty without. */
  String modelType() {
    return config.get("model_type") instanceof String type ? type : "";
  }

  private static Path firstFile(Checkpoint checkpoint) {
    return checkpoint.tensors().values().stream().map(tensor -> tensor.file()).findFirst().orElse(checkpoint.path());
  }

  /** The part of a weight file's or index's name that tells the family; null for other names. */
  private static @Nullable String stem(Path file) {
    String name = file.getFileName().toString();
    for (String stem : List.of("model", DIFFUSERS_STEM)) {
      if (name.matches(stem + "(-\\d+-of-\\d+)?\\.safetensors(\\.index\\.json)?")) {
        return stem;
      }
    }
    return null;
  }

  private static List<Path> companions(Path folder) throws IOException {
    try (Stream<Path> files = Files.list(folder)) {
      return files.filter(Files::isRegularFile).filter(file -> {
        String name = file.getFileName().toString();
        return COMPANION_ENDS.contains(name.substring(name.lastIndexOf('.') + 1)) && !name.equals(CONFIG)
            && !name.endsWith(".index.json");
      }).sorted().collect(Collectors.toList());
    }
  }

  /** The files that hold the tensors. */
  Set<Path> weightFiles() {
    return checkpoint.tensors().values().stream().map(tensor -> tensor.file())
        .collect(Collectors.toCollection(TreeSet::new));
  }
}
