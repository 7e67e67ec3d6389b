// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.internal.Names;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.EnumMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/**
 * The files of a base model: one safetensors file, an index with its shards, a folder of transformers, diffusers or
 * optimum-quanto with its {@code config.json}, or a GGUF file. Each module's format is read from its tensors: one of
 * {@link WeightFormat}. Files whose tensors speak for two int8 formats are refused with both readings. Nothing is
 * copied or converted, except that packed codes are unpacked where they are read. Safe for use by several threads.
 */
public final class Checkpoint implements AutoCloseable {
  private final Path path;
  private final Runnable close;
  private final Map<String, Tensor> tensors;
  private final Map<String, BaseLinear> linears;
  private final String recognition;
  private final List<String> notes;
  private final boolean gguf;

  private Checkpoint(Path path, Runnable close, Map<String, Tensor> tensors, Map<String, BaseLinear> linears,
      String recognition, List<String> notes, boolean gguf) {
    this.path = path;
    this.gguf = gguf;
    this.close = close;
    this.tensors = Collections.unmodifiableMap(tensors);
    this.linears = Collections.unmodifiableMap(linears);
    this.recognition = recognition;
    this.notes = List.copyOf(notes);
  }

  /**
   * Maps the files and reads their headers; weights are read when they are asked for.
   *
   * @param path a folder, a {@code .safetensors} file, a {@code .safetensors.index.json} file or a {@code .gguf} file
   * @throws IOException if a file cannot be read or mapped
   * @throws FormatException if a file is damaged, or of a format that is not read here; the message says which
   */
  public static Checkpoint open(Path path) throws IOException {
    List<String> notes = new ArrayList<>();
    boolean folder = Files.isDirectory(path);
    Path file = folder ? WeightFiles.choose(path) : path;
    if (GgufFile.is(file)) {
      return openGguf(path, GgufFile.open(file), notes);
    }
    WeightFiles weights = WeightFiles.open(file, folder, notes);
    try {
      LinearReader reader = new LinearReader(path, weights, QuantizationConfig.read(weights), notes);
      Map<String, BaseLinear> linears = reader.read();
      return new Checkpoint(path, weights::close, weights.tensors(), linears, reader.recognition(), notes, false);
    } catch (Throwable e) {
      weights.close();
      throw e;
    }
  }

  private static Checkpoint openGguf(Path path, GgufFile file, List<String> notes) {
    try {
      GgufLayers layers = new GgufLayers(file, notes);
      Map<String, BaseLinear> linears = layers.read();
      return new Checkpoint(path, file::close, file.tensors(), linears, layers.recognition(), notes, true);
    } catch (Throwable e) {
      file.close();
      throw e;
    }
  }

  /** As given to {@link #open}. */
  public Path path() {
    return path;
  }

  /** The formats of the linear layers with their counts, for people: "bitsandbytes int8 (34), BF16 (2)". */
  public String format() {
    Map<WeightFormat, Integer> counts = new EnumMap<>(WeightFormat.class);
    Map<String, Integer> floats = new TreeMap<>();
    for (BaseLinear linear : linears.values()) {
      if (linear.format() == WeightFormat.FLOAT) {
        floats.merge(linear.weight().type().name(), 1, Integer::sum);
      } else {
        counts.merge(linear.format(), 1, Integer::sum);
      }
    }
    List<String> parts = new ArrayList<>();
    counts.forEach((format, count) -> parts.add("%s (%d)".formatted(format.label(), count)));
    floats.forEach((type, count) -> parts.add("%s (%d)".formatted(type, count)));
    return parts.isEmpty() ? "no linear layers" : String.join(", ", parts);
  }

  /** By module path, blocks in numeric order; unmodifiable. See {@link BaseLinear} for what counts as linear. */
  public Map<String, BaseLinear> linears() {
    return linears;
  }

  /**
   * The layer of this name.
   *
   * @param name the module's full path
   * @throws OctoloraException for a name that is not in {@link #linears()}; the message has the nearest ones
   */
  public BaseLinear linear(String name) {
    BaseLinear linear = linears.get(name);
    if (linear == null) {
      throw new OctoloraException(Status.INVALID_ARGUMENT, "%s has no linear layer %s; nearest: %s".formatted(path,
          name, String.join(", ", Names.nearest(name, linears.keySet(), 3))));
    }
    return linear;
  }

  /** Every tensor of every file, by name; unmodifiable. Those of GGUF's Q8_0 are I8, the codes alone. */
  public Map<String, Tensor> tensors() {
    return tensors;
  }

  /** Whether this is a GGUF file: its tensors may then have other names than the modules. */
  public boolean isGguf() {
    return gguf;
  }

  /** What was seen in the files and which format that makes it, in a sentence for people. */
  public String recognition() {
    return recognition;
  }

  /** What a person should know though no rule forbids it, for example where configuration and tensors disagree. */
  public List<String> notes() {
    return notes;
  }

  /** Closes the files: see {@link SafetensorsFile#close()}. Idempotent. */
  @Override
  public void close() {
    close.run();
  }

  @Override
  public String toString() {
    return "%s: %s".formatted(path, format());
  }
}
