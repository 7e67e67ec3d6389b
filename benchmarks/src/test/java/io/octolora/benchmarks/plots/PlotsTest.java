// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.plots;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.io.StringReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import javax.xml.parsers.DocumentBuilderFactory;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.w3c.dom.Document;
import org.w3c.dom.Element;
import org.w3c.dom.NodeList;
import org.xml.sax.InputSource;

class PlotsTest {
  private static final String COLUMNS =
      "part,case,M,K,N,times,system,adapters,us,p10,p90,eager_us,floor_us,TOPS,GBs,of_bf16,sm_mhz,commit";

  @TempDir
  Path folder;

  private final List<String> lines = new ArrayList<>(
      List.of("# octolora 0.1.0, commit abc", "# GPU: NVIDIA H200, 580.1, 1980 MHz", COLUMNS));

  private void row(String part, String name, int m, int k, int n, int times, String system, String adapters,
      double us) {
    lines.add("%s,%s,%d,%d,%d,%d,%s,%s,%s,%s,%s,,%s,1,1,1,1980,abc".formatted(part, name, m, k, n, times, system,
        adapters, us, us, us, us / 2));
  }

  /** The five shapes of a step, n µs the wide ones of a double block and so on, so that sums can be told. */
  private Results results() throws IOException {
    int[][] shapes = {{3072, 3072, 76}, {3072, 12288, 19}, {12288, 3072, 19}, {3072, 21504, 38}, {15360, 3072, 38}};
    for (int[] s : shapes) {
      row("flux", "", 4608, s[0], s[1], s[2], "bf16 linear", "", 500);
      row("flux", "", 4608, s[0], s[1], s[2], "bf16 PEFT", "r16", 700);
      row("flux", "", 4608, s[0], s[1], s[2], "w8a8", "", 250);
      row("flux", "", 4608, s[0], s[1], s[2], "w8a8", "r16", 300);
      row("flux", "", 4608, s[0], s[1], s[2], "w8a8 quantize", "", 40);
    }
    row("groups", "qkv", 4608, 3072, 9216, 19, "w8a8", "", 200);
    row("groups", "qkv", 4608, 3072, 9216, 19, "w8a8", "r16", 220);
    row("groups", "qkv+mlp", 4608, 3072, 21504, 38, "w8a8", "", 200);
    row("groups", "qkv+mlp", 4608, 3072, 21504, 38, "w8a8", "r16", 220);
    for (int m = 1; m <= 64; m++) {
      row("decode", "", m, 8192, 28672, 0, "plain read", "r64", 54);
      row("decode", "", m, 8192, 28672, 0, "w8a8", "r64", 57 + m / 16.0);
      row("decode", "", m, 8192, 28672, 0, "bf16 linear", "", 110);
    }
    return Results.read(Files.write(folder.resolve("h200_compare.csv"), lines));
  }

  private static List<String> texts(Svg svg) {
    List<String> texts = new ArrayList<>();
    NodeList nodes = document(svg).getElementsByTagName("text");
    for (int i = 0; i < nodes.getLength(); i++) {
      texts.add(nodes.item(i).getTextContent());
    }
    return texts;
  }

  private static Document document(Svg svg) {
    try {
      return DocumentBuilderFactory.newInstance().newDocumentBuilder().parse(new InputSource(
          new StringReader(svg.toString())));
    } catch (Exception e) {
      throw new AssertionError(svg.toString(), e);
    }
  }

  @Test
  void sumsOfTheStep() throws IOException {
    List<String> texts = texts(Plots.fluxStep(results()));
    // 190 calls of 500, 700 and 300 µs
    assertTrue(texts.containsAll(List.of("95.0", "133.0  (1.40 of bf16)", "57.0  (0.60 of bf16)")), texts::toString);
    // alone: 19 square, 19 up, 19 down, 38 single out; groups: 57 calls of 220 µs
    assertTrue(texts.contains("41.0  (0.43 of bf16)"), texts::toString);
    // stages: 190 × 40 and 190 × 210; as groups 95 × 250 + 57 × 200 less 152 × 40
    assertTrue(texts.containsAll(List.of("7.6", "39.9", "29.1")), texts::toString);
    assertEquals(2, texts.stream().filter("quantize"::equals).count());
  }

  @Test
  void stepWithoutQuantizeAlone() throws IOException {
    Results measured = results();
    lines.removeIf(line -> line.contains("w8a8 quantize"));
    List<String> texts = texts(Plots.fluxStep(Results.read(Files.write(folder.resolve("less.csv"), lines))));
    assertTrue(texts(Plots.fluxStep(measured)).contains("quantize"));
    assertEquals(2, texts.stream().filter("quantize and product"::equals).count());
    // 190 calls of 250 µs; as groups 95 of 250 and 57 of 200
    assertTrue(texts.containsAll(List.of("47.5", "35.2", "57.0  (0.60 of bf16)")), texts::toString);
  }

  @Test
  void bandwidthOfTheLastPoint() throws IOException {
    List<String> texts = texts(Plots.decode(results()));
    // (8192 · 28672 + 2 · 64 · 36864 + 2 · 64 · 36864) bytes in 54, 61 and 110 µs
    assertTrue(texts.containsAll(List.of("plain read 4.5", "Octolora + r64 4.0", "torch bf16 2.2")), texts::toString);
  }

  @Test
  void everySystemOfAShapeHasItsNumber() throws IOException {
    List<String> texts = texts(Plots.shapes(results()));
    for (String number : List.of("150", "300", "500", "700")) { // the floor is half of the adapted call here
      assertEquals(5, texts.stream().filter(number::equals).count() - (number.equals("500") ? 1 : 0), number + texts);
    }
    assertTrue(texts.contains("NVIDIA H200 · driver 580.1 · commit abc"), texts::toString);
  }

  /** Light and dark, without a word from elsewhere, and nothing beyond the edge. */
  @Test
  void standsAlone() throws IOException {
    Results results = results();
    for (Svg svg : List.of(Plots.shapes(results), Plots.decode(results), Plots.fluxStep(results))) {
      String text = svg.toString();
      assertEquals(1, text.split("http", -1).length - 1, "the namespace is the only address");
      assertFalse(text.contains("href") || text.contains("url(") || text.contains("@import") || text.contains("NaN"),
          text);
      assertTrue(text.contains("prefers-color-scheme: dark"));
      Element root = document(svg).getDocumentElement();
      double width = Double.parseDouble(root.getAttribute("width"));
      double height = Double.parseDouble(root.getAttribute("height"));
      NodeList nodes = root.getElementsByTagName("text");
      for (int i = 0; i < nodes.getLength(); i++) {
        Element node = (Element) nodes.item(i);
        double wide = Svg.widthOf(node.getTextContent(), Integer.parseInt(node.getAttribute("font-size")));
        double x = Double.parseDouble(node.getAttribute("x"));
        double left = switch (node.getAttribute("text-anchor")) {
          case "end" -> x - wide;
          case "middle" -> x - wide / 2;
          default -> x;
        };
        assertTrue(left >= 0 && left + wide <= width, node.getTextContent() + " at " + left + " wide " + wide);
        assertTrue(Double.parseDouble(node.getAttribute("y")) < height, node.getTextContent());
      }
    }
  }

  @Test
  void otherColumnsAreRefused() throws IOException {
    Path file = Files.writeString(folder.resolve("old.csv"), "part,M,K,N\nflux,1,2,3\n");
    assertTrue(assertThrows(IOException.class, () -> Results.read(file)).getMessage().contains("old.csv: columns"));
  }
}
