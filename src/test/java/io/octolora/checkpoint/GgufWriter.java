// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;

/** Bytes of a GGUF file, right or wrong as a test wants them. */
final class GgufWriter {
  static final int F32 = 0;
  static final int F16 = 1;
  static final int Q8_0 = 8;
  static final int STRING = 8;

  private final ByteArrayOutputStream pairs = new ByteArrayOutputStream();
  private final ByteArrayOutputStream infos = new ByteArrayOutputStream();
  private final ByteArrayOutputStream data = new ByteArrayOutputStream();
  private int version = 3;
  private int alignment = 32;
  private long pairCount;
  private long tensorCount;

  GgufWriter version(int number) {
    version = number;
    return this;
  }

  /** Of the data, without a word of it in the pairs. */
  GgufWriter alignment(int bytes) {
    alignment = bytes;
    return this;
  }

  GgufWriter counts(long tensors, long keys) {
    tensorCount = tensors;
    pairCount = keys;
    return this;
  }

  GgufWriter pair(String key, String value) {
    return raw(key, STRING).text(pairs, value);
  }

  GgufWriter pair(String key, long value) {
    return raw(key, 4, 4, value);
  }

  GgufWriter pair(String key, String... values) {
    raw(key, 9).little(pairs, 4, STRING).little(pairs, 8, values.length);
    for (String value : values) {
      text(pairs, value);
    }
    return this;
  }

  /** A value as its type's number and numbers of so many bytes. */
  GgufWriter raw(String key, int type, int bytes, long... numbers) {
    raw(key, type).little(pairs, bytes, numbers);
    return this;
  }

  private GgufWriter raw(String key, int type) {
    pairCount++;
    text(pairs, key);
    return little(pairs, 4, type);
  }

  /** A tensor behind those before it; dimensions as the file has them, the closest in memory first. */
  GgufWriter tensor(String name, int type, byte[] bytes, long... dimensions) {
    while (data.size() % alignment != 0) {
      data.write(0);
    }
    info(name, type, data.size(), dimensions);
    data.writeBytes(bytes);
    return this;
  }

  /** A tensor's description alone. */
  GgufWriter info(String name, int type, long offset, long... dimensions) {
    tensorCount++;
    text(infos, name);
    little(infos, 4, dimensions.length);
    little(infos, 8, dimensions);
    little(infos, 4, type);
    return little(infos, 8, offset);
  }

  /** Blocks of 32 codes, each the byte of its place from 0 on, with scales of fp16 bits. */
  static byte[] blocks(int... scales) {
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    for (int i = 0; i < scales.length; i++) {
      out.write(scales[i]);
      out.write(scales[i] >> 8);
      for (int j = 0; j < 32; j++) {
        out.write(i * 32 + j);
      }
    }
    return out.toByteArray();
  }

  byte[] bytes() {
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    out.writeBytes("GGUF".getBytes(StandardCharsets.US_ASCII));
    little(out, 4, version);
    little(out, 8, tensorCount, pairCount);
    out.writeBytes(pairs.toByteArray());
    out.writeBytes(infos.toByteArray());
    while (out.size() % alignment != 0) {
      out.write(0);
    }
    out.writeBytes(data.toByteArray());
    return out.toByteArray();
  }

  Path write(Path file) throws IOException {
    return Files.write(file, bytes());
  }

  private GgufWriter text(ByteArrayOutputStream out, String text) {
    byte[] bytes = text.getBytes(StandardCharsets.ISO_8859_1);
    little(out, 8, bytes.length);
    out.writeBytes(bytes);
    return this;
  }

  private GgufWriter little(ByteArrayOutputStream out, int bytes, long... numbers) {
    for (long number : numbers) {
      for (int i = 0; i < bytes; i++) {
        out.write((int) (number >> 8 * i));
      }
    }
    return this;
  }
}
