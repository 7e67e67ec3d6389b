// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.checkpoint.Quantization;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import org.jetbrains.annotations.Nullable;

/**
 * A seeded layer with what it should compute, in double precision and in plain loops over the formulas of octolora.h.
 *
 * <p>x, A and B are small multiples of powers of two that fp16 and bf16 hold exactly, so that the choice of a 16-bit
 * type for a fp32 adapter is no source of error.
 */
final class RandomLayer {
  /** Unit roundoff, half the distance from 1 to the next number, of fp32 and of bf16, the coarser type of x·Aᵀ. */
  private static final double FP32 = 0x1p-24;
  private static final double BF16 = 0x1p-8;

  record Adapter(int rank, float[] a, float[] b, float weight) {}

  final int n;
  final int k;
  final Quantization quantization;
  final ByteBuffer weight;
  final float[] scale;
  final float @Nullable [] bias;
  final List<Adapter> adapters = new ArrayList<>();
  private final Random random;

  RandomLayer(long seed, int n, int k, Quantization quantization, boolean scalePerRow, boolean withBias) {
    this.random = new Random(seed);
    this.n = n;
    this.k = k;
    this.quantization = quantization;
    this.weight = ByteBuffer.allocateDirect(n * k);
    for (int i = 0; i < n * k; i++) {
      weight.put(i, (byte) (random.nextInt(256) - 128));
    }
    this.scale = new float[scalePerRow ? n : 1];
    for (int i = 0; i < scale.length; i++) {
      scale[i] = 0.001f + 0.01f * random.nextFloat();
    }
    this.bias = withBias ? floats(n) : null;
  }

  /** Multiples of 1/8 in [-8, 8]. */
  float[] floats(int count) {
    float[] values = new float[count];
    for (int i = 0; i < count; i++) {
      values[i] = (random.nextInt(129) - 64) / 8f;
    }
    return values;
  }

  Adapter adapter(int rank, float weight) {
    float[] a = floats(rank * k);
    float[] b = floats(n * rank);
    for (int i = 0; i < a.length; i++) {
      a[i] /= 64;
    }
    return new Adapter(rank, a, b, weight);
  }

  /** Loads the layer without its adapters. */
  Int8Linear load(Device device) {
    return device.load("layer", n, k, quantization, weight, scale, bias);
  }

  void attach(Int8Linear linear, Adapter adapter) {
    linear.attach(adapter.rank, adapter.a, adapter.b, adapter.weight, LoraPrecision.BITS_16);
    adapters.add(adapter);
  }

  /** What differs from y beyond its bound, in words; null where all is well. */
  @Nullable String judge(float[] x, int rows, float[] y) {
    return judge(x, rows, y, adapters);
  }

  /** The same for other adapters than those that were attached. */
  @Nullable String judge(float[] x, int rows, float[] y, List<Adapter> adapters) {
    for (int row = 0; row < rows; row++) {
      float max = 0;
      for (int c = 0; c < k; c++) {
        max = Math.max(max, Math.abs(x[row * k + c]));
      }
      boolean fixed = quantization.mode() == Quantization.Mode.W8A8_STATIC;
      float step = fixed ? quantization.xScale() : max / quantization.xDivisor();
      for (int o = 0; o < n; o++) {
        double base = 0;
        double magnitude = 0; // Σ |terms|, for W8A16, whose sum is rounded
        for (int c = 0; c < k; c++) {
          float value = x[row * k + c];
          int w = weight.get(o * k + c);
          double term = switch (quantization.mode()) {
            case W8A16 -> (double) value * w;
            case W8A8_STATIC -> clamp(Math.rint(value / step)) * w;
            case W8A8_DYNAMIC -> max == 0 ? 0 : clamp(Math.rint(value * (quantization.xDivisor() / max))) * w;
          };
          base += term;
          magnitude += Math.abs(term);
        }
        double scales = scale[scale.length == 1 ? 0 : o];
        double roundings = 4; // the sum to fp32, times s_x, times s_w, and one for the order of the products
        if (quantization.mode() == Quantization.Mode.W8A16) {
          roundings = 2;
          magnitude *= 2 * k * FP32 * Math.abs(scales); // a tensor core truncates: twice the unit roundoff
        } else {
          scales *= step;
          magnitude = 0;
        }
        base *= scales;
        double want = base;
        double bound = roundings * FP32 * Math.abs(base) + magnitude;
        double size = Math.abs(base); // of everything that is summed up to y
        int ranks = 0;
        if (bias != null) {
          want += bias[o];
          size += Math.abs(bias[o]);
        }
        for (Adapter adapter : adapters) {
          for (int r = 0; r < adapter.rank; r++) {
            double h = 0;
            double terms = 0;
            for (int c = 0; c < k; c++) {
              double term = (double) x[row * k + c] * adapter.a[r * k + c];
              h += term;
              terms += Math.abs(term);
            }
            double factor = (double) adapter.weight * adapter.b[o * adapter.rank + r];
            want += factor * h;
            size += Math.abs(factor * h);
            // the fp32 sum over k, h in 16 bits, and fp32 products with the weight and the row's scale
            bound += Math.abs(factor) * (2 * k * FP32 * terms + (BF16 + 4 * FP32) * Math.abs(h));
          }
          ranks += adapter.rank;
        }
        // Everything is added up in fp32 in some order: each bias, adapter and rank may be one more rounding of the
        // whole sum.
        bound += 2 * FP32 * (2 + adapters.size() + ranks) * size;
        double error = Math.abs(y[row * n + o] - want);
        if (!(error <= bound)) {
          return "y[%d,%d] = %s, expected %s, off by %s, bound %s"
              .formatted(row, o, y[row * n + o], want, error, bound);
        }
      }
    }
    return null;
  }

  private static double clamp(double code) {
    return Math.max(-128, Math.min(127, code));
  }
}
