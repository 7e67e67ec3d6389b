// SPDX-License-Identifier: Apache-2.0
package io.octolora.golden;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.cli.Activations;
import io.octolora.cli.Verification;
import io.octolora.cli.Verification.Recorded;
import io.octolora.cli.Verification.Result;
import io.octolora.cli.Verification.Weighted;
import io.octolora.mapping.LoraDelta;
import io.octolora.mapping.ModuleMap;
import io.octolora.oracle.Expectation;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle;
import io.octolora.oracle.OracleAdapter;
import io.octolora.oracle.OracleLinear;
import io.octolora.oracle.PeftReference;
import io.octolora.oracle.RawModel;
import io.octolora.oracle.Recording;
import io.octolora.runtime.Device;
import io.octolora.runtime.Int8Linear;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Locale;
import java.util.Set;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestInstance;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * Everything the tools recorded, computed by one device, layer by layer: with adapters and without, stored in the
 * recorded type and in fp32. Each number is judged by the bounds derived in {@link Oracle} and {@link PeftReference};
 * the oracle reads the adapter through the library's mapping, a second one straight from the file ({@link RawModel}).
 * Recordings of unquantized layers ({@code bf16__*}) have nothing for an int8 device; the test of PeftReference has
 * them.
 */
@TestInstance(TestInstance.Lifecycle.PER_CLASS)
abstract class GoldenSuite {
  private static final String SWAPPED = "transformer_blocks.0.attn.to_q";

  private Device device;

  abstract Device open();

  @BeforeAll
  void openDevice() {
    device = open();
  }

  @AfterAll
  void closeDevice() {
    if (device != null) {
      device.close();
    }
  }

  static Stream<String> recordings() {
    return Stream.of("flux", "llama").flatMap(model -> Fixtures.goldens(model)
        .filter(name -> !name.startsWith("bf16__"))
        .map(name -> model + "/" + name));
  }

  @Test
  void allRecordingsAreHere() {
    assertEquals(24, recordings().count(), "a fixture is missing or new; the suite runs what it finds");
    List<String> others = Stream.of("flux", "llama").flatMap(model -> Fixtures.goldens(model)
        .map(name -> model + "/" + name)).filter(id -> recordings().noneMatch(id::equals)).toList();
    assertEquals(List.of("flux/bf16__r4", "llama/bf16__r4_all"), others);
    others.forEach(id -> System.out.println(id + " is not run on a device: its layers are not quantized, and here only "
        + "int8 runs. PeftReferenceTest reproduces it in double precision."));
  }

  @ParameterizedTest
  @MethodSource("recordings")
  void recordedOutputsAreReproduced(String id) throws IOException {
    try (Golden golden = Golden.open(id, "peft")) {
      reproduce(golden, id);
    }
  }

  static Stream<String> diffusersRecordings() {
    return recordings().filter(id -> id.startsWith("flux/") && !id.endsWith("__none"));
  }

  @ParameterizedTest
  @MethodSource("diffusersRecordings")
  void recordedOutputsAreReproducedFromDiffusersFiles(String id) throws IOException {
    try (Golden golden = Golden.open(id, "diffusers_lora.safetensors")) {
      reproduce(golden, id + " (diffusers)");
    }
  }

  private void reproduce(Golden golden, String title) throws IOException {
    double[] worst = new double[4];
    for (Recording.Layer layer : golden.recording.layers().values()) {
      List<Weighted> active = golden.active(layer.module());
      assertEquals(layer.adapters().size(), active.size(), layer.module());
      Result y = golden.check(device, layer, active, layer.xFormat(), layer.y().toFloats());
      Result wide = golden.check(device, layer, active, FloatFormat.FLOAT32, layer.y().toFloats());
      Result base = golden.check(device, layer, List.of(), layer.xFormat(), layer.yBase().toFloats());
      for (Result result : List.of(y, wide, base)) {
        assertTrue(result.withinBounds(), result::toString);
      }
      Deviation raw = golden.rawOracle(device, layer, layer.xFormat()).compare(Verification.forward(device,
          golden.linear(layer), golden.how(layer), active, layer.x().toFloats(), layer.rows(), layer.xFormat(),
          layer.xFormat()));
      assertTrue(raw.withinBound(), () -> layer.module() + " against the file's own factors: " + raw);
      worst[0] = Math.max(worst[0], y.oracle().maxRatio());
      worst[1] = Math.max(worst[1], wide.oracle().maxRatio());
      worst[2] = Math.max(worst[2], y.recorded().maxRatio());
      worst[3] = Math.max(worst[3], base.recorded().maxRatio());
    }
    Set<String> adapted = new HashSet<>();
    golden.maps.forEach(map -> adapted.addAll(map.modules()));
    assertTrue(golden.recording.layers().keySet().containsAll(adapted), "a layer was adapted that was not recorded");
    System.out.printf(Locale.ROOT, "%s on %s: %d layers; of the oracle's bound: %.3f, stored in fp32 %.3f; "
        + "of the recording's: %.3f, base alone %.3f%n", title, device.info().id(), golden.recording.layers().size(),
        worst[0], worst[1], worst[2], worst[3]);
  }

  static Stream<String> variants() {
    return Stream.of("r4/kohya.safetensors", "r4/bfl.safetensors", "r4/pytorch_lora_weights.safetensors",
        "shared/kohya.safetensors", "shared/bfl.safetensors", "shared/bfl_diffusion_model_prefix.safetensors",
        "shared/pytorch_lora_weights.safetensors");
  }

  /**
   * The same adapter in other clothes. Files without alpha and without the scale folded in stand for a scale of 1, so
   * the recorded scaling becomes the user's weight. In the BFL files A and s·B are rounded to bf16: every product
   * |A||B| may be off by 2 · 2^-8 + 2^-16, carried through |x|.
   */
  @ParameterizedTest
  @MethodSource("variants")
  void otherFilesOfTheSameAdapterGiveTheSame(String variant) throws IOException {
    String name = variant.substring(0, variant.indexOf('/'));
    boolean bfl = variant.contains("bfl");
    boolean unscaled = variant.contains("pytorch_lora_weights");
    double worst = 0;
    try (Golden golden = Golden.open("flux/bnb8__" + name, "peft");
        LoraAdapter file = LoraAdapter.open(Fixtures.path("flux/adapters/" + variant))) {
      ModuleMap map = ModuleMap.of(golden.base, file);
      assertEquals(golden.maps.get(0).modules(), map.modules());
      for (Recording.Layer layer : golden.recording.layers().values()) {
        float weight = unscaled ? (float) layer.adapters().get(name).scaling() : 1;
        List<Weighted> active = List.of(new Weighted(map.delta(layer.module()), weight));
        float[] x = layer.x().toFloats();
        FloatFormat format = layer.xFormat();
        float[] y = Verification.forward(device, golden.linear(layer), golden.how(layer), active, x, layer.rows(),
            format, format);
        OracleLinear linear = OracleLinear.of(golden.linear(layer), golden.how(layer));
        Deviation own = Oracle.evaluate(linear, List.of(Verification.plain(active.get(0))), x, layer.rows(), format,
            format, Verification.arithmetic(device)).compare(y);
        assertTrue(own.withinBound(), () -> layer.module() + " against the oracle of this file: " + own);

        OracleAdapter raw = golden.raw.adapters(golden.recording, layer).get(0);
        Expectation expected = golden.rawOracle(device, layer, format);
        double[] bound = expected.bound().clone();
        if (bfl) {
          widen(bound, raw, x, layer.rows(), linear.n(), linear.k());
        }
        Expectation widened = new Expectation(expected.rows(), expected.n(), expected.value(), bound);
        Deviation same = widened.compare(y);
        assertTrue(same.withinBound(), () -> layer.module() + " against the PEFT folder: " + same);
        Deviation recorded = widened.against(golden.tool(layer, List.of(raw))).compare(y, layer.y().toFloats());
        assertTrue(recorded.withinBound(), () -> layer.module() + " against the recording: " + recorded);
        worst = Math.max(worst, Math.max(same.maxRatio(), recorded.maxRatio()));
      }
    }
    System.out.printf(Locale.ROOT, "%s on %s: up to %.3f of its bound%n", variant, device.info().id(), worst);
  }

  /**
   * GGUF Q8_0 as the gguf package wrote it, against x · Wᵀ + bias in double of what the package itself dequantizes,
   * with and without a PEFT adapter. No tool's roundings are in there, so the oracle has the same value and its bound
   * holds.
   */
  @ParameterizedTest
  @ValueSource(strings = {"flux", "llama"})
  void ggufLayersAreWhatThePackageDequantizes(String model) throws IOException {
    int adapted = 0;
    double worst = 0;
    try (Checkpoint base = Checkpoint.open(Fixtures.path(model + "/base_gguf"));
        SafetensorsFile expected = SafetensorsFile.open(Fixtures.path(model + "/base_gguf_expected.safetensors"));
        LoraAdapter adapter = LoraAdapter.open(Fixtures.path("llama/adapters/r4_all"))) {
      ModuleMap map = model.equals("llama") ? ModuleMap.of(base, adapter) : null;
      List<String> modules = expected.tensors().keySet().stream().filter(name -> name.startsWith("x."))
          .map(name -> name.substring(2)).toList();
      assertEquals(base.linears().values().stream().filter(BaseLinear::quantized).map(BaseLinear::name)
          .filter(name -> !name.endsWith("embed_tokens")).sorted().toList(), modules.stream().sorted().toList());
      for (String module : modules) {
        Tensor x = expected.tensors().get("x." + module);
        for (String kind : List.of("y.", "ya.")) {
          Tensor y = expected.tensors().get(kind + module);
          if (y == null) {
            continue;
          }
          List<Weighted> active = kind.equals("y.") ? List.of() : List.of(new Weighted(map.delta(module), 1));
          adapted += active.size();
          for (FloatFormat xFormat : List.of(FloatFormat.BFLOAT16, FloatFormat.FLOAT32)) {
            worst = Math.max(worst, checkBlocks(base.linear(module), active, x, y, xFormat));
          }
        }
      }
    }
    assertEquals(model.equals("llama") ? 12 : 0, adapted);
    System.out.printf(Locale.ROOT, "%s/base_gguf on %s: up to %.3f of its bound%n", model, device.info().id(), worst);
  }

  private double checkBlocks(BaseLinear linear, List<Weighted> active, Tensor x, Tensor y, FloatFormat xFormat) {
    int rows = (int) x.dimension(0);
    double[] want = new double[rows * linear.n()];
    y.bytes().asDoubleBuffer().get(want);
    Expectation oracle = Oracle.evaluate(OracleLinear.of(linear), active.stream().map(Verification::plain).toList(),
        x.toFloats(), rows, xFormat, FloatFormat.FLOAT32, Verification.arithmetic(device));
    for (int i = 0; i < want.length; i++) {
      assertEquals(want[i], oracle.value()[i], 1e-11, linear + " " + i);
    }
    Deviation deviation = new Expectation(rows, linear.n(), want, oracle.bound()).compare(Verification.forward(device,
        linear, linear.quantization(), active, x.toFloats(), rows, xFormat, FloatFormat.FLOAT32));
    assertTrue(deviation.withinBound(), () -> linear + ": " + deviation);
    return deviation.maxRatio();
  }

  private static void widen(double[] bound, OracleAdapter adapter, float[] x, int rows, int n, int k) {
    double perProduct = 2 * 0x1p-8 + 0x1p-16;
    for (int m = 0; m < rows; m++) {
      for (int r = 0; r < adapter.rank(); r++) {
        double h = 0;
        for (int c = 0; c < k; c++) {
          h += Math.abs((double) x[m * k + c] * adapter.a()[r * k + c]);
        }
        for (int channel = 0; channel < n; channel++) {
          bound[m * n + channel] +=
              perProduct * Math.abs(adapter.scale() * adapter.b()[channel * adapter.rank() + r]) * h;
        }
      }
    }
  }

  // ---- The suite can fail: every mistake below is outside the bounds

  @Test
  void aWrongScaleIsNoticedEverywhere() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4", "peft")) {
      for (Recording.Layer layer : golden.recording.layers().values()) {
        LoraDelta delta = golden.maps.get(0).delta(layer.module());
        Result result = golden.check(device, layer, List.of(new Weighted(delta, 0.5f)), layer.xFormat(),
            layer.y().toFloats());
        assertTrue(result.oracle().withinBound(), result::toString);
        assertFalse(result.withinBounds(), result::toString);
      }
    }
  }

  @Test
  void adaptersWithExchangedWeightsAreNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4+r8_attn_bf16", "peft")) {
      Recording.Layer layer = golden.recording.layers().get(SWAPPED);
      List<Weighted> right = golden.active(SWAPPED);
      List<Weighted> exchanged = List.of(new Weighted(right.get(0).delta(), right.get(1).weight()),
          new Weighted(right.get(1).delta(), right.get(0).weight()));
      float[] y = layer.y().toFloats();
      assertTrue(golden.check(device, layer, right, layer.xFormat(), y).withinBounds());
      assertFalse(golden.check(device, layer, exchanged, layer.xFormat(), y).withinBounds());
    }
  }

  /** A DoRA without its magnitude, and with a scale that its norms know of too. */
  @Test
  void aMagnitudeThatIsMissingOrOffIsNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__dora", "peft")) {
      for (Recording.Layer layer : golden.recording.layers().values()) {
        LoraDelta delta = golden.maps.get(0).delta(layer.module());
        LoraDelta plain = new LoraDelta(delta.module(), delta.a(), delta.b(), delta.scale(), null, null);
        float[] y = layer.y().toFloats();
        assertFalse(golden.check(device, layer, List.of(new Weighted(plain, 1)), layer.xFormat(), y).withinBounds());
        Result half = golden.check(device, layer, List.of(new Weighted(delta, 0.5f)), layer.xFormat(), y);
        assertTrue(half.oracle().withinBound(), half::toString);
        assertFalse(half.withinBounds(), half::toString);
      }
    }
  }

  @Test
  void aDroppedAdapterIsNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4+r8_attn_bf16", "peft")) {
      Recording.Layer layer = golden.recording.layers().get(SWAPPED);
      List<Weighted> both = golden.active(SWAPPED);
      for (Weighted one : both) {
        assertFalse(golden.check(device, layer, List.of(one), layer.xFormat(), layer.y().toFloats()).withinBounds());
      }
      assertFalse(golden.check(device, layer, List.of(), layer.xFormat(), layer.y().toFloats()).withinBounds());
    }
  }

  /** Names that end alike: {@code single_transformer_blocks.0.attn.to_q} and {@code transformer_blocks.0.attn.to_q}. */
  @Test
  void aSwappedModuleIsNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4", "peft")) {
      Recording.Layer layer = golden.recording.layers().get(SWAPPED);
      LoraDelta delta = golden.maps.get(0).delta("single_" + SWAPPED);
      assertFalse(golden.check(device, layer, List.of(new Weighted(delta, 1)), layer.xFormat(),
          layer.y().toFloats()).withinBounds());
    }
  }

  @Test
  void aThresholdThatWasNotRecordedIsNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4", "peft")) {
      int noticed = 0;
      for (Recording.Layer layer : golden.recording.layers().values()) {
        Quantization off = golden.how(layer).withOutlierThreshold(0);
        Result result = golden.check(device, layer, off, golden.active(layer.module()), layer.xFormat(),
            layer.y().toFloats());
        assertTrue(result.oracle().withinBound(), result::toString);
        noticed += result.withinBounds() ? 0 : 1;
      }
      assertTrue(noticed > 0, "no layer noticed that the outlier columns were quantized");
    }
  }

  /** One int8 weight of one channel off by 16 steps. */
  @Test
  void aPerturbedWeightIsNoticed() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4", "peft")) {
      Recording.Layer layer = golden.recording.layers().get(SWAPPED);
      BaseLinear base = golden.linear(layer);
      OracleLinear linear = OracleLinear.of(base, golden.how(layer));
      ByteBuffer weight = ByteBuffer.allocateDirect(linear.n() * linear.k()).put(linear.weight()).flip();
      float[] x = layer.x().toFloats();
      int channel = 17;
      int at = channel * linear.k() + 5;
      weight.put(at, (byte) (weight.get(at) + (weight.get(at) > 0 ? -16 : 16)));
      try (Int8Linear changed = device.load("perturbed", linear.n(), linear.k(), golden.how(layer), weight,
          linear.scale(), linear.bias())) {
        Deviation deviation = Oracle.evaluate(linear, x, layer.rows(), FloatFormat.FLOAT32, FloatFormat.FLOAT32,
            Verification.arithmetic(device)).compare(changed.forward(x, layer.rows()));
        assertFalse(deviation.withinBound(), deviation::toString);
        assertEquals(channel, deviation.channel());
      }
    }
  }

  // ---- Not recorded: types and rows that the tools did not use

  @Test
  void everyActivationTypeOnMadeUpRows() throws IOException {
    try (Golden golden = Golden.open("flux/bnb8__r4+r8_attn_bf16", "peft");
        Checkpoint quanto = Checkpoint.open(Fixtures.path("flux/base_quanto_diffusers"))) {
      for (Checkpoint base : List.of(golden.base, quanto)) {
        for (String module : List.of(SWAPPED, "single_transformer_blocks.1.proj_out")) {
          for (FloatFormat xFormat : FloatFormat.values()) {
            for (FloatFormat yFormat : FloatFormat.values()) {
              BaseLinear linear = base.linear(module);
              float[] x = Activations.random(11, 5, linear.k(), xFormat);
              Result result = Verification.check(device, linear, linear.quantization(), golden.active(module), x, 5,
                  xFormat, yFormat, null);
              assertTrue(result.withinBounds(), () -> xFormat + " to " + yFormat + ": " + result);
            }
          }
        }
      }
    }
  }

  /** A recording with its checkpoint and its adapters, opened as a user would, and read a second time by RawModel. */
  private static final class Golden implements AutoCloseable {
    final Recording recording;
    final Checkpoint base;
    final RawModel raw;
    final List<LoraAdapter> adapters = new ArrayList<>();
    final List<ModuleMap> maps = new ArrayList<>();
    private final boolean thresholdOff;

    private Golden(Recording recording, Checkpoint base, RawModel raw, boolean thresholdOff) {
      this.recording = recording;
      this.base = base;
      this.raw = raw;
      this.thresholdOff = thresholdOff;
    }

    /** @param file within the folder of a flux adapter */
    static Golden open(String id, String file) throws IOException {
      String model = id.substring(0, id.indexOf('/'));
      String name = id.substring(id.indexOf('/') + 1);
      Recording recording = Recording.open(Fixtures.golden(model, name));
      boolean off = name.endsWith("__t0");
      Golden golden = new Golden(recording, Checkpoint.open(Fixtures.path(model + "/" + recording.base())),
          new RawModel(model, recording.base(), off ? 0 : 6), off);
      if (!recording.adapter().equals("none")) {
        for (String adapter : recording.adapter().split("\\+")) {
          Path path = Fixtures.path(model + "/adapters/" + adapter + (model.equals("flux") ? "/" + file : ""));
          LoraAdapter lora = LoraAdapter.open(path);
          golden.adapters.add(lora);
          golden.maps.add(ModuleMap.of(golden.base, lora));
        }
      }
      return golden;
    }

    BaseLinear linear(Recording.Layer layer) {
      return base.linear(layer.module());
    }

    Quantization how(Recording.Layer layer) {
      Quantization how = linear(layer).quantization();
      assertNotNull(how, layer.module());
      return thresholdOff ? how.withOutlierThreshold(0) : how;
    }

    /** The adapters' parts of a module with the recorded weights. */
    List<Weighted> active(String module) {
      List<Weighted> active = new ArrayList<>();
      for (int i = 0; i < maps.size(); i++) {
        if (maps.get(i).modules().contains(module)) {
          float weight = recording.adapterWeights().isEmpty() ? 1 : recording.adapterWeights().get(i).floatValue();
          active.add(new Weighted(maps.get(i).delta(module), weight));
        }
      }
      return active;
    }

    Result check(Device device, Recording.Layer layer, List<Weighted> active, FloatFormat yFormat, float[] y) {
      return check(device, layer, how(layer), active, yFormat, y);
    }

    Result check(Device device, Recording.Layer layer, Quantization how, List<Weighted> active, FloatFormat yFormat,
        float[] y) {
      return Verification.check(device, linear(layer), how, active, layer.x().toFloats(), layer.rows(),
          layer.xFormat(), yFormat, new Recorded(layer.tool(), y, formats(layer, active.size())));
    }

    Expectation rawOracle(Device device, Recording.Layer layer, FloatFormat yFormat) throws IOException {
      return Oracle.evaluate(raw.linear(layer.module()), raw.adapters(recording, layer), layer.x().toFloats(),
          layer.rows(), layer.xFormat(), yFormat, Verification.arithmetic(device));
    }

    Expectation tool(Recording.Layer layer, List<OracleAdapter> plain) {
      return PeftReference.evaluate(layer.tool(), raw.linear(layer.module()), plain, formats(layer, plain.size()),
          layer.x().toFloats(), layer.rows(), layer.xFormat());
    }

    private static List<FloatFormat> formats(Recording.Layer layer, int count) {
      return layer.adapters().values().stream().map(Recording.Adapter::factorFormat).limit(count).toList();
    }

    @Override
    public void close() {
      adapters.forEach(LoraAdapter::close);
      base.close();
      raw.close();
      recording.close();
    }
  }
}
