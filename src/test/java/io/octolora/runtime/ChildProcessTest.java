// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** What needs a JVM of its own: its whole output, its class path, a library that does not load. */
class ChildProcessTest {
  @TempDir Path folder;

  private record Result(int exit, String output) {}

  private Result java(List<String> options, Class<?> main) throws IOException, InterruptedException {
    List<String> command = new ArrayList<>();
    command.add(Path.of(System.getProperty("java.home"), "bin", "java").toString());
    command.addAll(options);
    command.add(main.getName());
    Path output = folder.resolve("output");
    Process process = new ProcessBuilder(command).redirectErrorStream(true).redirectOutput(output.toFile()).start();
    if (!process.waitFor(120, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError(command + " still runs after 120 s");
    }
    return new Result(process.exitValue(), Files.readString(output));
  }

  /** The class path of this JVM without the jars of the CUDA bindings, which the library must not need. */
  private static String classPath() {
    return Arrays.stream(System.getProperty("java.class.path").split(File.pathSeparator))
        .filter(entry -> !Path.of(entry).getFileName().toString().startsWith("cuda-"))
        .collect(Collectors.joining(File.pathSeparator));
  }

  @Test
  void checkedJniFindsNothingAndCudaClassesAreNotNeeded() throws Exception {
    Result result = java(List.of("-Xcheck:jni", "-cp", classPath()), Workout.class);
    assertEquals(0, result.exit(), result.output());
    assertTrue(result.output().contains(Workout.DONE), result.output());
    // "WARNING in native method: ..." or "FATAL ERROR in native method: ..."
    assertFalse(result.output().contains("in native method"), result.output());
  }

  @Test
  void aFolderWithoutTheLibraryIsNamed() throws Exception {
    Result result = java(List.of("-Doctolora.library.path=" + folder, "-cp", classPath()), Workout.class);
    assertEquals(1, result.exit());
    assertTrue(result.output().contains("NativeLibraryException: -Doctolora.library.path=" + folder), result.output());
    assertTrue(result.output().contains("liboctolora.so.3 does not exist"), result.output());
  }

  @Test
  void aFileThatIsNoLibraryIsNamed() throws Exception {
    Files.writeString(folder.resolve("liboctolora.so.3"), "no library");
    Result result = java(List.of("-Doctolora.library.path=" + folder, "-cp", classPath()), Workout.class);
    assertEquals(1, result.exit());
    assertTrue(result.output().contains("NativeLibraryException: -Doctolora.library.path=" + folder), result.output());
    assertTrue(result.output().contains("liboctolora.so.3: "), result.output());
  }

  @Test
  void aClassPathWithoutTheLibraryIsNamed() throws Exception {
    Result result = java(List.of("-cp", withoutNatives()), Workout.class);
    assertEquals(1, result.exit());
    assertTrue(result.output().contains("NativeLibraryException: no native library for linux-x86_64"), result.output());
  }

  /** Such as one for a newer C library: what the system says of it must not be lost behind "not found". */
  @Test
  void aLibraryOnTheClassPathThatDoesNotLoadIsNamed() throws Exception {
    Path natives = Files.createDirectories(folder.resolve("io/octolora/runtime/linux-x86_64"));
    Files.writeString(natives.resolve("liboctolora.so.3"), "no library");
    Files.writeString(natives.resolve("libjnioctolora.so"), "no library");
    Result result = java(List.of("-cp", withoutNatives() + File.pathSeparator + folder), Workout.class);
    assertEquals(1, result.exit());
    assertTrue(result.output().contains("NativeLibraryException: the native library from the jar does not load: "
        + natives.resolve("libjnioctolora.so")), result.output());
  }

  private static String withoutNatives() {
    return Arrays.stream(classPath().split(File.pathSeparator))
        .filter(entry -> !Files.exists(Path.of(entry, "io/octolora/runtime/linux-x86_64")))
        .filter(entry -> !entry.contains("linux-x86_64"))
        .collect(Collectors.joining(File.pathSeparator));
  }

  @Test
  void anotherAbiVersionNamesBothNumbers() {
    NativeLibrary.requireAbi(1, 1);
    assertEquals("the native library speaks ABI version 3, these classes version 1: use jars of one build",
        assertThrows(NativeLibraryException.class, () -> NativeLibrary.requireAbi(1, 3)).getMessage());
  }
}
