// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The jar and the natives' jar as modules, with nothing on the class path. */
class ModulePathJarTest {
  @TempDir Path folder;

  @Test
  void theModuleFindsItsNatives() throws Exception {
    Path target = Path.of(System.getProperty("basedir", ""), "target");
    if (!Files.isDirectory(target)) {
      System.out.println("SKIPPED: ModulePathJarTest: not run in the source tree, no folder " + target);
    }
    Assumptions.assumeTrue(Files.isDirectory(target), "not in the source tree");
    String own;
    try (Stream<Path> files = Files.list(target)) {
      String names = "octolora-[0-9.]+(-SNAPSHOT)?(-linux-x86_64)?\\.jar";
      own = files.filter(file -> file.getFileName().toString().matches(names))
          .map(Path::toString).collect(Collectors.joining(File.pathSeparator));
    }
    String used = "(jackson-core|picocli|javacpp)-[0-9.]+\\.jar";
    String libraries = Arrays.stream(System.getProperty("java.class.path").split(File.pathSeparator))
        .filter(entry -> Path.of(entry).getFileName().toString().matches(used))
        .collect(Collectors.joining(File.pathSeparator));
    Path output = folder.resolve("output");
    List<String> command = List.of(Path.of(System.getProperty("java.home"), "bin", "java").toString(),
        "-p", own + File.pathSeparator + libraries, "--add-modules", "io.octolora.natives",
        "--enable-native-access=io.octolora,org.bytedeco.javacpp", "-m", "io.octolora/io.octolora.cli.Main", "verify",
        Fixtures.path("flux/base_bnb8").toString(), Fixtures.path("flux/adapters/r4/peft").toString(), "--device",
        "cpu");
    Process process = new ProcessBuilder(command).redirectErrorStream(true).redirectOutput(output.toFile()).start();
    if (!process.waitFor(120, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError(command + " still runs after 120 s");
    }
    String text = Files.readString(output);
    assertEquals(0, process.exitValue(), text);
    assertTrue(text.contains("OK: 26 of 26 layers within bounds on cpu"), text);
  }
}
