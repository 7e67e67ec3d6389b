// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.mapping.Factor;
import io.octolora.mapping.LoraDelta;
import io.octolora.mapping.ModuleMap;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.function.IntFunction;
import org.jetbrains.annotations.Nullable;

/**
 * An adapter's factors for one layer in host memory, as {@code octolora_slots_set} reads them: dense, in the file's
 * type, in direct buffers. A linear keeps the ones attached to it, so that attaching another does not read their files
 * again.
 */
final class HostAdapter {
  final int rank;
  /** A [rank, k]. */
  final ByteBuffer a;
  final DataType aType;
  /** B [n, rank]. */
  final ByteBuffer b;
  final DataType bType;
  /** [n] fp32, or null. */
  final @Nullable ByteBuffer bias;
  /** [n] fp32, or null. */
  final @Nullable ByteBuffer magnitude;
  /** The adapter's own, without the caller's weight. */
  final double scale;
  /** Where A, B, bias and magnitude lie; 0 for none. */
  final long[] addresses;

  HostAdapter(int rank, ByteBuffer a, DataType aType, ByteBuffer b, DataType bType, @Nullable ByteBuffer bias,
      @Nullable ByteBuffer magnitude, double scale) {
    this.rank = rank;
    this.a = a;
    this.aType = aType;
    this.b = b;
    this.bType = bType;
    this.bias = bias;
    this.magnitude = magnitude;
    this.scale = scale;
    this.addresses = new long[] {address(a), address(b), address(bias), address(magnitude)};
  }

  private static long address(@Nullable ByteBuffer direct) {
    return direct == null ? 0 : NativeOctolora.address(direct);
  }

  /** Copies a delta that must fit a layer of n output and k input features, to memory of the garbage collector's. */
  static HostAdapter of(LoraDelta delta, String linear, int n, int k) {
    requireFit(delta, linear, n, k);
    return of(delta, ByteBuffer::allocateDirect);
  }

  private static HostAdapter of(LoraDelta delta, IntFunction<ByteBuffer> memory) {
    Factor bias = delta.bias();
    Factor magnitude = delta.magnitude();
    return new HostAdapter(delta.rank(), copy(delta.a(), memory), DataType.of(delta.a().type()),
        copy(delta.b(), memory), DataType.of(delta.b().type()),
        bias == null ? null : copy(finite(bias, delta, "bias"), memory),
        magnitude == null ? null : copy(finite(magnitude, delta, "magnitude"), memory), delta.scale());
  }

  /** Where the device reads them for itself, no one else would look. */
  private static float[] finite(Factor vector, LoraDelta delta, String what) {
    float[] values = vector.toFloats();
    for (int i = 0; i < values.length; i++) {
      if (!Float.isFinite(values[i])) {
        throw new OctoloraException(Status.INVALID_ARGUMENT,
            "%s: adapter.%s[%d] = %s is not finite".formatted(delta.module(), what, i, values[i]));
      }
    }
    return values;
  }

  static void requireFit(LoraDelta delta, String linear, int n, int k) {
    if (delta.n() != n || delta.k() != k) {
      throw new IllegalArgumentException(
          "%s: an adapter for %s with n = %d, k = %d does not fit n = %d, k = %d"
              .formatted(linear, delta.module(), delta.n(), delta.k(), n, k));
    }
  }

  /** @param a [rank, k] @param b [n, rank] */
  static HostAdapter of(int rank, float[] a, float[] b, String linear, int n, int k) {
    if (rank < 1 || a.length != (long) rank * k || b.length != (long) n * rank) {
      throw new IllegalArgumentException(
          "%s: A holds %d and B %d numbers, expected %d x %d and %d x %d"
              .formatted(linear, a.length, b.length, rank, k, n, rank));
    }
    return new HostAdapter(rank, copy(a, ByteBuffer::allocateDirect), DataType.FLOAT32,
        copy(b, ByteBuffer::allocateDirect), DataType.FLOAT32, null, null, 1);
  }

  /** The same of what was copied before its layer was known. */
  void requireFit(String linear, int n, int k) {
    if (a.capacity() != (long) rank * k * aType.bytes() || b.capacity() != (long) n * rank * bType.bytes()) {
      throw new IllegalArgumentException(("%s: an adapter of rank %d with %d bytes of A and %d of B does not fit "
          + "n = %d, k = %d").formatted(linear, rank, a.capacity(), b.capacity(), n, k));
    }
  }

  // ---- All of a map

  /** Bytes of pinned memory for {@link #all}. */
  static long bytes(ModuleMap map) {
    long bytes = 0;
    for (String module : map.modules()) {
      LoraDelta delta = map.delta(module);
      bytes += PinnedMemory.taken(delta.a().byteSize()) + PinnedMemory.taken(delta.b().byteSize());
      for (Factor vector : new Factor[] {delta.bias(), delta.magnitude()}) {
        bytes += vector == null ? 0 : PinnedMemory.taken(4L * vector.rows());
      }
    }
    return bytes;
  }

  /** Copies every delta, by its module, in the map's order. */
  static Map<String, HostAdapter> all(ModuleMap map, IntFunction<ByteBuffer> memory) {
    Map<String, HostAdapter> copies = new LinkedHashMap<>();
    map.modules().forEach(module -> copies.put(module, of(map.delta(module), memory)));
    return copies;
  }

  /** What is said of modules that an adapter changes and that are not among count layers. */
  static String absent(String adapter, List<String> modules, int count) {
    int most = 3;
    return "adapter %s changes %d layers that are not in this set of %d: %s%s".formatted(adapter, modules.size(), count,
        String.join(", ", modules.subList(0, Math.min(most, modules.size()))), modules.size() > most ? ", …" : "");
  }

  // ---- Copies

  private static ByteBuffer copy(Factor factor, IntFunction<ByteBuffer> memory) {
    if (factor.byteSize() > Integer.MAX_VALUE) {
      throw new OctoloraException(Status.UNSUPPORTED,
          "%s: %d bytes, expected less than 2 GiB".formatted(factor, factor.byteSize()));
    }
    ByteBuffer bytes = memory.apply((int) factor.byteSize()).order(ByteOrder.LITTLE_ENDIAN);
    factor.copyTo(bytes);
    return bytes.flip();
  }

  private static ByteBuffer copy(float[] values, IntFunction<ByteBuffer> memory) {
    ByteBuffer bytes = memory.apply(Math.multiplyExact(4, values.length)).order(ByteOrder.nativeOrder());
    bytes.asFloatBuffer().put(values);
    return bytes;
  }

  /** Fills a slot; everything is read before the call returns. */
  void set(NativeHandle slots, int slot, float weight, LoraPrecision precision, long stream, String layer) {
    SlotFills fills = new SlotFills();
    fills.add(layer, slots, slot, this, weight, precision);
    fills.run(stream);
  }
}
