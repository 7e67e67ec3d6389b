// SPDX-License-Identifier: Apache-2.0
package io.octolora;

/** What kind of failure an {@link OctoloraException} reports; the values and their numbers are those of octolora.h. */
public enum Status {
  /** No failure. */
  OK,
  /** An argument, a file or a value outside what is documented. */
  INVALID_ARGUMENT,
  /** Host or device memory; nothing was kept. */
  OUT_OF_MEMORY,
  /** No CUDA driver, driver too old, no such ordinal, or built without CUDA. */
  NO_DEVICE,
  /** Valid, but not something this device, build or version does. */
  UNSUPPORTED,
  /** A CUDA call failed. */
  CUDA_ERROR,
  /** A workspace smaller than asked for. */
  WORKSPACE_TOO_SMALL,
  /** A defect of this library. */
  INTERNAL;

  private static final Status[] VALUES = values();

  /** The number in the C header, from 0. */
  public int code() {
    return ordinal();
  }

  /** The status of a C status code; {@link #INTERNAL} for a number that the header does not define. */
  public static Status ofCode(int code) {
    return code >= 0 && code < VALUES.length ? VALUES[code] : INTERNAL;
  }
}
