// SPDX-License-Identifier: Apache-2.0
package io.octolora.examples;

import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.mapping.ModuleMap;
import io.octolora.runtime.Device;
import io.octolora.runtime.Int8Linear;
import java.io.IOException;
import java.nio.file.Path;

/** What lies between the markers is the Java example of README.md, word for word. */
final class ReadmeExample {
  private ReadmeExample() {}

  static float[] run(Path checkpoint, Path lora, float[] x, int rows) throws IOException {
    // README begin
    try (Checkpoint base = Checkpoint.open(checkpoint);     // bitsandbytes or Quanto int8: told apart by the tensors
         LoraAdapter style = LoraAdapter.open(lora);        // PEFT, diffusers, kohya or BFL names
         Device device = Device.best()) {                   // CUDA if there, else the CPU
      ModuleMap map = ModuleMap.of(base, style);            // every key lands, or this throws with the full list
      try (Int8Linear toQ = device.load(base.linear("transformer_blocks.0.attn.to_q"))) {
        toQ.attach(map.delta(toQ.name()), 0.8f);            // y += 0.8 · scale · (x · Aᵀ) · Bᵀ
        return toQ.forward(x, rows);                        // or device pointers and a stream, without a copy
      }
    }
    // README end
  }
}
