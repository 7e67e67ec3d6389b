// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.lang.ref.SoftReference;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.ShortBuffer;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Objects;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Supplier;
import org.jetbrains.annotations.Nullable;
import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Halves;

/**
 * One tensor of a safetensors or GGUF file: dense, row-major, little-endian, read through a memory mapping of the file.
 * Nothing is copied until asked for. Where a matrix is used in another form than it is stored in (packed codes, blocks
 * of codes and scales, factors of factors), it is a {@linkplain #derived derived} tensor, computed from others where it
 * is read. The data belongs to the {@link SafetensorsFile} or the {@link Checkpoint}: after its {@code close()} reading
 * throws IllegalStateException, while buffers handed out before stay valid. Safe for use by several threads.
 */
public final class Tensor {
  private final MappedFile source;
  private final String name;
  private final ElementType type;
  private final long[] shape;
  private final long elementCount;
  private final long position;
  private final long byteSize;
  private final @Nullable Reader reader;

  /** Computes bytes of a {@linkplain #derived derived} tensor. */
  @FunctionalInterface
  public interface Reader {
    /** A new little-endian buffer of bytes offset to offset + length - 1; the range lies in the tensor. */
    ByteBuffer read(long offset, int length);
  }

  /** @param position of the first byte, from the start of the file */
  Tensor(MappedFile source, String name, ElementType type, long[] shape, long elementCount, long position,
      long byteSize) {
    this(source, name, type, shape, elementCount, position, byteSize, null);
  }

  private Tensor(MappedFile source, String name, ElementType type, long[] shape, long elementCount, long position,
      long byteSize, @Nullable Reader reader) {
    this.source = source;
    this.name = name;
    this.type = type;
    this.shape = shape;
    this.elementCount = elementCount;
    this.position = position;
    this.byteSize = byteSize;
    this.reader = reader;
  }

  /**
   * A tensor that is in no file as such, but follows from tensors of one.
   *
   * @param from a tensor that it follows from, for the file's name and whether that is still open
   * @param name for messages, in the style of the file's names
   * @param type of whole bytes
   * @param shape at least one element, below 2<sup>63</sup> bytes
   * @param reader reads the data each time that some is asked for
   */
  public static Tensor derived(Tensor from, String name, ElementType type, long[] shape, Reader reader) {
    long count = 1;
    for (long dimension : shape) {
      count = Math.multiplyExact(count, dimension);
    }
    return new Tensor(from.source, name, type, shape.clone(), count, 0, Math.multiplyExact(count, type.bits() / 8),
        Objects.requireNonNull(reader, "reader"));
  }

  /**
   * A {@link #derived} tensor that is computed whole when some of it is first read, and kept as long as memory allows.
   *
   * @param data gives all elements, little-endian, in a new direct buffer from position 0 to its limit
   */
  public static Tensor computed(Tensor from, String name, ElementType type, long[] shape, Supplier<ByteBuffer> data) {
    AtomicReference<SoftReference<ByteBuffer>> kept = new AtomicReference<>(new SoftReference<>(null));
    return derived(from, name, type, shape, (offset, length) -> {
      ByteBuffer whole = kept.get().get();
      if (whole == null) {
        whole = data.get();
        kept.set(new SoftReference<>(whole));
      }
      return whole.slice(Math.toIntExact(offset), length);
    });
  }

  /** Where the data is, or that which it is derived from. */
  public Path file() {
    return source.file();
  }

  /** The name in the file, exactly. */
  public String name() {
    return name;
  }

  /** Of every element. */
  public ElementType type() {
    return type;
  }

  /** A copy of the dimensions, outermost first; empty for a scalar. */
  public long[] shape() {
    return shape.clone();
  }

  /** How many there are; 0 for a scalar. */
  public int dimensions() {
    return shape.length;
  }

  /**
   * Elements along an axis.
   *
   * @throws IndexOutOfBoundsException unless 0 &le; axis &lt; {@link #dimensions()}
   */
  public long dimension(int axis) {
    return shape[axis];
  }

  /** The product of the dimensions; 1 for a scalar. */
  public long elementCount() {
    return elementCount;
  }

  /** Of all elements, packed where they are below 8 bits. */
  public long byteSize() {
    return byteSize;
  }

  /**
   * A read-only, direct, little-endian view of bytes offset to offset + length - 1 of the data. Its first byte need not
   * be aligned to the element size. No part of the file is copied.
   *
   * @throws IndexOutOfBoundsException if the range leaves the tensor
   * @throws IllegalStateException if the file is closed
   */
  public ByteBuffer bytes(long offset, int length) {
    if (offset < 0 || length < 0 || offset > byteSize - length) {
      throw new IndexOutOfBoundsException("%s: bytes %d + %d of %d".formatted(this, offset, length, byteSize));
    }
    if (reader == null) {
      return source.bytes(position + offset, length);
    }
    return direct(derivedBytes(offset, length)).asReadOnlyBuffer().order(ByteOrder.LITTLE_ENDIAN);
  }

  /** A little-endian buffer in heap memory where that can be had; the range lies in the tensor. */
  ByteBuffer copy(long offset, int length) {
    return reader == null ? source.copy(position + offset, length) : derivedBytes(offset, length);
  }

  private ByteBuffer derivedBytes(long offset, int length) {
    source.requireOpen();
    return reader.read(offset, length).order(ByteOrder.LITTLE_ENDIAN);
  }

  private static ByteBuffer direct(ByteBuffer bytes) {
    return bytes.isDirect() ? bytes : ByteBuffer.allocateDirect(bytes.remaining()).put(bytes).flip();
  }

  /**
   * All of the data; for a tensor above 2 GiB - 1 byte use {@link #bytes(long, int)}.
   *
   * @throws IllegalStateException if the file is closed, or the data does not fit one buffer
   */
  public ByteBuffer bytes() {
    if (byteSize > Integer.MAX_VALUE) {
      throw new IllegalStateException(
          "%s: %d bytes do not fit one buffer; read it piece by piece".formatted(this, byteSize));
    }
    return bytes(0, (int) byteSize);
  }

  /**
   * The elements as floats, row-major: exact for F32, F16 and BF16.
   *
   * @throws FormatException for other types
   * @throws IllegalStateException if the file is closed, or there are more than an array holds
   */
  public float[] toFloats() {
    if (elementCount > Integer.MAX_VALUE - 8) {
      throw new IllegalStateException("%s: %d elements do not fit one array".formatted(this, elementCount));
    }
    return toFloats(0, (int) elementCount);
  }

  /**
   * Elements first to first + count - 1 in row-major order, as {@link #toFloats()}.
   *
   * @throws IndexOutOfBoundsException if the range leaves the tensor
   */
  public float[] toFloats(long first, int count) {
    if (!type.isFloat()) {
      throw new FormatException("%s: type %s, expected F32, F16 or BF16".formatted(this, type));
    }
    if (first < 0 || count < 0 || first > elementCount - count) {
      throw new IndexOutOfBoundsException("%s: elements %d + %d of %d".formatted(this, first, count, elementCount));
    }
    float[] floats = new float[count];
    int width = type.bits() / 8;
    int chunk = 1 << 18; // elements, to keep the intermediate copy small
    for (int done = 0; done < count; done += chunk) {
      int length = Math.min(chunk, count - done);
      ByteBuffer bytes = copy((first + done) * width, length * width);
      switch (type) {
        case F32 -> {
          FloatBuffer values = bytes.asFloatBuffer();
          values.get(floats, done, length);
        }
        case F16 -> {
          ShortBuffer values = bytes.asShortBuffer();
          for (int i = 0; i < length; i++) {
            floats[done + i] = Halves.fromFloat16(values.get(i));
          }
        }
        default -> {
          ShortBuffer values = bytes.asShortBuffer();
          for (int i = 0; i < length; i++) {
            floats[done + i] = Halves.fromBfloat16(values.get(i));
          }
        }
      }
    }
    return floats;
  }

  /**
   * The value of a one-element tensor of an integer or floating-point type of 16 bits or more, or of I8 or U8: exact
   * but for I64 and U64 beyond 2<sup>53</sup>.
   *
   * @throws FormatException if there is not exactly one element, or for a type that is no plain number
   */
  public double scalar() {
    if (elementCount != 1) {
      throw new FormatException("%s: %d elements, expected 1".formatted(this, elementCount));
    }
    ByteBuffer bytes = copy(0, (int) byteSize);
    return switch (type) {
      case F64 -> bytes.getDouble(0);
      case F32 -> bytes.getFloat(0);
      case F16 -> Halves.fromFloat16(bytes.getShort(0));
      case BF16 -> Halves.fromBfloat16(bytes.getShort(0));
      case I8 -> bytes.get(0);
      case U8 -> bytes.get(0) & 0xff;
      case I16 -> bytes.getShort(0);
      case U16 -> bytes.getShort(0) & 0xffff;
      case I32 -> bytes.getInt(0);
      case U32 -> bytes.getInt(0) & 0xffffffffL;
      case I64 -> bytes.getLong(0);
      case U64 -> {
        long bits = bytes.getLong(0);
        yield bits >= 0 ? bits : (bits >>> 1 | bits & 1) * 2.0;
      }
      default -> throw new FormatException(Status.UNSUPPORTED,
          "%s: type %s, expected an integer or floating-point number".formatted(this, type));
    };
  }

  /** "file: name TYPE [shape]", for messages. */
  @Override
  public String toString() {
    return "%s: %s %s %s".formatted(source.file(), name, type, Arrays.toString(shape));
  }
}
