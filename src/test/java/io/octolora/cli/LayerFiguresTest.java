// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.cli.LayerFigures.Effect;
import io.octolora.cli.LayerFigures.Outliers;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle.Arithmetic;
import java.io.IOException;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class LayerFiguresTest {
  @TempDir
  Path folder;

  @Test
  void effectIsMeasuredByTheBase() {
    // root mean square of the base: sqrt((9 + 16 + 0 + 0) / 4) = 2.5; changes 0, 2.5, 5, 0.25
    Effect effect = Effect.of(new double[] {3, 4, 0, 0}, new double[] {3, 6.5, -5, 0.25});
    assertEquals(Math.sqrt((0 + 1 + 4 + 0.01) / 4), effect.share(), 1e-15);
    assertEquals(0, effect.low());
    assertEquals(0.1, effect.median(), 1e-15);
    assertEquals(1, effect.high(), 1e-15);
    assertEquals(4, Arrays.stream(effect.histogram()).sum());
    assertEquals(1, effect.histogram()[0], "no change");
    assertEquals(2, effect.histogram()[30] + effect.histogram()[31], "1 and 2 are in the last decade");
  }

  @Test
  void binsOfTheHistogram() {
    assertEquals(0, Effect.bin(0));
    assertEquals(0, Effect.bin(1e-9));
    assertEquals(30, Effect.bin(1.01));
    assertEquals(29, Effect.bin(0.99));
    assertEquals(35, Effect.bin(9.9));
    assertEquals(35, Effect.bin(Double.POSITIVE_INFINITY));
  }

  @Test
  void outlierColumns() {
    float[] x = {1, -7, 0, 6, 2, 8, 5.9f, -6.5f}; // [2, 4]
    Outliers own = Outliers.of(Quantization.bitsandbytes(6), x, 4);
    assertTrue(own.active());
    assertArrayEquals(new int[] {1, 3}, own.columns());
    assertArrayEquals(new float[] {8, 6.5f}, own.largest());
    Outliers compared = Outliers.of(Quantization.weightOnly(), x, 4);
    assertFalse(compared.active());
    assertEquals(6, compared.threshold());
    assertArrayEquals(new int[] {0, 1, 2, 3}, Outliers.of(Quantization.bitsandbytes(2), new float[] {2, 3, 4, 5}, 4)
        .columns());
  }

  @Test
  void costOfALayerThatIsKnown() throws IOException {
    // int8: codes 1..6 with steps 1 and 2; the float layer differs by 0.5 in one weight
    Path int8 = new SafetensorsWriter().bytes("a.weight._data", "I8", new long[] {2, 2}, new byte[] {1, 2, 3, 4})
        .floats("a.weight._scale", new long[] {2, 1}, 1, 2).write(folder.resolve("int8.safetensors"));
    Path plain = new SafetensorsWriter().floats("a.weight", new long[] {2, 2}, 1, 2, 6, 8.5f)
        .write(folder.resolve("float.safetensors"));
    try (Checkpoint quantized = Checkpoint.open(int8); Checkpoint original = Checkpoint.open(plain)) {
      BaseLinear linear = quantized.linear("a");
      float[] x = {1, 2};
      LayerFigures figures = LayerFigures.of(linear, linear.quantization(), List.of(), x, 1, FloatFormat.FLOAT32,
          Arithmetic.FP32, original.linear("a"));
      assertNull(figures.effect());
      assertEquals(0.5 / Math.sqrt(1 + 4 + 36 + 8.5 * 8.5), figures.cost().weight(), 1e-15);
      // y = (5, 22) against (5, 23)
      assertEquals(1 / Math.sqrt(25 + 23 * 23), figures.cost().output(), 1e-6);
      LayerFigures same = LayerFigures.of(linear, linear.quantization(), List.of(), x, 1, FloatFormat.FLOAT32,
          Arithmetic.FP32, null);
      assertNull(same.cost());
    }
  }

  @Test
  void costOfGguf() throws IOException {
    try (Checkpoint quantized = Checkpoint.open(Fixtures.path("llama/base_gguf"));
        Checkpoint original = Checkpoint.open(Fixtures.path("llama/base_bf16"))) {
      for (BaseLinear linear : quantized.linears().values()) {
        if (linear.quantized()) {
          float[] x = Activations.random(1, 2, linear.k(), FloatFormat.FLOAT32);
          LayerFigures figures = LayerFigures.of(linear, linear.quantization(), List.of(), x, 2, FloatFormat.FLOAT32,
              Arithmetic.FP32, original.linear(linear.name()));
          assertEquals(0.0045, figures.cost().weight(), 0.0015, linear.name());
        }
      }
    }
  }

  @Test
  void shares() {
    assertEquals("0 %", Numbers.percent(0));
    assertEquals("0.78 %", Numbers.percent(0.00781));
    assertEquals("1.0 %", Numbers.percent(0.00996));
    assertEquals("163 %", Numbers.percent(1.634));
    assertEquals("–", Numbers.percent(Double.NaN));
  }
}
