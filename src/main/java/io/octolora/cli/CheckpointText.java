// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonGenerator;
import com.fasterxml.jackson.core.util.DefaultPrettyPrinter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.WeightFormat;
import java.io.IOException;
import java.util.Locale;
import java.util.TreeSet;
import java.util.stream.Collectors;

/** A checkpoint in words and in JSON. */
final class CheckpointText {
  private CheckpointText() {}

  /** "37 linears: bitsandbytes int8 (36), BF16 (1), outlier threshold 6"; "no linear layers". */
  static String describe(Checkpoint base) {
    TreeSet<Float> thresholds = base.linears().values().stream().filter(CheckpointText::hasThreshold)
        .map(linear -> linear.quantization().outlierThreshold()).collect(Collectors.toCollection(TreeSet::new));
    if (base.linears().isEmpty()) {
      return base.format();
    }
    String text = "%d linears: %s".formatted(base.linears().size(), base.format());
    return thresholds.isEmpty() ? text : text + ", outlier threshold "
        + thresholds.stream().map(MappingView::number).collect(Collectors.joining(" and "));
  }

  /** Whether the format knows outlier columns: bitsandbytes does, and 0 turns them off. */
  static boolean hasThreshold(BaseLinear linear) {
    return linear.format() == WeightFormat.BITSANDBYTES_INT8;
  }

  /** A generator that leaves the terminal's writer open. */
  static JsonGenerator generator(Terminal terminal) throws IOException {
    JsonGenerator json = new JsonFactory().createGenerator(terminal.out());
    json.disable(JsonGenerator.Feature.AUTO_CLOSE_TARGET);
    return json.setPrettyPrinter(new DefaultPrettyPrinter());
  }

  /** The field "checkpoint". */
  static void write(JsonGenerator json, Checkpoint base) throws IOException {
    json.writeObjectFieldStart("checkpoint");
    json.writeStringField("path", base.path().toString());
    json.writeStringField("format", base.format());
    json.writeStringField("recognition", base.recognition());
    json.writeArrayFieldStart("linears");
    for (BaseLinear linear : base.linears().values()) {
      Quantization how = linear.quantization();
      json.writeStartObject();
      json.writeStringField("module", linear.name());
      json.writeNumberField("n", linear.n());
      json.writeNumberField("k", linear.k());
      json.writeStringField("format", linear.format().name().toLowerCase(Locale.ROOT));
      if (how == null) {
        json.writeNullField("mode");
      } else {
        json.writeStringField("mode", how.mode().name().toLowerCase(Locale.ROOT));
        json.writeNumberField("threshold", how.outlierThreshold());
      }
      json.writeBooleanField("bias", linear.bias() != null);
      json.writeEndObject();
    }
    json.writeEndArray();
    json.writeArrayFieldStart("notes");
    for (String note : base.notes()) {
      json.writeString(note);
    }
    json.writeEndArray();
    json.writeEndObject();
  }
}
