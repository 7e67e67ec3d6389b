// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.adapter.LoraPair;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;

/** What must be of one version. */
class BuildTest {
  private static final Path ROOT = Path.of(System.getProperty("basedir", ""));

  private static Path inSourceTree(String file) {
    Path path = ROOT.resolve(file);
    if (!Files.exists(path)) {
      System.out.println("SKIPPED: BuildTest: not run in the source tree, no " + path);
    }
    Assumptions.assumeTrue(Files.exists(path), "not in the source tree");
    return path;
  }

  private static String first(String file, String pattern) throws IOException {
    Path path = inSourceTree(file);
    Matcher match = Pattern.compile(pattern).matcher(Files.readString(path));
    assertTrue(match.find(), () -> file + " has no " + pattern);
    return match.group(1);
  }

  @Test
  void benchmarksAndNativeLibraryHaveTheVersionOfTheJar() throws IOException {
    String version = first("pom.xml", "<artifactId>octolora</artifactId>\\s*<version>([^<]+)</version>");
    assertEquals(version, first("benchmarks/pom.xml", "<octolora.version>([^<]+)</octolora.version>"));
    assertEquals(version,
        first("benchmarks/pom.xml", "<artifactId>octolora-benchmarks</artifactId>\\s*<version>([^<]+)<"));
    assertEquals(version.replace("-SNAPSHOT", ""),
        first("native/CMakeLists.txt", "project\\(octolora VERSION (\\S+)"));
  }

  /**
   * JavaCPP's jars, and those of its CUDA bindings, whatever their classifier; mixed versions fail when they are
   * loaded.
   */
  @Test
  void bindingsComeInOneVersion() {
    inSourceTree("pom.xml"); // elsewhere the class path is not Maven's
    Pattern jar = Pattern.compile("(javacpp|cuda)-([0-9][0-9.-]*[0-9])(-[a-z].*)?\\.jar");
    Map<String, Set<String>> versions = new TreeMap<>();
    for (String entry : System.getProperty("java.class.path").split(File.pathSeparator)) {
      Matcher match = jar.matcher(Path.of(entry).getFileName().toString());
      if (match.matches()) {
        versions.computeIfAbsent(match.group(1), name -> new TreeSet<>()).add(match.group(2));
      }
    }
    assertEquals(Set.of("cuda", "javacpp"), versions.keySet());
    assertEquals(1, versions.get("javacpp").size(), versions::toString);
    assertEquals(1, versions.get("cuda").size(), versions::toString);
    String javacpp = versions.get("javacpp").iterator().next();
    assertTrue(versions.get("cuda").iterator().next().endsWith("-" + javacpp), versions::toString);
  }

  @Test
  void theReadmeNamesTheGlibcThatIsCheckedAndTheNvccThatIsTaken() throws IOException {
    assertEquals(first("native/tests/CMakeLists.txt", "-D GLIBC=(\\S+)"), first("README.md", "glibc ([0-9.]+)\\+"));
    assertEquals(first("cmake/CudaCompiler.cmake", "OCTOLORA_NVCC_MINIMUM ([0-9.]+)"),
        first("README.md", "`nvcc` ([0-9.]+) or newer"));
  }

  /** The binding links the library by its ABI version, as the file name has it. */
  @Test
  void theBindingLinksTheAbiOfTheHeader() throws IOException {
    String abi = first("native/include/octolora/octolora.h", "#define OCTOLORA_ABI_VERSION (\\d+)");
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeOctolora.java", "link = \"octolora@\\.(\\d+)\""));
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeLibrary.java", "ABI_VERSION = (\\d+)"));
    assertEquals(abi, first("src/main/java/io/octolora/runtime/NativeLibrary.java", "liboctolora\\.so\\.(\\d+)"));
  }

  @Test
  void theGreatestRankIsTheHeaders() throws IOException {
    String rank = first("native/include/octolora/octolora.h", "#define OCTOLORA_MAX_RANK (\\d+)");
    assertEquals(rank, Integer.toString(LoraPair.MAX_RANK));
  }
}
