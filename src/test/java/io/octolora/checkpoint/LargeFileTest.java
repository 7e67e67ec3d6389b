// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** A file of 7 GiB with holes: every range reads, across the 1 and 2 GiB boundaries of mappings. */
class LargeFileTest {
  private static final long GIB = 1L << 30;
  /** Above 2 GiB, above one buffer, and ends on no boundary. */
  private static final long LARGE = 5 * GIB + 12;

  @TempDir Path folder;

  @Test
  void readsBeyondTwoGibibytes() throws IOException {
    Path file = folder.resolve("large.safetensors");
    long second = LARGE + 2 * GIB - 8;
    String header = ("{\"large\":{\"dtype\":\"U8\",\"shape\":[%d],\"data_offsets\":[0,%d]},"
        + "\"fits\":{\"dtype\":\"I8\",\"shape\":[2,%d],\"data_offsets\":[%d,%d]},"
        + "\"last\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[%d,%d]}}")
        .formatted(LARGE, LARGE, GIB - 4, LARGE, second, second, second + 8);
    byte[] text = header.getBytes(StandardCharsets.UTF_8);
    long data = 8 + text.length;
    long[] marks = {0, GIB - data, 2 * GIB - data, 3 * GIB - 2 - data, 4 * GIB - data, LARGE - 4};
    try (FileChannel channel = FileChannel.open(file, StandardOpenOption.CREATE_NEW, StandardOpenOption.WRITE,
        StandardOpenOption.SPARSE)) {
      channel.write(ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(text.length).flip(), 0);
      channel.write(ByteBuffer.wrap(text), 8);
      for (long mark : marks) {
        channel.write(ByteBuffer.wrap(new byte[] {1, 2, 3, 4}), data + mark);
      }
      channel.write(ByteBuffer.wrap(new byte[] {7}), data + second - 1);
      channel.write(ByteBuffer.wrap(new byte[] {0, 0, (byte) 0x80, 0x3f, 0, 0, 0, 0x40}), data + second);
    } catch (IOException e) {
      System.out.println("skipped: the file system of " + folder + " takes no file of 7 GiB: " + e);
      assumeTrue(false, "no room for a sparse file of 7 GiB: " + e);
    }
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Map<String, Tensor> tensors = opened.tensors();
      Tensor large = tensors.get("large");
      assertEquals(LARGE, large.byteSize());
      assertThrows(IllegalStateException.class, large::bytes);
      assertThrows(IllegalStateException.class, () -> large.toFloats());
      for (long mark : marks) {
        assertEquals(0x04030201, large.bytes(mark, 4).getInt(), "at " + mark);
        assertEquals(0x04030201, large.bytes(mark, (int) Math.min(GIB, LARGE - mark)).getInt(), "at " + mark);
      }
      ByteBuffer longest = large.bytes(GIB - data, Integer.MAX_VALUE);
      assertEquals(0x04030201, longest.getInt(0));
      assertEquals(0x04030201, longest.getInt((int) GIB));
      ByteBuffer fits = tensors.get("fits").bytes();
      assertEquals(2 * GIB - 8, fits.remaining());
      assertEquals(7, fits.get(fits.limit() - 1));
      assertArrayEquals(new float[] {1, 2}, tensors.get("last").toFloats());
    } finally {
      Files.delete(file);
    }
  }
}
