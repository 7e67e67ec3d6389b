// SPDX-License-Identifier: Apache-2.0

/**
 * What is the delta? LoRA files of PEFT, diffusers, kohya and ComfyUI as low-rank pairs under their own names.
 */
package io.octolora.adapter;
