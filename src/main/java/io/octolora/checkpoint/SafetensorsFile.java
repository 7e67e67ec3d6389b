// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.Map;

/** One safetensors file. */
public final class SafetensorsFile implements AutoCloseable {
  private final Path file;

  private SafetensorsFile(Path file) {
    this.file = file;
  }

  public static SafetensorsFile open(Path file) throws IOException {
    throw new UnsupportedOperationException(file.toString());
  }

  public Path file() {
    return file;
  }

  public Map<String, Tensor> tensors() {
    throw new UnsupportedOperationException();
  }

  public Map<String, String> metadata() {
    throw new UnsupportedOperationException();
  }

  ByteBuffer bytes(long position, int length) {
    throw new UnsupportedOperationException();
  }

  @Override
  public void close() {}
}
