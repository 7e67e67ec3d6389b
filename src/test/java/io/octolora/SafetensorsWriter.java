// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

/** Writes safetensors files for tests: valid ones tensor by tensor, broken ones from a header's text. */
public final class SafetensorsWriter {
  private final List<String> entries = new ArrayList<>();
  private final List<String> metadata = new ArrayList<>();
  private final ByteArrayOutputStream data = new ByteArrayOutputStream();

  /** A tensor whose bytes are given. */
  public SafetensorsWriter bytes(String name, String type, long[] shape, byte[] bytes) {
    entries.add("%s:{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%d,%d]}".formatted(quote(name), type,
        Arrays.toString(shape), data.size(), data.size() + bytes.length));
    data.writeBytes(bytes);
    return this;
  }

  /** fp32 values in row-major order. */
  public SafetensorsWriter floats(String name, long[] shape, float... values) {
    ByteBuffer bytes = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
    bytes.asFloatBuffer().put(values);
    return bytes(name, "F32", shape, bytes.array());
  }

  /** fp32 values 0, step, 2·step, …; as many as the shape asks for. */
  public SafetensorsWriter ramp(String name, float step, long... shape) {
    int count = (int) Arrays.stream(shape).reduce(1, (a, b) -> a * b);
    float[] values = new float[count];
    IntStream.range(0, count).forEach(i -> values[i] = i * step);
    return floats(name, shape, values);
  }

  /** int8 codes 0, 1, 2, … modulo 127. */
  public SafetensorsWriter codes(String name, long... shape) {
    byte[] bytes = new byte[(int) Arrays.stream(shape).reduce(1, (a, b) -> a * b)];
    IntStream.range(0, bytes.length).forEach(i -> bytes[i] = (byte) (i % 127));
    return bytes(name, "I8", shape, bytes);
  }

  /** A linear layer as bitsandbytes writes it, without bias. */
  public SafetensorsWriter bitsandbytes(String module, int n, int k) {
    return codes(module + ".weight", n, k).ramp(module + ".SCB", 1, n)
        .bytes(module + ".weight_format", "U8", new long[0], new byte[1]);
  }

  public SafetensorsWriter metadata(String key, String value) {
    metadata.add(quote(key) + ":" + quote(value));
    return this;
  }

  public Path write(Path file) throws IOException {
    List<String> header = new ArrayList<>(entries);
    if (!metadata.isEmpty()) {
      header.add("\"__metadata__\":{" + String.join(",", metadata) + "}");
    }
    return raw(file, header.stream().collect(Collectors.joining(",", "{", "}")), data.toByteArray());
  }

  /** Header length, the header as it is, the data as it is. */
  public static Path raw(Path file, String header, byte[] data) throws IOException {
    return raw(file, header.getBytes(StandardCharsets.UTF_8), data);
  }

  public static Path raw(Path file, byte[] header, byte[] data) throws IOException {
    return raw(file, header.length, header, data);
  }

  public static Path raw(Path file, long headerLength, byte[] header, byte[] data) throws IOException {
    ByteBuffer bytes = ByteBuffer.allocate(8 + header.length + data.length).order(ByteOrder.LITTLE_ENDIAN);
    bytes.putLong(headerLength).put(header).put(data);
    return Files.write(file, bytes.array());
  }

  public static String quote(String text) {
    StringBuilder quoted = new StringBuilder("\"");
    for (char c : text.toCharArray()) {
      quoted.append(c < ' ' || c == '"' || c == '\\' || Character.isSurrogate(c) ? "\\u%04x".formatted((int) c) : c);
    }
    return quoted.append('"').toString();
  }
}
