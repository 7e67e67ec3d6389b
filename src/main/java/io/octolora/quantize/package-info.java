// SPDX-License-Identifier: Apache-2.0

/**
 * What would the int8 tools have written? Turns float checkpoints into the files of bitsandbytes, Quanto and
 * compressed-tensors, tensor by tensor; runs no layer.
 */
package io.octolora.quantize;
