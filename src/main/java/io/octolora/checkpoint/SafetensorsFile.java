// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * One safetensors file of any size, memory-mapped: 8 bytes header length N (little-endian), N bytes JSON, then the
 * tensors' data without holes. {@link #open} checks everything that the reference reader (huggingface/safetensors) or
 * its documentation asks for; where the two differ it takes the stricter one, so that no two readers can see different
 * tensors in a file that is accepted here.
 *
 * <p>The mapping is freed by the garbage collector once the file is closed and no buffer of it is in use. Shortening
 * the file while it is open makes reading fail with an InternalError of the JVM. Safe for use by several threads.
 */
public final class SafetensorsFile implements AutoCloseable {
  /** The reference reader's limit, itself allowed. */
  static final long MAX_HEADER_BYTES = 100_000_000;

  private final MappedFile data;
  private final Map<String, Tensor> tensors;
  private final Map<String, String> metadata;

  private SafetensorsFile(MappedFile data, Header header, long dataStart) {
    this.data = data;
    this.metadata = Collections.unmodifiableMap(header.metadata);
    Map<String, Tensor> byName = new LinkedHashMap<>();
    for (Entry entry : header.entries) {
      byName.put(entry.name, new Tensor(data, entry.name, entry.type, entry.shape, entry.elementCount,
          dataStart + entry.begin, entry.end - entry.begin));
    }
    this.tensors = Collections.unmodifiableMap(byName);
  }

  /**
   * Maps the file and checks its header.
   *
   * @throws IOException if the file cannot be read or mapped
   * @throws FormatException if it is no safetensors file or breaks a rule of the format
   */
  public static SafetensorsFile open(Path file) throws IOException {
    MappedFile data = MappedFile.open(file, "a safetensors file");
    try {
      long size = data.size();
      ByteBuffer start = read(data, 0, (int) Math.min(size, 9));
      if (size < 8) {
        throw new FormatException("%s: %d bytes, a safetensors file has at least 8".formatted(file, size));
      }
      long headerBytes = start.getLong(0); // unsigned in the format
      if (headerBytes < 0 || headerBytes > MAX_HEADER_BYTES) {
        refuseForeign(file, start);
        throw new FormatException("%s: header length %s, expected at most %d".formatted(file,
            Long.toUnsignedString(headerBytes), MAX_HEADER_BYTES));
      }
      if (headerBytes > size - 8) {
        refuseForeign(file, start);
        throw new FormatException("%s: header of %d bytes from byte 8 on ends behind the file of %d bytes".formatted(
            file, headerBytes, size));
      }
      if (headerBytes == 0 || start.get(8) != '{') {
        refuseForeign(file, start);
        throw new FormatException("%s: header starts with %s, expected {".formatted(file,
            headerBytes == 0 ? "nothing" : "byte 0x%02x".formatted(start.get(8))));
      }
      byte[] text = new byte[(int) headerBytes];
      data.read(8, ByteBuffer.wrap(text));
      Header header = Json.parse(text, 0, text.length, file + " header", Header::read);
      header.checkLayout(size - 8 - headerBytes, file);
      data.map();
      return new SafetensorsFile(data, header, 8 + headerBytes);
    } catch (Throwable e) {
      data.close();
      throw e;
    }
  }

  /** As given to {@link #open}. */
  public Path file() {
    return data.file();
  }

  /** By name, in the order of the header; unmodifiable. Readable after {@link #close()}, their data is not. */
  public Map<String, Tensor> tensors() {
    return tensors;
  }

  /** {@code __metadata__}, in the order of the header; unmodifiable, empty if the file has none. */
  public Map<String, String> metadata() {
    return metadata;
  }

  /** Reading data afterwards throws IllegalStateException; buffers handed out before stay valid. Idempotent. */
  @Override
  public void close() {
    data.close();
  }

  private static ByteBuffer read(MappedFile data, long position, int length) throws IOException {
    ByteBuffer buffer = ByteBuffer.allocate(length).order(ByteOrder.LITTLE_ENDIAN);
    data.read(position, buffer);
    return buffer.flip();
  }

  /** Names a file that is plainly something else; returns if it is not. */
  private static void refuseForeign(Path file, ByteBuffer start) {
    int magic = start.getInt(0);
    String what = null;
    if (magic == GgufFile.MAGIC) {
      what = "a GGUF file";
    } else if (magic == 0x04034b50) {
      what = "a zip archive, as torch.save writes pickles";
    } else if ((magic & 0xff) == 0x80 && (magic >> 8 & 0xff) <= 5) {
      what = "a Python pickle";
    }
    if (what != null) {
      throw new FormatException(Status.UNSUPPORTED, "%s: this is %s, expected a safetensors file".formatted(file,
          what));
    }
  }

  /** One tensor of the header; begin and end are relative to the data area. */
  private record Entry(String name, ElementType type, long[] shape, long elementCount, long begin, long end) {}

  private record Header(List<Entry> entries, Map<String, String> metadata) {
    static Header read(JsonParser parser, String where) throws IOException {
      Header header = new Header(new ArrayList<>(), new LinkedHashMap<>());
      while (parser.nextToken() != JsonToken.END_OBJECT) {
        String name = Json.checked(parser.currentName(), where);
        parser.nextToken();
        if (name.equals("__metadata__")) {
          header.readMetadata(parser, where);
        } else {
          header.entries.add(readEntry(name, parser, where + ": " + name));
        }
      }
      return header;
    }

    private void readMetadata(JsonParser parser, String where) throws IOException {
      if (parser.currentToken() == JsonToken.VALUE_NULL) {
        return;
      }
      require(parser, JsonToken.START_OBJECT, where + ": __metadata__", "an object");
      while (parser.nextToken() != JsonToken.END_OBJECT) {
        String key = Json.checked(parser.currentName(), where);
        parser.nextToken();
        require(parser, JsonToken.VALUE_STRING, where + ": __metadata__ " + key, "a string");
        metadata.put(key, Json.checked(parser.getText(), where));
      }
    }

    private static Entry readEntry(String name, JsonParser parser, String where) throws IOException {
      require(parser, JsonToken.START_OBJECT, where, "an object");
      ElementType type = null;
      long[] shape = null;
      long[] offsets = null;
      while (parser.nextToken() != JsonToken.END_OBJECT) {
        String field = Json.checked(parser.currentName(), where);
        parser.nextToken();
        switch (field) {
          case "dtype" -> {
            require(parser, JsonToken.VALUE_STRING, where + ": dtype", "a string");
            String text = parser.getText();
            type = ElementType.ofName(text);
            if (type == null) {
              throw new FormatException("%s: dtype %s, expected one of %s".formatted(where, Json.describe(text),
                  Arrays.toString(ElementType.values())));
            }
          }
          case "shape" -> shape = readNumbers(parser, where + ": shape");
          case "data_offsets" -> offsets = readNumbers(parser, where + ": data_offsets");
          default -> Json.skip(parser, where);
        }
      }
      if (type == null || shape == null || offsets == null) {
        throw new FormatException("%s: no %s".formatted(where,
            type == null ? "dtype" : shape == null ? "shape" : "data_offsets"));
      }
      if (offsets.length != 2) {
        throw new FormatException("%s: %d data_offsets, expected 2".formatted(where, offsets.length));
      }
      if (offsets[0] > offsets[1]) {
        throw new FormatException("%s: data_offsets %d to %d run backwards".formatted(where, offsets[0], offsets[1]));
      }
      long elements = 1;
      long bits;
      try {
        for (long dimension : shape) {
          elements = Math.multiplyExact(elements, dimension);
        }
        bits = Math.multiplyExact(elements, type.bits());
      } catch (ArithmeticException e) {
        throw new FormatException("%s: %s %s has more than 2^63 bits".formatted(where, type, Arrays.toString(shape)),
            e);
      }
      if (bits % 8 != 0 || bits / 8 != offsets[1] - offsets[0]) {
        throw new FormatException("%s: %s %s has %d bits, data_offsets %d to %d hold %d bytes".formatted(where, type,
            Arrays.toString(shape), bits, offsets[0], offsets[1], offsets[1] - offsets[0]));
      }
      return new Entry(name, type, shape, elements, offsets[0], offsets[1]);
    }

    private static long[] readNumbers(JsonParser parser, String where) throws IOException {
      require(parser, JsonToken.START_ARRAY, where, "an array");
      long[] numbers = new long[4];
      int count = 0;
      while (parser.nextToken() != JsonToken.END_ARRAY) {
        String text = parser.getText();
        if (parser.currentToken() != JsonToken.VALUE_NUMBER_INT || text.startsWith("-")
            || parser.getNumberType() == JsonParser.NumberType.BIG_INTEGER) {
          throw new FormatException("%s: %s, expected an integer from 0 to 2^63 - 1".formatted(where,
              shown(parser)));
        }
        if (count == numbers.length) {
          numbers = Arrays.copyOf(numbers, 2 * count);
        }
        numbers[count++] = parser.getLongValue();
      }
      return Arrays.copyOf(numbers, count);
    }

    private static void require(JsonParser parser, JsonToken token, String where, String expected) throws IOException {
      if (parser.currentToken() != token) {
        throw new FormatException("%s: %s, expected %s".formatted(where, shown(parser), expected));
      }
    }

    /** The token under the parser for a message; strings in quotes. */
    private static String shown(JsonParser parser) throws IOException {
      String text = parser.getText();
      return parser.currentToken() == JsonToken.VALUE_STRING ? Json.describe(text) : text;
    }

    /** The data lies without hole, overlap or rest. */
    void checkLayout(long dataBytes, Path file) {
      List<Entry> sorted = new ArrayList<>(entries);
      sorted.sort(Comparator.comparingLong(Entry::begin).thenComparingLong(Entry::end));
      long end = 0;
      String before = "the start of the data";
      for (Entry entry : sorted) {
        if (entry.begin != end) {
          throw new FormatException("%s: %s begins at byte %d of the data, %s %d, where %s ends".formatted(file,
              entry.name, entry.begin, entry.begin < end ? "inside or before" : "a hole after", end, before));
        }
        end = entry.end;
        before = entry.name;
      }
      if (end != dataBytes) {
        throw new FormatException("%s: the tensors have %d bytes, the file has %d behind its header".formatted(file,
            end, dataBytes));
      }
    }
  }
}
