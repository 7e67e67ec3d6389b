// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.checkpoint.ElementType;
import io.octolora.internal.Halves;

/** Turns one row of a weight into int8 codes and the number that the format stores for the row. */
abstract class RowQuantizer {
  /**
   * @param row holds the weights from {@code from} on; may be overwritten
   * @param codes gets them from {@code from} on
   * @return the stored number; NaN where the row has a value that the format cannot take, and then no codes are set
   */
  abstract float quantize(float[] row, int from, int k, byte[] codes);

  /** @param type of the weight: F32, F16 or BF16 */
  static RowQuantizer of(TargetFormat format, ElementType type) {
    return switch (format) {
      case BITSANDBYTES -> new Bitsandbytes();
      case QUANTO -> new Divided(type, 127f, 0);
      case COMPRESSED_TENSORS -> new Divided(type, 127.5f, epsilon(type));
    };
  }

  private static float absoluteMaximum(float[] row, int from, int k) {
    float maximum = 0;
    for (int i = from; i < from + k; i++) {
      maximum = Math.max(maximum, Math.abs(row[i])); // NaN stays
    }
    return maximum;
  }

  /** The distance from 1 to the next number of the type. */
  private static float epsilon(ElementType type) {
    return switch (type) {
      case F32 -> 0x1p-23f;
      case F16 -> 0x1p-10f;
      case BF16 -> 0x1p-7f;
      default -> throw new IllegalArgumentException("weight of type " + type);
    };
  }

  /**
   * The weight rounded to fp16, times 127 / absmax, to the nearest integer. The CUDA kernel divides by multiplying with
   * the hardware's approximate reciprocal, which decides codes that lie exactly between two.
   */
  static final class Bitsandbytes extends RowQuantizer {
    /**
     * The fp16 fractions whose reciprocal on the GPU, {@code rcp.approx.ftz.f32}, is not the nearest fp32 but the next
     * one below or above. Measured on an H200 for 1 + i / 1024 with all 1024 i; a power of two changes nothing, as the
     * reciprocal of any fp16 is a normal fp32.
     */
    private static final int[] RECIPROCAL_BELOW = {
        6, 14, 32, 46, 62, 70, 77, 86, 87, 88, 126, 127, 135, 160, 176, 179, 214, 219, 221, 274, 287, 325, 349,
        401, 415, 443, 445, 473, 474, 558, 614, 751, 783, 950, 954, 956, 957, 965, 1010, 1016};
    private static final int[] RECIPROCAL_ABOVE = {
        11, 17, 18, 20, 48, 91, 97, 98, 104, 105, 113, 138, 147, 148, 153, 203, 204, 209, 225, 226, 252, 260,
        296, 298, 304, 305, 346, 371, 386, 395, 396, 403, 408, 409, 417, 425, 439, 449, 453, 454, 458, 467, 481,
        488, 498, 505, 507, 519, 520, 521, 528, 531, 543, 547, 563, 564, 627, 647, 648, 650, 651, 667, 675, 676,
        687, 700, 701, 724, 728, 785, 786, 787, 789, 805, 807, 813, 823, 872, 874, 876, 878, 893, 920, 923, 928,
        944, 968, 987, 988, 997};
    private static final byte[] RECIPROCAL_CORRECTION = new byte[1024];

    static {
      for (int fraction : RECIPROCAL_BELOW) {
        RECIPROCAL_CORRECTION[fraction] = -1;
      }
      for (int fraction : RECIPROCAL_ABOVE) {
        RECIPROCAL_CORRECTION[fraction] = 1;
      }
    }

    @Override
    float quantize(float[] row, int from, int k, byte[] codes) {
      for (int i = from; i < from + k; i++) {
        row[i] = Halves.fromFloat16(Halves.toFloat16(row[i]));
      }
      float maximum = absoluteMaximum(row, from, k);
      if (!Float.isFinite(maximum)) {
        return Float.NaN;
      }
      float factor = maximum == 0 ? 0 : 127 * reciprocal(maximum);
      for (int i = from; i < from + k; i++) {
        codes[i] = (byte) Math.rint(row[i] * factor);
      }
      return maximum;
    }

    /** 1 / value of a positive fp16 number as the GPU has it. */
    static float reciprocal(float value) {
      int fraction = Float.floatToRawIntBits(value) >>> 13 & 0x3ff; // normal as fp32, also where fp16 has no exponent
      return Float.intBitsToFloat(Float.floatToRawIntBits(1 / value) + RECIPROCAL_CORRECTION[fraction]);
    }
  }

  /** scale = absmax / divisor, code = weight / scale, both rounded to the weight's own type. */
  private static final class Divided extends RowQuantizer {
    private final ElementType type;
    private final float divisor;
    private final float scaleOfZeros;

    Divided(ElementType type, float divisor, float scaleOfZeros) {
      this.type = type;
      this.divisor = divisor;
      this.scaleOfZeros = scaleOfZeros;
    }

    @Override
    float quantize(float[] row, int from, int k, byte[] codes) {
      float maximum = absoluteMaximum(row, from, k);
      if (!Float.isFinite(maximum)) {
        return Float.NaN;
      }
      float scale = round(maximum / divisor);
      scale = scale == 0 ? scaleOfZeros : scale;
      for (int i = from; i < from + k; i++) {
        double code = Math.rint(round(row[i] / scale));
        codes[i] = (byte) Math.max(-128, Math.min(127, code)); // 0 / 0 gives code 0
      }
      return scale;
    }

    private float round(float value) {
      return switch (type) {
        case BF16 -> Halves.fromBfloat16(Halves.toBfloat16(value));
        case F16 -> Halves.fromFloat16(Halves.toFloat16(value));
        default -> value;
      };
    }
  }
}
