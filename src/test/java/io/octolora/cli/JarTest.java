// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The command line as a user starts it, in a process of its own. Maven makes the jar after it runs the tests. */
class JarTest {
  @TempDir
  Path folder;

  @Test
  void verifyRunsFromTheJar() throws Exception {
    Path jar = jar();
    Run run = run(jar, "verify", Fixtures.path("flux/base_bnb8"), Fixtures.path("flux/adapters/r4/peft"), "--golden",
        Fixtures.golden("flux", "bnb8__r4"), "--device", "cpu");
    assertEquals(0, run.status, run.err + run.out);
    assertTrue(run.out.strip().lines().reduce((a, b) -> b).orElse("").startsWith("OK: 26 of 26 layers"), run.out);
    assertTrue(!run.out.contains("\u001b"), "colours without a terminal");
  }

  @Test
  void badInputIsOneLineAndStatusTwo() throws Exception {
    Run run = run(jar(), "inspect", folder.resolve("nowhere"));
    assertEquals(2, run.status, run.err + run.out);
    assertEquals(1, run.err.lines().filter(line -> line.startsWith("octolora: ")).count(), run.err);
    assertTrue(!run.err.contains("\tat "), run.err);
  }

  /** A disk without room; a reader that leaves early is no failure. */
  @Test
  void outputThatIsLostIsSaid() throws Exception {
    Path base = Fixtures.path("flux/base_bnb8");
    Path full = Path.of("/dev/full");
    if (!Files.exists(full)) {
      System.out.println("SKIPPED: JarTest.outputThatIsLostIsSaid: no /dev/full");
      Assumptions.abort("no /dev/full");
    }
    Run lost = run(full, jar(), "inspect", base);
    assertEquals(2, lost.status, lost.err);
    assertEquals("octolora: standard output: No space left on device", lost.err.strip());
    Run piped = run(folder.resolve("out.txt"), List.of("sh", "-c", "exec 3>&1; { \"$@\"; echo status $? >&3; } | true",
        "sh", java(), "-jar", jar().toString(), "inspect", base.toString()));
    assertEquals("status 0\n", piped.out, piped.err);
    assertEquals("", piped.err);
  }

  @Test
  void theJarKnowsItsVersion() throws Exception {
    Run run = run(jar(), "--version");
    assertEquals(0, run.status, run.err);
    assertTrue(run.out.matches("(?s)octolora \\d+\\.\\d+\\.\\d+.*"), run.out);
  }

  private record Run(int status, String out, String err) {}

  private static String java() {
    return Path.of(System.getProperty("java.home"), "bin", "java").toString();
  }

  private Run run(Path jar, Object... args) throws IOException, InterruptedException {
    return run(folder.resolve("out.txt"), jar, args);
  }

  private Run run(Path out, Path jar, Object... args) throws IOException, InterruptedException {
    List<String> command = new ArrayList<>(List.of(java(), "-jar", jar.toString()));
    Stream.of(args).map(String::valueOf).forEach(command::add);
    return run(out, command);
  }

  private Run run(Path out, List<String> command) throws IOException, InterruptedException {
    Path err = folder.resolve("err.txt");
    Process process = new ProcessBuilder(command).redirectOutput(out.toFile()).redirectError(err.toFile()).start();
    if (!process.waitFor(120, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError("still running after 120 s: " + command);
    }
    return new Run(process.exitValue(), Files.isRegularFile(out) ? Files.readString(out, StandardCharsets.UTF_8) : "",
        Files.readString(err, StandardCharsets.UTF_8));
  }

  /** The jar with everything in it, if it was made of the classes under test. */
  private static Path jar() throws IOException {
    Path target = Path.of(System.getProperty("basedir", ""), "target");
    String reason = "no target/octolora-*-all.jar; mvn package makes it";
    if (Files.isDirectory(target)) {
      try (Stream<Path> files = Files.list(target)) {
        Path jar = files.filter(file -> file.getFileName().toString().matches("octolora-.*-all\\.jar")).findFirst()
            .orElse(null);
        if (jar != null) {
          Path newest = newestClass();
          if (newest == null || Files.getLastModifiedTime(jar).compareTo(Files.getLastModifiedTime(newest)) >= 0) {
            return jar;
          }
          reason = "%s is older than %s".formatted(jar, newest);
        }
      }
    }
    System.out.println("SKIPPED: JarTest: " + reason);
    Assumptions.abort(reason);
    throw new AssertionError(reason);
  }

  private static Path newestClass() throws IOException {
    Path classes = Path.of(System.getProperty("basedir", ""), "target", "classes");
    if (!Files.isDirectory(classes)) {
      return null;
    }
    Path newest = null;
    try (Stream<Path> files = Files.walk(classes)) {
      for (Path file : (Iterable<Path>) files.filter(file -> file.toString().endsWith(".class"))::iterator) {
        if (newest == null || Files.getLastModifiedTime(file).compareTo(Files.getLastModifiedTime(newest)) > 0) {
          newest = file;
        }
      }
    }
    return newest;
  }
}
