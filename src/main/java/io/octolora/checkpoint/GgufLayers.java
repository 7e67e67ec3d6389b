// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Names;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.function.LongUnaryOperator;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.jetbrains.annotations.Nullable;

/**
 * The linear layers of a GGUF file. FLUX and its kin keep the names of the model's own code; llama.cpp has names of its
 * own, which become those of transformers, so that adapters find them, for the architectures whose layers are the same
 * as in transformers.
 *
 * <p>For {@code llama}, llama.cpp puts the two halves of each head of q and k, rows i and i + d/2, beside each other,
 * as its rotary embedding pairs them. Here they go back, so that y has the order of transformers' q_proj and k_proj and
 * their adapters fit.
 */
final class GgufLayers {
  private static final String WEIGHT = ".weight";
  private static final String BIAS = ".bias";
  private static final Pattern BLOCK_NAME = Pattern.compile("blk\\.(\\d+)\\.(\\w+)");

  /** Architectures whose layers are named as below; those whose q and k are reordered. */
  private static final Set<String> KNOWN = Set.of("llama", "qwen2", "qwen3");
  private static final Set<String> REORDERED = Set.of("llama");
  private static final Map<String, String> IN_BLOCK = Map.of("attn_q", "self_attn.q_proj", "attn_k",
      "self_attn.k_proj", "attn_v", "self_attn.v_proj", "attn_output", "self_attn.o_proj", "ffn_gate", "mlp.gate_proj",
      "ffn_up", "mlp.up_proj", "ffn_down", "mlp.down_proj");
  private static final Map<String, String> OUTSIDE = Map.of("token_embd", "model.embed_tokens", "output", "lm_head");

  private final GgufFile file;
  private final List<String> notes;
  private final boolean renamed;
  private final Map<String, BaseLinear> linears = new TreeMap<>(Names.NATURAL);

  GgufLayers(GgufFile file, List<String> notes) {
    this.file = file;
    this.notes = notes;
    this.renamed = KNOWN.contains(file.architecture());
  }

  Map<String, BaseLinear> read() {
    refuseOthers();
    List<Tensor> stacked = new ArrayList<>();
    for (Tensor tensor : file.tensors().values()) {
      if (tensor.name().endsWith(WEIGHT) && tensor.dimensions() == 2) {
        read(tensor);
      } else if (file.blockScales().containsKey(tensor.name())) {
        stacked.add(tensor);
      }
    }
    if (!stacked.isEmpty()) {
      notes.add("%d tensors of Q8_0 are no weights with two dimensions, such as %s; they are no linear layers here"
          .formatted(stacked.size(), stacked.get(0)));
    }
    if (renamed) {
      notes.add("%s: the names of llama.cpp (blk.0.attn_q) stand as those of transformers (%s)%s".formatted(
          file.file(), module("blk.0.attn_q"),
          REORDERED.contains(file.architecture()) ? ", and the rows of attn_q and attn_k in transformers' order" : ""));
    } else if (file.tensors().keySet().stream().anyMatch(name -> BLOCK_NAME.matcher(name).lookingAt())) {
      notes.add("%s: architecture %s: the names of llama.cpp stay as they are; those of %s become transformers'"
          .formatted(file.file(), file.architecture().isEmpty() ? "unknown" : file.architecture(),
              String.join(", ", KNOWN.stream().sorted().toList())));
    }
    return new LinkedHashMap<>(linears);
  }

  String recognition() {
    return "GGUF version %d%s: %d of %d tensors are Q8_0".formatted(file.version(),
        file.architecture().isEmpty() ? "" : ", architecture " + file.architecture(), file.blockScales().size(),
        file.tensors().size());
  }

  private void refuseOthers() {
    if ("adapter".equals(file.metadata().get("general.type"))) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: general.type is adapter: a GGUF LoRA is not read here, expected a model".formatted(file.file()));
    }
    if (file.metadata().get("split.count") instanceof Long parts && parts > 1) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: one of %d parts of a model (split.count); expected one file, as gguf-split --merge makes it".formatted(
              file.file(), parts));
    }
  }

  private void read(Tensor weight) {
    String name = weight.name().substring(0, weight.name().length() - WEIGHT.length());
    Tensor scales = file.blockScales().get(weight.name());
    Tensor bias = file.tensors().get(name + BIAS);
    if (scales == null && !weight.type().isFloat()) {
      throw new FormatException(Status.UNSUPPORTED, "%s: expected a Q8_0, F32, F16 or BF16 weight".formatted(weight));
    }
    if (weight.dimension(0) > Integer.MAX_VALUE || weight.dimension(1) > Integer.MAX_VALUE) {
      throw new FormatException("%s: expected two dimensions from 1 to %d".formatted(weight, Integer.MAX_VALUE));
    }
    int n = (int) weight.dimension(0);
    int k = (int) weight.dimension(1);
    if (bias != null && (!bias.type().isFloat() || bias.dimensions() != 1 || bias.dimension(0) != n)) {
      throw new FormatException("%s: expected F32, F16 or BF16 [%d] beside %s".formatted(bias, n, weight));
    }
    LongUnaryOperator order = order(name, weight);
    String module = module(name);
    BaseLinear linear = scales == null
        ? new BaseLinear(module, n, k, WeightFormat.FLOAT, null, rows(weight, order), null, rows(bias, order))
        : BaseLinear.ofBlocks(module, n, k, WeightFormat.GGUF_Q8_0, rows(weight, order), rows(scales, order),
            GgufFile.BLOCK, rows(bias, order));
    if (linears.put(module, linear) != null) {
      throw new FormatException("%s: %s twice, the second by %s".formatted(file.file(), module, weight.name()));
    }
  }

  private String module(String name) {
    if (!renamed) {
      return name;
    }
    Matcher block = BLOCK_NAME.matcher(name);
    if (block.matches() && IN_BLOCK.containsKey(block.group(2))) {
      return "model.layers.%s.%s".formatted(block.group(1), IN_BLOCK.get(block.group(2)));
    }
    return OUTSIDE.getOrDefault(name, name);
  }

  /** Of transformers' rows, the row of the file that each is; null where they are the same. */
  private @Nullable LongUnaryOperator order(String name, Tensor weight) {
    Matcher block = BLOCK_NAME.matcher(name);
    boolean query = block.matches() && block.group(2).equals("attn_q");
    boolean key = block.matches() && block.group(2).equals("attn_k");
    if (!REORDERED.contains(file.architecture()) || !query && !key) {
      return null;
    }
    String field = file.architecture() + ".attention.head_count";
    Object queries = file.metadata().get(field);
    Object heads = query ? queries : file.metadata().getOrDefault(field + "_kv", queries);
    long n = weight.dimension(0);
    if (!(heads instanceof Long count) || count < 1 || n % count != 0 || n / count % 2 != 0) {
      throw new FormatException(("%s: the rows of llama.cpp's q and k are reordered within heads, but %s%s is %s, "
          + "expected a number of heads with an even number of rows each").formatted(weight, field,
              query ? "" : "_kv", heads));
    }
    long rows = n / count;
    return row -> row / rows * rows + row % (rows / 2) * 2 + row % rows / (rows / 2);
  }

  /** The same with its rows in another order; null of null. */
  private static @Nullable Tensor rows(@Nullable Tensor tensor, @Nullable LongUnaryOperator order) {
    if (tensor == null || order == null) {
      return tensor;
    }
    long width = tensor.byteSize() / tensor.dimension(0);
    return Tensor.derived(tensor, tensor.name(), tensor.type(), tensor.shape(), (offset, length) -> {
      ByteBuffer rows = ByteBuffer.allocate(length);
      while (rows.hasRemaining()) {
        long at = offset + rows.position();
        int part = (int) Math.min(rows.remaining(), width - at % width);
        rows.put(tensor.copy(order.applyAsLong(at / width) * width + at % width, part));
      }
      return rows.flip();
    });
  }
}
