// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Halves;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.file.FileSystemException;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.stream.IntStream;

/**
 * Writes one shard, each tensor at the place that the layout gives it, a few rows at a time. Memory: some megabytes or
 * a few rows of the widest weight, and the scales of one weight, whatever the sizes of tensors and files.
 */
final class ShardWriter {
  private static final int CHUNK_BYTES = 4 << 20;
  private static final int CHUNK_ELEMENTS = 1 << 20;

  private final Plan.Shard shard;
  private final TargetFormat format;
  private final Progress progress;
  /** One buffer for all writes: a channel would otherwise keep a copy as large as the largest. */
  private final ByteBuffer buffer = ByteBuffer.allocateDirect(CHUNK_BYTES).order(ByteOrder.LITTLE_ENDIAN);

  /** Told of every piece of the source that is done. */
  interface Progress {
    void done(Tensor tensor, long bytes);
  }

  ShardWriter(Plan.Shard shard, TargetFormat format, Progress progress) {
    this.shard = shard;
    this.format = format;
    this.progress = progress;
  }

  /** On return the file is whole and on the disk. */
  void write(Path file) throws IOException {
    try (FileChannel channel = FileChannel.open(file, StandardOpenOption.CREATE, StandardOpenOption.TRUNCATE_EXISTING,
        StandardOpenOption.WRITE)) {
      writeFully(channel, shard.layout().start(), 0);
      for (Plan.Unit unit : shard.units()) {
        if (unit.quantized()) {
          quantize(channel, unit);
        } else {
          copy(channel, unit);
        }
      }
      channel.force(true);
    } catch (FileSystemException e) {
      throw e;
    } catch (IOException e) { // of the channel, which does not know its name
      throw new IOException("%s: %s".formatted(file, e.getMessage()), e);
    }
  }

  private void copy(FileChannel channel, Plan.Unit unit) throws IOException {
    Tensor source = unit.source();
    long position = shard.layout().position(unit.outputs().get(0));
    for (long done = 0; done < source.byteSize(); ) {
      int length = (int) Math.min(CHUNK_BYTES, source.byteSize() - done);
      writeFully(channel, source.bytes(done, length), position + done);
      done += length;
      progress.done(source, length);
    }
  }

  private void quantize(FileChannel channel, Plan.Unit unit) throws IOException {
    Tensor weight = unit.source();
    int n = Math.toIntExact(weight.dimension(0));
    int k = Math.toIntExact(weight.dimension(1));
    RowQuantizer quantizer = RowQuantizer.of(format, weight.type());
    TensorSpec codesSpec = unit.outputs().get(0);
    long position = shard.layout().position(codesSpec);
    int chunkRows = Math.max(1, CHUNK_ELEMENTS / k);
    float[] scales = new float[n];
    byte[] codes = new byte[Math.multiplyExact(Math.min(n, chunkRows), k)];
    for (int row = 0; row < n; row += chunkRows) {
      int rows = Math.min(chunkRows, n - row);
      float[] values = weight.toFloats((long) row * k, rows * k);
      int first = row;
      IntStream.range(0, rows).parallel()
          .forEach(i -> scales[first + i] = quantizer.quantize(values, i * k, k, codes));
      for (int i = row; i < row + rows; i++) {
        if (Float.isNaN(scales[i])) {
          throw refused(weight, i);
        }
      }
      writeFully(channel, codes, rows * k, position + (long) row * k);
      progress.done(weight, (long) rows * k * weight.type().bits() / 8);
    }
    writeNumbers(channel, unit.outputs().get(1), scales);
    for (TensorSpec constant : unit.outputs().subList(2, unit.outputs().size())) {
      writeNumbers(channel, constant, constant.type() == ElementType.U8 ? 0 : 1);
    }
  }

  private FormatException refused(Tensor weight, int row) {
    return new FormatException(Status.UNSUPPORTED, "%s: row %d has a weight that is %s".formatted(weight, row,
        format == TargetFormat.BITSANDBYTES ? "NaN or, rounded to fp16 as bitsandbytes does, infinite"
            : "NaN or infinite"));
  }

  private void writeNumbers(FileChannel channel, TensorSpec tensor, float... values) throws IOException {
    int width = tensor.type().bits() / 8;
    long position = shard.layout().position(tensor);
    for (int done = 0; done < values.length; ) {
      int count = Math.min(CHUNK_BYTES / width, values.length - done);
      buffer.clear();
      for (int i = done; i < done + count; i++) {
        switch (tensor.type()) {
          case F32 -> buffer.putFloat(values[i]);
          case F16 -> buffer.putShort(Halves.toFloat16(values[i]));
          case BF16 -> buffer.putShort(Halves.toBfloat16(values[i]));
          default -> buffer.put((byte) values[i]);
        }
      }
      writeFully(channel, buffer.flip(), position + (long) done * width);
      done += count;
    }
  }

  private void writeFully(FileChannel channel, byte[] bytes, int length, long position) throws IOException {
    for (int done = 0; done < length; ) {
      int count = Math.min(CHUNK_BYTES, length - done);
      buffer.clear();
      buffer.put(bytes, done, count);
      writeFully(channel, buffer.flip(), position + done);
      done += count;
    }
  }

  private static void writeFully(FileChannel channel, ByteBuffer bytes, long position) throws IOException {
    while (bytes.hasRemaining()) {
      position += channel.write(bytes, position);
    }
  }
}
