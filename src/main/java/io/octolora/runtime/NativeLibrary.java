// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.nio.file.Files;
import java.nio.file.Path;
import org.bytedeco.javacpp.Loader;

/**
 * Loads the native library once and turns its statuses into exceptions. The system property {@value #PATH_PROPERTY}
 * names a folder with the two shared libraries; without it they come from the class path, where JavaCPP finds them.
 */
final class NativeLibrary {
  static final String PATH_PROPERTY = "octolora.library.path";
  /** OCTOLORA_ABI_VERSION of the header that {@link NativeOctolora} was written for. */
  static final int ABI_VERSION = 3;

  private static final System.Logger LOG = System.getLogger("io.octolora.runtime");

  private NativeLibrary() {}

  /** Loads at the first use of the class; a failure is kept and thrown again by every {@link #ensure}. */
  private static final class Loaded {
    static final String VERSION;
    static final NativeLibraryException FAILURE;

    static {
      String version = null;
      NativeLibraryException failure = null;
      try {
        load(System.getProperty(PATH_PROPERTY));
        requireAbi(ABI_VERSION, NativeOctolora.abiVersion());
        version = NativeOctolora.version();
      } catch (NativeLibraryException e) {
        failure = e;
      } catch (LinkageError e) {
        failure = new NativeLibraryException("the native library does not load: " + e.getMessage(), e);
      }
      VERSION = version;
      FAILURE = failure;
    }
  }

  static void load(String folder) {
    if (folder == null) {
      try {
        Loader.load(NativeOctolora.class);
      } catch (UnsatisfiedLinkError e) {
        throw new NativeLibraryException(refusal(e), e);
      }
      return;
    }
    // The JNI library names the other one without a folder; loading that first satisfies it.
    for (String name : new String[] {"liboctolora.so.3", "libjnioctolora.so"}) {
      Path file = Path.of(folder, name).toAbsolutePath();
      if (!Files.isRegularFile(file)) {
        throw new NativeLibraryException("-D%s=%s: %s does not exist".formatted(PATH_PROPERTY, folder, file), null);
      }
      try {
        System.load(file.toString());
      } catch (UnsatisfiedLinkError e) {
        throw new NativeLibraryException("-D%s=%s: %s".formatted(PATH_PROPERTY, folder, e.getMessage()), e);
      }
    }
  }

  /** JavaCPP looks on where a library that it found does not load, and keeps the reason as the cause. */
  private static String refusal(UnsatisfiedLinkError error) {
    String platform = Loader.getPlatform();
    String resource = "io/octolora/runtime/" + platform + "/libjnioctolora.so";
    if (error.getCause() != null && NativeLibrary.class.getClassLoader().getResource(resource) != null) {
      return "the native library from the jar does not load: " + error.getCause().getMessage();
    }
    return ("no native library for %1$s (expected the jar with the classifier %1$s on the %2$s), and -D%3$s names no "
        + "folder: %4$s").formatted(platform, NativeLibrary.class.getModule().isNamed()
            ? "class path, or on the module path with --add-modules io.octolora.natives" : "class path", PATH_PROPERTY,
            error.getMessage());
  }

  static void requireAbi(int expected, int found) {
    if (expected != found) {
      throw new NativeLibraryException(
          "the native library speaks ABI version %d, these classes version %d: use jars of one build"
              .formatted(found, expected),
          null);
    }
  }

  /** Throws why the library cannot be used, or does nothing. Every first call into the library goes through here. */
  static void ensure() {
    if (Loaded.FAILURE != null) {
      throw new NativeLibraryException(Loaded.FAILURE.getMessage(), Loaded.FAILURE);
    }
  }

  static String version() {
    ensure();
    return Loaded.VERSION;
  }

  /** Throws what {@code octolora_last_error} says unless status is 0; allocates nothing otherwise. */
  static void check(int status) {
    if (status != 0) {
      throw failure(status, "");
    }
  }

  /** The same, with the object the call was about before the message. */
  static void check(int status, String about) {
    if (status != 0) {
      throw failure(status, about + ": ");
    }
  }

  /** For a failure while something is freed: said in the log, since close() must not hide what was thrown before it. */
  static void warn(int status, String about) {
    if (status != 0) {
      LOG.log(System.Logger.Level.WARNING, failure(status, about + ": ").getMessage());
    }
  }

  private static OctoloraException failure(int status, String prefix) {
    return new OctoloraException(Status.ofCode(status), prefix + NativeOctolora.lastError());
  }
}
