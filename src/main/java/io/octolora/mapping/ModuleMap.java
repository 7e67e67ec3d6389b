// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.adapter.LoraPair;
import io.octolora.adapter.UnsupportedKey;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Names;
import io.octolora.mapping.MappingReport.Entry;
import io.octolora.mapping.MappingReport.Landing;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import org.jetbrains.annotations.Nullable;

/**
 * Which part of an adapter sits on which module of a base. The map describes; the numbers stay in the adapter's file
 * and are readable until the adapter is closed.
 *
 * <p>A pair whose name means several modules (FLUX's fused {@code qkv} and {@code linear1}) is split by B's rows. Each
 * part takes all of A, unless B is zero outside equal diagonal blocks: then it takes its own block of ranks, which is
 * the same product for less work. The scale is that of the whole pair in both cases.
 */
public final class ModuleMap {
  private final Checkpoint base;
  private final LoraAdapter adapter;
  private final Map<String, LoraDelta> deltas;
  private final MappingReport report;

  private ModuleMap(Checkpoint base, LoraAdapter adapter, Map<String, LoraDelta> deltas, MappingReport report) {
    this.base = base;
    this.adapter = adapter;
    this.deltas = Collections.unmodifiableMap(deltas);
    this.report = report;
  }

  /**
   * Strict: every tensor of the adapter lands on a module whose shape fits.
   *
   * @throws MappingException with the list of all that do not, why, and the nearest modules
   */
  public static ModuleMap of(Checkpoint base, LoraAdapter adapter) {
    ModuleMap map = new Mapper(base, adapter).map();
    List<Entry> unmapped = map.report.unmapped();
    if (!unmapped.isEmpty()) {
      throw map.failure("%d of %d tensors of %s have no place on %s".formatted(unmapped.size(),
          map.report.entries().size(), adapter.path(), base.path()));
    }
    return map;
  }

  /**
   * What fits is mapped; {@link #report()} has the rest.
   *
   * @throws MappingException if nothing fits at all
   */
  public static ModuleMap lenient(Checkpoint base, LoraAdapter adapter) {
    ModuleMap map = new Mapper(base, adapter).map();
    if (map.deltas.isEmpty()) {
      throw map.failure("none of the %d tensors of %s has a place on %s".formatted(map.report.entries().size(),
          adapter.path(), base.path()));
    }
    return map;
  }

  /** The modules that the adapter changes, in the order of {@link Checkpoint#linears()}; unmodifiable. */
  public Set<String> modules() {
    return deltas.keySet();
  }

  /**
   * What the adapter adds to a module: one delta, or none.
   *
   * @throws OctoloraException if the base has no such module
   */
  public List<LoraDelta> deltas(String module) {
    LoraDelta delta = deltas.get(base.linear(module).name());
    return delta == null ? List.of() : List.of(delta);
  }

  /**
   * The one delta of a module.
   *
   * @throws OctoloraException if the base has no such module, or the adapter does not change it
   */
  public LoraDelta delta(String module) {
    List<LoraDelta> found = deltas(module);
    if (found.isEmpty()) {
      throw new OctoloraException(Status.INVALID_ARGUMENT,
          "%s does not change %s; nearest that it changes: %s".formatted(
          adapter.path(), module, String.join(", ", Names.nearest(module, deltas.keySet(), 3))));
    }
    return found.get(0);
  }

  /** Where every tensor of the adapter landed. */
  public MappingReport report() {
    return report;
  }

  private MappingException failure(String headline) {
    StringBuilder message = new StringBuilder(headline).append(':');
    for (Entry entry : report.unmapped()) {
      message.append("\n  ").append(entry.key()).append(": ").append(entry.why());
      if (!entry.nearest().isEmpty()) {
        message.append("; nearest: ").append(String.join(", ", entry.nearest()));
      }
    }
    return new MappingException(message.toString(), report);
  }

  /** Places the pairs one after the other. */
  private static final class Mapper {
    private static final int NEAREST = 3;

    private final Checkpoint base;
    private final LoraAdapter adapter;
    private final ModuleTable table;
    private final Map<String, LoraDelta> deltas = new HashMap<>();
    /** Module to the adapter's name that filled it. */
    private final Map<String, String> filledBy = new HashMap<>();
    private final Map<String, List<String>> nearest = new HashMap<>();
    private final Map<String, Entry> entries = new TreeMap<>(Names.NATURAL);
    private final List<String> notes;

    Mapper(Checkpoint base, LoraAdapter adapter) {
      this.base = base;
      this.adapter = adapter;
      this.table = new ModuleTable(base.linears());
      this.notes = new ArrayList<>(adapter.notes());
    }

    ModuleMap map() {
      adapter.pairs().forEach(this::place);
      for (UnsupportedKey key : adapter.unsupported()) {
        entries.put(key.key(), new Entry(key.key(), List.of(), key.why(), nearest(key.module())));
      }
      Map<String, LoraDelta> ordered = new LinkedHashMap<>();
      for (String module : table.modules()) {
        if (deltas.containsKey(module)) {
          ordered.put(module, deltas.get(module));
        }
      }
      return new ModuleMap(base, adapter, ordered, new MappingReport(new ArrayList<>(entries.values()), notes));
    }

    private void place(LoraPair pair) {
      Set<ModuleTable.Target> targets = table.find(pair.name());
      String why = null;
      List<Landing> landings = List.of();
      if (targets.isEmpty()) {
        why = "the base has no such linear layer";
      } else if (targets.size() > 1) {
        why = "it could be " + String.join(" or ", targets.stream().map(ModuleTable.Target::describe).toList());
      } else {
        ModuleTable.Target target = targets.iterator().next();
        why = misfit(pair, target);
        if (why == null) {
          landings = land(pair, target);
        }
      }
      for (String key : pair.keys()) {
        entries.put(key, new Entry(key, landings, why, why == null ? List.of() : nearest(pair.name())));
      }
    }

    private @Nullable String misfit(LoraPair pair, ModuleTable.Target target) {
      long rows = 0;
      for (BaseLinear part : target.parts()) {
        rows += part.n();
        if (pair.in() != part.k()) {
          return "A takes %d inputs, %s has %d".formatted(pair.in(), part.name(), part.k());
        }
        if (filledBy.containsKey(part.name())) {
          return "%s is also the place of %s".formatted(part.name(), filledBy.get(part.name()));
        }
      }
      if (pair.out() != rows) {
        return "B gives %d outputs, %s has %d".formatted(pair.out(), target.describe(), rows);
      }
      return target.halvesSwapped() && rows % 2 != 0
          ? "its %d outputs have no halves to swap".formatted(rows)
          : null;
    }

    private List<Landing> land(LoraPair pair, ModuleTable.Target target) {
      List<BaseLinear> parts = target.parts();
      boolean diagonal = parts.size() > 1 && isBlockDiagonal(pair, parts);
      if (diagonal) {
        noteSplitQkv(pair, parts.size());
      }
      int ranks = diagonal ? pair.rank() / parts.size() : pair.rank();
      List<Landing> landings = new ArrayList<>();
      int row = 0;
      for (int i = 0; i < parts.size(); i++) {
        BaseLinear part = parts.get(i);
        int rank = diagonal ? i * ranks : 0;
        int rotation = target.halvesSwapped() ? part.n() / 2 : 0;
        Tensor bias = pair.bias();
        deltas.put(part.name(), new LoraDelta(part.name(),
            new Factor(pair.a(), rank, ranks, 0, pair.in(), 0),
            new Factor(pair.b(), row, part.n(), rank, ranks, rotation),
            pair.scale(),
            bias == null ? null : new Factor(bias, row, part.n(), 0, 1, rotation)));
        filledBy.put(part.name(), pair.name());
        landings.add(new Landing(part.name(), row, row + part.n(), rank, rank + ranks, target.halvesSwapped()));
        row += part.n();
      }
      return landings;
    }

    /**
     * Whether B is zero outside the blocks (rows of part i) x (ranks i·r/n to (i+1)·r/n). That r is a multiple of n is
     * no evidence: parts that share one A have such ranks too.
     */
    private static boolean isBlockDiagonal(LoraPair pair, List<BaseLinear> parts) {
      int rank = pair.rank();
      if (rank % parts.size() != 0) {
        return false;
      }
      int block = rank / parts.size();
      int width = pair.b().type().bits() / 8;
      ByteBuffer bytes = pair.b().bytes();
      int at = 0;
      for (int i = 0; i < parts.size(); i++) {
        for (int row = 0; row < parts.get(i).n(); row++) {
          for (int column = 0; column < rank; column++, at += width) {
            if (column / block != i && !isZero(bytes, at, width)) {
              return false;
            }
          }
        }
      }
      return true;
    }

    /** Little-endian floats: all bits but the sign are 0. */
    private static boolean isZero(ByteBuffer bytes, int at, int width) {
      return width == 2 ? (bytes.getShort(at) & 0x7fff) == 0 : (bytes.getInt(at) & 0x7fffffff) == 0;
    }

    /** sd-scripts' split_qkv joins the parts into one pair of rank n·r but leaves alpha as it was for rank r. */
    private void noteSplitQkv(LoraPair pair, int parts) {
      String dimension = adapter.metadata().get("ss_network_dim");
      String alpha = adapter.metadata().get("ss_network_alpha");
      try {
        if (dimension != null && alpha != null && Long.parseLong(dimension) * parts == pair.rank()
            && Double.parseDouble(alpha) == pair.scale() * pair.rank()) {
          notes.add(("%s: joined from %d pairs of rank %s, while its alpha of %s is meant for one of them: the file's "
              + "own scale, which is used, may be %d times too small").formatted(pair.name(), parts, dimension,
              alpha, parts));
        }
      } catch (NumberFormatException e) {
        return; // free text of the training program, informative only
      }
    }

    /** For an existing name its modules, else those whose paths come closest. */
    private List<String> nearest(String name) {
      return nearest.computeIfAbsent(name, unknown -> {
        Set<ModuleTable.Target> targets = table.find(unknown);
        return targets.isEmpty()
            ? Names.nearest(ModuleTable.bare(unknown), table.modules(), NEAREST)
            : targets.stream().flatMap(target -> target.parts().stream()).map(BaseLinear::name).distinct().toList();
      });
    }
  }
}
