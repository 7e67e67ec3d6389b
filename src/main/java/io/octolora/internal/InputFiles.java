// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import io.octolora.FormatException;
import java.nio.file.Files;
import java.nio.file.Path;

/** Pipes and devices have no length and may never end, or never start: opening one can wait for ever. */
public final class InputFiles {
  private InputFiles() {}

  /** @throws FormatException for what exists and is neither a regular file nor a folder, links followed */
  public static void refuseSpecial(Path file) {
    if (Files.exists(file) && !Files.isRegularFile(file) && !Files.isDirectory(file)) {
      throw new FormatException("%s: a pipe, socket or device, expected a regular file".formatted(file));
    }
  }
}
