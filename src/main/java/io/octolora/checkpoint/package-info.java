// SPDX-License-Identifier: Apache-2.0

/**
 * What is the base? Safetensors and GGUF files and the int8 formats inside them; describes modules, never touches a
 * device.
 */
package io.octolora.checkpoint;
