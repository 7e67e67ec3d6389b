// SPDX-License-Identifier: Apache-2.0
package io.octolora;

import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.net.URISyntaxException;
import java.net.URL;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.stream.Stream;
import java.util.zip.GZIPInputStream;

/** Where the fixtures lie: the folder named by the system property octolora.fixtures, else the class path's. */
public final class Fixtures {
  private static final Path ROOT = root();
  private static final Map<Path, Path> UNPACKED = new ConcurrentHashMap<>();

  private Fixtures() {}

  /** A file or folder below the fixtures, for example {@code path("flux/base_bnb8")}. */
  public static Path path(String relative) {
    Path path = ROOT.resolve(relative);
    if (!Files.exists(path)) {
      throw new IllegalArgumentException("no fixture " + path);
    }
    return path;
  }

  /** The recorded tensors of a run, for example {@code golden("flux", "bnb8__r4")}, unpacked where they are packed. */
  public static Path golden(String model, String name) {
    Path plain = ROOT.resolve(model).resolve("golden").resolve(name + ".safetensors");
    return Files.exists(plain) ? plain : UNPACKED.computeIfAbsent(plain, Fixtures::unpack);
  }

  /** The description beside {@link #golden}: which tensor belongs to which module. */
  public static Path goldenJson(String model, String name) {
    return golden(model, name).resolveSibling(name + ".json");
  }

  /** The names of all recorded runs of a model, sorted. */
  public static Stream<String> goldens(String model) {
    try (Stream<Path> files = Files.list(ROOT.resolve(model).resolve("golden"))) {
      Map<String, Path> names = new TreeMap<>();
      files.map(Path::getFileName).filter(file -> file.toString().matches(".*\\.json(\\.gz)?"))
          .forEach(file -> names.put(file.toString().replaceFirst("\\.json(\\.gz)?$", ""), file));
      return names.keySet().stream();
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
  }

  /** Unpacks the tensors and their description, as the tools wrote them. */
  private static Path unpack(Path plain) {
    try {
      Path folder = Files.createTempDirectory("octolora-golden");
      folder.toFile().deleteOnExit();
      String json = plain.getFileName().toString().replaceFirst("\\.safetensors$", ".json");
      for (Path file : List.of(plain, plain.resolveSibling(json))) {
        Path target = folder.resolve(file.getFileName());
        target.toFile().deleteOnExit();
        try (InputStream in = new GZIPInputStream(Files.newInputStream(file.resolveSibling(
            file.getFileName() + ".gz")))) {
          Files.copy(in, target);
        }
      }
      return folder.resolve(plain.getFileName());
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
  }

  private static Path root() {
    String property = System.getProperty("octolora.fixtures");
    if (property != null) {
      return Path.of(property);
    }
    URL url = Fixtures.class.getResource("/fixtures/README.md");
    if (url == null) {
      throw new IllegalStateException("no /fixtures on the class path and no system property octolora.fixtures");
    }
    try {
      return Path.of(url.toURI()).getParent();
    } catch (URISyntaxException e) {
      throw new IllegalStateException(e);
    }
  }
}
