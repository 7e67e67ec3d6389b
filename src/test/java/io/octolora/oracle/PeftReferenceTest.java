// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.oracle.Expectation.Deviation;
import java.io.IOException;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;

/** The model of the tools' arithmetic explains every number they recorded, and notices what is not theirs. */
class PeftReferenceTest {
  static Stream<String> recordings() {
    return Stream.of("flux", "llama").flatMap(model -> Fixtures.goldens(model)
        .filter(name -> !name.startsWith("bf16__"))
        .map(name -> model + "/" + name));
  }

  @ParameterizedTest
  @MethodSource("recordings")
  void everyRecordedNumberIsWithinItsBound(String id) throws IOException {
    double worst = 0;
    double worstBase = 0;
    try (Run run = new Run(id)) {
      for (Recording.Layer layer : run.recording.layers().values()) {
        Deviation y = run.evaluate(layer, run.raw.adapters(run.recording, layer)).compare(layer.y().toFloats());
        Deviation base = run.evaluate(layer, List.of()).compare(layer.yBase().toFloats());
        assertTrue(y.withinBound(), () -> layer.module() + ": y " + y);
        assertTrue(base.withinBound(), () -> layer.module() + ": base " + base);
        worst = Math.max(worst, y.maxRatio());
        worstBase = Math.max(worstBase, base.maxRatio());
      }
      System.out.printf(Locale.ROOT, "%s: %d layers, y up to %.3f of its bound, base up to %.3f%n", id,
          run.recording.layers().size(), worst, worstBase);
    }
  }

  /** The bounds are not so wide that anything fits: each mistake is found in every layer it touches. */
  @ParameterizedTest
  @MethodSource("recordings")
  void mistakesAreOutside(String id) throws IOException {
    try (Run run = new Run(id)) {
      for (Recording.Layer layer : run.recording.layers().values()) {
        float[] y = layer.y().toFloats();
        List<OracleAdapter> right = run.raw.adapters(run.recording, layer);
        for (int i = 0; i < right.size(); i++) {
          List<OracleAdapter> doubled = new ArrayList<>(right);
          doubled.set(i, right.get(i).weighted(2));
          List<OracleAdapter> dropped = new ArrayList<>(right);
          dropped.remove(i);
          assertFalse(run.evaluate(layer, doubled).compare(y).withinBound(), layer.module() + ": scale doubled");
          assertFalse(run.evaluate(layer, dropped).compare(y).withinBound(), layer.module() + ": adapter dropped");
        }
        OracleLinear linear = run.raw.linear(layer.module());
        float[] scale = linear.scale().clone();
        scale[scale.length / 2] *= 1.1f;
        OracleLinear changed = new OracleLinear(linear.n(), linear.k(), linear.weight(), scale, linear.bias(),
            linear.quantization());
        assertFalse(run.evaluate(layer, changed, right).compare(y).withinBound(), layer.module() + ": one scale +10 %");
      }
    }
  }

  @Test
  void aThresholdThatWasNotRecordedIsOutside() throws IOException {
    try (Run run = new Run("flux/bnb8__r4"); RawModel off = new RawModel("flux", "base_bnb8", 0)) {
      int noticed = 0;
      for (Recording.Layer layer : run.recording.layers().values()) {
        OracleLinear linear = off.linear(layer.module());
        if (!run.evaluate(layer, linear, run.raw.adapters(run.recording, layer)).compare(layer.y().toFloats())
            .withinBound()) {
          noticed++;
        }
      }
      assertTrue(noticed > 0, "no layer noticed the missing outlier columns");
    }
  }

  /** Layers before they were quantized; of FLUX those whose weights are among the fixtures. */
  @ParameterizedTest
  @CsvSource({"flux, bf16__r4, base_bf16_part/diffusion_pytorch_model.safetensors, 11",
      "llama, bf16__r4_all, base_bf16/model.safetensors, 14"})
  void unquantizedLayers(String model, String golden, String weights, int count) throws IOException {
    int layers = 0;
    int all;
    try (Recording recording = Recording.open(Fixtures.golden(model, golden));
        SafetensorsFile base = SafetensorsFile.open(Fixtures.path(model + "/" + weights));
        RawModel raw = new RawModel(model, "base_bnb8", 6)) { // its adapters alone
      all = recording.layers().size();
      for (Recording.Layer layer : recording.layers().values()) {
        assertNull(layer.tool(), layer.module());
        Tensor weight = base.tensors().get(layer.module() + ".weight");
        if (weight == null) {
          continue;
        }
        layers++;
        Tensor bias = base.tensors().get(layer.module() + ".bias");
        List<OracleAdapter> adapters = raw.adapters(recording, layer);
        List<OracleAdapter> doubled = adapters.stream().map(adapter -> adapter.weighted(2)).toList();
        assertTrue(unquantized(layer, weight, bias, adapters).compare(layer.y().toFloats()).withinBound(),
            layer.module() + ": y");
        assertTrue(unquantized(layer, weight, bias, List.of()).compare(layer.yBase().toFloats()).withinBound(),
            layer.module() + ": base");
        assertFalse(unquantized(layer, weight, bias, doubled).compare(layer.y().toFloats()).withinBound(),
            layer.module() + ": scale doubled");
        assertFalse(unquantized(layer, weight, bias, List.of()).compare(layer.y().toFloats()).withinBound(),
            layer.module() + ": adapter dropped");
      }
    }
    assertEquals(count, layers);
    System.out.printf("%s/%s: %d of %d layers%s%n", model, golden, layers, all, layers == all ? ""
        : "; the unquantized weights of the others are not among the fixtures, for their size");
  }

  private static Expectation unquantized(Recording.Layer layer, Tensor weight, Tensor bias,
      List<OracleAdapter> adapters) {
    List<FloatFormat> formats = layer.adapters().values().stream().map(Recording.Adapter::factorFormat)
        .limit(adapters.size()).toList();
    return PeftReference.evaluateUnquantized(weight.toFloats(), bias == null ? null : bias.toFloats(),
        (int) weight.dimension(0), adapters, formats, layer.x().toFloats(), layer.rows(), layer.xFormat());
  }

  @Test
  void readsWhatTheRecordingSays() throws IOException {
    try (Recording recording = Recording.open(Fixtures.golden("flux", "bnb8__r4+r8_attn_bf16"))) {
      assertEquals(List.of(0.7, 0.4), recording.adapterWeights());
      assertEquals("base_bnb8", recording.base());
      Recording.Layer layer = recording.layers().get("single_transformer_blocks.0.attn.to_k");
      assertEquals(24, layer.rows());
      assertEquals(PeftReference.BaseTool.BITSANDBYTES, layer.tool());
      assertEquals(FloatFormat.BFLOAT16, layer.xFormat());
      assertEquals(6.0, layer.threshold());
      assertEquals(List.of("r4", "r8_attn_bf16"), List.copyOf(layer.adapters().keySet()));
      assertEquals(new Recording.Adapter(4, 1.4, FloatFormat.FLOAT32), layer.adapters().get("r4"));
    }
  }

  /** A recording with the files it was made from. */
  private static final class Run implements AutoCloseable {
    final Recording recording;
    final RawModel raw;

    Run(String id) throws IOException {
      String model = id.substring(0, id.indexOf('/'));
      String name = id.substring(id.indexOf('/') + 1);
      recording = Recording.open(Fixtures.golden(model, name));
      raw = new RawModel(model, "base_" + name.substring(0, name.indexOf("__")), name.endsWith("__t0") ? 0 : 6);
    }

    Expectation evaluate(Recording.Layer layer, List<OracleAdapter> adapters) {
      return evaluate(layer, raw.linear(layer.module()), adapters);
    }

    Expectation evaluate(Recording.Layer layer, OracleLinear linear, List<OracleAdapter> adapters) {
      List<FloatFormat> formats = new ArrayList<>();
      layer.adapters().values().forEach(adapter -> formats.add(adapter.factorFormat()));
      while (formats.size() > adapters.size()) {
        formats.remove(formats.size() - 1);
      }
      return PeftReference.evaluate(layer.tool(), linear, adapters, formats, layer.x().toFloats(), layer.rows(),
          layer.xFormat());
    }

    @Override
    public void close() {
      recording.close();
      raw.close();
    }
  }
}
