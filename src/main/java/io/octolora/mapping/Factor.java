// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import java.nio.ByteBuffer;
import java.util.Objects;

/**
 * A rectangle of a row-major matrix in a file. Row {@code i} is the tensor's row
 * {@code firstRow + (i + rotation) mod rows}, columns {@code firstColumn} to {@code firstColumn + columns - 1}. The
 * data belongs to the adapter that the tensor came from and is readable until that is closed.
 */
public final class Factor {
  private final Tensor tensor;
  private final int rows;
  private final int columns;
  private final int firstRow;
  private final int firstColumn;
  private final int rotation;
  private final int stride;

  Factor(Tensor tensor, int firstRow, int rows, int firstColumn, int columns, int rotation) {
    int height = Math.toIntExact(tensor.dimension(0));
    this.stride = Math.toIntExact(tensor.elementCount() / height);
    Objects.checkFromIndexSize(firstRow, rows, height);
    Objects.checkFromIndexSize(firstColumn, columns, stride);
    this.tensor = tensor;
    this.firstRow = firstRow;
    this.rows = rows;
    this.firstColumn = firstColumn;
    this.columns = columns;
    this.rotation = rotation;
  }

  /** The tensor this is a part of. */
  public Tensor tensor() {
    return tensor;
  }

  /** Of the rectangle. */
  public int rows() {
    return rows;
  }

  /** Of the rectangle. */
  public int columns() {
    return columns;
  }

  /** In the tensor. */
  public int firstRow() {
    return firstRow;
  }

  /** In the tensor. */
  public int firstColumn() {
    return firstColumn;
  }

  /** By how many rows the view starts later, modulo {@link #rows()}; 0 but where a format stores halves swapped. */
  public int rotation() {
    return rotation;
  }

  /** {@link ElementType#F32}, {@link ElementType#F16} or {@link ElementType#BF16}. */
  public ElementType type() {
    return tensor.type();
  }

  /** Bytes of the dense copy: rows · columns · element size. */
  public long byteSize() {
    return (long) rows * columns * (type().bits() / 8);
  }

  /** The elements, row-major, exactly. */
  public float[] toFloats() {
    float[] whole = tensor.toFloats((long) firstRow * stride, rows * stride);
    float[] floats = new float[rows * columns];
    for (int row = 0; row < rows; row++) {
      System.arraycopy(whole, (fileRow(row) - firstRow) * stride + firstColumn, floats, row * columns, columns);
    }
    return floats;
  }

  /**
   * Writes the elements in their own type, dense, row-major and little-endian, from the buffer's position on, and moves
   * the position behind them.
   *
   * @throws java.nio.BufferOverflowException if fewer than {@link #byteSize()} bytes remain
   */
  public void copyTo(ByteBuffer target) {
    if (target.remaining() < byteSize()) {
      throw new java.nio.BufferOverflowException();
    }
    int width = type().bits() / 8;
    for (int row = 0; row < rows; row++) {
      target.put(tensor.bytes(((long) fileRow(row) * stride + firstColumn) * width, columns * width));
    }
  }

  private int fileRow(int row) {
    return firstRow + (row + rotation) % rows;
  }

  /** "tensor rows a..b columns c..d", for messages; ends are exclusive. */
  @Override
  public String toString() {
    return "%s rows %d..%d columns %d..%d".formatted(tensor, firstRow, firstRow + rows, firstColumn,
        firstColumn + columns);
  }
}
