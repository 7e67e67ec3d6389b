// SPDX-License-Identifier: Apache-2.0

/** The command line: {@code inspect} shows what is in files, {@code verify} runs layers and judges every number. */
package io.octolora.cli;
