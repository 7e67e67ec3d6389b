// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.adapter.LoraPair;
import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;
import java.util.Objects;
import java.util.Set;
import java.util.function.Function;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;

/**
 * Pairs of layers that the base stores as one matrix, as one delta of that matrix: A are the pairs' A below each other,
 * B is zero but for the pairs' B as blocks, and rows that no pair has are zero. Pairs with one and the same A keep it
 * once, their B below each other.
 *
 * <p>Where all pairs have one scale it stays apart; otherwise B holds {@code scale · B} in fp32, one rounding, under
 * the scale 1. Numbers are copied where their types agree and else widened to fp32, exactly.
 */
final class JoinedPairs {
  /** A pair and the first of the matrix' rows that it changes. */
  record Member(LoraPair pair, int firstRow) {}

  private final String module;
  private final int rows;
  private final List<Member> members;
  private final boolean sharedA;
  private final boolean sharedScale;

  /** @param members at least one, in the order of their rows */
  JoinedPairs(String module, int rows, List<Member> members) {
    this.module = module;
    this.rows = rows;
    this.members = members;
    LoraPair first = members.get(0).pair;
    this.sharedA = members.stream().allMatch(member -> same(first.a(), member.pair.a()));
    this.sharedScale = members.stream().allMatch(member -> member.pair.scale() == first.scale());
  }

  /** Rows whose length is not given cannot stand beside rows whose length is; null if all can. */
  @Nullable String why() {
    long sized = members.stream().filter(member -> member.pair.magnitude() != null).count();
    long covered = members.stream().mapToLong(member -> member.pair.out()).sum();
    return sized == 0 || sized == members.size() && covered == rows ? null
        : "a DoRA magnitude is needed for all %d rows of %s or for none: %d of %d pairs have one, for %d rows in all"
            .formatted(rows, module, sized, members.size(), covered);
  }

  LoraDelta delta() {
    LoraPair first = members.get(0).pair;
    String name = String.join(" + ", members.stream().map(member -> member.pair.name()).toList());
    int rank = rank();
    Tensor a = sharedA
        ? Tensor.derived(first.a(), name + ".A", first.a().type(), new long[] {rank, first.in()}, first.a()::bytes)
        : computed(name + ".A", rank, first.in(), LoraPair::a, true, false);
    Tensor b = computed(name + ".B", rows, rank, LoraPair::b, false, true);
    boolean sized = first.magnitude() != null; // and so all are
    boolean biased = members.stream().anyMatch(member -> member.pair.bias() != null);
    return new LoraDelta(module, new Factor(a, 0, rank, 0, first.in(), 0), new Factor(b, 0, rows, 0, rank, 0),
        sharedScale ? first.scale() : 1,
        biased ? new Factor(computed(name + ".bias", rows, 1, LoraPair::bias, false, true), 0, rows, 0, 1, 0) : null,
        sized ? new Factor(computed(name + ".magnitude", rows, 1, LoraPair::magnitude, false, false), 0, rows, 0, 1, 0)
            : null);
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
      boolean isA, boolean withScale) {
    Set<ElementType> types = members.stream().map(member -> part.apply(member.pair)).filter(Objects::nonNull)
        .map(Tensor::type).collect(Collectors.toSet());
    boolean scaled = withScale && !sharedScale;
    ElementType type = types.size() == 1 && !scaled ? types.iterator().next() : ElementType.F32;
    return Tensor.computed(members.get(0).pair.a(), name, type, new long[] {height, width}, () -> {
      int bytes = type.bits() / 8;
      ByteBuffer whole = ByteBuffer.allocateDirect(Math.multiplyExact(Math.multiplyExact(height, width), bytes))
          .order(ByteOrder.LITTLE_ENDIAN);
      for (int i = 0; i < members.size(); i++) {
        Member member = members.get(i);
        Tensor block = part.apply(member.pair);
        if (block != null) {
          int row = isA ? firstRank(i) : member.firstRow;
          int column = isA || width == 1 ? 0 : firstRank(i);
          int at = (row * width + column) * bytes;
          if (type == block.type() && !scaled) {
            copy(block, whole, at, width * bytes, bytes);
          } else {
            widen(block, scaled ? member.pair.scale() : 1, whole, at, width * bytes);
          }
        }
      }
      return whole;
    });
  }

  /** @param stride bytes from row to row of the whole */
  private static void copy(Tensor block, ByteBuffer whole, int at, int stride, int bytes) {
    int height = Math.toIntExact(block.dimension(0));
    int length = Math.toIntExact(block.elementCount() / height) * bytes;
    ByteBuffer source = block.bytes();
    for (int row = 0; row < height; row++) {
      whole.put(at + row * stride, source, row * length, length);
    }
  }

  private static void widen(Tensor block, double scale, ByteBuffer whole, int at, int stride) {
    int height = Math.toIntExact(block.dimension(0));
    int width = Math.toIntExact(block.elementCount() / height);
    float[] numbers = block.toFloats();
    for (int row = 0; row < height; row++) {
      for (int column = 0; column < width; column++) {
        whole.putFloat(at + row * stride + 4 * column, (float) (scale * numbers[row * width + column]));
      }
    }
  }

  private static boolean same(Tensor one, Tensor other) {
    return one == other
        || one.type() == other.type() && one.byteSize() == other.byteSize() && one.bytes().equals(other.bytes());
  }
}
