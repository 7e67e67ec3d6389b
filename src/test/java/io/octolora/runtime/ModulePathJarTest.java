// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
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

  private record Result(int exit, String output) {}

  private Result run(String tool, String... arguments) throws Exception {
    List<String> command = new ArrayList<>(List.of(Path.of(System.getProperty("java.home"), "bin", tool).toString()));
    command.addAll(List.of(arguments));
    Path output = folder.resolve("output");
    Process process = new ProcessBuilder(command).redirectErrorStream(true).redirectOutput(output.toFile()).start();
    if (!process.waitFor(120, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError(command + " still runs after 120 s");
    }
    return new Result(process.exitValue(), Files.readString(output));
  }

  /** The jars of this build and those that they need to run. */
  private static String modulePath() throws IOException {
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
    return own + File.pathSeparator + libraries;
  }

  @Test
  void theModuleFindsItsNatives() throws Exception {
    String[] verify = {"-p", modulePath(), "--add-modules", "io.octolora.natives",
        "--enable-native-access=io.octolora,org.bytedeco.javacpp", "-m", "io.octolora/io.octolora.cli.Main", "verify",
        Fixtures.path("flux/base_bnb8").toString(), Fixtures.path("flux/adapters/r4/peft").toString(), "--device",
        "cpu"};
    Result result = run("java", verify);
    assertEquals(0, result.exit(), result.output());
    assertTrue(result.output().contains("OK: 26 of 26 layers within bounds on cpu"), result.output());
    verify[3] = "io.octolora";
    Result without = run("java", verify);
    assertEquals(2, without.exit(), without.output());
    assertTrue(without.output().contains("with --add-modules io.octolora.natives"), without.output());
  }

  /** With what Maven puts on its module path, which is not what is only "provided" to the library. */
  @Test
  void anotherModuleCompilesAgainstIt() throws Exception {
    Path module = Files.writeString(folder.resolve("module-info.java"), "module app { requires io.octolora; }");
    Path app = Files.writeString(folder.resolve("App.java"), """
        package app;
        import io.octolora.runtime.*;
        class App {
          void run(Int8Linear linear, DeviceMemory x, Stream stream) {
            linear.forward(x, DataType.FLOAT32, x, DataType.FLOAT32, 1, null, stream);
          }
        }
        """);
    Result result = run("javac", "-p", modulePath(), "-d", folder.resolve("out").toString(), "-Xlint:all", "-Werror",
        module.toString(), app.toString());
    assertEquals(0, result.exit(), result.output());
  }
}
