// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.oracle.FloatFormat;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Random;

/** Rows of activations: made up, and to and from the bytes that a device reads and writes. */
public final class Activations {
  private Activations() {}

  /**
   * Normal values with what makes int8 activations hard: about one column in a hundred (and at least one of 64 or more)
   * is 8 to 24 times larger in every row, as in trained transformers. Already rounded to the format.
   */
  public static float[] random(long seed, int rows, int k, FloatFormat format) {
    Random random = new Random(seed);
    float[] columnScale = new float[k];
    for (int c = 0; c < k; c++) {
      columnScale[c] = random.nextInt(100) == 0 ? 8 + 16 * random.nextFloat() : 1;
    }
    if (k >= 64) {
      columnScale[random.nextInt(k)] = 8 + 16 * random.nextFloat();
    }
    float[] x = new float[Math.multiplyExact(rows, k)];
    for (int i = 0; i < x.length; i++) {
      x[i] = (float) format.round(random.nextGaussian() * columnScale[i % k]);
    }
    return x;
  }

  /** Values of the format as little-endian bytes. */
  public static byte[] pack(float[] values, FloatFormat format) {
    int width = format == FloatFormat.FLOAT32 ? 4 : 2;
    ByteBuffer bytes = ByteBuffer.allocate(Math.multiplyExact(values.length, width)).order(ByteOrder.LITTLE_ENDIAN);
    for (float value : values) {
      switch (format) {
        case FLOAT32 -> bytes.putFloat(value);
        case BFLOAT16 -> bytes.putShort((short) (Float.floatToRawIntBits((float) format.round(value)) >>> 16));
        case FLOAT16 -> bytes.putShort(float16Bits((float) format.round(value)));
      }
    }
    return bytes.array();
  }

  /** The reverse of {@link #pack}. */
  public static float[] unpack(byte[] packed, FloatFormat format) {
    ByteBuffer bytes = ByteBuffer.wrap(packed).order(ByteOrder.LITTLE_ENDIAN);
    float[] values = new float[packed.length / (format == FloatFormat.FLOAT32 ? 4 : 2)];
    for (int i = 0; i < values.length; i++) {
      values[i] = switch (format) {
        case FLOAT32 -> bytes.getFloat();
        case BFLOAT16 -> Float.intBitsToFloat(bytes.getShort() << 16);
        case FLOAT16 -> float16Value(bytes.getShort());
      };
    }
    return values;
  }

  /** Of a value that fp16 holds. */
  private static short float16Bits(float value) {
    int sign = Float.floatToRawIntBits(value) >>> 16 & 0x8000;
    if (Float.isNaN(value)) {
      return (short) (sign | 0x7e00);
    }
    float magnitude = Math.abs(value);
    if (Float.isInfinite(magnitude)) {
      return (short) (sign | 0x7c00);
    }
    int exponent = Math.getExponent(magnitude);
    if (magnitude == 0 || exponent < -14) {
      return (short) (sign | (int) (magnitude * 0x1p24f)); // a multiple of 2^-24
    }
    int fraction = (Float.floatToRawIntBits(magnitude) & 0x7fffff) >>> 13;
    return (short) (sign | exponent + 15 << 10 | fraction);
  }

  private static float float16Value(short bits) {
    int exponent = bits >>> 10 & 0x1f;
    int fraction = bits & 0x3ff;
    float magnitude;
    if (exponent == 0x1f) {
      magnitude = fraction == 0 ? Float.POSITIVE_INFINITY : Float.NaN;
    } else if (exponent == 0) {
      magnitude = fraction * 0x1p-24f;
    } else {
      magnitude = Math.scalb(1f + fraction * 0x1p-10f, exponent - 15);
    }
    return bits < 0 ? -magnitude : magnitude;
  }
}
