// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import io.octolora.FormatException;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Json;
import io.octolora.internal.Names;
import io.octolora.internal.Pickles;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.stream.Stream;
import org.jetbrains.annotations.Nullable;

/**
 * The low-rank pairs of an adapter, under the file's own names: a folder of PEFT, or a safetensors file with the names
 * of one of the families in {@link AdapterFormat}; a file whose names speak for two of them is refused with both
 * readings. LoHa and LoKr are pairs too, exactly, up to rank 4096. Which base modules the names mean is the business of
 * {@link io.octolora.mapping.ModuleMap}.
 *
 * <p>Every tensor of the file is either a part of one of {@link #pairs()} or listed in {@link #unsupported()}. Each
 * pair has its own scale: from {@code adapter_config.json} or the header's {@code lora_adapter_metadata} where there
 * is one, else {@code alpha / rank} where the module has an alpha tensor, else 1. Nothing is copied or converted. Safe
 * for use by several threads.
 */
public final class LoraAdapter implements AutoCloseable {
  private static final String CONFIG = "adapter_config.json";
  private static final String PEFT_WEIGHTS = "adapter_model.safetensors";
  private static final String PEFT_PREFIX = "base_model.model.";
  /** Of pipelines of diffusers; one of them may have a configuration in the header and another none. */
  private static final Set<String> COMPONENTS =
      Set.of("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3");

  private final Path path;
  private final SafetensorsFile file;
  private final AdapterFormat format;
  private final String recognition;
  private final List<LoraPair> pairs;
  private final List<UnsupportedKey> unsupported;
  private final List<String> notes;

  private LoraAdapter(Path path, SafetensorsFile file, AdapterFormat format, String recognition,
      List<LoraPair> pairs, List<UnsupportedKey> unsupported, List<String> notes) {
    this.path = path;
    this.file = file;
    this.format = format;
    this.recognition = recognition;
    this.pairs = List.copyOf(pairs);
    this.unsupported = List.copyOf(unsupported);
    this.notes = List.copyOf(notes);
  }

  /**
   * Maps the file and sorts its tensors into pairs.
   *
   * @param path a folder of PEFT, a folder with one safetensors file, or a safetensors file; one that lies beside an
   *     {@code adapter_config.json} and is called {@code adapter_model.safetensors} is read with it
   * @throws IOException if a file cannot be read or mapped
   * @throws FormatException if a file is damaged, is no adapter, or its configuration asks for something that is not
   *     supported; the message names the file, the field and its value
   */
  public static LoraAdapter open(Path path) throws IOException {
    Path weights = weights(path);
    Pickles.refuse(weights);
    SafetensorsFile file = SafetensorsFile.open(weights);
    try {
      return new Reader(path, file, configs(weights, file)).read();
    } catch (Throwable e) {
      file.close();
      throw e;
    }
  }

  /** As given to {@link #open}. */
  public Path path() {
    return path;
  }

  /** The family of names that {@link #recognition} tells. */
  public AdapterFormat format() {
    return format;
  }

  /** What was seen in the names and which family that makes it, in a sentence for people. */
  public String recognition() {
    return recognition;
  }

  /** Ordered by name, blocks in numeric order; unmodifiable. */
  public List<LoraPair> pairs() {
    return pairs;
  }

  /** The tensors that are no part of a pair, ordered by name; unmodifiable. */
  public List<UnsupportedKey> unsupported() {
    return unsupported;
  }

  /** The header's {@code __metadata__}; unmodifiable. */
  public Map<String, String> metadata() {
    return file.metadata();
  }

  /** What a person should know though no rule forbids it, for example patterns that fit no module. */
  public List<String> notes() {
    return notes;
  }

  /** Closes the file: see {@link SafetensorsFile#close()}. Idempotent. */
  @Override
  public void close() {
    file.close();
  }

  @Override
  public String toString() {
    return "%s: %s, %d pairs".formatted(path, format.label(), pairs.size());
  }

  private static Path weights(Path path) throws IOException {
    if (!Files.isDirectory(path)) {
      return path.getFileName().toString().equals(CONFIG) ? path.resolveSibling(PEFT_WEIGHTS) : path;
    }
    Path peft = path.resolve(PEFT_WEIGHTS);
    if (Files.exists(peft)) {
      if (!Files.exists(path.resolve(CONFIG))) {
        throw new FormatException("%s: no %s beside %s; it has the scale".formatted(path, CONFIG, PEFT_WEIGHTS));
      }
      return peft;
    }
    List<Path> files;
    try (Stream<Path> list = Files.list(path)) {
      files = list.sorted().toList();
    }
    List<Path> candidates = files.stream().filter(file -> file.toString().endsWith(".safetensors")).toList();
    if (candidates.size() == 1) {
      return candidates.get(0);
    }
    if (candidates.isEmpty()) {
      files.forEach(Pickles::refuse);
    }
    throw new FormatException("%s: %s, expected %s or one safetensors file".formatted(path,
        candidates.isEmpty() ? "no safetensors file" : candidates.size() + " safetensors files", PEFT_WEIGHTS));
  }

  /** By component ("transformer", "text_encoder", …); "" where the fields have no component. */
  private static Map<String, LoraConfig> configs(Path weights, SafetensorsFile file) throws IOException {
    Path config = weights.resolveSibling(CONFIG);
    if (weights.getFileName().toString().equals(PEFT_WEIGHTS) && Files.exists(config)) {
      return Map.of("", new LoraConfig(Json.readObject(config), config.toString(), true));
    }
    String text = file.metadata().get("lora_adapter_metadata");
    if (text == null) {
      return Map.of();
    }
    String where = file.file() + ": lora_adapter_metadata";
    Map<String, Map<String, Object>> components = new LinkedHashMap<>();
    Json.object(Json.parse(text, where), where).forEach((name, value) -> {
      int dot = name.indexOf('.'); // LoraConfig's own fields have none
      components.computeIfAbsent(name.substring(0, Math.max(dot, 0)), component -> new LinkedHashMap<>())
          .put(name.substring(dot + 1), value);
    });
    Map<String, LoraConfig> configs = new LinkedHashMap<>();
    components.forEach((component, fields) -> configs.put(component,
        new LoraConfig(fields, component.isEmpty() ? where : where + ": " + component, false)));
    return configs;
  }

  /** The tensors that belong to one module. */
  private static final class Parts {
    @Nullable Tensor a;
    @Nullable Tensor b;
    @Nullable Tensor bias;
    @Nullable Tensor alpha;
    @Nullable Tensor magnitude;
    /** Whether the magnitude may be one of columns. */
    boolean ofEitherAxis;
    /** Of LoHa and LoKr, by the ends of their names. */
    final Map<String, Tensor> factors = new LinkedHashMap<>();
    @Nullable FactorProduct product;
    final List<String> keys = new ArrayList<>();
    /** Of single keys; any makes the whole module unsupported. */
    final Map<String, String> problems = new LinkedHashMap<>();
  }

  private static final class Reader {
    private final Path path;
    private final SafetensorsFile file;
    private final Map<String, LoraConfig> configs;
    private final Map<String, Parts> modules = new TreeMap<>(Names.NATURAL);
    private final List<LoraPair> pairs = new ArrayList<>();
    private final Map<String, UnsupportedKey> unsupported = new TreeMap<>(Names.NATURAL);
    private final List<String> withoutEffect = new ArrayList<>();
    private final List<String> ofFullRank = new ArrayList<>();
    private boolean sawAdapter;
    private String recognition = "";

    Reader(Path path, SafetensorsFile file, Map<String, LoraConfig> configs) {
      this.path = path;
      this.file = file;
      this.configs = configs;
    }

    LoraAdapter read() {
      file.tensors().values().forEach(this::sort);
      if (modules.isEmpty()) {
        throw new FormatException("%s: no tensors".formatted(file.file()));
      }
      AdapterFormat format = format();
      if (format == AdapterFormat.PEFT && configs.isEmpty()) {
        throw new FormatException("%s: names of PEFT, but no %s beside it and no lora_adapter_metadata in its header: "
            .formatted(file.file(), CONFIG) + "the scale is unknown");
      }
      modules.forEach(this::read);
      if (pairs.isEmpty() && !sawAdapter) {
        throw new FormatException("%s: none of its %d tensors is named as part of an adapter; the first is %s"
            .formatted(file.file(), file.tensors().size(), file.tensors().keySet().iterator().next()));
      }
      List<String> notes = new ArrayList<>();
      configs.values().forEach(config -> notes.addAll(config.notes()));
      if (!withoutEffect.isEmpty()) {
        notes.add("%d modules have scale 0 and change nothing, as their alpha is 0: %s%s".formatted(
            withoutEffect.size(), withoutEffect.get(0), withoutEffect.size() > 1 ? ", ..." : ""));
      }
      if (!ofFullRank.isEmpty()) {
        notes.add("%d modules are low-rank pairs of no less rank than their layers, exact and as costly: %s%s"
            .formatted(ofFullRank.size(), ofFullRank.get(0), ofFullRank.size() > 1 ? ", ..." : ""));
      }
      return new LoraAdapter(path, file, format, recognition, pairs, new ArrayList<>(unsupported.values()), notes);
    }

    private void sort(Tensor tensor) {
      KeyRole role = KeyRole.of(tensor.name());
      sawAdapter |= role.kind() != KeyRole.Kind.UNKNOWN;
      Parts parts = modules.computeIfAbsent(role.module(), module -> new Parts());
      parts.keys.add(tensor.name());
      Tensor before = switch (role.kind()) {
        case A -> parts.a;
        case B -> parts.b;
        case B_BIAS -> parts.bias;
        case ALPHA -> parts.alpha;
        case MAGNITUDE, DORA_SCALE -> parts.magnitude;
        case FACTOR -> parts.factors.get(role.why());
        case UNSUPPORTED, UNKNOWN -> null;
      };
      if (before != null) {
        parts.problems.put(tensor.name(), "means the same as " + before.name());
        return;
      }
      switch (role.kind()) {
        case A -> parts.a = tensor;
        case B -> parts.b = tensor;
        case B_BIAS -> parts.bias = tensor;
        case ALPHA -> parts.alpha = tensor;
        case MAGNITUDE, DORA_SCALE -> {
          parts.magnitude = tensor;
          parts.ofEitherAxis = role.kind() == KeyRole.Kind.DORA_SCALE;
        }
        case FACTOR -> parts.factors.put(role.why(), tensor);
        case UNSUPPORTED, UNKNOWN -> parts.problems.put(tensor.name(), role.why());
      }
    }

    /** The family that every telling key may belong to. */
    private AdapterFormat format() {
      List<AdapterFormat> candidates = List.of();
      String evidence = null;
      int telling = 0;
      for (String key : new TreeSet<>(file.tensors().keySet())) {
        List<AdapterFormat> families = AdapterFormat.of(key);
        if (families.isEmpty()) {
          continue;
        }
        telling++;
        if (evidence == null) {
          candidates = families;
          evidence = key;
          continue;
        }
        List<AdapterFormat> common = candidates.stream().filter(families::contains).toList();
        if (common.isEmpty()) {
          throw new FormatException("%s: read as %s by %s, as %s by %s; expected the names of one family".formatted(
              file.file(), candidates.get(0).label(), evidence, families.get(0).label(), key));
        }
        evidence = common.equals(candidates) ? evidence : key;
        candidates = common;
      }
      AdapterFormat format = evidence == null ? AdapterFormat.DIFFUSERS : candidates.get(0);
      recognition = "%s: %s; %s".formatted(format.label(), evidence == null ? "no key has the sign of another family"
          : "%d of %d keys are named like %s".formatted(telling, file.tensors().size(), evidence), format.rule());
      return format;
    }

    private void read(String module, Parts parts) {
      String why = parts.problems.isEmpty() ? problem(module, parts) : null;
      if (parts.problems.isEmpty() && why == null) {
        LoraPair pair = new LoraPair(module, parts.a, parts.b, parts.bias, parts.magnitude, scale(module, parts),
            parts.keys);
        pairs.add(pair);
        if (pair.scale() == 0) {
          withoutEffect.add(module);
        }
        if (parts.product != null && parts.product.fullRank() != null) {
          ofFullRank.add(module + ", a " + parts.product.fullRank());
        }
        return;
      }
      for (String key : parts.keys) {
        String own = parts.problems.get(key);
        if (own == null) {
          Map.Entry<String, String> first = parts.problems.isEmpty() ? null
              : parts.problems.entrySet().iterator().next();
          own = first == null ? why : "%s beside it is %s".formatted(first.getKey(), first.getValue());
        }
        unsupported.put(key, new UnsupportedKey(key, module, own));
      }
    }

    /** What keeps the parts from being a pair; null if nothing does. */
    private @Nullable String problem(String module, Parts parts) {
      if (!parts.factors.isEmpty()) {
        return factorProblem(module, parts);
      }
      if (parts.a == null || parts.b == null) {
        return "its module has no %s".formatted(parts.a == null && parts.b == null ? "low-rank pair"
            : parts.a == null ? "down-projection (A)" : "up-projection (B)");
      }
      String shape = shapeProblem(parts);
      if (shape != null) {
        return shape;
      }
      LoraConfig config = config(module);
      if (config == null) {
        boolean unconfigured = !configs.isEmpty() && parts.alpha == null && !COMPONENTS.contains(first(module));
        return unconfigured ? "the header's configuration is for %s alone".formatted(configs.keySet()) : null;
      }
      if (config.dora() && parts.magnitude == null) {
        return "use_dora is set, but its module has no magnitude";
      }
      if (!config.dora() && parts.magnitude != null) {
        return "its module has a DoRA magnitude, but use_dora is not set";
      }
      long rank = config.rank(path(module));
      if (rank != parts.a.dimension(0)) {
        return "the configuration gives its module rank %d, A has %d".formatted(rank, parts.a.dimension(0));
      }
      if (parts.alpha != null && !closeTo(alpha(parts.alpha) / rank, config.scale(path(module)))) {
        return "its alpha gives scale %s, the configuration %s".formatted(alpha(parts.alpha) / rank,
            config.scale(path(module)));
      }
      return null;
    }

    /** Turns the factors of LoHa and LoKr into A and B. */
    private @Nullable String factorProblem(String module, Parts parts) {
      if (parts.a != null || parts.b != null || parts.bias != null) {
        return "its module has factors of LoHa or LoKr, %s, beside a low-rank pair".formatted(parts.factors.keySet());
      }
      parts.product = new FactorProduct(module, parts.factors);
      if (parts.product.why() != null) {
        return parts.product.why();
      }
      parts.a = parts.product.a();
      parts.b = parts.product.b();
      if (config(module) != null) {
        return "a configuration of LoRA says nothing about LoHa and LoKr";
      }
      String magnitude = magnitudeProblem(parts);
      return magnitude != null ? magnitude : alphaProblem(parts);
    }

    /** A magnitude of columns would scale x before the product, which no factor of an output does. */
    private static @Nullable String magnitudeProblem(Parts parts) {
      Tensor magnitude = parts.magnitude;
      if (magnitude == null) {
        return null;
      }
      long out = parts.b.dimension(0);
      long in = parts.a.dimension(1);
      boolean rows = magnitude.dimensions() >= 1 && magnitude.dimension(0) == out && magnitude.elementCount() == out;
      boolean told = !parts.ofEitherAxis || magnitude.dimensions() >= 2;
      boolean columns = parts.ofEitherAxis && magnitude.elementCount() == in;
      if (magnitude.type().isFloat() && rows && !told) {
        return columns ? ("%s could be a DoRA magnitude of W's %d rows or of its %d columns: one dimension does not "
            + "tell, expected [%d, 1]").formatted(magnitude, out, in, out)
            : "%s has one dimension, expected [%d, 1] for a DoRA magnitude of W's rows".formatted(magnitude, out);
      }
      if (!magnitude.type().isFloat() || !rows) {
        return columns ? "%s is a DoRA magnitude of W's columns, which is not supported: expected [%d, 1], of its rows"
            .formatted(magnitude, out) : "%s is no DoRA magnitude of B's %d rows".formatted(magnitude, out);
      }
      return parts.bias != null ? "%s is a DoRA magnitude beside a bias of B, which PEFT does not have".formatted(
          magnitude.name()) : null;
    }

    private static @Nullable String shapeProblem(Parts parts) {
      for (Tensor factor : List.of(parts.a, parts.b)) {
        if (!factor.type().isFloat()) {
          return "%s has type %s, expected F32, F16 or BF16".formatted(factor.name(), factor.type());
        }
        boolean matrix = factor.dimensions() == 2
            || factor.dimensions() == 4 && factor.dimension(2) == 1 && factor.dimension(3) == 1;
        if (!matrix || factor.elementCount() == 0 || factor.byteSize() > Integer.MAX_VALUE) {
          return "%s is no matrix of 1 to %d bytes, nor a 1 x 1 convolution".formatted(factor, Integer.MAX_VALUE);
        }
      }
      if (parts.a.dimension(0) != parts.b.dimension(1)) {
        return "A has %d rows, B %d columns".formatted(parts.a.dimension(0), parts.b.dimension(1));
      }
      if (parts.bias != null && (!parts.bias.type().isFloat() || parts.bias.dimensions() != 1
          || parts.bias.dimension(0) != parts.b.dimension(0))) {
        return "%s is no vector of B's %d rows".formatted(parts.bias, parts.b.dimension(0));
      }
      String magnitude = magnitudeProblem(parts);
      return magnitude != null ? magnitude : alphaProblem(parts);
    }

    private static @Nullable String alphaProblem(Parts parts) {
      if (parts.alpha != null) {
        if (parts.alpha.dimensions() > 1 || parts.alpha.elementCount() != 1) {
          return "%s is no single number".formatted(parts.alpha);
        }
        double alpha = parts.alpha.scalar();
        if (!Double.isFinite(alpha)) {
          return "%s is %s, expected a finite number".formatted(parts.alpha.name(), alpha);
        }
      }
      return null;
    }

    private double scale(String module, Parts parts) {
      LoraConfig config = config(module);
      if (config != null) {
        return config.scale(path(module));
      }
      long rank = parts.product == null ? parts.a.dimension(0) : parts.product.dimension();
      return parts.alpha == null || rank == 0 ? 1 : alpha(parts.alpha) / rank;
    }

    private static double alpha(Tensor alpha) {
      return alpha.scalar();
    }

    /** Alpha tensors are cast to the file's type, bf16 at the coarsest: 2^-8 relative. */
    private static boolean closeTo(double a, double b) {
      return Math.abs(a - b) <= 0x1p-8 * Math.max(Math.abs(a), Math.abs(b));
    }

    private @Nullable LoraConfig config(String module) {
      LoraConfig config = configs.get(first(module));
      return config != null ? config : configs.get("");
    }

    /** The module as patterns name it: without PEFT's wrapper and the component that the configuration is for. */
    private String path(String module) {
      String first = first(module);
      return configs.containsKey(first) ? strip(module, first + ".") : strip(module, PEFT_PREFIX);
    }

    /** Up to the first dot. */
    private static String first(String module) {
      int dot = module.indexOf('.');
      return dot < 0 ? module : module.substring(0, dot);
    }

    private static String strip(String text, String prefix) {
      return text.startsWith(prefix) ? text.substring(prefix.length()) : text;
    }
  }
}
