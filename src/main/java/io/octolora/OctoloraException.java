// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * What a file, a device or the native library refuses. The message names the argument, file or module and the numbers.
 * Beside it there are Java's own exceptions: {@link IllegalArgumentException} for what is seen before any of them is
 * asked, such as an array of a wrong length, and {@link IllegalStateException} for what is closed.
 */
public class OctoloraException extends RuntimeException {
  private static final long serialVersionUID = 1;
  /** Never {@link Status#OK}. */
  private final Status status;

  /** Without a cause. */
  public OctoloraException(Status status, String message) {
    this(status, message, null);
  }

  /** With what led to it, or null. */
  public OctoloraException(Status status, String message, @Nullable Throwable cause) {
    super(message, cause);
    this.status = Objects.requireNonNull(status, "status");
  }

  /** The kind of failure; never {@link Status#OK}. */
  public Status status() {
    return status;
  }
}
