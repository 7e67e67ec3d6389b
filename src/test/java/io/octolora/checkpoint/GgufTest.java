// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static io.octolora.checkpoint.GgufWriter.F16;
import static io.octolora.checkpoint.GgufWriter.F32;
import static io.octolora.checkpoint.GgufWriter.Q8_0;
import static io.octolora.checkpoint.GgufWriter.STRING;
import static io.octolora.checkpoint.GgufWriter.blocks;
import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.internal.Halves;
import io.octolora.mapping.ModuleMap;
import io.octolora.runtime.Device;
import io.octolora.runtime.Int8Linear;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.Set;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;

/** GGUF files of the gguf package (fixtures) and such as are written here, right and wrong. */
class GgufTest {
  private static final int ONE = 0x3c00;
  private static final int TWO = 0x4000;
  private static final int HALF = 0x3800;

  @TempDir Path folder;

  // ---- Files of the real tool

  @Test
  void fluxUnderItsOwnNames() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_gguf/flux-Q8_0.gguf"))) {
      assertEquals("GGUF Q8_0 (4), F32 (1)", base.format());
      assertEquals("GGUF version 3, architecture flux: 4 of 10 tensors are Q8_0", base.recognition());
      assertEquals(List.of(), base.notes());
      assertEquals(10, base.tensors().size());
      BaseLinear qkv = base.linear("double_blocks.0.img_attn.qkv");
      assertEquals(384, qkv.n());
      assertEquals(128, qkv.k());
      assertEquals(WeightFormat.GGUF_Q8_0, qkv.format());
      assertEquals(Quantization.weightOnly(), qkv.quantization());
      assertArrayEquals(new float[] {1}, qkv.scale());
      assertEquals(32, qkv.scaleBlock());
      assertEquals(384 * 4 * 2, qkv.blockScale().remaining());
      assertEquals(384, qkv.bias().length);
      assertFalse(base.linear("img_in").quantized());
      assertNull(base.linear("img_in").blockScale());
      assertEquals(0, base.linear("img_in").scaleBlock());
    }
  }

  /** diffusers' three layers are one here, with rows of their own each. */
  @Test
  void adaptersOfDiffusersOnFlux() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String part : List.of("to_q", "to_k", "to_v", "add_v_proj")) {
      writer.ramp("transformer.transformer_blocks.0.attn." + part + ".lora_A.weight", part.charAt(3) * 0.001f, 2, 128)
          .ramp("transformer.transformer_blocks.0.attn." + part + ".lora_B.weight", 1, 128, 2);
    }
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_gguf"));
        LoraAdapter adapter = LoraAdapter.open(writer.write(folder.resolve("lora.safetensors")))) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertEquals(Set.of("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv"), Set.copyOf(map.modules()));
      assertEquals(6, map.delta("double_blocks.0.img_attn.qkv").rank());
    }
  }

  /** The adapter's names are those of transformers; every key has to land. */
  @Test
  void llamaUnderTheNamesOfTransformers() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_gguf"));
        Checkpoint original = Checkpoint.open(Fixtures.path("llama/base_bf16"));
        LoraAdapter adapter = LoraAdapter.open(Fixtures.path("llama/adapters/r4_all"))) {
      assertEquals("GGUF Q8_0 (14), F16 (2)", base.format());
      assertEquals(original.linears().keySet(), base.linears().keySet());
      assertEquals(14, ModuleMap.of(base, adapter).modules().size());
      assertTrue(base.notes().get(0).contains("model.layers.0.self_attn.q_proj"), base.notes()::toString);
      for (BaseLinear linear : base.linears().values()) {
        assertNear(linear, original.linear(linear.name()));
      }
    }
  }

  /** Row by row within half a step of the original, or of fp16's rounding: so no row stands where another belongs. */
  private static void assertNear(BaseLinear linear, BaseLinear original) {
    float[] want = original.weight().toFloats();
    float[] floats = linear.quantized() ? null : linear.weight().toFloats();
    ByteBuffer codes = linear.weight().bytes();
    ByteBuffer scales = linear.blockScale();
    for (int i = 0; i < want.length; i++) {
      double d = scales == null ? 0 : Halves.fromFloat16(scales.getShort(i / 32 * 2));
      double weight = floats == null ? d * codes.get(i) : floats[i];
      double bound = floats == null ? 0.502 * d + 0x1p-11 * Math.abs(want[i]) : 0x1p-11 * Math.abs(want[i]);
      assertEquals(want[i], weight, bound + 0x1p-24, linear + " " + i);
    }
  }

  // ---- Reading

  private static GgufWriter small() {
    return new GgufWriter().pair("general.architecture", "test").pair("tokens", "a", "bc", "")
        .tensor("m.weight", Q8_0, blocks(ONE, TWO, HALF, ONE), 64, 2).tensor("m.bias", F32, new byte[8], 2)
        .tensor("norm.weight", F32, new byte[4 * 5], 5);
  }

  @ParameterizedTest
  @CsvSource({"2, 32", "3, 32", "3, 1", "3, 4096"})
  void codesAndScalesAreReadApart(int version, int alignment) throws IOException {
    GgufWriter writer = new GgufWriter().version(version).alignment(alignment)
        .pair("general.alignment", alignment).tensor("norm.weight", F16, new byte[] {1, 2}, 1)
        .tensor("m.weight", Q8_0, blocks(ONE, TWO, HALF, ONE), 64, 2);
    try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("any name")))) {
      BaseLinear linear = base.linear("m");
      Tensor weight = linear.weight();
      assertEquals(ElementType.I8, weight.type());
      for (int from = 0; from < 128; from++) {
        for (int length = 0; length <= 128 - from; length += 7) {
          ByteBuffer part = weight.bytes(from, length);
          assertTrue(part.isDirect());
          for (int i = 0; i < length; i++) {
            assertEquals(from + i, part.get(i));
          }
        }
      }
      ByteBuffer scales = linear.blockScale();
      assertTrue(scales.isDirect());
      int[] want = {ONE, TWO, HALF, ONE};
      for (int i = 0; i < 4; i++) {
        assertEquals(want[i], scales.getShort(2 * i));
      }
      float[] x = new float[64];
      x[1] = 1;
      x[33] = 10;
      try (Device device = Device.cpu(); Int8Linear loaded = device.load(linear)) {
        assertArrayEquals(new float[] {1 + 2 * 33 * 10, 65 * 0.5f + 97 * 10}, loaded.forward(x, 1));
      }
    }
  }

  @Test
  void aClosedFileIsNotRead() throws IOException {
    Checkpoint base = Checkpoint.open(small().write(folder.resolve("a.gguf")));
    BaseLinear linear = base.linear("m");
    base.close();
    base.close();
    assertThrows(IllegalStateException.class, linear::blockScale);
    assertThrows(IllegalStateException.class, () -> linear.weight().bytes());
    assertThrows(IllegalStateException.class, linear::bias);
  }

  @Test
  void aFolderWithOneGgufFile() throws IOException {
    small().write(folder.resolve("a.gguf"));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals("GGUF Q8_0 (1)", base.format());
    }
    new SafetensorsWriter().ramp("s.weight", 1, 2, 3).write(folder.resolve("model.safetensors"));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals("F32 (1)", base.format());
    }
  }

  /** Three GiB of holes before the weights. */
  @Test
  void readsBeyondTwoGibibytes() throws IOException {
    long far = 3L << 30;
    byte[] header = new GgufWriter().info("m.weight", Q8_0, far, 32, 1).bytes();
    Path file = folder.resolve("large.gguf");
    try (FileChannel channel = FileChannel.open(file, StandardOpenOption.CREATE_NEW, StandardOpenOption.WRITE,
        StandardOpenOption.SPARSE)) {
      channel.write(ByteBuffer.wrap(header), 0);
      channel.write(ByteBuffer.wrap(blocks(TWO)), header.length + far);
    } catch (IOException e) {
      System.out.println("skipped: the file system of " + folder + " takes no file of 3 GiB: " + e);
      Assumptions.assumeTrue(false, "no room for a sparse file of 3 GiB: " + e);
    }
    try (Checkpoint base = Checkpoint.open(file)) {
      assertEquals(31, base.linear("m").weight().bytes().get(31));
      assertEquals(TWO, base.linear("m").blockScale().getShort(0));
    } finally {
      Files.delete(file);
    }
  }

  @Test
  void stackedExpertsAreNoLinearLayers() throws IOException {
    GgufWriter writer = small().tensor("experts.weight", Q8_0, blocks(ONE, ONE), 32, 1, 2);
    try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("a.gguf")))) {
      assertEquals(Set.of("m"), base.linears().keySet());
      assertTrue(base.notes().get(0).contains("experts.weight I8 [2, 1, 32]"), base.notes()::toString);
    }
  }

  // ---- Names

  /** Of 8 rows and 2 heads, rows 0 1 2 3 of a head lie in the file as 0 2 1 3. */
  @ParameterizedTest
  @CsvSource({"llama, attn_q, self_attn.q_proj, true", "llama, attn_k, self_attn.k_proj, true",
      "llama, attn_v, self_attn.v_proj, false", "qwen2, attn_q, self_attn.q_proj, false",
      "qwen3, attn_k, self_attn.k_proj, false", "llama, ffn_up, mlp.up_proj, false"})
  void rowsOfQueriesAndKeys(String architecture, String name, String module, boolean reordered) throws IOException {
    byte[] weight = blocks(1, 2, 3, 4, 5, 6, 7, 8);
    byte[] bias = new byte[32];
    ByteBuffer.wrap(bias).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().put(new float[] {1, 2, 3, 4, 5, 6, 7, 8});
    GgufWriter writer = new GgufWriter().pair("general.architecture", architecture)
        .pair(architecture + ".attention.head_count", name.equals("attn_k") ? 4 : 2)
        .pair(architecture + ".attention.head_count_kv", name.equals("attn_k") ? 2 : 1)
        .tensor("blk.3." + name + ".weight", Q8_0, weight, 32, 8).tensor("blk.3." + name + ".bias", F32, bias, 8);
    try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("a.gguf")))) {
      BaseLinear linear = base.linear("model.layers.3." + module);
      int[] rows = reordered ? new int[] {0, 2, 1, 3, 4, 6, 5, 7} : new int[] {0, 1, 2, 3, 4, 5, 6, 7};
      ByteBuffer codes = linear.weight().bytes(5, 8 * 32 - 5);
      ByteBuffer scales = linear.blockScale();
      float[] biases = linear.bias();
      for (int row = 0; row < 8; row++) {
        assertEquals((byte) (rows[row] * 32 + 9), codes.get(row * 32 + 4));
        assertEquals(rows[row] + 1, scales.getShort(2 * row));
        assertEquals(rows[row] + 1, biases[row]);
      }
    }
  }

  @Test
  void namesOfOtherArchitecturesStay() throws IOException {
    GgufWriter writer = new GgufWriter().pair("general.architecture", "falcon")
        .tensor("blk.0.attn_q.weight", Q8_0, blocks(ONE), 32, 1).tensor("output.weight", F32, new byte[8], 2, 1);
    try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("a.gguf")))) {
      assertEquals(Set.of("blk.0.attn_q", "output"), base.linears().keySet());
      assertTrue(base.notes().get(0).contains("architecture falcon"), base.notes()::toString);
    }
  }

  static Stream<Arguments> headCounts() {
    return Stream.of(
        Arguments.of(new GgufWriter(), "llama.attention.head_count is null"),
        Arguments.of(new GgufWriter().pair("llama.attention.head_count", 3), "head_count is 3"),
        Arguments.of(new GgufWriter().pair("llama.attention.head_count", 0), "head_count is 0"),
        Arguments.of(new GgufWriter().pair("llama.attention.head_count", 8), "head_count is 8"),
        Arguments.of(new GgufWriter().raw("llama.attention.head_count", 9, 4, 4, 1, 0, 2), "head_count is null"));
  }

  @ParameterizedTest
  @MethodSource("headCounts")
  void rowsAreNotReorderedByGuess(GgufWriter writer, String message) throws IOException {
    writer.pair("general.architecture", "llama").tensor("blk.0.attn_q.weight", Q8_0, new byte[8 * 34], 32, 8);
    assertRejected(Status.INVALID_ARGUMENT, writer.bytes(), "blk.0.attn_q.weight", message);
  }

  // ---- Refused

  @Test
  void otherTypesAreNamed() throws IOException {
    GgufWriter writer = small().info("q4.weight", 12, 0, 256, 2).info("q6.weight", 14, 0, 256, 2)
        .info("new.weight", 77, 0, 256, 2);
    assertRejected(Status.UNSUPPORTED, writer.bytes(), "q4.weight [2, 256] is Q4_K",
        "6 tensors {F32=2, Q4_K=1, Q6_K=1, Q8_0=1, type 77=1}", "expected Q8_0, F32, F16 and BF16");
    assertRejected(Status.UNSUPPORTED, small().tensor("i.weight", 26, new byte[8], 2, 1).bytes(),
        "i.weight I32 [1, 2]");
  }

  static Stream<Arguments> refused() {
    GgufWriter adapter = small().pair("general.type", "adapter");
    GgufWriter part = small().raw("split.count", 2, 2, 3);
    return Stream.of(
        Arguments.of(Status.UNSUPPORTED, adapter, "a GGUF LoRA is not read here"),
        Arguments.of(Status.UNSUPPORTED, part, "one of 3 parts"),
        Arguments.of(Status.UNSUPPORTED, small().version(1), "version 1, expected 2 or 3"),
        Arguments.of(Status.UNSUPPORTED, small().version(4), "version 4"),
        Arguments.of(Status.UNSUPPORTED, small().version(3 << 24), "version 3 in big-endian order"),
        Arguments.of(Status.INVALID_ARGUMENT, small().counts(-1, 2), "18446744073709551615 tensors, which"),
        Arguments.of(Status.INVALID_ARGUMENT, small().counts(1L << 40, 2), "1099511627776 tensors, which"),
        Arguments.of(Status.INVALID_ARGUMENT, small().counts(3, 1L << 62), "4611686018427387904 key-value pairs"),
        Arguments.of(Status.INVALID_ARGUMENT, small().pair("tokens", 1), "key tokens twice"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", 13, 1, 0), "x has type 13"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", 7, 1, 2), "x is a boolean of value 2"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", 9, 4, 9, 1, 0, 9, 1, 0, 9, 1, 0, 9, 1, 0, 9, 1, 0),
            "a list of type 9, 4 deep"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", 9, 4, 4, 0, 1 << 30), "4611686018427387904 items of x"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", STRING, 8, -1), "18446744073709551615 bytes wanted"),
        Arguments.of(Status.INVALID_ARGUMENT, small().raw("x", STRING, 8, 1 << 20), "1048576 bytes wanted"),
        Arguments.of(Status.INVALID_ARGUMENT, small().pair("\u00ff", 1), "a key that is not UTF-8"),
        Arguments.of(Status.INVALID_ARGUMENT, small().pair("general.alignment", 0), "general.alignment is 0"),
        Arguments.of(Status.INVALID_ARGUMENT, small().pair("general.alignment", 48), "general.alignment is 48"),
        Arguments.of(Status.INVALID_ARGUMENT, small().pair("general.alignment", "32"), "general.alignment is 32, exp"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("m.weight", F32, 0, 1), "tensor m.weight twice"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a\u0000", F32, 0, 1), "control characters"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a".repeat(65536), F32, 0, 1), "name of 65536 bytes"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 0), "a has 0 dimensions"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 0, 1, 1, 1, 1, 1), "a has 5 dimensions"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 0, 0, 3), "a has a dimension 0"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 0, -1), "a dimension 18446744073709551615"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 0, 1L << 40, 1L << 40), "too large"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", Q8_0, 0, 33, 2), "rows of 33, expected a multiple of"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 16, 1), "byte 16 of the data, expected a multip"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 32, 1), "inside m.weight, which ends at 136"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 1L << 62, 1), "from byte 4611686018427387904"),
        Arguments.of(Status.INVALID_ARGUMENT, small().info("a", F32, 224, 1), "a has 4 bytes from byte 224"),
        Arguments.of(Status.INVALID_ARGUMENT, small().tensor("n.weight", Q8_0, blocks(ONE), 32, 1)
            .tensor("n.bias", F32, new byte[8], 2), "n.bias F32 [2]: expected F32, F16 or BF16 [1]"));
  }

  @ParameterizedTest
  @MethodSource("refused")
  void refusedInWords(Status status, GgufWriter writer, String message) throws IOException {
    assertRejected(status, writer.bytes(), message);
  }

  @Test
  void scalesThatAreNotFinite() throws IOException {
    for (int bits : new int[] {0x7c00, 0xfc00, 0x7e00}) {
      GgufWriter writer = new GgufWriter().tensor("m.weight", Q8_0, blocks(ONE, ONE, ONE, bits), 64, 2);
      try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("a.gguf")))) {
        FormatException e = assertThrows(FormatException.class, () -> base.linear("m").blockScale());
        assertTrue(e.getMessage().contains("block 1 of row 1 is"), e.getMessage());
      }
    }
  }

  /** Every prefix is refused in words, and every byte set to 0xff is refused or read: nothing else happens. */
  @Test
  void cutShortAndChanged() throws IOException {
    byte[] whole = small().bytes();
    for (int i = 0; i < whole.length; i++) {
      assertRejected(Status.INVALID_ARGUMENT, Arrays.copyOf(whole, i), "a.gguf");
      byte[] changed = whole.clone();
      changed[i] = (byte) 0xff;
      try (Checkpoint base = Checkpoint.open(Files.write(folder.resolve("a.gguf"), changed))) {
        base.linears().values().forEach(linear -> linear.weight().bytes());
      } catch (FormatException e) {
        assertTrue(e.getMessage().contains("a.gguf"), e.getMessage());
      }
    }
  }

  /** The real file with some bytes of its header replaced, moved or left out. */
  @Test
  void aDamagedHeaderOfTheRealTool() throws IOException {
    byte[] whole = Files.readAllBytes(Fixtures.path("llama/base_gguf/llama-Q8_0.gguf"));
    Random random = new Random(5);
    int read = 0;
    for (int i = 0; i < 1500; i++) {
      byte[] changed = whole.clone();
      for (int j = random.nextInt(3); j >= 0; j--) {
        int at = random.nextInt(9000);
        changed[at] = (byte) (random.nextBoolean() ? random.nextInt(256) : changed[at] + 1);
      }
      if (i % 5 == 0) {
        int at = random.nextInt(9000);
        int count = 1 + random.nextInt(9);
        System.arraycopy(whole, at + count, changed, at, whole.length - at - count);
      }
      try (Checkpoint base = Checkpoint.open(Files.write(folder.resolve("a.gguf"), changed))) {
        for (BaseLinear linear : base.linears().values()) {
          linear.weight().bytes();
          linear.bias();
        }
        read++;
      } catch (FormatException e) {
        assertTrue(e.getMessage().contains("a.gguf"), e.getMessage());
      }
    }
    assertTrue(read > 100 && read < 1400, read + " of 1500 files were read");
  }

  private void assertRejected(Status status, byte[] bytes, String... parts) throws IOException {
    Path file = Files.write(folder.resolve("a.gguf"), bytes);
    FormatException e = assertThrows(FormatException.class, () -> Checkpoint.open(file).close());
    for (String part : parts) {
      assertTrue(e.getMessage().contains(part), () -> "no \"" + part + "\" in: " + e.getMessage());
    }
    assertEquals(status, e.status(), e.getMessage());
  }
}
