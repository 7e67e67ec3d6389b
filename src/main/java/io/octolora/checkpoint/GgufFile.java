// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.CharBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import org.jetbrains.annotations.Nullable;

/**
 * One GGUF file of version 2 or 3, little-endian, of any size, memory-mapped: magic, version, counts, key-value pairs,
 * descriptions of the tensors, then their data from a multiple of {@code general.alignment} on. Everything that could
 * make two readers see different tensors is checked; a file with a tensor of a type that is not read here is refused.
 *
 * <p>Shapes are turned round: GGUF names the dimension that lies closest in memory first. A Q8_0 tensor, whose rows are
 * blocks of an fp16 scale and 32 int8 codes, becomes two: the I8 codes, under its name, and the F16 scales, in
 * {@link #blockScales}.
 */
final class GgufFile implements AutoCloseable {
  /** The bytes "GGUF" as a little-endian number. */
  static final int MAGIC = 0x46554747;
  /** Codes of a Q8_0 block, which follow two bytes of scale. */
  static final int BLOCK = 32;

  private static final int BLOCK_BYTES = BLOCK + 2;
  /** More bytes of keys and names than this are not read. */
  private static final long MAX_HEADER_BYTES = 256L << 20;
  private static final int MAX_NAME_BYTES = 65535;
  private static final int MAX_DIMENSIONS = 4;
  /** Longer texts are skipped, as lists are. */
  private static final int MAX_KEPT_BYTES = 4096;
  private static final int MAX_DEPTH = 4;
  private static final int Q8_0 = 8;

  private static final Map<Integer, String> TYPES = new TreeMap<>();

  static {
    String[] names = {"F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K",
        "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
        "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"};
    for (int i = 0; i < names.length; i++) {
      TYPES.put(i, names[i]);
    }
    TYPES.put(34, "TQ1_0");
    TYPES.put(35, "TQ2_0");
    TYPES.put(39, "MXFP4");
  }

  /** Bytes of a value by its type's number; 0 for texts and lists. */
  private static final int[] VALUE_BYTES = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  private static final int BOOL = 7;
  private static final int STRING = 8;
  private static final int ARRAY = 9;

  private final MappedFile data;
  private final int version;
  private final Map<String, Object> metadata;
  private final Map<String, Tensor> tensors = new LinkedHashMap<>();
  private final Map<String, Tensor> blockScales = new LinkedHashMap<>();

  private GgufFile(MappedFile data, Header header) {
    this.data = data;
    this.version = header.version;
    this.metadata = header.metadata;
    for (Entry entry : header.entries) {
      if (entry.type == Q8_0) {
        split(entry, header.dataStart);
      } else {
        ElementType type = ElementType.valueOf(TYPES.get(entry.type));
        tensors.put(entry.name, new Tensor(data, entry.name, type, entry.shape, entry.elements,
            header.dataStart + entry.offset, entry.bytes));
      }
    }
  }

  /** Whether the file is one by its name or by its first bytes; false for what is no readable regular file. */
  static boolean is(Path file) throws IOException {
    if (file.getFileName() != null && file.getFileName().toString().toLowerCase(Locale.ROOT).endsWith(".gguf")) {
      return !Files.isDirectory(file);
    }
    if (!Files.isRegularFile(file) || Files.size(file) < 4) {
      return false;
    }
    try (MappedFile data = MappedFile.open(file, "a file")) {
      return new Reader(data, 4).number(4) == MAGIC;
    }
  }

  /**
   * @throws IOException if the file cannot be read or mapped
   * @throws FormatException if it is no GGUF file, is damaged, or holds types that are not read here
   */
  static GgufFile open(Path file) throws IOException {
    MappedFile data = MappedFile.open(file, "a GGUF file");
    try {
      Header header = new Header(new Reader(data, Math.min(data.size(), MAX_HEADER_BYTES)));
      header.checkLayout(data);
      data.map();
      return new GgufFile(data, header);
    } catch (Throwable e) {
      data.close();
      throw e;
    }
  }

  Path file() {
    return data.file();
  }

  int version() {
    return version;
  }

  /** Numbers as Long or Double, texts and booleans; long texts and lists are not kept. */
  Map<String, Object> metadata() {
    return metadata;
  }

  /** {@code general.architecture}; empty if the file does not say. */
  String architecture() {
    return metadata.get("general.architecture") instanceof String name ? name : "";
  }

  /** By name, in the order of the file; I8 for those of {@link #blockScales}. */
  Map<String, Tensor> tensors() {
    return tensors;
  }

  /** Of the Q8_0 tensors: F16, one for each 32 codes of a row. */
  Map<String, Tensor> blockScales() {
    return blockScales;
  }

  @Override
  public void close() {
    data.close();
  }

  private void split(Entry entry, long dataStart) {
    long blocks = entry.elements / BLOCK;
    long position = dataStart + entry.offset;
    Tensor raw = new Tensor(data, entry.name, ElementType.U8, new long[] {blocks, BLOCK_BYTES}, entry.bytes, position,
        entry.bytes);
    tensors.put(entry.name, Tensor.derived(raw, entry.name, ElementType.I8, entry.shape, (offset, length) -> {
      byte[] codes = new byte[length];
      for (int done = 0; done < length;) {
        long block = (offset + done) / BLOCK;
        int within = (int) ((offset + done) % BLOCK);
        // A piece at a time, so that the bytes of a range that spans much of a large file fit a buffer.
        int count = Math.min(length - done, (1 << 20) - within);
        int last = (within + count + BLOCK - 1) / BLOCK;
        ByteBuffer stored = data.bytes(position + block * BLOCK_BYTES, last * BLOCK_BYTES);
        for (int i = 0; i < last; i++, within = 0) {
          int part = Math.min(BLOCK - within, count);
          stored.get(i * BLOCK_BYTES + 2 + within, codes, done, part);
          done += part;
          count -= part;
        }
      }
      return ByteBuffer.wrap(codes);
    }));
    long[] shape = entry.shape.clone();
    shape[shape.length - 1] /= BLOCK;
    blockScales.put(entry.name, Tensor.derived(raw, entry.name + " scales", ElementType.F16, shape,
        (offset, length) -> {
          byte[] scales = new byte[length];
          for (int done = 0; done < length;) {
            long block = (offset + done) / 2;
            int first = (int) ((offset + done) % 2);
            int count = Math.min((first + length - done + 1) / 2, 1 << 15);
            ByteBuffer stored = data.bytes(position + block * BLOCK_BYTES, count * BLOCK_BYTES);
            for (int i = first; i < 2 * count && done < length; i++) {
              scales[done++] = stored.get(i / 2 * BLOCK_BYTES + i % 2);
            }
          }
          return ByteBuffer.wrap(scales);
        }));
  }

  /** One tensor; offset is relative to the data, the shape outermost first. */
  private record Entry(String name, int type, long[] shape, long elements, long offset, long bytes) {}

  /** Numbers and texts of the header, in pieces. */
  private static final class Reader {
    private final MappedFile data;
    private final long end;
    private final ByteBuffer buffer = ByteBuffer.allocate(1 << 16).order(ByteOrder.LITTLE_ENDIAN).limit(0);
    private long next; // of the file, behind the buffer

    Reader(MappedFile data, long end) {
      this.data = data;
      this.end = end;
    }

    long position() {
      return next - buffer.remaining();
    }

    long left() {
      return end - position();
    }

    FormatException damaged(String what, Object... details) {
      return new FormatException("%s: this is a GGUF file that is cut short or damaged: %s".formatted(data.file(),
          what.formatted(details)));
    }

    /** Little-endian; 64-bit numbers of 2<sup>63</sup> and above come out negative. */
    long number(int bytes) throws IOException {
      require(bytes);
      fill(bytes);
      return switch (bytes) {
        case 1 -> buffer.get() & 0xff;
        case 2 -> buffer.getShort() & 0xffff;
        case 4 -> buffer.getInt() & 0xffffffffL;
        default -> buffer.getLong();
      };
    }

    byte[] bytes(int count) throws IOException {
      require(count);
      byte[] bytes = new byte[count];
      for (int done = 0; done < count;) {
        fill(1);
        int part = Math.min(count - done, buffer.remaining());
        buffer.get(bytes, done, part);
        done += part;
      }
      return bytes;
    }

    void skip(long bytes) throws IOException {
      require(bytes);
      long ahead = Math.max(0, bytes - buffer.remaining());
      buffer.position(buffer.position() + (int) (bytes - ahead));
      next += ahead;
    }

    String text(int most, String what) throws IOException {
      long length = number(8);
      if (length < 0 || length > most) {
        throw damaged("%s of %s bytes, expected at most %d", what, Long.toUnsignedString(length), most);
      }
      CharBuffer text;
      try {
        text = StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes((int) length)));
      } catch (CharacterCodingException e) {
        throw damaged("%s that is not UTF-8", what);
      }
      if (text.chars().anyMatch(c -> c < ' ')) {
        throw damaged("%s with control characters", what);
      }
      return text.toString();
    }

    /** A count of things that take at least so many bytes each. */
    long count(int least, String what) throws IOException {
      long count = number(8);
      if (count < 0 || count > left() / least) {
        throw damaged("%s %s, which %d bytes cannot hold", Long.toUnsignedString(count), what, left());
      }
      return count;
    }

    private void require(long bytes) {
      if (bytes < 0 || bytes > left()) {
        throw damaged("%s bytes wanted, %d left", Long.toUnsignedString(bytes), left());
      }
    }

    /** At least so many bytes in the buffer. */
    private void fill(int bytes) throws IOException {
      if (buffer.remaining() >= bytes) {
        return;
      }
      buffer.compact();
      int wanted = (int) Math.min(buffer.remaining(), end - next);
      buffer.limit(buffer.position() + wanted);
      data.read(next, buffer);
      next += wanted;
      buffer.flip();
    }
  }

  private static final class Header {
    final int version;
    final Map<String, Object> metadata = new LinkedHashMap<>();
    final List<Entry> entries = new ArrayList<>();
    final long dataStart;

    Header(Reader in) throws IOException {
      Path file = in.data.file();
      if (in.left() < 4 || in.number(4) != MAGIC) {
        throw new FormatException("%s: a GGUF file by its name, but not by its first bytes".formatted(file));
      }
      long number = in.number(4);
      if (number != 2 && number != 3) {
        boolean swapped = number == 2 << 24 || number == 3 << 24;
        throw new FormatException(Status.UNSUPPORTED, "%s: this is a GGUF file of version %d%s, expected 2 or 3"
            .formatted(file, swapped ? number >> 24 : number, swapped ? " in big-endian order" : ""));
      }
      version = (int) number;
      long tensorCount = in.count(8 + 4 + 4 + 8, "tensors");
      long pairs = in.count(8 + 4 + 1, "key-value pairs");
      for (long i = 0; i < pairs; i++) {
        String key = in.text(MAX_NAME_BYTES, "a key");
        Object value = value(in, in.number(4), 0, key);
        if (metadata.containsKey(key)) {
          throw in.damaged("key %s twice", key);
        }
        metadata.put(key, value);
      }
      long alignment = alignment(in);
      Map<String, Long> seen = new LinkedHashMap<>();
      Map<String, Integer> types = new TreeMap<>();
      Entry foreign = null;
      for (long i = 0; i < tensorCount; i++) {
        Entry entry = entry(in, alignment);
        if (seen.put(entry.name, i) != null) {
          throw in.damaged("tensor %s twice", entry.name);
        }
        types.merge(typeName(entry.type), 1, Integer::sum);
        foreign = foreign == null && entry.bytes < 0 ? entry : foreign;
        entries.add(entry);
      }
      if (foreign != null) {
        throw new FormatException(Status.UNSUPPORTED, ("%s: %s %s is %s; the GGUF file has %d tensors %s, expected "
            + "Q8_0, F32, F16 and BF16").formatted(file, foreign.name, Arrays.toString(foreign.shape),
                typeName(foreign.type), tensorCount, types));
      }
      long start = in.position();
      dataStart = (start + alignment - 1) / alignment * alignment;
    }

    private static String typeName(int type) {
      return TYPES.getOrDefault(type, "type " + Integer.toUnsignedString(type));
    }

    /** null for what is not kept. */
    private static @Nullable Object value(Reader in, long type, int depth, String key) throws IOException {
      if (type >= VALUE_BYTES.length) {
        throw in.damaged("%s has type %d, expected 0 to %d", key, type, VALUE_BYTES.length - 1);
      }
      if (type == STRING) {
        long length = in.number(8);
        if (length < 0 || length > MAX_KEPT_BYTES) {
          in.skip(length);
          return null;
        }
        return new String(in.bytes((int) length), StandardCharsets.UTF_8);
      }
      if (type == ARRAY) {
        skipList(in, depth, key);
        return null;
      }
      long bits = in.number(VALUE_BYTES[(int) type]);
      return switch ((int) type) {
        case 1 -> (long) (byte) bits;
        case 3 -> (long) (short) bits;
        case 5 -> (long) (int) bits;
        case 6 -> (double) Float.intBitsToFloat((int) bits);
        case 12 -> Double.longBitsToDouble(bits);
        case BOOL -> {
          if (bits > 1) {
            throw in.damaged("%s is a boolean of value %d", key, bits);
          }
          yield bits == 1;
        }
        default -> bits;
      };
    }

    private static void skipList(Reader in, int depth, String key) throws IOException {
      long item = in.number(4);
      if (item >= VALUE_BYTES.length || depth == MAX_DEPTH) {
        throw in.damaged("%s is a list of type %d, %d deep", key, item, depth);
      }
      int bytes = VALUE_BYTES[(int) item];
      long count = in.count(bytes > 0 ? bytes : 8, "items of " + key);
      if (bytes > 0) {
        in.skip(count * bytes);
        return;
      }
      for (long i = 0; i < count; i++) {
        if (item == STRING) {
          in.skip(in.number(8));
        } else {
          skipList(in, depth + 1, key);
        }
      }
    }

    private long alignment(Reader in) {
      Object given = metadata.getOrDefault("general.alignment", 32L);
      if (!(given instanceof Long value) || value < 1 || value > 1 << 30 || Long.bitCount(value) != 1) {
        throw in.damaged("general.alignment is %s, expected a power of two", given);
      }
      return value;
    }

    /** bytes is -1 for a type that is not read. */
    private static Entry entry(Reader in, long alignment) throws IOException {
      String name = in.text(MAX_NAME_BYTES, "a tensor's name");
      long dimensions = in.number(4);
      if (dimensions < 1 || dimensions > MAX_DIMENSIONS) {
        throw in.damaged("%s has %d dimensions, expected 1 to %d", name, dimensions, MAX_DIMENSIONS);
      }
      long[] shape = new long[(int) dimensions];
      long elements = 1;
      for (int i = shape.length - 1; i >= 0; i--) {
        shape[i] = in.number(8);
        if (shape[i] < 1 || shape[i] > (Long.MAX_VALUE >> 8) / elements) {
          throw in.damaged("%s has a dimension %s, which is 0 or makes it too large", name,
              Long.toUnsignedString(shape[i]));
        }
        elements *= shape[i];
      }
      int type = (int) in.number(4);
      long offset = in.number(8);
      if (offset < 0 || offset % alignment != 0) {
        throw in.damaged("%s begins at byte %s of the data, expected a multiple of %d", name,
            Long.toUnsignedString(offset), alignment);
      }
      long bytes = -1;
      if (type == Q8_0) {
        if (shape[shape.length - 1] % BLOCK != 0) {
          throw in.damaged("%s is Q8_0 with rows of %d, expected a multiple of %d", name, shape[shape.length - 1],
              BLOCK);
        }
        bytes = elements / BLOCK * BLOCK_BYTES;
      } else {
        ElementType plain = ElementType.ofName(typeName(type));
        bytes = plain == null ? -1 : elements * (plain.bits() / 8);
      }
      return new Entry(name, type, shape, elements, offset, bytes);
    }

    /** The data lies in the file, and no two tensors share a byte. */
    void checkLayout(MappedFile data) {
      List<Entry> sorted = new ArrayList<>(entries);
      sorted.sort(Comparator.comparingLong(Entry::offset));
      Entry before = null;
      for (Entry entry : sorted) {
        if (before != null && entry.offset < before.offset + before.bytes) {
          throw new FormatException("%s: %s begins at byte %d of the data, inside %s, which ends at %d".formatted(
              data.file(), entry.name, entry.offset, before.name, before.offset + before.bytes));
        }
        long room = data.size() - dataStart;
        if (entry.offset > room || entry.bytes > room - entry.offset) {
          throw new FormatException("%s: %s has %d bytes from byte %d of the data on, the file has %d".formatted(
              data.file(), entry.name, entry.bytes, entry.offset, Math.max(0, room)));
        }
        before = entry;
      }
    }
  }
}
