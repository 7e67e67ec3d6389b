// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Comparator;
import java.util.List;
import java.util.Random;
import java.util.stream.Stream;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.constraints.IntRange;
import net.jqwik.api.lifecycle.AfterContainer;
import net.jqwik.api.lifecycle.BeforeContainer;

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

  @BeforeContainer
  static void copy() throws IOException {
    base = copy("llama/base_bnb8");
    quanto = copy("flux/base_quanto_diffusers");
    adapter = copy("llama/adapters/pattern");
  }

  @AfterContainer
  static void delete() throws IOException {
    for (Path folder : List.of(base, quanto, adapter)) {
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
    damaged(file, changes, seed, () -> {
      try (Checkpoint checkpoint = Checkpoint.open(folder)) {
        for (BaseLinear linear : checkpoint.linears().values()) {
          if (linear.quantized()) {
            linear.scale();
          }
          linear.bias();
          linear.weight().bytes();
        }
        checkpoint.format();
      }
    });
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
