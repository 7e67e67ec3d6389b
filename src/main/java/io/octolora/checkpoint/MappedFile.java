// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.internal.InputFiles;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.MappedByteBuffer;
import java.nio.channels.ClosedChannelException;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import org.jetbrains.annotations.Nullable;

/**
 * A file of any size, memory-mapped when {@link #map} is called. The mapping is freed by the garbage collector once the
 * file is closed and no buffer of it is in use. Shortening the file while it is open makes reading fail with an
 * InternalError of the JVM. Safe for use by several threads.
 */
final class MappedFile implements AutoCloseable {
  /**
   * Windows start at multiples of this many bytes and reach over the next, as far as one buffer can: every range of up
   * to a step's length lies in the window that its first byte selects.
   */
  private static final int WINDOW_SHIFT = 30;

  private static final long WINDOW_STEP = 1L << WINDOW_SHIFT;

  private final Path file;
  private final FileChannel channel;
  private final long size;
  private volatile MappedByteBuffer @Nullable [] windows;

  private MappedFile(Path file, FileChannel channel) throws IOException {
    this.file = file;
    this.channel = channel;
    this.size = channel.size();
  }

  /** @param kind for the message where the path is a folder, such as "a safetensors file" */
  static MappedFile open(Path file, String kind) throws IOException {
    if (Files.isDirectory(file)) {
      throw new FormatException("%s is a folder, expected %s".formatted(file, kind));
    }
    InputFiles.refuseSpecial(file);
    FileChannel channel = FileChannel.open(file, StandardOpenOption.READ);
    try {
      return new MappedFile(file, channel);
    } catch (Throwable e) {
      channel.close();
      throw e;
    }
  }

  Path file() {
    return file;
  }

  long size() {
    return size;
  }

  /** Once, before the first {@link #bytes} and for a file that is not empty. */
  void map() throws IOException {
    MappedByteBuffer[] mapped = new MappedByteBuffer[Math.toIntExact(((size - 1) >> WINDOW_SHIFT) + 1)];
    for (int i = 0; i < mapped.length; i++) {
      long start = i * WINDOW_STEP;
      mapped[i] = channel.map(FileChannel.MapMode.READ_ONLY, start, Math.min(size - start, Integer.MAX_VALUE));
    }
    windows = mapped;
  }

  /** Fills the buffer from its position on, whether or not the file is mapped. */
  void read(long position, ByteBuffer target) throws IOException {
    long start = position - target.position();
    while (target.hasRemaining()) {
      if (channel.read(target, start + target.position()) < 0) {
        throw new IOException("%s became shorter while it was read".formatted(file));
      }
    }
  }

  /** Read-only little-endian view of a range inside the file. */
  ByteBuffer bytes(long position, int length) {
    MappedByteBuffer[] mapped = windows;
    if (mapped == null) {
      throw closed();
    }
    ByteBuffer view;
    if (length == 0) {
      view = mapped[0].slice(0, 0);
    } else if (length <= WINDOW_STEP) {
      int window = (int) (position >> WINDOW_SHIFT);
      view = mapped[window].slice((int) (position - window * WINDOW_STEP), length);
    } else {
      try {
        view = channel.map(FileChannel.MapMode.READ_ONLY, position, length);
      } catch (IOException e) {
        throw new UncheckedIOException("%s: mapping %d bytes from byte %d".formatted(file, length, position), e);
      }
    }
    return view.asReadOnlyBuffer().order(ByteOrder.LITTLE_ENDIAN);
  }

  /**
   * A little-endian copy of a range inside the file, by a plain read: a page fault in a mapping makes the system read
   * megabytes around a few wanted bytes.
   */
  ByteBuffer copy(long position, int length) {
    requireOpen();
    ByteBuffer buffer = ByteBuffer.allocate(length).order(ByteOrder.LITTLE_ENDIAN);
    try {
      read(position, buffer);
      return buffer.flip();
    } catch (ClosedChannelException e) {
      return bytes(position, length); // an interrupt of some thread closed the channel; the mapping outlives it
    } catch (IOException e) {
      throw new UncheckedIOException("%s: reading %d bytes from byte %d".formatted(file, length, position), e);
    }
  }

  void requireOpen() {
    if (windows == null) {
      throw closed();
    }
  }

  private IllegalStateException closed() {
    return new IllegalStateException(file + " is closed");
  }

  /** Reading data afterwards throws IllegalStateException; buffers handed out before stay valid. Idempotent. */
  @Override
  public void close() {
    windows = null;
    try {
      channel.close();
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
  }
}
