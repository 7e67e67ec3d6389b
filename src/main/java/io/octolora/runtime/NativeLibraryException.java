// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import org.jetbrains.annotations.Nullable;

/** The native library is missing, does not load, or is of another version than these classes. */
public final class NativeLibraryException extends OctoloraException {
  private static final long serialVersionUID = 1L;

  NativeLibraryException(String message, @Nullable Throwable cause) {
    super(Status.UNSUPPORTED, message, cause);
  }
}
