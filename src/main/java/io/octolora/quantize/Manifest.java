// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.Map;

/** The shards that a job has finished, in its working folder. Replaced as a whole, never changed in place. */
final class Manifest {
  static final String NAME = "octolora-quantize.json";

  private final Path folder;
  private final String job;
  private final Map<String, Long> finished = new LinkedHashMap<>();

  private Manifest(Path folder, String job) {
    this.folder = folder;
    this.job = job;
  }

  /**
   * An empty one where there is none.
   *
   * @throws OctoloraException if it is another job's, or a shard that it lists is gone or has another size
   */
  static Manifest open(Path folder, String job) throws IOException {
    Manifest manifest = new Manifest(folder, job);
    Path file = folder.resolve(NAME);
    if (!Files.exists(file)) {
      return manifest;
    }
    Map<String, Object> fields = Json.readObject(file);
    if (!job.equals(fields.get("job"))) {
      throw new OctoloraException(Status.INVALID_ARGUMENT, ("%s is of another job: the source, the options or the "
          + "program changed since; delete %s to start anew").formatted(file, folder));
    }
    Json.object(fields.get("finished"), file + ": finished").forEach((shard, value) -> {
      if (value instanceof Long bytes && (hasSize(folder.resolve(shard + ".part"), bytes)
          || hasSize(folder.resolve(shard), bytes))) {
        manifest.finished.put(shard, bytes);
      } else {
        throw new OctoloraException(Status.INVALID_ARGUMENT, "%s lists %s with %s bytes, which is not there; delete %s "
            .formatted(file, shard, value, folder) + "to start anew");
      }
    });
    return manifest;
  }

  /** Sizes by name; unmodifiable. */
  Map<String, Long> finished() {
    return Collections.unmodifiableMap(finished);
  }

  void add(String shard, long bytes) throws IOException {
    finished.put(shard, bytes);
    Path next = folder.resolve(NAME + ".next");
    Files.writeString(next, PythonJson.write(Map.of("job", job, "finished", finished)));
    Files.move(next, folder.resolve(NAME), StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
  }

  private static boolean hasSize(Path file, long bytes) {
    try {
      return Files.size(file) == bytes;
    } catch (IOException e) {
      return false;
    }
  }
}
