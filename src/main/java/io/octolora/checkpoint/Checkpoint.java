// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.io.IOException;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;

/** A base model's files. */
public final class Checkpoint implements AutoCloseable {
  private Checkpoint() {}

  public static Checkpoint open(Path path) throws IOException {
    throw new UnsupportedOperationException(path.toString());
  }

  /** The path given to open. */
  public Path path() {
    throw new UnsupportedOperationException();
  }

  /** For people: "bitsandbytes int8", "Quanto qint8", "BF16", …. */
  public String format() {
    throw new UnsupportedOperationException();
  }

  /** By module name, blocks in numeric order. */
  public Map<String, BaseLinear> linears() {
    throw new UnsupportedOperationException();
  }

  public BaseLinear linear(String name) {
    throw new UnsupportedOperationException();
  }

  public Map<String, Tensor> tensors() {
    throw new UnsupportedOperationException();
  }

  /** What a person should know and no rule forbids. */
  public List<String> notes() {
    throw new UnsupportedOperationException();
  }

  @Override
  public void close() {}
}
