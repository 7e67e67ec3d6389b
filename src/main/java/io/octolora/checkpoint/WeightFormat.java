// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

/** How the weight of one linear layer is stored. */
public enum WeightFormat {
  /** bitsandbytes LLM.int8(): int8 {@code weight} and the absolute maximum of each row, {@code SCB}. */
  BITSANDBYTES_INT8("bitsandbytes int8"),
  /** Quanto qint8: int8 {@code weight._data} and the step of each row, {@code weight._scale}. */
  QUANTO_QINT8("Quanto qint8"),
  /** torchao Int8Tensor: int8 {@code _weight_qdata} and the step of each row or of all, {@code _weight_scale}. */
  TORCHAO_INT8("torchao int8"),
  /**
   * compressed-tensors: int8 {@code weight} (int-quantized), or {@code weight_packed} (pack-quantized), and the step of
   * each row or of all, {@code weight_scale}. Dynamic activations are measured by {@code max |x| / 127}, as the CUDA
   * kernel of vLLM does, which serves these models; the library's own emulation, {@code max |x| / 127.5}, is
   * {@link Quantization#dynamic}{@code (127.5f)} given to {@code Device.load}.
   */
  COMPRESSED_TENSORS_INT8("compressed-tensors int8"),
  /** ComfyUI int8_tensorwise: int8 {@code weight} and the step of each row or of all, {@code weight_scale}. */
  COMFYUI_INT8("ComfyUI int8"),
  /** GGUF Q8_0: blocks of 32 int8 codes of a row and their fp16 scale. */
  GGUF_Q8_0("GGUF Q8_0"),
  /** fp32, fp16 or bf16: not quantized. */
  FLOAT("not quantized");

  private final String label;

  WeightFormat(String label) {
    this.label = label;
  }

  /** The name for people, such as "bitsandbytes int8". */
  public String label() {
    return label;
  }
}
