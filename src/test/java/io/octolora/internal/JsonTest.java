// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.FormatException;
import java.io.IOException;
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class JsonTest {
  @TempDir Path folder;

  @Test
  void readsEveryKindOfValueAndKeepsTheOrder() {
    Map<String, Object> object = Json.object(Json.parse(
        "{\"z\":[1,-2.5,true,false,null,\"\\u00e9\\ud83d\\ude00\"],\"a\":{},\"m\":18446744073709551616}", "here"),
            "here");
    assertEquals(List.of("z", "a", "m"), List.copyOf(object.keySet()));
    assertEquals(Arrays.asList(1L, -2.5, true, false, null, "\u00e9\ud83d\ude00"), object.get("z"));
    assertEquals(Map.of(), object.get("a"));
    assertEquals(BigInteger.TWO.pow(64), object.get("m"));
    assertNull(Json.parse("null", "here"));
  }

  @ParameterizedTest
  @ValueSource(strings = {"", " ", "{", "{\"a\":1,\"a\":2}", "{\"a\":{\"b\":1,\"b\":2}}", "[1,]", "{'a':1}", "NaN",
      "01", "1 2",
      "{} x", "\"\\ud800\"", "{\"\\udc00\":1}", "\"\\ud800\\ud800\"", "/* */ 1", "\"\t\"", "{}\u0000"})
  void everythingElseIsNamedWithItsPlace(String text) {
    FormatException e = assertThrows(FormatException.class, () -> Json.parse(text, "file: key"));
    assertTrue(e.getMessage().startsWith("file: key: "), e.getMessage());
    assertFalse(e.getMessage().contains("Source") || e.getMessage().contains("\n"), e.getMessage());
  }

  /** An unfinished object is named with the place where it starts, too. */
  @Test
  void mistakesAreNamedWithLineAndColumn() {
    assertMistake("Duplicate field 'a' at line 1, column 11", "{\"a\":1,\"a\":2}");
    assertMistake("(start marker at line: 2, column: 4) at line 3, column 1", "{\n\"\":{\n");
  }

  private static void assertMistake(String end, String text) {
    FormatException e = assertThrows(FormatException.class, () -> Json.parse(text, "file"));
    assertTrue(e.getMessage().startsWith("file: bad JSON: ") && e.getMessage().endsWith(end), e.getMessage());
  }

  @Test
  void filesAreNamed() throws IOException {
    Path file = Files.write(folder.resolve("a.json"), new byte[] {'{', '"', (byte) 0xc3, '(', '"', ':', '1', '}'});
    FormatException e = assertThrows(FormatException.class, () -> Json.readObject(file));
    assertEquals(file + ": invalid UTF-8 at byte 2", e.getMessage());
    Files.writeString(file, "[]");
    e = assertThrows(FormatException.class, () -> Json.readObject(file));
    assertEquals(file + ": [], expected an object", e.getMessage());
  }
}
