// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static io.octolora.SafetensorsWriter.raw;
import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.ReadOnlyBufferException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

/** What the format allows and forbids, rule by rule. */
class SafetensorsFileTest {
  @TempDir Path folder;
  private Path file;

  @BeforeEach
  void name() {
    file = folder.resolve("x.safetensors");
  }

  static Stream<Arguments> rejectedHeaders() {
    return Stream.of(
        broken("leading space", " {}", 0, "starts with byte 0x20"),
        broken("not an object", "[]", 0, "starts with byte 0x5b"),
        broken("empty", "", 0, "starts with nothing"),
        broken("cut short", "{\"a\":{\"dtype\":\"F32\"", 0, "bad JSON"),
        broken("trailing NUL", "{}\0", 0, "bad JSON"),
        broken("trailing value", "{} 1", 0, "text after the JSON value"),
        broken("comment", "{/**/}", 0, "bad JSON"),
        broken("same tensor twice", "{" + entry("a", "I8", "[1]", 0, 1) + "," + entry("a", "I8", "[1]", 0, 1) + "}", 1,
            "Duplicate", "a"),
        broken("metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "Duplicate", "__metadata__"),
        broken("metadata key twice", "{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, "Duplicate", "k"),
        broken("metadata no object", "{\"__metadata__\":3}", 0, "__metadata__", "3", "expected an object"),
        broken("metadata value no string", "{\"__metadata__\":{\"k\":1}}", 0, "__metadata__ k", "1",
            "expected a string"),
        broken("metadata value null", "{\"__metadata__\":{\"k\":null}}", 0, "__metadata__ k", "expected a string"),
        broken("entry no object", "{\"a\":1}", 0, "a: 1", "expected an object"),
        broken("field twice", "{\"a\":{\"dtype\":\"I8\",\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0,
            "Duplicate"),
        broken("no dtype", "{\"a\":{\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "a: no dtype"),
        broken("no shape", "{\"a\":{\"dtype\":\"I8\",\"data_offsets\":[0,0]}}", 0, "a: no shape"),
        broken("no offsets", "{\"a\":{\"dtype\":\"I8\",\"shape\":[0]}}", 0, "a: no data_offsets"),
        broken("dtype in lower case", one("f32", "[1]", 0, 4), 4, "a: dtype \"f32\"", "F32"),
        broken("dtype unknown", one("F128", "[1]", 0, 16), 16, "a: dtype \"F128\""),
        broken("dtype no string", "{\"a\":{\"dtype\":8,\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "a: dtype", "8"),
        broken("shape no array", one("I8", "1", 0, 1), 1, "a: shape", "expected an array"),
        broken("negative dimension", one("I8", "[-1]", 0, 1), 1, "a: shape", "-1"),
        broken("two negative dimensions", one("I8", "[-1,-1]", 0, 1), 1, "a: shape", "-1"),
        broken("minus zero", one("I8", "[-0]", 0, 0), 0, "a: shape", "-0"),
        broken("fractional dimension", one("I8", "[1.0]", 0, 1), 1, "a: shape", "1.0"),
        broken("dimension as text", one("I8", "[\"1\"]", 0, 1), 1, "a: shape", "1"),
        broken("dimension null", one("I8", "[null]", 0, 1), 1, "a: shape", "null"),
        broken("nested dimension", one("I8", "[[1]]", 0, 1), 1, "a: shape"),
        broken("dimension 2^63", one("I8", "[9223372036854775808]", 0, 1), 1, "a: shape", "9223372036854775808"),
        broken("product overflows", one("I8", "[4294967296,4294967296]", 0, 0), 0, "a: I8", "4294967296", "2^63"),
        broken("product overflows before a zero", one("I8", "[4294967296,4294967296,0]", 0, 0), 0, "2^63"),
        broken("bits overflow", one("I8", "[2305843009213693952]", 0, 0), 0, "2305843009213693952", "2^63"),
        broken("too few bytes", one("F32", "[2,3]", 0, 23), 23, "a: F32 [2, 3] has 192 bits", "0 to 23", "23 bytes"),
        broken("too many bytes", one("F32", "[2,3]", 0, 25), 25, "a: F32 [2, 3] has 192 bits", "25 bytes"),
        broken("no whole byte", one("F4", "[3]", 0, 2), 2, "a: F4 [3] has 12 bits"),
        broken("one offset", "{\"a\":{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0]}}", 0, "a: 1 data_offsets"),
        broken("three offsets", "{\"a\":{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0,0]}}", 0,
            "a: 3 data_offsets"),
        broken("negative offset", one("I8", "[1]", -1, 0), 1, "a: data_offsets", "-1"),
        broken("end before begin", one("I8", "[1]", 1, 0), 1, "a: data_offsets 1 to 0 run backwards"),
        broken("not starting at 0", one("I8", "[1]", 1, 2), 2, "a begins at byte 1", "a hole after 0"),
        broken("hole", two(0, 1, 2, 3), 3, "b begins at byte 2", "a hole after 1", "where a ends"),
        broken("overlap", "{" + entry("a", "I8", "[2]", 0, 2) + "," + entry("b", "I8", "[2]", 1, 3) + "}", 3,
            "b begins at byte 1", "inside or before 2"),
        broken("alias", two(0, 1, 0, 1), 1, "b begins at byte 0", "inside or before 1"),
        broken("file too short", one("I8", "[4]", 0, 4), 3, "the tensors have 4 bytes, the file has 3"),
        broken("file too long", one("I8", "[4]", 0, 4), 5, "the tensors have 4 bytes, the file has 5"),
        broken("data without a tensor", "{}", 1, "the tensors have 0 bytes, the file has 1"),
        broken("lone surrogate in a name", "{\"\\ud800\":{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0,
            "lone surrogate \\ud800"),
        broken("lone low surrogate in metadata", "{\"__metadata__\":{\"k\":\"\\udc00x\"}}", 0,
            "lone surrogate \\udc00"),
        broken("deep nesting", "{\"a\":" + "[".repeat(100_000) + "]".repeat(100_000) + "}", 0, "a"),
        broken("deep nesting in an extra field", "{\"a\":{\"x\":" + "[".repeat(100_000) + "]".repeat(100_000) + "}}", 0,
            "bad JSON"),
        broken("long number", one("I8", "[" + "9".repeat(5000) + "]", 0, 1), 1, "bad JSON"));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("rejectedHeaders")
  void rejects(String rule, String header, int dataBytes, List<String> messageParts) throws IOException {
    raw(file, header, new byte[dataBytes]);
    assertRejected(messageParts.toArray(new String[0]));
  }

  static Stream<Arguments> acceptedHeaders() {
    return Stream.of(
        Arguments.of("nothing", "{}", 0, 0),
        Arguments.of("trailing blanks", "{} \n\t\r ", 0, 0),
        Arguments.of("metadata null", "{\"__metadata__\":null}", 0, 0),
        Arguments.of("scalar", one("F32", "[]", 0, 4), 4, 1),
        Arguments.of("empty tensor at 0", one("F32", "[3,0]", 0, 0), 0, 1),
        Arguments.of("empty tensor between others",
            "{" + entry("a", "I8", "[2]", 0, 2) + "," + entry("e", "I8", "[0]", 2, 2) + ","
                + entry("b", "I8", "[1]", 2, 3) + "}", 3, 3),
        Arguments.of("any order", two(1, 2, 0, 1), 2, 2),
        Arguments.of("extra fields, any order",
            "{\"a\":{\"more\":{\"x\":[1,{\"y\":null}]},\"data_offsets\":[0,1],\"shape\":[1],\"dtype\":\"I8\"}}", 1, 1),
        Arguments.of("packed type", one("F4", "[3,2]", 0, 3), 3, 1),
        Arguments.of("six-bit type", one("F6_E2M3", "[4]", 0, 3), 3, 1),
        Arguments.of("unaligned", "{" + entry("a", "I8", "[1]", 0, 1) + "," + entry("b", "F32", "[1]", 1, 5) + "}", 5,
            2));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("acceptedHeaders")
  void accepts(String rule, String header, int dataBytes, int tensors) throws IOException {
    raw(file, header, new byte[dataBytes]);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      assertEquals(tensors, opened.tensors().size());
      opened.tensors().values().forEach(tensor -> assertEquals(tensor.byteSize(), tensor.bytes().remaining()));
    }
  }

  @Test
  void everyElementTypeIsReadByItsName() throws IOException {
    for (ElementType type : ElementType.values()) {
      raw(file, one(type.name(), "[8]", 0, type.bits()), new byte[type.bits()]);
      try (SafetensorsFile opened = SafetensorsFile.open(file)) {
        assertEquals(type, opened.tensors().get("a").type());
      }
    }
    assertEquals(22, ElementType.values().length);
  }

  @Test
  void rejectsAFileBelowEightBytes() throws IOException {
    Files.write(file, new byte[7]);
    assertRejected("7 bytes", "at least 8");
    Files.write(file, new byte[0]);
    assertRejected("0 bytes", "at least 8");
  }

  @Test
  void rejectsAHeaderLengthAboveTheLimitBeforeReading() throws IOException {
    byte[] header = "{}".getBytes(StandardCharsets.UTF_8);
    raw(file, 100_000_001, header, new byte[0]);
    assertRejected("header length 100000001", "100000000");
    raw(file, -1, header, new byte[0]);
    assertRejected("header length 18446744073709551615");
    raw(file, Long.MAX_VALUE, header, new byte[0]);
    assertRejected("header length 9223372036854775807");
  }

  @Test
  void rejectsAHeaderThatEndsBehindTheFile() throws IOException {
    raw(file, 3, "{}".getBytes(StandardCharsets.UTF_8), new byte[0]);
    assertRejected("header of 3 bytes", "file of 10 bytes");
    raw(file, 100_000_000, "{}".getBytes(StandardCharsets.UTF_8), new byte[0]);
    assertRejected("header of 100000000 bytes", "file of 10 bytes");
  }

  @Test
  void rejectsInvalidUtf8() throws IOException {
    byte[][] invalid = {{(byte) 0xff}, {(byte) 0xc3}, {(byte) 0xc0, (byte) 0x80}, {(byte) 0xed, (byte) 0xa0,
        (byte) 0x80},
        {(byte) 0xf4, (byte) 0x90, (byte) 0x80, (byte) 0x80}};
    for (byte[] sequence : invalid) {
      ByteBuffer header = ByteBuffer.allocate(40);
      header.put("{\"__metadata__\":{\"k\":\"".getBytes(StandardCharsets.UTF_8)).put(sequence)
          .put("\"}}".getBytes(StandardCharsets.UTF_8));
      byte[] text = new byte[header.flip().remaining()];
      header.get(text);
      raw(file, text, new byte[0]);
      assertRejected("invalid UTF-8 at byte 22");
    }
  }

  @Test
  void namesForeignFiles() throws IOException {
    Files.write(file, "GGUF\3\0\0\0\0\0\0\0\0\0\0\0".getBytes(StandardCharsets.ISO_8859_1));
    assertEquals(Status.UNSUPPORTED, assertRejected("GGUF").status());
    Files.write(file, "PK\3\4\0\0\b\b\0\0\0\0".getBytes(StandardCharsets.ISO_8859_1));
    assertEquals(Status.UNSUPPORTED, assertRejected("zip archive").status());
    Files.write(file, "\u0080\2}q\0.\0\0\0\0\0\0".getBytes(StandardCharsets.ISO_8859_1));
    assertEquals(Status.UNSUPPORTED, assertRejected("pickle").status());
  }

  @Test
  void aFolderIsNoFile() {
    FormatException e = assertThrows(FormatException.class, () -> SafetensorsFile.open(folder));
    assertTrue(e.getMessage().contains(folder + " is a folder"), e.getMessage());
  }

  @Test
  void aMissingFileIsAnIoException() {
    assertThrows(NoSuchFileException.class, () -> SafetensorsFile.open(file));
  }

  @Test
  void readsEveryFloatTypeExactly() throws IOException {
    ByteBuffer halves = ByteBuffer.allocate(6).order(ByteOrder.LITTLE_ENDIAN);
    halves.putShort((short) 0x3c01).putShort((short) 0x8001).putShort((short) 0x7bff);
    new SafetensorsWriter().bytes("pad", "U8", new long[] {1}, new byte[1])
        .bytes("f16", "F16", new long[] {3}, halves.array())
        .bytes("bf16", "BF16", new long[] {3}, halves.array())
        .floats("f32", new long[] {1, 2}, -0f, 0x1.234567p-140f)
        .write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Map<String, Tensor> tensors = opened.tensors();
      assertArrayEquals(new float[] {1 + 0x1p-10f, -0x1p-24f, 65504}, tensors.get("f16").toFloats());
      assertArrayEquals(new float[] {0x1.02p-7f, -0x1p-133f, 0x1.fep120f}, tensors.get("bf16").toFloats());
      assertArrayEquals(new float[] {-0f, 0x1.234567p-140f}, tensors.get("f32").toFloats());
      assertArrayEquals(new float[] {-0x1p-24f}, tensors.get("f16").toFloats(1, 1));
      assertEquals(List.of("pad", "f16", "bf16", "f32"), List.copyOf(tensors.keySet()));
      FormatException e = assertThrows(FormatException.class, () -> tensors.get("pad").toFloats());
      assertTrue(e.getMessage().contains("pad U8 [1]: type U8"), e.getMessage());
    }
  }

  @Test
  void readsScalarsOfEveryNumberType() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    byte[] minusOne = new byte[8];
    java.util.Arrays.fill(minusOne, (byte) 0xff);
    for (String type : List.of("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")) {
      int width = ElementType.valueOf(type).bits() / 8;
      writer.bytes(type, type, new long[0], java.util.Arrays.copyOf(minusOne, width));
    }
    writer.bytes("F64", "F64", new long[] {1, 1}, new byte[] {0, 0, 0, 0, 0, 0, (byte) 0xf0, 0x3f});
    writer.bytes("BF16", "BF16", new long[0], new byte[] {0, 0x41});
    writer.bytes("F16", "F16", new long[0], new byte[] {0, 0x49});
    writer.floats("F32", new long[0], 2.5f);
    writer.floats("two", new long[] {2}, 1, 2);
    writer.bytes("BOOL", "BOOL", new long[0], new byte[1]);
    writer.write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Map<String, Tensor> tensors = opened.tensors();
      Map<String, Double> expected = Map.ofEntries(Map.entry("I8", -1.0), Map.entry("I16", -1.0), Map.entry("I32",
          -1.0),
          Map.entry("I64", -1.0), Map.entry("U8", 255.0), Map.entry("U16", 65535.0), Map.entry("U32", 0x1p32 - 1),
          Map.entry("U64", 0x1p64), Map.entry("F64", 1.0), Map.entry("BF16", 8.0), Map.entry("F16", 10.0),
          Map.entry("F32", 2.5));
      expected.forEach((name, value) -> assertEquals(value, tensors.get(name).scalar(), name));
      assertThrows(FormatException.class, () -> tensors.get("two").scalar());
      assertThrows(FormatException.class, () -> tensors.get("BOOL").scalar());
    }
  }

  @Test
  void buffersAreReadOnlyLittleEndianAndBounded() throws IOException {
    new SafetensorsWriter().bytes("a", "U8", new long[] {4}, new byte[] {1, 2, 3, 4}).write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Tensor tensor = opened.tensors().get("a");
      ByteBuffer bytes = tensor.bytes(1, 2);
      assertTrue(bytes.isDirect());
      assertEquals(0x0302, bytes.getShort());
      assertEquals(0, bytes.remaining());
      assertThrows(ReadOnlyBufferException.class, () -> bytes.put(0, (byte) 0));
      assertEquals(0, tensor.bytes(4, 0).remaining());
      assertThrows(IndexOutOfBoundsException.class, () -> tensor.bytes(3, 2));
      assertThrows(IndexOutOfBoundsException.class, () -> tensor.bytes(-1, 1));
      assertThrows(IndexOutOfBoundsException.class, () -> tensor.bytes(Long.MAX_VALUE, 1));
      assertThrows(IndexOutOfBoundsException.class, () -> tensor.bytes(0, -1));
    }
  }

  @Test
  void closingTwiceIsFineAndReadingAfterwardsIsNot() throws IOException {
    new SafetensorsWriter().ramp("a", 1, 2).metadata("k", "v").write(file);
    SafetensorsFile opened = SafetensorsFile.open(file);
    Tensor tensor = opened.tensors().get("a");
    ByteBuffer before = tensor.bytes();
    opened.close();
    opened.close();
    IllegalStateException e = assertThrows(IllegalStateException.class, tensor::bytes);
    assertTrue(e.getMessage().contains(file + " is closed"), e.getMessage());
    assertThrows(IllegalStateException.class, tensor::toFloats);
    assertEquals(1f, before.getFloat(4));
    assertEquals(Map.of("k", "v"), opened.metadata());
  }

  @Test
  void anInterruptedThreadStillReads() throws IOException {
    new SafetensorsWriter().ramp("a", 1, 3).write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Tensor tensor = opened.tensors().get("a");
      Thread.currentThread().interrupt();
      float[] interrupted = tensor.toFloats();
      assertTrue(Thread.interrupted());
      assertArrayEquals(new float[] {0, 1, 2}, interrupted);
      assertArrayEquals(new float[] {0, 1, 2}, tensor.toFloats());
    }
  }

  @Test
  void shapesAreCopies() throws IOException {
    new SafetensorsWriter().ramp("a", 1, 2, 3).write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Tensor tensor = opened.tensors().get("a");
      tensor.shape()[0] = 99;
      assertArrayEquals(new long[] {2, 3}, tensor.shape());
      assertEquals(file + ": a F32 [2, 3]", tensor.toString());
    }
  }

  private FormatException assertRejected(String... messageParts) {
    FormatException e = assertThrows(FormatException.class, () -> SafetensorsFile.open(file).close());
    assertTrue(e.getMessage().contains(file.toString()), e.getMessage());
    for (String part : messageParts) {
      assertTrue(e.getMessage().contains(part), () -> "no \"" + part + "\" in: " + e.getMessage());
    }
    return e;
  }

  private static Arguments broken(String rule, String header, int dataBytes, String... messageParts) {
    return Arguments.of(rule, header, dataBytes, List.of(messageParts));
  }

  private static String entry(String name, String type, String shape, long begin, long end) {
    return "\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%d,%d]}".formatted(name, type, shape, begin, end);
  }

  private static String one(String type, String shape, long begin, long end) {
    return "{" + entry("a", type, shape, begin, end) + "}";
  }

  private static String two(long beginA, long endA, long beginB, long endB) {
    return "{" + entry("a", "I8", "[1]", beginA, endA) + "," + entry("b", "I8", "[1]", beginB, endB) + "}";
  }
}
