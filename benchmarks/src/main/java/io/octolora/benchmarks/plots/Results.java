// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.plots;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.Optional;
import java.util.OptionalDouble;

/** What {@code benchmarks/peers/compare.py} wrote; its head says what the columns mean. */
record Results(List<String> header, List<Row> rows) {
  private static final List<String> COLUMNS = List.of("part", "case", "M", "K", "N", "times", "system", "adapters",
      "us", "p10", "p90", "eager_us", "floor_us", "TOPS", "GBs", "of_bf16", "sm_mhz", "commit");

  /** x [m,k], y [m,n]. */
  record Shape(int m, int k, int n) {
    @Override
    public String toString() {
      return m + " × " + k + " × " + n;
    }
  }

  /**
   * @param times calls in one FLUX.1 step
   * @param us microseconds a call; p10 and p90 are percentiles of the same
   * @param floorUs NaN where the device is not known
   * @param gigabytes a second, of the bytes that this system must move
   */
  record Row(String part, String name, Shape shape, int times, String system, String adapters, double us, double p10,
      double p90, double floorUs, double gigabytes) {}

  static Results read(Path file) throws IOException {
    List<String> header = new ArrayList<>();
    List<Row> rows = new ArrayList<>();
    List<String> columns = null;
    for (String line : Files.readAllLines(file)) {
      if (line.startsWith("# ")) {
        header.add(line.substring(2));
      } else if (columns == null) {
        columns = List.of(line.split(","));
        if (!columns.equals(COLUMNS)) {
          throw new IOException("%s: columns %s, expected %s".formatted(file, columns, COLUMNS));
        }
      } else {
        rows.add(row(line.split(",", -1)));
      }
    }
    if (rows.isEmpty()) {
      throw new IOException(file + ": no rows");
    }
    return new Results(header, rows);
  }

  private static Row row(String[] cells) {
    return new Row(cells[0], cells[1],
        new Shape(Integer.parseInt(cells[2]), Integer.parseInt(cells[3]), Integer.parseInt(cells[4])),
        Integer.parseInt(cells[5]), cells[6], cells[7], number(cells[8]), number(cells[9]), number(cells[10]),
        number(cells[12]), number(cells[14]));
  }

  private static double number(String cell) {
    return cell.isEmpty() ? Double.NaN : Double.parseDouble(cell);
  }

  Optional<Row> find(String part, String name, Shape shape, String system, String adapters) {
    return rows.stream().filter(row -> row.part.equals(part) && row.name.equals(name) && row.shape.equals(shape)
        && row.system.equals(system) && row.adapters.equals(adapters)).findFirst();
  }

  OptionalDouble us(String part, String name, Shape shape, String system, String adapters) {
    return find(part, name, shape, system, adapters).stream().mapToDouble(Row::us).findFirst();
  }

  /** The shapes of a part, in the order of the file. */
  List<Shape> shapes(String part) {
    return rows.stream().filter(row -> row.part.equals(part)).map(Row::shape).distinct().toList();
  }

  /** "NVIDIA H200, driver 580.1, torch 2.11; commit abc", for the foot of a plot. */
  String source() {
    String gpu = header.stream().filter(line -> line.startsWith("GPU: ")).findFirst().orElse("GPU: unknown");
    String[] state = gpu.substring("GPU: ".length()).split(", ");
    String torch = header.stream().filter(line -> line.startsWith("torch ")).findFirst().orElse("");
    String commit = header.stream().filter(line -> line.contains(", commit ")).findFirst()
        .map(line -> line.substring(line.indexOf(", commit ") + 2)).orElse("");
    return String.join(" · ", List.of(state[0], state.length > 1 ? "driver " + state[1] : "", torch, commit).stream()
        .filter(text -> !Objects.requireNonNull(text).isEmpty()).toList());
  }
}
