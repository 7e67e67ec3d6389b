// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;

/** Files that must name the same version. */
class BuildTest {
  private static final Path ROOT = Path.of(System.getProperty("basedir", ""));

  private static String first(String file, String pattern) throws IOException {
    Path path = ROOT.resolve(file);
    if (!Files.exists(path)) {
      System.out.println("SKIPPED: BuildTest: not run in the source tree, no " + path);
    }
    Assumptions.assumeTrue(Files.exists(path), "not in the source tree");
    Matcher match = Pattern.compile(pattern).matcher(Files.readString(path));
    assertTrue(match.find(), () -> file + " has no " + pattern);
    return match.group(1);
  }

  @Test
  void benchmarksAndNativeLibraryHaveTheVersionOfTheJar() throws IOException {
    String version = first("pom.xml", "<artifactId>octolora</artifactId>\\s*<version>([^<]+)</version>");
    assertEquals(version, first("benchmarks/pom.xml", "<octolora.version>([^<]+)</octolora.version>"));
    assertEquals(version, first("benchmarks/pom.xml", "<artifactId>octolora-benchmarks</artifactId>\\s*<version>([^<]+)<"));
    assertEquals(version.replace("-SNAPSHOT", ""),
        first("native/CMakeLists.txt", "project\\(octolora VERSION (\\S+)"));
  }

  /** The binding links the library by its ABI version, as the file name has it. */
  @Test
  void theBindingLinksTheAbiOfTheHeader() throws IOException {
    String abi = first("native/include/octolora/octolora.h", "#define OCTOLORA_ABI_VERSION (\\d+)");
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeOctolora.java", "link = \"octolora@\\.(\\d+)\""));
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeLibrary.java", "ABI_VERSION = (\\d+)"));
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeLibrary.java", "liboctolora\\.so\\.(\\d+)"));
  }
}
