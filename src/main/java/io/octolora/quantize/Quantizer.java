// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.checkpoint.Checkpoint;
import java.io.IOException;
import java.nio.channels.FileChannel;
import java.nio.channels.FileLock;
import java.nio.channels.OverlappingFileLockException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.jetbrains.annotations.Nullable;

/**
 * Writes a float checkpoint as int8. Work goes on in a folder beside the target, {@code TARGET.partial}, in which no
 * file has a name that a loader takes for weights; it gets the target's name when all is there. What an interrupted run
 * finished is listed there in {@value Manifest#NAME} and is not done again.
 */
public final class Quantizer {
  /** How often a caller hears of progress is up to the sizes of the tensors: every few megabytes at least. */
  @FunctionalInterface
  public interface Progress {
    /**
     * Called from the thread that runs the job.
     *
     * @param tensor the one in work
     * @param done bytes of the source that are written, those of earlier runs included
     * @param total bytes of the source
     */
    void at(String tensor, long done, long total);
  }

  /**
   * What to write.
   *
   * @param format whose tool the result is to be read by
   * @param skip layers to leave as they are, read as the format's own tools read their lists; empty: their default
   * @param threshold outlier threshold for bitsandbytes' configuration
   * @param maxShardBytes of tensors in a file, unless a single one is larger; null: what the family writes by default,
   *     50 GB for transformers and 10 GB for diffusers
   */
  public record Options(TargetFormat format, List<String> skip, float threshold, @Nullable Long maxShardBytes) {
    /** Refuses numbers out of range with an {@link IllegalArgumentException}. */
    public Options {
      skip = List.copyOf(skip);
      if (!(threshold >= 0) || Float.isInfinite(threshold)) {
        throw new IllegalArgumentException("threshold " + threshold + ", expected a finite number, 0 or above");
      }
      if (maxShardBytes != null && maxShardBytes < 1) {
        throw new IllegalArgumentException("shards of %d bytes, expected 1 or more".formatted(maxShardBytes));
      }
    }

    /** With the defaults of the tools. */
    public static Options of(TargetFormat format) {
      return new Options(format, List.of(), 6, null);
    }

    long maxShardBytes(boolean diffusers) {
      return maxShardBytes != null ? maxShardBytes : diffusers ? 10_000_000_000L : 50_000_000_000L;
    }
  }

  /**
   * What was written.
   *
   * @param quantized modules that are int8 now
   * @param left modules with a weight of two dimensions that are not: embeddings and skipped ones
   * @param unusedSkips entries of the skip list that fit no module
   * @param copied tensors that are the same in both
   * @param shards files with tensors
   * @param resumedShards those of them that an earlier run had finished
   * @param sourceBytes of tensors read
   * @param writtenBytes of tensors written
   */
  public record Result(List<String> quantized, List<String> left, List<String> unusedSkips, int copied, int shards,
      int resumedShards, long sourceBytes, long writtenBytes) {}

  private static final String PARTIAL = ".partial";
  private static final String FINISHED = ".part";
  private static final String UNFINISHED = ".unfinished";
  private static final String LOCK = "lock";

  private final Plan plan;
  private final Source source;
  private final Options options;
  private final Path target;
  private final Path work;

  private Quantizer(Source source, Path target, Options options) {
    this.source = source;
    this.options = options;
    this.target = target;
    this.work = target.resolveSibling(target.getFileName() + PARTIAL);
    this.plan = new Plan(source, options);
  }

  /**
   * Writes all of it, and returns when it is there under its name.
   *
   * @param in as for {@link Checkpoint#open}
   * @param out a folder that does not exist yet or is empty
   * @param resume whether to go on where an interrupted run of the same job stopped
   * @throws FormatException if the source is damaged, not float, or has weights that the format cannot take
   * @throws OctoloraException if something is in the way: a full target, or another or interrupted run
   */
  public static Result run(Path in, Path out, Options options, boolean resume, Progress progress) throws IOException {
    Path target = out.toAbsolutePath().normalize();
    if (target.getFileName() == null) {
      throw refused("%s is no name for a new folder".formatted(out));
    }
    if (Files.isSymbolicLink(target)) { // whose place a finished folder cannot take
      throw refused("%s is a symbolic link to %s, expected the name of a new folder".formatted(out,
          Files.readSymbolicLink(target)));
    }
    if (Files.isDirectory(target) && !Files.getFileStore(target).equals(Files.getFileStore(target.getParent()))) {
      throw refused("%s is a mount point, expected a new folder, such as one in it".formatted(out));
    }
    try (Checkpoint checkpoint = Checkpoint.open(in)) {
      return new Quantizer(Source.of(checkpoint), target, options).run(resume, progress);
    }
  }

  private Result run(boolean resume, Progress progress) throws IOException {
    if (Files.exists(target) && !isEmptyFolder(target)) {
      throw refused("%s exists, expected a new folder".formatted(target));
    }
    if (Files.exists(work) && !resume && !isEmptyFolder(work)) {
      throw refused("%s is left from an interrupted run: resume it, or delete that folder".formatted(work));
    }
    Files.createDirectories(work);
    int resumed;
    try (FileChannel lockFile = FileChannel.open(work.resolve(LOCK), StandardOpenOption.CREATE,
        StandardOpenOption.WRITE); FileLock lock = lock(lockFile)) {
      if (lock == null) {
        throw refused("%s: another run is writing there".formatted(work));
      }
      removeUnfinished();
      String job = plan.fingerprint();
      Manifest manifest = Manifest.open(work, job);
      resumed = manifest.finished().size();
      requireSpace(manifest);
      try {
        writeShards(manifest, progress);
      } catch (Throwable e) {
        discardIfEmpty(manifest);
        throw e;
      }
      assemble();
    }
    Files.move(work, target, StandardCopyOption.ATOMIC_MOVE);
    Files.deleteIfExists(target.resolve(Manifest.NAME));
    Files.deleteIfExists(target.resolve(LOCK));
    int copied = (int) plan.shards().stream().flatMap(shard -> shard.units().stream())
        .filter(unit -> !unit.quantized()).count();
    return new Result(plan.quantized(), plan.skipped(), plan.unusedSkips(), copied, plan.shards().size(), resumed,
        plan.sourceBytes(), plan.outputBytes());
  }

  private void writeShards(Manifest manifest, Progress progress) throws IOException {
    long[] done = {0};
    for (Plan.Shard shard : plan.shards()) {
      if (manifest.finished().containsKey(shard.file())) {
        done[0] += shard.sourceBytes();
        continue;
      }
      Path unfinished = work.resolve(shard.file() + UNFINISHED);
      new ShardWriter(shard, options.format(), (tensor, bytes) -> {
        done[0] += bytes;
        progress.at(tensor.name(), done[0], plan.sourceBytes());
      }).write(unfinished);
      Files.move(unfinished, work.resolve(shard.file() + FINISHED), StandardCopyOption.ATOMIC_MOVE);
      manifest.add(shard.file(), shard.layout().fileBytes());
    }
  }

  /** What a killed process had in work. */
  private void removeUnfinished() throws IOException {
    try (Stream<Path> files = Files.list(work)) {
      for (Path file : files.filter(name -> name.toString().endsWith(UNFINISHED)).toList()) {
        Files.delete(file);
      }
    }
  }

  /** All shards are there: gives them their names. The index goes first, so that no half of them opens as a model. */
  private void assemble() throws IOException {
    for (Map.Entry<String, String> text : plan.texts().entrySet()) {
      Files.writeString(work.resolve(text.getKey()), text.getValue());
    }
    for (Path companion : source.companions()) {
      Path copy = work.resolve(companion.getFileName());
      if (!plan.texts().containsKey(companion.getFileName().toString())) {
        Files.copy(companion, copy, StandardCopyOption.REPLACE_EXISTING);
      }
    }
    for (Plan.Shard shard : plan.shards()) {
      Path part = work.resolve(shard.file() + FINISHED);
      if (Files.exists(part)) {
        Files.move(part, work.resolve(shard.file()), StandardCopyOption.ATOMIC_MOVE);
      }
    }
  }

  private void requireSpace(Manifest manifest) throws IOException {
    long needed = plan.shards().stream().filter(shard -> !manifest.finished().containsKey(shard.file()))
        .mapToLong(shard -> shard.layout().fileBytes()).sum();
    long usable = Files.getFileStore(work).getUsableSpace();
    if (needed > usable) {
      discardIfEmpty(manifest);
      throw refused("%s: %d bytes are to be written, %d are free".formatted(work, needed, usable));
    }
  }

  private void discardIfEmpty(Manifest manifest) throws IOException {
    if (manifest.finished().isEmpty()) {
      discard();
    }
  }

  /** Nothing in there is of use. */
  private void discard() throws IOException {
    try (Stream<Path> files = Files.list(work)) {
      for (Path file : files.toList()) {
        Files.delete(file);
      }
    }
    Files.delete(work);
  }

  private static @Nullable FileLock lock(FileChannel channel) throws IOException {
    try {
      return channel.tryLock();
    } catch (OverlappingFileLockException e) { // held within this process
      return null;
    }
  }

  private static boolean isEmptyFolder(Path path) throws IOException {
    if (!Files.isDirectory(path)) {
      return false;
    }
    try (Stream<Path> files = Files.list(path)) {
      return files.findAny().isEmpty();
    }
  }

  private static OctoloraException refused(String message) {
    return new OctoloraException(Status.INVALID_ARGUMENT, message);
  }
}
