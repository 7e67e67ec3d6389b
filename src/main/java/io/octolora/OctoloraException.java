// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/** The one unchecked exception of this library. The message names the argument, file or module and the numbers. */
public class OctoloraException extends RuntimeException {
  private static final long serialVersionUID = 1;
  private final Status status;

  public OctoloraException(Status status, String message) {
    this(status, message, null);
  }

  public OctoloraException(Status status, String message, @Nullable Throwable cause) {
    super(message, cause);
    this.status = Objects.requireNonNull(status, "status");
  }

  public Status status() {
    return status;
  }
}
