// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import java.io.ByteArrayInputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;
import javax.xml.parsers.DocumentBuilderFactory;
import javax.xml.xpath.XPathConstants;
import javax.xml.xpath.XPathFactory;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.w3c.dom.Document;
import org.w3c.dom.NodeList;

class HtmlReportTest {
  private static final Path BASE = Fixtures.path("flux/base_bnb8");
  private static final Path R4 = Fixtures.path("flux/adapters/r4/peft");

  @TempDir
  Path folder;

  private String report(int status, Object... more) throws Exception {
    Path file = folder.resolve("report.html");
    List<Object> arguments = new ArrayList<>(List.of("verify"));
    arguments.addAll(List.of(more));
    arguments.addAll(List.of("--device", "cpu", "--report", file));
    Cli cli = Cli.run(arguments.toArray()).expect(status);
    assertTrue(cli.lines().contains("report      " + file), cli.out());
    return Files.readString(file);
  }

  private String full() throws Exception {
    return report(0, BASE, R4, "--golden", Fixtures.golden("flux", "bnb8__r4"), "--base",
        Fixtures.path("flux/base_bf16_part"));
  }

  /** The page is XML too: whatever is not escaped breaks this. */
  private static Document parse(String html) throws Exception {
    DocumentBuilderFactory factory = DocumentBuilderFactory.newInstance();
    return factory.newDocumentBuilder().parse(new ByteArrayInputStream(html.getBytes(StandardCharsets.UTF_8)));
  }

  private static List<String> texts(Document document, String path) throws Exception {
    NodeList nodes = (NodeList) XPathFactory.newInstance().newXPath().evaluate(path, document, XPathConstants.NODESET);
    List<String> texts = new ArrayList<>();
    for (int i = 0; i < nodes.getLength(); i++) {
      texts.add(nodes.item(i).getTextContent());
    }
    return texts;
  }

  @Test
  void everySectionHasItsLayers() throws Exception {
    Document page = parse(full());
    assertEquals(List.of("Errors", "What the adapters change", "Outlier columns", "What int8 costs", "Adapters",
        "All numbers"), texts(page, "//section/h2"));
    assertEquals("✓ OK Every layer is within bounds", texts(page, "//h1").get(0));
    String rows = "//section[h2='%s']/ul[@class='rows']/li[@class='row']";
    assertEquals(26, texts(page, rows.formatted("Errors")).size());
    assertEquals(26, texts(page, rows.formatted("What the adapters change")).size());
    assertEquals(20, texts(page, rows.formatted("Outlier columns")).size());
    // the part of the unquantized model: eight projections of one block, three of the other; both are adapted
    assertEquals(11, texts(page, rows.formatted("What int8 costs")).size());
    assertTrue(texts(page, "//section[h2='What int8 costs']/p").contains(
        "15 of the layers are not in the unquantized model."));
    assertEquals(26, texts(page, "//tbody/tr").size());
    assertEquals(List.of("Layer", "N", "K", "Rows", "Rank", "From oracle", "/ bound", "From recorded", "/ bound",
        "Changed by adapters", "Outlier columns", "Lost of W", "Lost of y"), texts(page, "//thead//th"));
  }

  @Test
  void chartsSayInWordsWhatTheyShow() throws Exception {
    Document page = parse(full());
    List<String> labels = texts(page, "//*[local-name()='svg']/@aria-label");
    assertEquals(texts(page, "//*[local-name()='svg']").size(), labels.size());
    assertTrue(labels.stream().anyMatch(label -> label.matches(
        "transformer_blocks\\.0\\.attn\\.to_q: 0\\.\\d+ of the oracle's bound, 0\\.\\d+ of the recording's")),
        labels.toString());
    assertTrue(labels.stream().anyMatch(label -> label.matches(
        "transformer_blocks\\.0\\.attn\\.to_q: 2 of 128 columns: \\d+, \\d+")), labels.toString());
    assertTrue(labels.stream().anyMatch(label -> label.startsWith("Distribution of ")), labels.toString());
  }

  @Test
  void nothingComesFromElsewhere() throws Exception {
    String html = full();
    for (String foreign : List.of("http:", "https:", "//cdn", "src=", "href=", "url(", "@import", "<script", "<link",
        "javascript:")) {
      assertFalse(html.contains(foreign), foreign);
    }
    assertTrue(html.contains("default-src 'none'"));
  }

  @Test
  void namesFromFilesAreText() throws Exception {
    String evil = "<img src=x onerror=alert(1)>&\"'";
    Path adapter = new SafetensorsWriter().ramp("transformer." + evil + ".lora_A.weight", 0.01f, 2, 64)
        .ramp("transformer." + evil + ".lora_B.weight", 0.01f, 64, 2)
        .write(folder.resolve("<b>&'.safetensors"));
    String html = report(1, BASE, adapter, R4);
    assertFalse(html.contains("<img"), html);
    Document page = parse(html);
    assertTrue(texts(page, "//code").contains("transformer." + evil + ".lora_A.weight"), html);
    assertTrue(texts(page, "//h3").contains(adapter.toString()), html);
    assertTrue(texts(page, "//h1").get(0).startsWith("✕ FAILED"), html);
  }

  @Test
  void whatIsOutsideIsMarked() throws Exception {
    Document page = parse(report(1, BASE, R4 + "=0.5", "--golden", Fixtures.golden("flux", "bnb8__r4")));
    assertEquals("✕ FAILED 26 of 26 layers are outside the bounds", texts(page, "//h1").get(0));
    assertEquals(26, texts(page, "//span[@class='value bad']").size());
    assertEquals(1, texts(page, "//div[@class='tile bad']").size());
  }

  @Test
  void whatIsNotThereIsLeftOut() throws Exception {
    Document page = parse(report(0, Fixtures.path("flux/base_quanto_diffusers"), "--rows", "2"));
    assertEquals(List.of("Errors", "Outlier columns", "All numbers"), texts(page, "//section/h2"));
    assertTrue(texts(page, "//section[h2='Outlier columns']/p").get(0).contains("do not treat them apart"));
    Document nothing = parse(report(1, Fixtures.path("llama/base_bnb8"), R4));
    assertEquals("✕ FAILED No layer was run", texts(nothing, "//h1").get(0));
    assertEquals(List.of("Adapters"), texts(nothing, "//section/h2"));
  }

  @Test
  void manyLayersAreFolded() throws Exception {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (int i = 0; i < 45; i++) {
      writer.bitsandbytes("blocks." + i, 3, 4);
    }
    Document page = parse(report(0, writer.write(folder.resolve("many.safetensors"))));
    String errors = "//section[h2='Errors']";
    assertEquals(40, texts(page, errors + "/ul[@class='rows']/li[@class='row']").size());
    assertEquals("Show 5 more", texts(page, errors + "/details/summary").get(0));
    assertEquals(5, texts(page, errors + "/details/ul/li").size());
  }

  @Test
  void keysThatLandedNowhereComeWithTheirFixes() throws Exception {
    Path llama = Fixtures.path("llama/adapters/r4_all");
    Document page = parse(report(1, BASE, Fixtures.path("flux/adapters/r4/peft"), llama));
    String adapters = "//section[h2='Adapters']";
    assertEquals(28, texts(page, adapters + "/ul[@class='keys'][2]/li").size());
    List<String> advice = texts(page, adapters + "/ul[@class='keys'][1]/li");
    assertEquals(2, advice.size());
    assertTrue(advice.get(0).startsWith("Names were read as PEFT: "), advice.get(0));
    assertTrue(advice.get(1).startsWith("Fix 1, for 28 keys: --rename FROM=TO "), advice.get(1));
    Document many = parse(report(1, Fixtures.path("llama/base_bnb8"), R4));
    assertEquals(40, texts(many, adapters + "/ul[@class='keys'][2]/li").size());
    assertEquals(12, texts(many, adapters + "/details/ul/li").size());
  }

  @Test
  void badUsage() {
    Cli.run("verify", BASE, R4, "--base", Fixtures.path("llama/base_bf16")).expectError("--report");
    Path file = folder.resolve("report.html");
    Path other = Fixtures.path("flux/base_bnb8");
    Cli wrong = Cli.run("verify", BASE, "--device", "cpu", "--report", file, "--base", other).expect(Main.BAD_INPUT);
    assertTrue(wrong.err().contains("expected the unquantized layer"), wrong.err());
    assertFalse(Files.exists(file));
    Path another = Fixtures.path("llama/base_bf16");
    Cli.run("verify", BASE, "--device", "cpu", "--report", file, "--base", another).expectError(
        "--base " + another + ": it has none of the 36 layers, such as context_embedder");
    Cli nowhere = Cli.run("verify", BASE, "--device", "cpu", "--report", folder.resolve("no/report.html"))
        .expect(Main.BAD_INPUT);
    assertTrue(nowhere.err().contains("no/report.html"), nowhere.err());
  }

  /** Rendered at the widths of a small phone, a phone and a desk: nothing to scroll sideways, everything drawn. */
  @Test
  void aBrowserShowsIt() throws Exception {
    Optional<Browser> browser = Browser.find();
    if (browser.isEmpty()) {
      System.out.println("HtmlReportTest.aBrowserShowsIt skipped: no chromium on the PATH");
    }
    Assumptions.assumeTrue(browser.isPresent(), "no chromium on the PATH");
    String expression = """
        JSON.stringify([
          page.documentElement.scrollWidth <= page.documentElement.clientWidth,
          [...page.querySelectorAll('.rows > .row:not(.axis)')].every(e => e.getBoundingClientRect().height > 10),
          [...page.querySelectorAll('.rows svg')].every(e => e.getBoundingClientRect().width > 120),
          [...page.querySelectorAll('.name, .value, .tile b')].every(e => e.scrollWidth <= e.clientWidth + 1),
          parseFloat(view.getComputedStyle(page.body).fontSize) >= 16,
          view.performance.getEntriesByType('resource').length,
          page.querySelectorAll('.rows svg').length,
          page.querySelector('h1').textContent])""";
    List<String> results = browser.get().evaluate(folder, full(), expression, 320, 390, 1200);
    int charts = 26 + 26 + 20 + 11;
    for (String result : results) {
      assertEquals("[true,true,true,true,true,0,%d,\"✓ OK Every layer is within bounds\"]".formatted(charts), result);
    }
  }
}
