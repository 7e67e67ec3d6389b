// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.SafetensorsWriter;
import java.io.IOException;
import java.nio.file.Path;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** What was recognised, by what, and a base that stores together what the adapter has apart. */
class InspectFamiliesTest {
  @TempDir Path folder;

  @Test
  void saysWhatWasSeenAndShowsJoinedPairs() throws IOException {
    Path base = new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6).write(folder.resolve("base.safetensors"));
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String part : new String[] {"gate", "up"}) {
      writer.ramp("lora_unet_m_" + part + "_proj.lora_down.weight", 1, 2, 6)
          .ramp("lora_unet_m_" + part + "_proj.lora_up.weight", 1, 5, 2);
    }
    Cli cli = Cli.run("inspect", "-v", base, writer.write(folder.resolve("lora.safetensors"))).expect(0);
    for (String part : new String[] {"read as     bitsandbytes int8: 1 layers have tensors named like m.gate_up_proj.SCB",
        "read as     KOHYA: 4 of 4 keys are named like lora_unet_m_gate_proj.lora_down.weight",
        "4 of 4 keys landed on 1 modules", "lora_unet_m_gate_proj + lora_unet_m_up_proj"}) {
      assertTrue(cli.out().contains(part), cli.out());
    }
  }

  @Test
  void mixedFilesAreBadInput() throws IOException {
    Path base = new SafetensorsWriter().bitsandbytes("m", 5, 6).codes("l.weight._data", 5, 6)
        .ramp("l.weight._scale", 1, 5, 1).write(folder.resolve("base.safetensors"));
    Cli.run("inspect", base).expectError("read as bitsandbytes int8 by");
  }
}
