// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.internal.Json;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

/** One run of the command line inside this process. */
record Cli(int status, String out, String err) {
  static Cli run(Object... args) {
    return run(false, false, args);
  }

  static Cli run(boolean colours, boolean progress, Object... args) {
    StringWriter out = new StringWriter();
    StringWriter err = new StringWriter();
    Terminal terminal = new Terminal(new PrintWriter(out, true), new PrintWriter(err, true), colours, progress,
        Terminal.MIN_WIDTH);
    int status = Main.run(terminal, Arrays.stream(args).map(String::valueOf).toArray(String[]::new));
    return new Cli(status, out.toString(), err.toString());
  }

  /** Asserts the exit status; the message holds both outputs. */
  Cli expect(int expected) {
    assertEquals(expected, status, () -> "stdout:\n" + out + "\nstderr:\n" + err);
    return this;
  }

  /** Asserts bad input: status 2, nothing on stdout, and one line on stderr that holds all the parts. */
  void expectError(String... parts) {
    expect(Main.BAD_INPUT);
    assertEquals("", out);
    assertEquals(1, err.lines().count(), err);
    assertTrue(err.startsWith("octolora: "), err);
    for (String part : parts) {
      assertTrue(err.contains(part), () -> "expected '" + part + "' in: " + err);
    }
  }

  List<String> lines() {
    return out.lines().toList();
  }

  /** Asserts a table with these columns, all of it within 120 characters; sentences around it may be longer. */
  Cli expectTable(String... columns) {
    List<String> lines = lines();
    int header = -1;
    for (int i = 0; i < lines.size() && header < 0; i++) {
      String line = lines.get(i);
      header = line.startsWith(columns[0] + " ") && Arrays.stream(columns).allMatch(line::contains) ? i : -1;
    }
    assertTrue(header >= 0, () -> "no table with the columns " + List.of(columns) + ":\n" + out);
    for (int i = header; i < lines.size() && !lines.get(i).isEmpty(); i++) {
      String line = lines.get(i);
      assertTrue(line.length() <= 120, () -> line.length() + " columns: " + line);
    }
    return this;
  }

  Map<String, Object> json() {
    return Json.object(Json.parse(out, "stdout"), "stdout");
  }
}
