// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.mapping.Factor;
import io.octolora.mapping.LoraDelta;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import org.jetbrains.annotations.Nullable;

/**
 * An adapter's factors in host memory, as {@code octolora_slots_set} reads them: dense, in the file's type, in direct
 * buffers. A linear keeps the ones attached to it, so that attaching another does not read their files again.
 *
 * @param a [rank, k]
 * @param b [n, rank]
 * @param bias [n], or null
 * @param magnitude [n], or null
 * @param scale the adapter's own, without the caller's weight
 */
record HostAdapter(int rank, ByteBuffer a, DataType aType, ByteBuffer b, DataType bType, float @Nullable [] bias,
    float @Nullable [] magnitude, double scale) {

  /** Copies a delta that must fit a layer of n output and k input features. */
  static HostAdapter of(LoraDelta delta, String linear, int n, int k) {
    if (delta.n() != n || delta.k() != k) {
      throw new IllegalArgumentException(
          "%s: an adapter for %s with n = %d, k = %d does not fit n = %d, k = %d"
              .formatted(linear, delta.module(), delta.n(), delta.k(), n, k));
    }
    Factor bias = delta.bias();
    Factor magnitude = delta.magnitude();
    return new HostAdapter(delta.rank(), copy(delta.a()), DataType.of(delta.a().type()), copy(delta.b()),
        DataType.of(delta.b().type()), bias == null ? null : bias.toFloats(),
        magnitude == null ? null : magnitude.toFloats(), delta.scale());
  }

  /** @param a [rank, k] @param b [n, rank] */
  static HostAdapter of(int rank, float[] a, float[] b, String linear, int n, int k) {
    if (rank < 1 || a.length != (long) rank * k || b.length != (long) n * rank) {
      throw new IllegalArgumentException(
          "%s: A holds %d and B %d numbers, expected %d x %d and %d x %d"
              .formatted(linear, a.length, b.length, rank, k, n, rank));
    }
    return new HostAdapter(rank, copy(a), DataType.FLOAT32, copy(b), DataType.FLOAT32, null, null, 1);
  }

  private static ByteBuffer copy(Factor factor) {
    if (factor.byteSize() > Integer.MAX_VALUE) {
      throw new OctoloraException(Status.UNSUPPORTED,
          "%s: %d bytes, expected less than 2 GiB".formatted(factor, factor.byteSize()));
    }
    ByteBuffer bytes = ByteBuffer.allocateDirect((int) factor.byteSize()).order(ByteOrder.LITTLE_ENDIAN);
    factor.copyTo(bytes);
    return bytes.flip();
  }

  private static ByteBuffer copy(float[] values) {
    ByteBuffer bytes = ByteBuffer.allocateDirect(Math.multiplyExact(4, values.length)).order(ByteOrder.nativeOrder());
    bytes.asFloatBuffer().put(values);
    return bytes;
  }

  /** Fills a slot; everything is read before the call returns. */
  void set(long slots, int slot, float weight, LoraPrecision precision, long stream, String about) {
    NativeLibrary.check(
        NativeOctolora.slotsSet(slots, slot, rank, aType.code(), bType.code(), precision.code(), a, b, bias,
            magnitude, (float) (weight * scale), stream),
        about);
  }
}
