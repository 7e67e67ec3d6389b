// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.oracle.FloatFormat;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.EnumSource;

class CliPartsTest {
  @ParameterizedTest
  @CsvSource({"a.safetensors,a.safetensors,1", "a=0.7,a,0.7", "a=-2,a,-2", "a=.5,a,.5", "a=1.,a,1", "a=1e-3,a,1e-3",
      "a=b=2,a=b,2", "a=b,a=b,1", "a=nano,a=nano,1", "a=0x10,a=0x10,1", "a=1f,a=1f,1",
      "run=3/a.safetensors,run=3/a.safetensors,1", "run=3/a=0.5,run=3/a,0.5", "a=,a=,1", "=1,=1,1", "a=+3,a,3"})
  void adapterArgument(String text, String path, float scale) {
    assertEquals(new AdapterArgument(Path.of(path), scale), AdapterArgument.parse(text));
  }

  @Test
  void aFileOfThatVeryNameWins(@TempDir Path folder) throws IOException {
    Path file = Files.createFile(folder.resolve("style=2"));
    assertEquals(new AdapterArgument(file, 1), AdapterArgument.parse(file.toString()));
    assertEquals(new AdapterArgument(file, 3), AdapterArgument.parse(file + "=3"));
  }

  @Test
  void whatIsNoScaleOfAFileIsRefused(@TempDir Path folder) throws IOException {
    Path file = Files.createFile(folder.resolve("style"));
    for (String scale : new String[] {"", "half", "0x10", "1f"}) {
      assertEquals("scale '%s' of %s: expected a number".formatted(scale, file),
          assertThrows(IllegalArgumentException.class, () -> AdapterArgument.parse(file + "=" + scale)).getMessage());
    }
  }

  @Test
  void aScaleBeyondFloatIsRefused() {
    assertThrows(IllegalArgumentException.class, () -> AdapterArgument.parse("a=1e39"));
  }

  @ParameterizedTest
  @CsvSource({"a=nan", "a=NaN", "a=inf", "a=-Infinity"})
  void aScaleThatIsNotFiniteIsRefused(String text, @TempDir Path folder) throws IOException {
    assertThrows(IllegalArgumentException.class, () -> AdapterArgument.parse(text));
    Path file = Files.createFile(folder.resolve(text));
    assertEquals(new AdapterArgument(file, 1), AdapterArgument.parse(file.toString()));
  }

  @ParameterizedTest
  @EnumSource(FloatFormat.class)
  void packedValuesComeBack(FloatFormat format) {
    float[] values = {0, -0f, 1, -1.5f, 65504, -65504, 0x1p-14f, 0x1p-24f, 3 * 0x1p-24f, 0x1.ffcp-15f, 2048,
        Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY, Float.NaN};
    float[] expected = values.clone();
    format.roundAll(expected);
    assertArrayEquals(expected, Activations.unpack(Activations.pack(values, format), format));
  }

  @Test
  void knownBits() {
    assertArrayEquals(new byte[] {0, 0x3c, 1, 0, 0, (byte) 0xc0},
        Activations.pack(new float[] {1, 0x1p-24f, -2}, FloatFormat.FLOAT16));
    assertArrayEquals(new byte[] {(byte) 0x80, 0x3f}, Activations.pack(new float[] {1}, FloatFormat.BFLOAT16));
  }

  @Test
  void madeUpRowsHaveOutlierColumnsAndRepeat() {
    float[] x = Activations.random(3, 16, 128, FloatFormat.BFLOAT16);
    assertArrayEquals(x, Activations.random(3, 16, 128, FloatFormat.BFLOAT16));
    assertTrue(FloatFormat.BFLOAT16.holds(x));
    int large = 0;
    for (float v : x) {
      large += Math.abs(v) >= 6 ? 1 : 0;
    }
    assertTrue(large > 0 && large < x.length / 4, large + " of " + x.length + " at or above 6");
  }

  @Test
  void tablesGiveWayAtTheWidestColumn() {
    Table table = new Table("NAME", ">N", "OTHER");
    table.add("a".repeat(200) + "tail", 5, "b".repeat(60));
    table.add("short", 12345, "x");
    List<String> lines = table.lines(120);
    for (String line : lines) {
      assertTrue(line.length() <= 120, line);
    }
    assertTrue(lines.get(1).contains("…") && lines.get(1).contains("tail"), lines.get(1));
    assertTrue(lines.get(2).contains("12345"), lines.get(2));
    assertEquals("a".repeat(200) + "tail      5  " + "b".repeat(60), table.lines(1000).get(1));
  }

  /** Without line breaks by the terminal, which "clear the line" would not take back. */
  @Test
  void progressStaysOnOneLine() {
    StringWriter err = new StringWriter();
    Terminal terminal = new Terminal(new PrintWriter(new StringWriter()), new PrintWriter(err), false, true, 120);
    terminal.progress("m".repeat(5000), 3, 504);
    String text = err.toString();
    assertTrue(text.startsWith("\r\u001b[K\u001b[?7l3/504  mmm") && text.endsWith("mmm\u001b[?7h"), text);
    assertTrue(text.length() < 200, text);
  }

  @Test
  void controlCharactersDoNotReachATerminal() {
    assertEquals("a?[31mb?c?", Table.printable("a\u001b[31mb\nc\u202e"));
  }

  @ParameterizedTest
  @CsvSource({"2,2", "0.5,0.5", "5.656854249,5.65685", "0.6666666,0.666667", "-1,-1", "1e-9,1.00000e-09"})
  void numbers(double value, String text) {
    assertEquals(text, MappingView.number(value));
  }
}
