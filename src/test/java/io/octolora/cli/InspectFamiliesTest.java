// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.SafetensorsWriter;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

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
    for (String part : new String[] {
        "read as     bitsandbytes int8: 1 layers have tensors named like m.gate_up_proj.SCB",
        "read as     kohya: 4 of 4 keys are named like lora_unet_m_gate_proj.lora_down.weight",
        "4 of 4 keys landed on 1 modules", "lora_unet_m_gate_proj + lora_unet_m_up_proj"}) {
      assertTrue(cli.out().contains(part), cli.out());
    }
  }

  /** Each way of storing int8, with pairs that are joined and scaled apart, run and judged by the oracle. */
  @ParameterizedTest
  @ValueSource(strings = {"torchao", "compressed-tensors", "packed", "ComfyUI"})
  void everyFormatRunsWithinTheBounds(String format) throws IOException {
    int n = 24;
    int k = 20;
    String fused = "model.layers.0.self_attn.qkv_proj";
    SafetensorsWriter base = new SafetensorsWriter();
    String config = "{}";
    switch (format) {
      case "torchao" -> base.codes(fused + "._weight_qdata", n, k).ramp(fused + "._weight_scale", 1e-3f, n, 1)
          .metadata("tensor_names", "[\"%s.weight\"]".formatted(fused)).metadata(fused + ".weight",
              "{\"_type\":\"Int8Tensor\",\"_data\":{\"block_size\":[1,20],\"act_quant_kwargs\":{\"_data\":{"
                  + "\"granularity\":{\"_type\":\"PerRow\"}}}}}");
      case "ComfyUI" -> base.codes(fused + ".weight", n, k).floats(fused + ".weight_scale", new long[0], 1e-3f)
          .metadata("_quantization_metadata",
              "{\"layers\":{\"%s\":{\"format\":\"int8_tensorwise\"}}}".formatted(fused));
      default -> {
        boolean packed = format.equals("packed");
        String activations = "{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"token\",\"dynamic\":true}";
        config = ("{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"config_groups\":{\"g\":{"
            + "\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"channel\"},"
            + "\"input_activations\":%s}}}}").formatted(packed ? "null" : activations);
        base.ramp(fused + ".weight_scale", 1e-3f, n, 1);
        if (packed) {
          byte[] words = new byte[n * k];
          for (int i = 0; i < words.length; i++) {
            words[i] = (byte) (37 * i);
          }
          base.bytes(fused + ".weight_packed", "I32", new long[] {n, k / 4}, words).bytes(fused + ".weight_shape",
              "I64", new long[] {2}, new byte[] {(byte) n, 0, 0, 0, 0, 0, 0, 0, (byte) k, 0, 0, 0, 0, 0, 0, 0});
        } else {
          base.codes(fused + ".weight", n, k);
        }
      }
    }
    base.write(folder.resolve("model.safetensors"));
    Files.writeString(folder.resolve("config.json"), config);
    SafetensorsWriter lora = new SafetensorsWriter();
    for (String part : new String[] {"q", "v"}) {
      String name = "lora_unet_model_layers_0_self_attn_" + part + "_proj";
      lora.ramp(name + ".lora_down.weight", 1e-2f, 2, k).ramp(name + ".lora_up.weight", 1e-2f,
          part.equals("q") ? 12 : 6, 2).floats(name + ".alpha", new long[0], part.equals("q") ? 1 : 3);
    }
    Path adapter = Files.createDirectory(folder.resolve("lora")).resolve("lora.safetensors");
    Cli cli = Cli.run("verify", folder, lora.write(adapter), "--device", "cpu").expect(0);
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith(fused)), cli.out());
  }

  @Test
  void mixedFilesAreBadInput() throws IOException {
    Path base = new SafetensorsWriter().bitsandbytes("m", 5, 6).codes("l.weight._data", 5, 6)
        .ramp("l.weight._scale", 1, 5, 1).write(folder.resolve("base.safetensors"));
    Cli.run("inspect", base).expectError("read as bitsandbytes int8 by");
  }
}
