// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.mapping.LoraDelta;
import io.octolora.mapping.ModuleMap;
import java.io.IOException;
import java.util.Arrays;
import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;

/** Layers and adapters from files; what they compute is judged by the recordings of the real tools. */
class CheckpointLayersTest {
  private static final String TO_Q = "transformer_blocks.0.attn.to_q";
  private static final String TO_FF = "transformer_blocks.0.ff.net.0.proj";
  private static final int ROWS = 4;

  private final float[] x = new float[ROWS * 128];

  CheckpointLayersTest() {
    Random random = new Random(1);
    for (int i = 0; i < x.length; i++) {
      x[i] = (float) random.nextGaussian();
    }
  }

  private static Checkpoint open(String name) throws IOException {
    return Checkpoint.open(Fixtures.path("flux/" + name));
  }

  @Test
  void weightsInPiecesAreTheSameWeights() throws IOException {
    try (Checkpoint base = open("base_bnb8"); Device device = Device.cpu()) {
      BaseLinear layer = base.linear(TO_FF);
      try (Int8Linear whole = device.load(layer);
          Int8Linear pieces = Int8Linear.create(device.handle(), layer.name(), layer.n(), layer.k(),
              layer.quantization(), layer.weight()::bytes, layer.scale(), layer.bias(), 1000)) {
        assertArrayEquals(whole.forward(x, ROWS), pieces.forward(x, ROWS));
      }
    }
  }

  @Test
  void filesMayBeClosedOnceAttached() throws IOException {
    try (Device device = Device.cpu()) {
      Int8Linear layer;
      float[] first;
      try (Checkpoint base = open("base_bnb8")) {
        layer = device.load(base.linear(TO_Q));
        try (LoraAdapter r4 = LoraAdapter.open(Fixtures.path("flux/adapters/r4/peft"))) {
          layer.attach(ModuleMap.of(base, r4).delta(TO_Q), 0.5f);
          first = layer.forward(x, ROWS);
        }
        // builds the storage again, from what was copied of the adapter that is closed
        try (LoraAdapter r8 = LoraAdapter.open(Fixtures.path("flux/adapters/r8_attn_bf16/peft"))) {
          layer.attach(ModuleMap.of(base, r8).delta(TO_Q), 0);
        }
      }
      try (layer) {
        assertEquals(2, layer.attachedCount());
        assertArrayEquals(first, layer.forward(x, ROWS), "an adapter of weight 0 changes nothing");
        layer.detachAll();
        assertFalse(Arrays.equals(first, layer.forward(x, ROWS)));
      }
      assertEquals(0, device.memoryInUse());
    }
  }

  @Test
  void layersThatAreNotInt8AreNamed() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bnb8")); Device device = Device.cpu()) {
      BaseLinear head = base.linear("lm_head");
      for (Executable call : new Executable[] {
          () -> device.load(head), () -> device.load(head, Quantization.weightOnly())}) {
        OctoloraException e = assertThrows(OctoloraException.class, call);
        assertEquals(Status.UNSUPPORTED, e.status());
        assertEquals("lm_head: the weight is BF16 and not quantized; only int8 layers run here", e.getMessage());
      }
    }
  }

  @Test
  void anAdapterOfAnotherShapeIsNamed() throws IOException {
    try (Checkpoint base = open("base_bnb8");
        LoraAdapter adapter = LoraAdapter.open(Fixtures.path("flux/adapters/r4/peft"));
        Device device = Device.cpu();
        Int8Linear layer = device.load(base.linear(TO_Q))) {
      LoraDelta wide = ModuleMap.of(base, adapter).delta(TO_FF);
      assertEquals("%s: an adapter for %s with n = 512, k = 128 does not fit n = 128, k = 128".formatted(TO_Q, TO_FF),
          assertThrows(IllegalArgumentException.class, () -> layer.attach(wide, 1)).getMessage());
      assertEquals(0, layer.attachedCount());
    }
  }
}
