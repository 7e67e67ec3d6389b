// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.internal.Halves;
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
        case BFLOAT16 -> bytes.putShort(Halves.toBfloat16(value));
        case FLOAT16 -> bytes.putShort(Halves.toFloat16(value));
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
        case BFLOAT16 -> Halves.fromBfloat16(bytes.getShort());
        case FLOAT16 -> Halves.fromFloat16(bytes.getShort());
      };
    }
    return values;
  }
}
