// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

/** How the weight of one linear layer is stored. */
public enum WeightFormat {
  /** bitsandbytes LLM.int8(): int8 {@code weight} and the absolute maximum of each row, {@code SCB}. */
  BITSANDBYTES_INT8,
  /** Quanto qint8: int8 {@code weight._data} and the step of each row, {@code weight._scale}. */
  QUANTO_QINT8,
  /** fp32, fp16 or bf16: not quantized. */
  FLOAT
}
