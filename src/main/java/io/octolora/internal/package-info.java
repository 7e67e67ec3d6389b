// SPDX-License-Identifier: Apache-2.0

/**
 * Shared by the readers and not exported: strict JSON, order and likeness of names, 16-bit floats.
 */
package io.octolora.internal;
