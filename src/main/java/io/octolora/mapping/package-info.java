// SPDX-License-Identifier: Apache-2.0

/**
 * Which delta sits on which module? Every tensor of an adapter lands on a module of the base or is listed.
 */
package io.octolora.mapping;
