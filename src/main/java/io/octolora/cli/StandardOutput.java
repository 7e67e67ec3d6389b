// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import org.jetbrains.annotations.Nullable;

/** Standard output that remembers why it could not be written, such as a full disk, which a PrintWriter forgets. */
final class StandardOutput extends OutputStream {
  private final OutputStream out = new FileOutputStream(FileDescriptor.out);
  private @Nullable IOException failure;

  @Override
  public void write(int octet) throws IOException {
    write(new byte[] {(byte) octet}, 0, 1);
  }

  @Override
  public void write(byte[] octets, int offset, int length) throws IOException {
    try {
      out.write(octets, offset, length);
    } catch (IOException e) {
      failure = failure == null ? e : failure;
      throw e;
    }
  }

  /** The first failure; null for none, or where the reader had enough, as {@code head} has. */
  @Nullable IOException failure() {
    return failure == null || "Broken pipe".equals(failure.getMessage()) ? null : failure;
  }
}
