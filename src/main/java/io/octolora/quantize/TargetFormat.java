// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.checkpoint.ElementType;
import java.util.ArrayList;
import java.util.List;

/** The int8 layouts that can be written. */
public enum TargetFormat {
  /** LLM.int8(): {@code weight}, the rows' absolute maxima in fp32 as {@code SCB}, {@code weight_format} 0. */
  BITSANDBYTES("bitsandbytes", List.of()) {
    @Override
    List<TensorSpec> tensors(String module, ElementType type, long n, long k) {
      return List.of(new TensorSpec(module + ".weight", ElementType.I8, n, k),
          new TensorSpec(module + ".SCB", ElementType.F32, n),
          new TensorSpec(module + ".weight_format", ElementType.U8));
    }
  },
  /** qint8, weight-only: {@code weight._data}, {@code weight._scale} and the scales of activations, 1. */
  QUANTO("quanto", List.of(".input_scale", ".output_scale")) {
    @Override
    List<TensorSpec> tensors(String module, ElementType type, long n, long k) {
      TensorSpec scale = n == 1 ? new TensorSpec(module + ".weight._scale", type)
          : new TensorSpec(module + ".weight._scale", type, n, 1);
      return List.of(new TensorSpec(module + ".weight._data", ElementType.I8, n, k), scale,
          new TensorSpec(module + ".input_scale", type), new TensorSpec(module + ".output_scale", type));
    }
  },
  /** int-quantized, symmetric, one scale a row, activations per token: {@code weight}, {@code weight_scale}. */
  COMPRESSED_TENSORS("compressed-tensors", List.of(".input_scale", ".weight_zero_point")) {
    @Override
    List<TensorSpec> tensors(String module, ElementType type, long n, long k) {
      return List.of(new TensorSpec(module + ".weight", ElementType.I8, n, k),
          new TensorSpec(module + ".weight_scale", type, n, 1));
    }
  };

  private final String tool;
  private final List<String> parts;

  TargetFormat(String tool, List<String> parts) {
    this.tool = tool;
    this.parts = parts;
  }

  /** The name of the tool that this is the layout of. */
  public String tool() {
    return tool;
  }

  /** Ends of names that a layer's tensors may have in this layout and in a float checkpoint alike. */
  List<String> parts() {
    return parts;
  }

  /** What stands for a weight {@code [n,k]} of a type: the codes, then the scales of the rows, then constants. */
  abstract List<TensorSpec> tensors(String module, ElementType type, long n, long k);

  /** All names, for messages. */
  static List<String> tools() {
    List<String> names = new ArrayList<>();
    for (TargetFormat format : values()) {
      names.add(format.tool);
    }
    return names;
  }

  @Override
  public String toString() {
    return tool;
  }
}
