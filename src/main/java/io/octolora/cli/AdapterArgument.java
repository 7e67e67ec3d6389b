// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * {@code PATH} or {@code PATH=SCALE}. The text behind the last {@code =} is the scale if no file carries the whole name
 * and it is a decimal number, or the name of one that is not finite, or what is before it is a file.
 */
record AdapterArgument(Path path, float scale) {
  private static final Pattern SCALED =
      Pattern.compile("(?<path>.+)="
          + "(?<scale>[+-]?((\\d+\\.?\\d*|\\.\\d+)([eE][+-]?\\d+)?|(?<name>(?i)nan|inf(inity)?)))", Pattern.DOTALL);

  /** @throws IllegalArgumentException for what is no path, or a scale that no float holds */
  static AdapterArgument parse(String text) {
    if (text.isEmpty()) {
      throw new IllegalArgumentException("ADAPTER: the path is empty");
    }
    Matcher matcher = SCALED.matcher(text);
    if (matcher.matches() && !Files.exists(Path.of(text))) {
      if (matcher.group("name") != null) {
        throw new IllegalArgumentException("scale %s of %s: expected a finite number".formatted(
            matcher.group("scale"), matcher.group("path")));
      }
      float scale = Float.parseFloat(matcher.group("scale"));
      if (!Float.isFinite(scale)) {
        throw new IllegalArgumentException("scale %s of %s is beyond the range of a 32-bit float"
            .formatted(matcher.group("scale"), matcher.group("path")));
      }
      return new AdapterArgument(Path.of(matcher.group("path")), scale);
    }
    int last = text.lastIndexOf('=');
    if (last > 0 && !Files.exists(Path.of(text)) && Files.exists(Path.of(text.substring(0, last)))) {
      throw new IllegalArgumentException("scale '%s' of %s: expected a number".formatted(text.substring(last + 1),
          text.substring(0, last)));
    }
    return new AdapterArgument(Path.of(text), 1);
  }
}
