// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

/**
 * A tensor of an adapter file that is no part of a usable low-rank pair.
 *
 * @param key its name in the file
 * @param module the module it belongs to under the file's own name; the key itself where that cannot be told
 * @param why what it is and what is wrong with it
 */
public record UnsupportedKey(String key, String module, String why) {}
