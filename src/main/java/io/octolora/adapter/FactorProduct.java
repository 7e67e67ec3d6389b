// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/**
 * The factors of LoHa or LoKr as one low-rank pair, which is exact, where its rank is one that runs.
 *
 * <p>LoHa: {@code ΔW = (w1a·w1b) ∘ (w2a·w2b)}, an element-wise product of ranks r. Each of the r² pairs of columns
 * (i, j) is a rank: {@code B[o,(i,j)] = w1a[o,i]·w2a[o,j]}, {@code A[(i,j),c] = w1b[i,c]·w2b[j,c]}.
 *
 * <p>LoKr: {@code ΔW = w1 ⊗ w2}. With each factor a product {@code u·v} (a stored pair, or a full matrix beside an
 * identity on its narrower side), {@code B = u1 ⊗ u2} and {@code A = v1 ⊗ v2}. Where both are full, the rank can be
 * that of the layer: then the pair is as right as any, and no smaller than the weight.
 *
 * <p>Elements are products of two stored numbers in fp32: exact for F16 and BF16, one rounding for F32.
 */
final class FactorProduct {
  /** A matrix of numbers in row-major order; numbers null stands for the identity. */
  private record Matrix(int rows, int columns, float @Nullable [] numbers) {
    static Matrix identity(int size) {
      return new Matrix(size, size, null);
    }

    float at(int row, int column) {
      return numbers == null ? row == column ? 1 : 0 : numbers[row * columns + column];
    }
  }

  /** {@code u·v}; either may be an identity, which no tensor stands for. */
  private record Operand(@Nullable Tensor u, @Nullable Tensor v, int rows, int inner, int columns) {
    Matrix left() {
      return u == null ? Matrix.identity(inner) : new Matrix(rows, inner, u.toFloats());
    }

    Matrix right() {
      return v == null ? Matrix.identity(inner) : new Matrix(inner, columns, v.toFloats());
    }
  }


  private final Map<String, Tensor> factors;
  private @Nullable String why;
  private @Nullable Tensor a;
  private @Nullable Tensor b;
  private long dimension;
  private @Nullable String fullRank;

  /** @param factors of one module by the ends of their names, at least one */
  FactorProduct(String module, Map<String, Tensor> factors) {
    this.factors = factors;
    boolean loha = factors.keySet().iterator().next().startsWith("hada");
    String form = loha ? "LoHa" : "LoKr";
    for (Map.Entry<String, Tensor> factor : factors.entrySet()) {
      Tensor tensor = factor.getValue();
      if (factor.getKey().startsWith("hada") != loha) {
        why = "it has factors of LoHa and of LoKr: %s".formatted(factors.keySet());
        return;
      }
      if (!tensor.type().isFloat() || tensor.dimensions() != 2 || tensor.elementCount() == 0
          || tensor.elementCount() > Integer.MAX_VALUE / 4) {
        why = "%s is no matrix of F32, F16 or BF16, as a factor of %s on a linear layer is".formatted(tensor, form);
        return;
      }
    }
    Operand one = operand(loha ? "hada_w1" : "lokr_w1");
    Operand two = operand(loha ? "hada_w2" : "lokr_w2");
    if (one == null || two == null) {
      why = why != null ? why : "%s needs two factors, or pairs of them; it has %s".formatted(form, factors.keySet());
      return;
    }
    if (loha && (one.rows != two.rows || one.columns != two.columns || one.inner != two.inner)) {
      why = "the products of LoHa are %d x %d of rank %d and %d x %d of rank %d, expected the same".formatted(one.rows,
          one.columns, one.inner, two.rows, two.columns, two.inner);
      return;
    }
    long rank = (long) one.inner * two.inner;
    long out = loha ? one.rows : (long) one.rows * two.rows;
    long in = loha ? one.columns : (long) one.columns * two.columns;
    if (rank > LoraPair.MAX_RANK) {
      why = "this %s of %d x %d has rank %d as a low-rank pair, expected at most %d".formatted(form, out, in, rank,
          LoraPair.MAX_RANK);
      return;
    }
    if (rank >= Math.min(out, in)) {
      fullRank = "%s of %d x %d with rank %d".formatted(form, out, in, rank);
    }
    if (rank * Math.max(in, out) > Integer.MAX_VALUE / 4) {
      why = "as a low-rank pair this %s has %d x %d numbers, more than 2 GiB".formatted(form, rank, Math.max(in, out));
      return;
    }
    Tensor from = factors.values().iterator().next();
    a = Tensor.computed(from, module + ".A of " + form, ElementType.F32, new long[] {rank, in},
        () -> product(one.right(), two.right(), false, loha));
    b = Tensor.computed(from, module + ".B of " + form, ElementType.F32, new long[] {out, rank},
        () -> product(one.left(), two.left(), loha, false));
  }

  /** What keeps the factors from being a pair; null if nothing does. */
  @Nullable String why() {
    return why;
  }

  /** [rank, in]. */
  Tensor a() {
    return a;
  }

  /** [out, rank]. */
  Tensor b() {
    return b;
  }

  /** What it is, where the pair has no less rank than the layer; else null. */
  @Nullable String fullRank() {
    return fullRank;
  }

  /** What alpha is divided by: the rank of the stored pairs; 0 where there is none, and alpha does not count. */
  long dimension() {
    return dimension;
  }

  /** A stored pair, or a full matrix and the smaller of the identities that fit it; null if neither is complete. */
  private @Nullable Operand operand(String name) {
    Tensor full = factors.get(name);
    Tensor u = factors.get(name + "_a");
    Tensor v = factors.get(name + "_b");
    if (full != null && u == null && v == null) {
      int rows = (int) full.dimension(0);
      int columns = (int) full.dimension(1);
      return rows < columns ? new Operand(null, full, rows, rows, columns)
          : new Operand(full, null, rows, columns, columns);
    }
    if (full != null || u == null || v == null) {
      return null;
    }
    if (u.dimension(1) != v.dimension(0)) {
      why = "%s has %d columns, %s %d rows".formatted(u.name(), u.dimension(1), v.name(), v.dimension(0));
      return null;
    }
    if (dimension != 0 && dimension != u.dimension(1)) {
      why = "its pairs have ranks %d and %d, expected one: alpha is divided by it".formatted(dimension, u.dimension(1));
      return null;
    }
    dimension = u.dimension(1);
    return new Operand(u, v, (int) u.dimension(0), (int) u.dimension(1), (int) v.dimension(1));
  }

  /**
   * All products of an element of one and an element of two. Rows are pairs of rows and columns pairs of columns (a
   * Kronecker product), but where shared: then both matrices have the same rows (columns) and the result has them too.
   */
  private static ByteBuffer product(Matrix one, Matrix two, boolean rowsShared, boolean columnsShared) {
    int rows = rowsShared ? one.rows : one.rows * two.rows;
    int columns = columnsShared ? one.columns : one.columns * two.columns;
    ByteBuffer bytes = ByteBuffer.allocateDirect(rows * columns * 4).order(ByteOrder.LITTLE_ENDIAN);
    for (int row = 0; row < rows; row++) {
      int rowOne = rowsShared ? row : row / two.rows;
      int rowTwo = rowsShared ? row : row % two.rows;
      for (int column = 0; column < columns; column++) {
        int columnOne = columnsShared ? column : column / two.columns;
        int columnTwo = columnsShared ? column : column % two.columns;
        bytes.putFloat(one.at(rowOne, columnOne) * two.at(rowTwo, columnTwo));
      }
    }
    return bytes.flip();
  }
}
