// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.SafetensorsWriter;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Random;
import java.util.stream.Stream;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.constraints.IntRange;
import net.jqwik.api.lifecycle.AfterContainer;
import net.jqwik.api.lifecycle.BeforeContainer;
import org.jetbrains.annotations.Nullable;

/**
 * Files of real tools with random damage in their JSON: whatever is read from them, the only exceptions are those that
 * the methods document.
 */
class DamagedFilesTest {
  /** What damage likes to be: text that is still JSON and means something else. */
  private static final List<String> PIECES = List.of("\"", "0", "-1", "9", "9223372036854775807", "1e308", "null", "{}",
      "[]", "[1,2]", "weight", "SCB", "_data", "_scale", "I8", "F32", "BF16", "U8", ".", "lora_A", "lora_B", ",", ":",
          "(",
      "\\\\", "*", "$", "\\u0000", "\\ud800", "true", "false", "", "");

  private static Path base;
  private static Path quanto;
  private static Path adapter;
  /** torchao, compressed-tensors (plain and packed) and ComfyUI, one layer each. */
  private static List<Path> written;
  /** A base of fused layers with pairs, LoHa and LoKr on them. */
  private static Path fused;

  @BeforeContainer
  static void copy() throws IOException {
    base = copy("llama/base_bnb8");
    quanto = copy("flux/base_quanto_diffusers");
    adapter = copy("llama/adapters/pattern");
    written = new ArrayList<>();
    written.add(folder(new SafetensorsWriter().codes("m._weight_qdata", 2, 8).ramp("m._weight_scale", 1, 2, 1)
        .metadata("tensor_names", "[\"m.weight\"]").metadata("m.weight", "{\"_type\":\"Int8Tensor\",\"_data\":"
            + "{\"block_size\":[1,8],\"act_quant_kwargs\":{\"_data\":{\"granularity\":{\"_type\":\"PerRow\"}}}}}"),
        null));
    String config = "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"ignore\":[\"re:a\"],"
        + "\"config_groups\":{\"g\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":8,\"type\":\"int\","
        + "\"strategy\":\"channel\"},\"input_activations\":{\"num_bits\":8,\"type\":\"int\",\"strategy\":"
        + "\"token\",\"dynamic\":true,\"symmetric\":true}}}}}";
    written.add(folder(new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 2, 1)
        .bytes("p.weight_packed", "I32", new long[] {2, 2}, new byte[16]).ramp("p.weight_scale", 1, 2, 1)
        .bytes("p.weight_shape", "I64", new long[] {2}, new byte[] {2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0}),
        config));
    written.add(folder(new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 2, 1).metadata(
        "_quantization_metadata", "{\"layers\":{\"m\":{\"format\":\"int8_tensorwise\"}}}"), null));
    fused = folder(new SafetensorsWriter().bitsandbytes("m.qkv_proj", 16, 6).bitsandbytes("h", 9, 7)
        .bitsandbytes("k", 30, 27), null);
    SafetensorsWriter lora = new SafetensorsWriter();
    for (String part : List.of("q", "k", "v")) {
      lora.ramp("m." + part + "_proj.lora_A.weight", 1, 2, 6)
          .ramp("m." + part + "_proj.lora_B.weight", 1, part.equals("q") ? 8 : 4, 2)
          .floats("m." + part + "_proj.alpha", new long[0], part.equals("q") ? 1 : 2);
    }
    lora.ramp("h.hada_w1_a", 1, 9, 2).ramp("h.hada_w1_b", 1, 2, 7).ramp("h.hada_w2_a", 1, 9, 2)
        .ramp("h.hada_w2_b", 1, 2, 7).ramp("k.lokr_w1", 1, 3, 3).ramp("k.lokr_w2_a", 1, 10, 2)
        .ramp("k.lokr_w2_b", 1, 2, 9).write(fused.resolve("lora.safetensors"));
  }

  private static Path folder(SafetensorsWriter writer, @Nullable String config) throws IOException {
    Path folder = Files.createTempDirectory("octolora");
    writer.write(folder.resolve("model.safetensors"));
    if (config != null) {
      Files.writeString(folder.resolve("config.json"), config);
    }
    return folder;
  }

  @AfterContainer
  static void delete() throws IOException {
    List<Path> folders = new ArrayList<>(written);
    folders.addAll(List.of(base, quanto, adapter, fused));
    for (Path folder : folders) {
      try (Stream<Path> files = Files.walk(folder)) {
        files.sorted(Comparator.reverseOrder()).forEach(file -> file.toFile().delete());
      }
    }
  }

  @Property(tries = 400)
  void checkpointsFailAsDocumented(@ForAll boolean bitsandbytes, @ForAll boolean config,
      @ForAll @IntRange(min = 1, max = 4) int changes, @ForAll long seed) throws IOException {
    Path folder = bitsandbytes ? base : quanto;
    Path file = folder.resolve(config ? "config.json"
        : bitsandbytes ? "model.safetensors" : "diffusion_pytorch_model.safetensors");
    damaged(file, changes, seed, () -> read(folder));
  }

  @Property(tries = 600)
  void writtenCheckpointsFailAsDocumented(@ForAll @IntRange(max = 2) int format, @ForAll boolean config,
      @ForAll @IntRange(min = 1, max = 4) int changes, @ForAll long seed) throws IOException {
    Path folder = written.get(format);
    Path file = folder.resolve("config.json");
    damaged(config && Files.exists(file) ? file : folder.resolve("model.safetensors"), changes, seed,
        () -> read(folder));
  }

  private static void read(Path folder) throws IOException {
    try (Checkpoint checkpoint = Checkpoint.open(folder)) {
      for (BaseLinear linear : checkpoint.linears().values()) {
        if (linear.quantized()) {
          linear.scale();
        }
        linear.bias();
        linear.weight().bytes();
      }
      checkpoint.format();
      checkpoint.recognition();
    }
  }

  @Property(tries = 400)
  void adaptersFailAsDocumented(@ForAll boolean config, @ForAll @IntRange(min = 1, max = 4) int changes,
      @ForAll long seed) throws IOException {
    Path file = adapter.resolve(config ? "adapter_config.json" : "adapter_model.safetensors");
    damaged(file, changes, seed, () -> {
      try (Checkpoint checkpoint = Checkpoint.open(Fixtures.path("llama/base_bnb8"));
          LoraAdapter lora = LoraAdapter.open(adapter)) {
        ModuleMap map = ModuleMap.lenient(checkpoint, lora);
        for (String module : map.modules()) {
          LoraDelta delta = map.delta(module);
          delta.a().toFloats();
          delta.b().toFloats();
        }
      }
    });
  }

  @Property(tries = 600)
  void writtenAdaptersFailAsDocumented(@ForAll @IntRange(min = 1, max = 4) int changes, @ForAll long seed)
      throws IOException {
    Path file = fused.resolve("lora.safetensors");
    damaged(file, changes, seed, () -> {
      try (Checkpoint checkpoint = Checkpoint.open(fused.resolve("model.safetensors"));
          LoraAdapter lora = LoraAdapter.open(file)) {
        ModuleMap map = ModuleMap.lenient(checkpoint, lora);
        for (String module : map.modules()) {
          map.delta(module).a().toFloats();
          map.delta(module).b().toFloats();
        }
      }
    });
  }

  private interface Reading {
    void run() throws IOException;
  }

  /** Runs with some pieces of the file's JSON replaced, then puts the file back. */
  private static void damaged(Path file, int changes, long seed, Reading reading) throws IOException {
    Random random = new Random(seed);
    byte[] original = Files.readAllBytes(file);
    ByteBuffer bytes = ByteBuffer.wrap(original).order(ByteOrder.LITTLE_ENDIAN);
    boolean tensors = file.toString().endsWith(".safetensors");
    int start = tensors ? 8 : 0;
    int end = tensors ? 8 + (int) bytes.getLong(0) : original.length;
    StringBuilder json = new StringBuilder(
        new String(original, start, end - start, java.nio.charset.StandardCharsets.UTF_8));
    for (int i = 0; i < changes; i++) {
      int at = random.nextInt(json.length());
      json.replace(at, Math.min(json.length(), at + random.nextInt(5)), PIECES.get(random.nextInt(PIECES.size())));
    }
    byte[] header = json.toString().getBytes(java.nio.charset.StandardCharsets.UTF_8);
    ByteBuffer changed = ByteBuffer.allocate(start + header.length + original.length - end)
        .order(ByteOrder.LITTLE_ENDIAN);
    if (tensors) {
      changed.putLong(header.length);
    }
    Files.write(file, changed.put(header).put(original, end, original.length - end).array());
    try {
      reading.run();
    } catch (OctoloraException | IOException | UncheckedIOException e) {
      if (e.getMessage() == null || e.getMessage().isBlank()) {
        throw new AssertionError("no message", e);
      }
    } finally {
      Files.write(file, original);
    }
  }

  private static Path copy(String fixture) throws IOException {
    Path folder = Files.createTempDirectory("octolora");
    try (Stream<Path> files = Files.list(Fixtures.path(fixture))) {
      for (Path file : files.filter(Files::isRegularFile).toList()) {
        Files.copy(file, folder.resolve(file.getFileName()));
      }
    }
    return folder;
  }
}
