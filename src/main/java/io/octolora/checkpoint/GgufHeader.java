// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.InputFiles;
import java.io.BufferedInputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.TreeMap;

/**
 * The header of a GGUF file, read far enough to say what is in it: magic, version, counts, key-value pairs, then the
 * tensors' names, shapes and types. GGUF is not run here: its Q8_0 has a scale for each 32 inputs.
 */
final class GgufHeader {
  /** The bytes "GGUF" as a little-endian number. */
  static final int MAGIC = 0x46554747;

  /** More bytes of keys and names than this are not read. */
  private static final long LIMIT = 256L << 20;
  private static final Map<Integer, String> TYPES = Map.ofEntries(Map.entry(0, "F32"), Map.entry(1, "F16"),
      Map.entry(2, "Q4_0"), Map.entry(3, "Q4_1"), Map.entry(6, "Q5_0"), Map.entry(7, "Q5_1"), Map.entry(8, "Q8_0"),
      Map.entry(9, "Q8_1"), Map.entry(10, "Q2_K"), Map.entry(11, "Q3_K"), Map.entry(12, "Q4_K"),
      Map.entry(13, "Q5_K"), Map.entry(14, "Q6_K"), Map.entry(15, "Q8_K"), Map.entry(30, "BF16"));
  /** Bytes of a value by its type's number; 0 for strings and arrays. */
  private static final int[] VALUE_BYTES = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  private static final int STRING = 8;
  private static final int ARRAY = 9;

  private final InputStream in;
  private long left;

  private GgufHeader(InputStream in, long left) {
    this.in = in;
    this.left = left;
  }

  /** What to say of the file; damage in it is part of that. */
  static FormatException refusal(Path file) {
    InputFiles.refuseSpecial(file);
    String content;
    try (InputStream in = new BufferedInputStream(Files.newInputStream(file))) {
      content = new GgufHeader(in, Math.min(Files.size(file), LIMIT)).describe();
    } catch (EOFException e) {
      content = "with a header that is cut short or damaged (%s)".formatted(e.getMessage());
    } catch (IOException e) {
      throw new UncheckedIOException(file + ": " + e.getMessage(), e);
    }
    return new FormatException(Status.UNSUPPORTED, ("%s: this is a GGUF file, %s; its Q8_0 has one scale for each 32 "
        + "inputs of a row, which int8 layers here do not have (one scale a row, or one for all): expected a "
        + "safetensors file").formatted(file, content));
  }

  private String describe() throws IOException {
    if (number(4) != MAGIC) {
      return "by its name, but not by its first bytes";
    }
    long version = number(4);
    long tensors = number(8);
    long pairs = number(8);
    for (long i = 0; i < pairs; i++) {
      skip(number(8));
      skipValue(number(4), 0);
    }
    Map<String, Integer> types = new TreeMap<>();
    for (long i = 0; i < tensors; i++) {
      skip(number(8));
      long dimensions = number(4);
      skip(dimensions > 8 ? -1 : dimensions * 8);
      int type = (int) number(4);
      types.merge(TYPES.getOrDefault(type, "type " + type), 1, Integer::sum);
      skip(8);
    }
    return "version %d with %d tensors %s".formatted(version, tensors, types);
  }

  private void skipValue(long type, int depth) throws IOException {
    if (type == STRING) {
      skip(number(8));
    } else if (type == ARRAY && depth < 4) {
      long item = number(4);
      long count = number(8);
      if (item >= 0 && item < VALUE_BYTES.length && VALUE_BYTES[(int) item] > 0) {
        skip(count < 0 || count > LIMIT ? -1 : count * VALUE_BYTES[(int) item]);
        return;
      }
      for (long i = 0; i < count; i++) {
        skipValue(item, depth + 1);
      }
    } else {
      skip(type >= 0 && type < VALUE_BYTES.length && type != ARRAY ? VALUE_BYTES[(int) type] : -1);
    }
  }

  /** Little-endian; counts and lengths of 2<sup>63</sup> and above come out negative. */
  private long number(int bytes) throws IOException {
    long value = 0;
    require(bytes);
    for (int i = 0; i < bytes; i++) {
      int next = in.read();
      if (next < 0) {
        throw new EOFException("it ends inside a number");
      }
      value |= (long) next << 8 * i;
    }
    return value;
  }

  private void skip(long bytes) throws IOException {
    require(bytes);
    in.skipNBytes(bytes);
  }

  private void require(long bytes) throws EOFException {
    if (bytes < 0 || bytes > left) {
      throw new EOFException("%s bytes wanted, %d left".formatted(Long.toUnsignedString(bytes), left));
    }
    left -= bytes;
  }
}
