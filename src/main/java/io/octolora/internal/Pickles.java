// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import io.octolora.FormatException;
import io.octolora.Status;
import java.nio.file.Path;
import java.util.List;

/** Files whose reading would run code. */
public final class Pickles {
  private static final List<String> ENDS = List.of(".bin", ".pt", ".pth", ".ckpt", ".pkl");

  private Pickles() {}

  /** @throws FormatException if the file's name is that of a pickle */
  public static void refuse(Path file) {
    String name = String.valueOf(file.getFileName());
    for (String end : ENDS) {
      if (name.endsWith(end)) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: a Python pickle (%s) can run code when it is read; expected a safetensors file".formatted(file, end));
      }
    }
  }
}
