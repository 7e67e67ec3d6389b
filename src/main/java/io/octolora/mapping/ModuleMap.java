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
import java.util.Comparator;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.regex.Pattern;
import java.util.stream.IntStream;
import org.jetbrains.annotations.Nullable;

/**
 * Which part of an adapter sits on which module of a base. The map describes; the numbers stay in the adapter's file
 * and are readable until the adapter is closed.
 *
 * <p>A pair whose name means several modules (FLUX's fused {@code qkv} and {@code linear1}) is split by B's rows. Each
 * part takes all of A, unless B is zero outside equal diagonal blocks: then it takes its own block of ranks, which is
 * the same product for less work. The scale is that of the whole pair in both cases.
 *
 * <p>The other way round, pairs of layers that the base stores as one matrix ({@code qkv_proj}, {@code gate_up_proj},
 * FLUX's original {@code qkv}) are joined into one delta of that matrix; layers without a pair have zeros in it.
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
    return of(base, adapter, Map.of());
  }

  /**
   * {@link #of(Checkpoint, LoraAdapter)} with the adapter's names read in another way.
   *
   * @param renames texts, none of them empty, that are replaced wherever the names of the adapter's modules have them,
   *     one after the other in this order: {@code "atn"} by {@code "attn"}, or an unknown prefix by nothing
   */
  public static ModuleMap of(Checkpoint base, LoraAdapter adapter, Map<String, String> renames) {
    ModuleMap map = new Mapper(base, adapter, renames).map();
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
    return lenient(base, adapter, Map.of());
  }

  /** {@link #lenient(Checkpoint, LoraAdapter)} with renames as in {@link #of(Checkpoint, LoraAdapter, Map)}. */
  public static ModuleMap lenient(Checkpoint base, LoraAdapter adapter, Map<String, String> renames) {
    ModuleMap map = new Mapper(base, adapter, renames).map();
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
    private static final Pattern TEXT_ENCODER = Pattern.compile("^(lora_te|text_(encoder|model))|\\.text_encoder");
    private static final String LENIENT = "--lenient (in Java: ModuleMap.lenient)";
    /** Remedies. */
    private static final String OTHER_NAME = "--rename FROM=TO (in Java: the renames of ModuleMap.of) reads FROM in "
        + "its name as TO, if it means a module of the base; or leave it out with " + LENIENT;
    private static final String LIKELY_NAME = "--rename %s=%s (in Java: the renames of ModuleMap.of) reads it as the "
        + "nearest module, whose shape fits, if it means that; or leave it out with " + LENIENT;
    private static final String AMBIGUOUS = "--rename FROM=TO with a TO that means one of them, or leave it out with "
        + LENIENT;
    private static final String TAKEN = "remove one of the two, or leave this one out with " + LENIENT;
    private static final String OTHER_MODEL = "it was made for a layer of another size: no option makes it fit, "
        + LENIENT + " leaves it out";

    private final Checkpoint base;
    private final LoraAdapter adapter;
    private final ModuleTable table;
    private final Map<String, LoraDelta> deltas = new HashMap<>();
    /** By module, its pieces that are filled and by which name of the adapter. */
    private final Map<String, Map<ModuleTable.Piece, String>> filledBy = new HashMap<>();
    /** By module that holds several layers, the pairs of single ones. */
    private final Map<String, List<Part>> fused = new LinkedHashMap<>();
    private final Map<String, List<String>> nearest = new HashMap<>();
    private final Map<String, Entry> entries = new TreeMap<>(Names.NATURAL);
    private final List<String> notes;
    private final String rule;
    private final Map<String, String> renames;
    private final Set<String> unusedRenames;

    /** A pair for one or more of the layers that a module holds. */
    private record Part(LoraPair pair, ModuleTable.Piece piece) {}

    Mapper(Checkpoint base, LoraAdapter adapter, Map<String, String> renames) {
      if (renames.containsKey("")) {
        throw new OctoloraException(Status.INVALID_ARGUMENT, "a rename of the empty text");
      }
      this.renames = renames;
      this.unusedRenames = new LinkedHashSet<>(renames.keySet());
      this.base = base;
      this.adapter = adapter;
      this.table = new ModuleTable(base.linears());
      this.notes = new ArrayList<>(adapter.notes());
      this.rule = adapter.format().rule();
    }

    ModuleMap map() {
      adapter.pairs().forEach(this::place);
      fused.forEach(this::join);
      for (UnsupportedKey key : adapter.unsupported()) {
        String module = renamed(key.module());
        entries.put(key.key(), new Entry(key.key(), List.of(), key.why(), nearest(module), rule,
            "leave its module out with " + LENIENT));
      }
      unusedRenames.forEach(from -> notes.add("rename %s=%s: no name of this adapter has %s".formatted(from,
          renames.get(from), from)));
      Map<String, LoraDelta> ordered = new LinkedHashMap<>();
      for (String module : table.modules()) {
        if (deltas.containsKey(module)) {
          ordered.put(module, deltas.get(module));
        }
      }
      return new ModuleMap(base, adapter, ordered, new MappingReport(new ArrayList<>(entries.values()), notes));
    }

    private void place(LoraPair pair) {
      Set<ModuleTable.Target> targets = table.find(renamed(pair.name()));
      if (targets.isEmpty()) {
        refuse(pair, "the base has no such linear layer as %s [%d, %d]".formatted(
            ModuleTable.bare(renamed(pair.name())), pair.out(), pair.in()), otherName(pair));
      } else if (targets.size() > 1) {
        refuse(pair, "it could be " + String.join(" or ", targets.stream().map(ModuleTable.Target::describe).toList()),
            AMBIGUOUS);
      } else {
        place(pair, targets.iterator().next());
      }
    }

    private void place(LoraPair pair, ModuleTable.Target target) {
      List<ModuleTable.Piece> pieces = target.pieces();
      String taken = taken(pair, pieces);
      if (taken != null) {
        refuse(pair, taken, TAKEN);
      } else if (pieces.size() == 1 && !pieces.get(0).whole()) {
        fused.computeIfAbsent(pieces.get(0).module().name(), module -> new ArrayList<>())
            .add(new Part(pair, pieces.get(0)));
        claim(pair, pieces);
      } else {
        String why = misfit(pair, target);
        if (why != null) {
          refuse(pair, why, OTHER_MODEL);
        } else {
          claim(pair, pieces);
          accept(pair, land(pair, target));
        }
      }
    }

    private void accept(LoraPair pair, List<Landing> landings) {
      pair.keys().forEach(key -> entries.put(key, new Entry(key, landings, null, List.of(), rule, null)));
    }

    private void refuse(LoraPair pair, String why, String remedy) {
      List<String> near = nearest(renamed(pair.name()));
      pair.keys().forEach(key -> entries.put(key, new Entry(key, List.of(), why, near, rule, remedy)));
    }

    /** The name as the caller wants it read. */
    private String renamed(String name) {
      String read = name;
      for (Map.Entry<String, String> rename : renames.entrySet()) {
        if (read.contains(rename.getKey())) {
          unusedRenames.remove(rename.getKey());
          read = read.replace(rename.getKey(), rename.getValue());
        }
      }
      return read;
    }

    /** What to do about a name that the base does not have: with the parts that differ where the nearest is near. */
    private String otherName(LoraPair pair) {
      String name = renamed(pair.name());
      if (TEXT_ENCODER.matcher(name).find()) {
        return "it is a text encoder's: map it on that checkpoint, and here leave it out with " + LENIENT;
      }
      List<String> near = nearest(name);
      BaseLinear nearest = near.isEmpty() ? null : base.linear(near.get(0));
      if (nearest == null || nearest.n() != pair.out() || nearest.k() != pair.in()) {
        return OTHER_NAME;
      }
      List<String> from = List.of(ModuleTable.bare(name).split("\\."));
      List<String> to = List.of(nearest.name().split("\\."));
      int first = 0;
      while (first < Math.min(from.size(), to.size()) && from.get(first).equals(to.get(first))) {
        first++;
      }
      int last = 0;
      while (last < Math.min(from.size(), to.size()) - first
          && from.get(from.size() - 1 - last).equals(to.get(to.size() - 1 - last))) {
        last++;
      }
      String differs = String.join(".", from.subList(first, from.size() - last));
      boolean word = from.size() - last - first == 1 && to.size() - last - first == 1 && from.size() > 1
          && !differs.matches("\\d*"); // not a block's number
      boolean elsewhere = word && adapter.pairs().stream().map(other -> renamed(other.name()))
          .anyMatch(other -> other.contains(differs) && !table.find(other).isEmpty()); // where it is right as it is
      return word && !elsewhere ? LIKELY_NAME.formatted(differs, to.get(first)) : OTHER_NAME;
    }

    /** Each layer takes one pair, be it a module or a part of one. */
    private @Nullable String taken(LoraPair pair, List<ModuleTable.Piece> pieces) {
      for (ModuleTable.Piece piece : pieces) {
        for (Map.Entry<ModuleTable.Piece, String> other
            : filledBy.getOrDefault(piece.module().name(), Map.of()).entrySet()) {
          if (piece.whole() || other.getKey().whole()
              || piece.from() < other.getKey().to() && other.getKey().from() < piece.to()) {
            return "%s is also the place of %s".formatted(piece.describe(), other.getValue());
          }
        }
      }
      return null;
    }

    private void claim(LoraPair pair, List<ModuleTable.Piece> pieces) {
      pieces.forEach(piece -> filledBy.computeIfAbsent(piece.module().name(), module -> new HashMap<>())
          .put(piece, pair.name()));
    }

    private @Nullable String misfit(LoraPair pair, ModuleTable.Target target) {
      long rows = 0;
      for (ModuleTable.Piece piece : target.pieces()) {
        if (!piece.whole()) {
          return "it means parts of several matrices: %s".formatted(target.describe());
        }
        rows += piece.module().n();
        if (pair.in() != piece.module().k()) {
          return "A takes %d inputs, %s has %d".formatted(pair.in(), piece.module().name(), piece.module().k());
        }
      }
      if (pair.out() != rows) {
        return "B gives %d outputs, %s has %d".formatted(pair.out(), target.describe(), rows);
      }
      return target.halvesSwapped() && rows % 2 != 0
          ? "its %d outputs have no halves to swap".formatted(rows)
          : null;
    }

    /** One delta from all pairs of the layers that the base stores as one matrix. */
    private void join(String module, List<Part> parts) {
      ModuleTable.Fused matrix = parts.get(0).piece.fused();
      int n = matrix.module().n();
      int[] known = new int[matrix.parts().size()];
      for (Part part : parts) {
        if (part.piece.to() - part.piece.from() == 1) {
          known[part.piece.from()] = part.pair.out();
        }
      }
      int[] rows = matrix.rows(known);
      List<JoinedPairs.Member> members = new ArrayList<>();
      parts.sort(Comparator.comparingInt(part -> part.piece.from()));
      for (Part part : parts) {
        String why = null;
        int firstRow = 0;
        if (part.pair.in() != matrix.module().k()) {
          why = "A takes %d inputs, %s has %d".formatted(part.pair.in(), module, matrix.module().k());
        } else if (rows == null) {
          why = "B gives %d outputs; the %d rows of %s are no %s of such sizes".formatted(part.pair.out(), n, module,
              matrix.parts());
        } else {
          int count = IntStream.range(part.piece.from(), part.piece.to()).map(i -> rows[i]).sum();
          firstRow = IntStream.range(0, part.piece.from()).map(i -> rows[i]).sum();
          if (part.pair.out() != count) {
            why = "B gives %d outputs, %s has %d".formatted(part.pair.out(), part.piece.describe(), count);
          }
        }
        if (why != null) {
          refuse(part.pair, why, OTHER_MODEL);
        } else {
          members.add(new JoinedPairs.Member(part.pair, firstRow));
        }
      }
      if (!members.isEmpty()) {
        JoinedPairs joined = new JoinedPairs(module, n, members);
        String why = joined.why();
        if (why != null) {
          members.forEach(member -> refuse(member.pair(), why, OTHER_MODEL));
          return;
        }
        deltas.put(module, joined.delta());
        members.forEach(member -> accept(member.pair(), List.of(new Landing(module, 0, member.pair().out(), 0,
            member.pair().rank(), false, member.firstRow()))));
      }
    }

    private List<Landing> land(LoraPair pair, ModuleTable.Target target) {
      List<BaseLinear> parts = target.pieces().stream().map(ModuleTable.Piece::module).toList();
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
        Tensor magnitude = pair.magnitude();
        deltas.put(part.name(), new LoraDelta(part.name(),
            new Factor(pair.a(), rank, ranks, 0, pair.in(), 0),
            new Factor(pair.b(), row, part.n(), rank, ranks, rotation),
            pair.scale(),
            bias == null ? null : new Factor(bias, row, part.n(), 0, 1, rotation),
            magnitude == null ? null : new Factor(magnitude, row, part.n(), 0, 1, rotation)));
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
            : targets.stream().flatMap(target -> target.pieces().stream()).map(piece -> piece.module().name())
                .distinct().toList();
      });
    }
  }
}
