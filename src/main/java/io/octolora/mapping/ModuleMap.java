// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import java.util.List;
import java.util.Set;

/** Which part of an adapter sits on which module of a base. */
public final class ModuleMap {
  private ModuleMap() {}

  public static ModuleMap of(Checkpoint base, LoraAdapter adapter) {
    throw new UnsupportedOperationException();
  }

  public static ModuleMap lenient(Checkpoint base, LoraAdapter adapter) {
    throw new UnsupportedOperationException();
  }

  /** In the order of {@link Checkpoint#linears()}. */
  public Set<String> modules() {
    throw new UnsupportedOperationException();
  }

  public List<LoraDelta> deltas(String module) {
    throw new UnsupportedOperationException();
  }

  public LoraDelta delta(String module) {
    throw new UnsupportedOperationException();
  }

  public MappingReport report() {
    throw new UnsupportedOperationException();
  }
}
