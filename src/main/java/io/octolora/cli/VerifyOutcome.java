// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.cli.Verification.Result;
import io.octolora.oracle.Recording;
import io.octolora.runtime.Device;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/**
 * Everything that the tables, the JSON and the report tell.
 *
 * @param original the model before it was quantized
 * @param figures by module; only where a report is wanted
 */
record VerifyOutcome(Checkpoint base, Device device, List<AdapterArgument> arguments, List<MappingView> views,
    @Nullable Recording recording, @Nullable Checkpoint original, List<Result> results,
    Map<String, LayerFigures> figures, Map<String, String> skipped) {
  boolean mapped() {
    return views.stream().allMatch(MappingView::complete);
  }

  long within() {
    return results.stream().filter(Result::withinBounds).count();
  }

  boolean ok() {
    return mapped() && !results.isEmpty() && within() == results.size();
  }

  String verdict() {
    List<String> parts = new ArrayList<>();
    long outside = results.size() - within();
    if (results.isEmpty()) {
      parts.add("no layer was run" + (base.linears().values().stream().anyMatch(BaseLinear::quantized) ? ""
          : ", as the checkpoint has none of int8"));
    } else {
      parts.add("%d of %d layers %s on %s".formatted(outside == 0 ? results.size() : outside, results.size(),
          outside == 0 ? "within bounds" : "outside the bounds", device.info().id()));
      double oracle = results.stream().mapToDouble(r -> r.oracle().maxRatio()).max().orElseThrow();
      double recorded = results.stream().filter(r -> r.recorded() != null)
          .mapToDouble(r -> r.recorded().maxRatio()).max().orElse(-1);
      parts.add("at most %s of the oracle's bound".formatted(Numbers.ratio(oracle))
          + (recorded < 0 ? "" : ", %s of the recording's".formatted(Numbers.ratio(recorded))));
      if (oracle <= 1 && recorded > 1) {
        parts.add("the recording was made with other adapters, scales, threshold or weights");
      }
    }
    if (!views.isEmpty()) {
      parts.add(MappingView.verdict(views));
    }
    if (!skipped.isEmpty()) {
      parts.add("not int8 and so not run: " + skipped.size());
    }
    return String.join("; ", parts);
  }
}
