// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.Fixtures;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/**
 * A fixture's layers and adapters read straight from their files by the names that the tools gave them, past the
 * packages checkpoint, adapter and mapping: the second opinion on those. Scales of adapters come from the recording.
 */
public final class RawModel implements AutoCloseable {
  private final SafetensorsFile base;
  private final Path root;
  private final Map<String, SafetensorsFile> adapters = new java.util.HashMap<>();
  private final float threshold;

  /** @param model flux or llama; base, for example base_bnb8 */
  public RawModel(String model, String base, float threshold) throws IOException {
    this.root = Fixtures.path(model);
    this.threshold = threshold;
    Path folder = root.resolve(base);
    Path file = folder.resolve("model.safetensors");
    this.base = SafetensorsFile.open(
        Files.exists(file) ? file : folder.resolve("diffusion_pytorch_model.safetensors"));
  }

  public OracleLinear linear(String module) {
    Map<String, Tensor> tensors = base.tensors();
    Tensor bias = tensors.get(module + ".bias");
    Tensor scb = tensors.get(module + ".SCB");
    Tensor weight = tensors.get(module + (scb == null ? ".weight._data" : ".weight"));
    byte[] bytes = new byte[Math.toIntExact(weight.byteSize())];
    weight.bytes(0, bytes.length).get(bytes);
    float[] scale = (scb == null ? tensors.get(module + ".weight._scale") : scb).toFloats();
    if (scb != null) {
      for (int i = 0; i < scale.length; i++) {
        scale[i] /= 127f;
      }
    }
    return new OracleLinear((int) weight.dimension(0), (int) weight.dimension(1), bytes, scale,
        bias == null ? null : bias.toFloats(),
        scb == null ? Quantization.weightOnly() : Quantization.bitsandbytes(threshold));
  }

  /** The adapters that the recorded layer had, in its order, and with its scaling. */
  public List<OracleAdapter> adapters(Recording recording, Recording.Layer layer) throws IOException {
    List<OracleAdapter> all = new ArrayList<>();
    for (Map.Entry<String, Recording.Adapter> entry : layer.adapters().entrySet()) {
      String name = entry.getKey().equals("default") ? recording.adapter() : entry.getKey();
      all.add(adapter(name, layer.module(), entry.getValue().scaling()));
    }
    return all;
  }

  private OracleAdapter adapter(String name, String module, double scaling) throws IOException {
    SafetensorsFile file = adapters.get(name);
    if (file == null) {
      Path folder = root.resolve("adapters").resolve(name);
      Path peft = folder.resolve("peft");
      file = SafetensorsFile.open((Files.isDirectory(peft) ? peft : folder).resolve("adapter_model.safetensors"));
      adapters.put(name, file);
    }
    String stem = "base_model.model." + module + ".";
    Tensor a = file.tensors().get(stem + "lora_A.weight");
    Tensor b = file.tensors().get(stem + "lora_B.weight");
    @Nullable Tensor bias = file.tensors().get(stem + "lora_B.bias");
    @Nullable Tensor magnitude = file.tensors().get(stem + "lora_magnitude_vector");
    return new OracleAdapter((int) a.dimension(0), a.toFloats(), format(a), b.toFloats(), format(b),
        bias == null ? null : bias.toFloats(), magnitude == null ? null : magnitude.toFloats(), scaling);
  }

  private static FloatFormat format(Tensor tensor) {
    return switch (tensor.type()) {
      case F32 -> FloatFormat.FLOAT32;
      case F16 -> FloatFormat.FLOAT16;
      case BF16 -> FloatFormat.BFLOAT16;
      default -> throw new IllegalArgumentException(tensor.toString());
    };
  }

  @Override
  public void close() {
    base.close();
    adapters.values().forEach(SafetensorsFile::close);
  }
}
