// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.adapter.LoraPair;
import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;
import java.util.function.Function;
import org.jetbrains.annotations.Nullable;

/**
 * Pairs of layers that the base stores as one matrix, as one delta of that matrix: A are the pairs' A below each other,
 * B is zero but for the pairs' B as blocks, and rows that no pair has are zero. Pairs with one and the same A keep it
 * once, their B below each other.
 *
 * <p>Where all pairs have one type and one scale, their numbers are copied and the scale stays apart. Otherwise A is
 * widened to fp32, exactly, and B holds {@code scale · B} in fp32, one rounding, under the scale 1.
 */
final class JoinedPairs {
  /** A pair and the first of the matrix' rows that it changes. */
  record Member(LoraPair pair, int firstRow) {}

  private final String module;
  private final int rows;
  private final List<Member> members;
  private final boolean sharedA;
  private final boolean copied;
  private final ElementType type;

  /** @param members at least one, in the order of their rows */
  JoinedPairs(String module, int rows, List<Member> members) {
    this.module = module;
    this.rows = rows;
    this.members = members;
    LoraPair first = members.get(0).pair;
    this.sharedA = members.stream().allMatch(member -> same(first.a(), member.pair.a()));
    this.copied = members.stream().map(Member::pair).allMatch(pair -> pair.scale() == first.scale()
        && pair.a().type() == first.a().type() && pair.b().type() == first.a().type()
        && (pair.bias() == null || pair.bias().type() == first.a().type()));
    this.type = copied ? first.a().type() : ElementType.F32;
  }

  LoraDelta delta() {
    LoraPair first = members.get(0).pair;
    String name = String.join(" + ", members.stream().map(member -> member.pair.name()).toList());
    int rank = rank();
    Tensor a = sharedA
        ? Tensor.derived(first.a(), name + ".A", first.a().type(), new long[] {rank, first.in()}, first.a()::bytes)
        : computed(name + ".A", rank, first.in(), LoraPair::a, true);
    Tensor b = computed(name + ".B", rows, rank, LoraPair::b, false);
    boolean biased = members.stream().anyMatch(member -> member.pair.bias() != null);
    return new LoraDelta(module, new Factor(a, 0, rank, 0, first.in(), 0), new Factor(b, 0, rows, 0, rank, 0),
        copied ? first.scale() : 1,
        biased ? new Factor(computed(name + ".bias", rows, 1, LoraPair::bias, false), 0, rows, 0, 1, 0) : null);
  }

  private int rank() {
    return sharedA ? members.get(0).pair.rank() : firstRank(members.size());
  }

  /** The first of a member's ranks. */
  private int firstRank(int member) {
    return sharedA ? 0 : members.stream().limit(member).mapToInt(each -> each.pair.rank()).sum();
  }

  /** The members' tensors as blocks of one matrix that is zero elsewhere. */
  private Tensor computed(String name, int height, int width, Function<LoraPair, @Nullable Tensor> part,
      boolean isA) {
    return Tensor.computed(members.get(0).pair.a(), name, type, new long[] {height, width}, () -> {
      int bytes = type.bits() / 8;
      ByteBuffer whole = ByteBuffer.allocateDirect(Math.multiplyExact(Math.multiplyExact(height, width), bytes))
          .order(ByteOrder.LITTLE_ENDIAN);
      for (int i = 0; i < members.size(); i++) {
        Tensor block = part.apply(members.get(i).pair);
        if (block != null) {
          int row = isA ? firstRank(i) : members.get(i).firstRow;
          int column = isA || block.dimensions() == 1 ? 0 : firstRank(i);
          put(whole, (row * width + column) * bytes, width * bytes, block, isA ? 1 : members.get(i).pair.scale());
        }
      }
      return whole;
    });
  }

  private void put(ByteBuffer whole, int at, int stride, Tensor block, double scale) {
    int height = Math.toIntExact(block.dimension(0));
    int width = Math.toIntExact(block.elementCount() / height);
    ByteBuffer bytes = copied ? block.bytes() : null;
    float[] numbers = copied ? new float[0] : block.toFloats();
    for (int row = 0; row < height; row++) {
      int place = at + row * stride;
      if (bytes != null) {
        int length = width * type.bits() / 8;
        whole.put(place, bytes, row * length, length);
        continue;
      }
      for (int column = 0; column < width; column++) {
        whole.putFloat(place + 4 * column, (float) (scale * numbers[row * width + column]));
      }
    }
  }

  private static boolean same(Tensor one, Tensor other) {
    return one == other
        || one.type() == other.type() && one.byteSize() == other.byteSize() && one.bytes().equals(other.bytes());
  }
}
