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
     * Where the reciprocal of a GPU (H200) is not the nearest fp32 but its neighbour: the fraction bits of a
     * bf16 absmax, and by how many units in the last place; the exponent does not matter. Follows from the codes that
     * bitsandbytes 0.50.1 wrote for 9168 rows with all 128 fractions. For absmax with more bits, from fp16 and fp32
     * weights, the nearest fp32 is taken: at most a code between two integers differs then.
     */
    private static final byte[] RECIPROCAL_CORRECTION = new byte[128];

    static {
      RECIPROCAL_CORRECTION[20] = -1;
      RECIPROCAL_CORRECTION[22] = -1;
      RECIPROCAL_CORRECTION[65] = 1;
      RECIPROCAL_CORRECTION[109] = 1;
      RECIPROCAL_CORRECTION[116] = 1;
      RECIPROCAL_CORRECTION[127] = -1;
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

    /** Of a positive fp16 number: its reciprocal is a normal fp32. */
    private static float reciprocal(float value) {
      int bits = Float.floatToRawIntBits(value);
      float nearest = 1 / value;
      return (bits & 0xffff) != 0 ? nearest
          : Float.intBitsToFloat(Float.floatToRawIntBits(nearest) + RECIPROCAL_CORRECTION[bits >>> 16 & 0x7f]);
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
