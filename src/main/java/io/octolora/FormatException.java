// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import org.jetbrains.annotations.Nullable;

/**
 * A file is damaged, breaks the rules of its format ({@link Status#INVALID_ARGUMENT}), or is a known format that this
 * library does not read ({@link Status#UNSUPPORTED}). The message names the file, the tensor or key, and the numbers.
 */
public final class FormatException extends OctoloraException {
  private static final long serialVersionUID = 1;

  /** Of a file that is damaged or breaks the rules of its format. */
  public FormatException(String message) {
    super(Status.INVALID_ARGUMENT, message);
  }

  /** The same with what led to it, or null. */
  public FormatException(String message, @Nullable Throwable cause) {
    super(Status.INVALID_ARGUMENT, message, cause);
  }

  /** Of a known format that is not read: with {@link Status#UNSUPPORTED}. */
  public FormatException(Status status, String message) {
    super(status, message);
  }
}
