// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.OctoloraException;
import io.octolora.Status;

/** Some or all tensors of an adapter have no place on a base; the report has the full list. */
public final class MappingException extends OctoloraException {
  private static final long serialVersionUID = 1;
  private final transient MappingReport report;

  MappingException(String message, MappingReport report) {
    super(Status.INVALID_ARGUMENT, message);
    this.report = report;
  }

  /** Every tensor of the adapter, and why it landed nowhere where it did not. */
  public MappingReport report() {
    return report;
  }
}
