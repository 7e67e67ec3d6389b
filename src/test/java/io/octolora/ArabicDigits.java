// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import java.util.Locale;

/** While open, the locale of formatted numbers is Egypt's, whose digits no name in a file has. */
public final class ArabicDigits implements AutoCloseable {
  private final Locale before = Locale.getDefault(Locale.Category.FORMAT);

  public ArabicDigits() {
    Locale.setDefault(Locale.Category.FORMAT, Locale.forLanguageTag("ar-EG"));
  }

  @Override
  public void close() {
    Locale.setDefault(Locale.Category.FORMAT, before);
  }
}
