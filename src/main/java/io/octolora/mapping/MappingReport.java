// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import java.util.List;
import org.jetbrains.annotations.Nullable;

/**
 * Where every tensor of an adapter landed.
 *
 * @param entries one for each tensor of the adapter, in the order of their names
 * @param notes what a person should know and no rule forbids
 */
public record MappingReport(List<Entry> entries, List<String> notes) {
  /** Copies the lists. */
  public MappingReport {
    entries = List.copyOf(entries);
    notes = List.copyOf(notes);
  }

  /** The tensors that landed nowhere; empty for a map made by {@link ModuleMap#of}. */
  public List<Entry> unmapped() {
    return entries.stream().filter(entry -> entry.why() != null).toList();
  }

  /**
   * One tensor of the adapter.
   *
   * @param key its name in the file
   * @param landings the modules it serves; empty if it landed nowhere
   * @param why why it landed nowhere, or null
   * @param nearest modules of the base whose names come closest, best first; empty if it landed
   * @param rule how the adapter's family of names was read: what {@link io.octolora.adapter.AdapterFormat#rule} says
   * @param remedy what would accept the adapter all the same, or null if the tensor landed
   */
  public record Entry(String key, List<Landing> landings, @Nullable String why, List<String> nearest, String rule,
      @Nullable String remedy) {
    /** Copies the lists. */
    public Entry {
      landings = List.copyOf(landings);
      nearest = List.copyOf(nearest);
    }
  }

  /**
   * The part of an adapter's pair that serves one module. Ends are exclusive.
   *
   * @param module the base checkpoint's name
   * @param rowBegin first of the rows of B (and the bias) that the module takes
   * @param rankBegin first of the ranks (rows of A, columns of B) that the module takes
   * @param halvesSwapped whether the module takes the second half of those rows of B before the first
   * @param moduleRow first of the module's rows that they change; above 0 where the base stores several layers as one
   */
  public record Landing(String module, int rowBegin, int rowEnd, int rankBegin, int rankEnd, boolean halvesSwapped,
      int moduleRow) {
    /** Of a pair that changes the module from its first row on. */
    public Landing(String module, int rowBegin, int rowEnd, int rankBegin, int rankEnd, boolean halvesSwapped) {
      this(module, rowBegin, rowEnd, rankBegin, rankEnd, halvesSwapped, 0);
    }
  }
}
