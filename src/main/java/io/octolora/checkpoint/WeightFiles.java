// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.internal.Json;
import io.octolora.internal.Pickles;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.jetbrains.annotations.Nullable;

/** The safetensors files of one model as transformers and diffusers lay them out, and their tensors as one set. */
final class WeightFiles implements AutoCloseable {
  private static final String INDEX_END = ".safetensors.index.json";
  /** What transformers and diffusers call the file without shards. */
  private static final List<String> SINGLE_NAMES =
      List.of("model.safetensors", "diffusion_pytorch_model.safetensors");

  private final List<SafetensorsFile> files = new ArrayList<>();
  private final Map<String, Tensor> tensors = new LinkedHashMap<>();
  private final List<String> notes;
  private final @Nullable Path folder;
  private Map<String, Object> indexMetadata = Map.of();

  /** @param folder where config.json is looked for, or null if the file stands alone */
  private WeightFiles(@Nullable Path folder, List<String> notes) {
    this.folder = folder;
    this.notes = notes;
  }

  /** @param chosen whether the file was found by {@link #choose} and not named by the user */
  static WeightFiles open(Path file, boolean chosen, List<String> notes) throws IOException {
    Pickles.refuse(file);
    String name = file.getFileName().toString();
    boolean index = name.endsWith(INDEX_END);
    boolean model = index || SINGLE_NAMES.contains(name) || chosen;
    WeightFiles weights = new WeightFiles(model ? file.toAbsolutePath().getParent() : null, notes);
    try {
      if (index) {
        weights.openShards(file);
      } else {
        SafetensorsFile single = SafetensorsFile.open(file);
        weights.files.add(single);
        weights.tensors.putAll(single.tensors());
      }
      return weights;
    } catch (Throwable e) {
      weights.close();
      throw e;
    }
  }

  Map<String, Tensor> tensors() {
    return tensors;
  }

  List<SafetensorsFile> files() {
    return files;
  }

  /** The text maps of the files' headers, then that of the index. */
  List<Map<String, ?>> metadata() {
    List<Map<String, ?>> all = new ArrayList<>();
    files.forEach(file -> all.add(file.metadata()));
    all.add(indexMetadata);
    return all;
  }

  /** The file of that name beside the weights as messages call it. */
  String beside(String name) {
    return folder == null ? name : folder.resolve(name).toString();
  }

  /** An optional JSON object beside the weights; null if there is none. */
  @Nullable Map<String, Object> json(String name) throws IOException {
    Path file = folder == null ? null : folder.resolve(name);
    return file != null && Files.exists(file) ? Json.readObject(file) : null;
  }

  @Override
  public void close() {
    files.forEach(SafetensorsFile::close);
  }

  /** The one weight file or index of a folder, or where there is none, its one GGUF file. */
  static Path choose(Path folder) throws IOException {
    List<String> names;
    try (Stream<Path> list = Files.list(folder)) {
      names = list.map(file -> file.getFileName().toString()).sorted().toList();
    }
    List<String> indexes = names.stream().filter(name -> name.endsWith(INDEX_END)).toList();
    List<String> standard = names.stream().filter(SINGLE_NAMES::contains).toList();
    List<String> candidates = new ArrayList<>(indexes);
    candidates.addAll(standard);
    if (candidates.isEmpty()) {
      candidates.addAll(names.stream().filter(name -> name.endsWith(".safetensors")).toList());
    }
    if (candidates.isEmpty()) {
      candidates.addAll(names.stream().filter(name -> name.endsWith(".gguf")).toList());
    }
    if (candidates.size() == 1) {
      return folder.resolve(candidates.get(0));
    }
    if (candidates.size() > 1) {
      throw new FormatException("%s: %s could each be the model; name one of them".formatted(folder,
          String.join(", ", candidates)));
    }
    for (String name : names) {
      Pickles.refuse(folder.resolve(name));
    }
    throw new FormatException("%s: no %s, no %s and no index of theirs%s".formatted(folder, SINGLE_NAMES.get(0),
        SINGLE_NAMES.get(1),
        names.contains("model_index.json") ? "; this is a pipeline, its transformer folder is a model" : ""));
  }

  private void openShards(Path index) throws IOException {
    Map<String, Object> json = Json.readObject(index);
    if (json.get("metadata") != null) {
      indexMetadata = Json.object(json.get("metadata"), index + ": metadata");
    }
    Map<String, Object> weightMap = Json.object(json.get("weight_map"), index + ": weight_map");
    Map<String, SafetensorsFile> shards = new LinkedHashMap<>();
    for (Map.Entry<String, Object> entry : weightMap.entrySet()) {
      String where = "%s: weight_map %s".formatted(index, entry.getKey());
      if (!(entry.getValue() instanceof String shard)) {
        throw new FormatException("%s: %s, expected a file name".formatted(where, Json.describe(entry.getValue())));
      }
      SafetensorsFile file = shards.get(shard);
      if (file == null) {
        file = openShard(index, shard, where);
        files.add(file);
        shards.put(shard, file);
      }
      Tensor tensor = file.tensors().get(entry.getKey());
      if (tensor == null) {
        throw new FormatException("%s: %s has no such tensor".formatted(where, file.file()));
      }
      tensors.put(entry.getKey(), tensor);
    }
    for (SafetensorsFile file : files) {
      for (Tensor tensor : file.tensors().values()) {
        Tensor listed = tensors.putIfAbsent(tensor.name(), tensor);
        if (listed == null) {
          notes.add("%s is not in %s; it is used all the same".formatted(tensor, index.getFileName()));
        } else if (listed != tensor) {
          notes.add("%s is a second copy; %s names %s".formatted(tensor, index.getFileName(), listed.file()));
        }
      }
    }
  }

  private static SafetensorsFile openShard(Path index, String shard, String where) throws IOException {
    if (shard.isEmpty() || shard.contains("/") || shard.contains("\\") || shard.contains("..")
        || shard.indexOf('\0') >= 0) {
      throw new FormatException("%s: %s, expected the name of a file in the same folder".formatted(where,
          Json.describe(shard)));
    }
    Path file = index.resolveSibling(shard);
    Pickles.refuse(file);
    if (!Files.exists(file)) {
      throw new FormatException("%s: there is no %s".formatted(where, file));
    }
    return SafetensorsFile.open(file);
  }
}
