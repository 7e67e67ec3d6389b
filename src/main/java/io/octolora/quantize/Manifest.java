// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
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
   * @throws OctoloraException if it is damaged or another job's, or a shard that it lists is gone or has another size
   */
  static Manifest open(Path folder, String job) throws IOException {
    Manifest manifest = new Manifest(folder, job);
    Path file = folder.resolve(NAME);
    if (!Files.exists(file)) {
      return manifest;
    }
    Map<String, Object> fields;
    Map<String, Object> shards;
    try {
      fields = Json.readObject(file);
      shards = Json.object(fields.get("finished"), file + ": finished");
    } catch (FormatException e) {
      throw new OctoloraException(Status.INVALID_ARGUMENT,
          "%s; delete %s to start anew".formatted(e.getMessage(), folder), e);
    }
    if (!job.equals(fields.get("job"))) {
      throw new OctoloraException(Status.INVALID_ARGUMENT, ("%s is of another job: the source, the options or the "
          + "program changed since; delete %s to start anew").formatted(file, folder));
    }
    shards.forEach((shard, value) -> {
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
    byte[] text = PythonJson.write(Map.of("job", job, "finished", finished)).getBytes(StandardCharsets.UTF_8);
    try (FileChannel channel = FileChannel.open(next, StandardOpenOption.CREATE, StandardOpenOption.TRUNCATE_EXISTING,
        StandardOpenOption.WRITE)) {
      for (ByteBuffer left = ByteBuffer.wrap(text); left.hasRemaining(); ) {
        channel.write(left);
      }
      channel.force(true); // before it takes the former one's place, also where the power fails
    }
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
