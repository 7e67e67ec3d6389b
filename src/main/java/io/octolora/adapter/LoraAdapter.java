// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import java.io.IOException;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;

/** A LoRA adapter's file or folder. */
public final class LoraAdapter implements AutoCloseable {
  private LoraAdapter() {}

  public static LoraAdapter open(Path path) throws IOException {
    throw new UnsupportedOperationException(path.toString());
  }

  /** The path given to open. */
  public Path path() {
    throw new UnsupportedOperationException();
  }

  public AdapterFormat format() {
    throw new UnsupportedOperationException();
  }

  public List<LoraPair> pairs() {
    throw new UnsupportedOperationException();
  }

  public List<UnsupportedKey> unsupported() {
    throw new UnsupportedOperationException();
  }

  public Map<String, String> metadata() {
    throw new UnsupportedOperationException();
  }

  public List<String> notes() {
    throw new UnsupportedOperationException();
  }

  @Override
  public void close() {}
}
