// SPDX-License-Identifier: Apache-2.0

/**
 * The judge: what a layer must give, in double precision and plain loops, and by how much rounding may move it.
 * {@link io.octolora.oracle.Oracle} is the library's own contract, {@link io.octolora.oracle.PeftReference} what the
 * real tools compute, {@link io.octolora.oracle.Recording} what they computed once. Nothing here touches a device.
 */
package io.octolora.oracle;
