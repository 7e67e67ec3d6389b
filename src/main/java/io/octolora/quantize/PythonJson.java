// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import io.octolora.internal.Json;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import org.jetbrains.annotations.Nullable;

/**
 * JSON as the Python tools write configuration files: two spaces a level, names sorted, ASCII. Numbers keep the text
 * that they were read from.
 */
final class PythonJson {
  private PythonJson() {}

  /** A number in its own spelling. */
  record Literal(String text) {
    @Override
    public String toString() {
      return text;
    }
  }

  static Map<String, Object> readObject(byte[] text, String where) {
    return Json.object(Json.parse(text, 0, text.length, where, PythonJson::value), where);
  }

  private static @Nullable Object value(JsonParser parser, String where) throws IOException {
    switch (parser.currentToken()) {
      case START_OBJECT -> {
        Map<String, Object> map = new LinkedHashMap<>();
        while (parser.nextToken() != JsonToken.END_OBJECT) {
          String name = Json.checked(parser.currentName(), where);
          parser.nextToken();
          map.put(name, value(parser, where));
        }
        return map;
      }
      case START_ARRAY -> {
        List<Object> list = new ArrayList<>();
        while (parser.nextToken() != JsonToken.END_ARRAY) {
          list.add(value(parser, where));
        }
        return list;
      }
      case VALUE_NUMBER_INT, VALUE_NUMBER_FLOAT -> {
        return new Literal(parser.getText());
      }
      default -> {
        return Json.value(parser, where);
      }
    }
  }

  static String write(Map<String, ?> object) {
    StringBuilder text = new StringBuilder();
    write(text, object, 0);
    return text.append('\n').toString();
  }

  private static void write(StringBuilder text, @Nullable Object value, int depth) {
    if (value instanceof Map<?, ?> map) {
      Map<String, Object> sorted = new TreeMap<>();
      map.forEach((name, field) -> sorted.put((String) name, field));
      Iterator<Map.Entry<String, Object>> fields = sorted.entrySet().iterator();
      text.append('{');
      while (fields.hasNext()) {
        Map.Entry<String, Object> field = fields.next();
        newLine(text, depth + 1);
        quote(text, field.getKey());
        text.append(": ");
        write(text, field.getValue(), depth + 1);
        text.append(fields.hasNext() ? "," : "");
      }
      if (!sorted.isEmpty()) {
        newLine(text, depth);
      }
      text.append('}');
    } else if (value instanceof List<?> list) {
      Iterator<?> items = list.iterator();
      text.append('[');
      while (items.hasNext()) {
        newLine(text, depth + 1);
        write(text, items.next(), depth + 1);
        text.append(items.hasNext() ? "," : "");
      }
      if (!list.isEmpty()) {
        newLine(text, depth);
      }
      text.append(']');
    } else if (value instanceof String string) {
      quote(text, string);
    } else {
      text.append(value); // null, true, false, numbers
    }
  }

  private static void newLine(StringBuilder text, int depth) {
    text.append('\n').append("  ".repeat(depth));
  }

  private static void quote(StringBuilder text, String string) {
    text.append('"');
    for (int i = 0; i < string.length(); i++) {
      char c = string.charAt(i);
      switch (c) {
        case '"' -> text.append("\\\"");
        case '\\' -> text.append("\\\\");
        case '\n' -> text.append("\\n");
        case '\r' -> text.append("\\r");
        case '\t' -> text.append("\\t");
        case '\b' -> text.append("\\b");
        case '\f' -> text.append("\\f");
        default -> {
          if (c < ' ' || c > '~') {
            text.append("\\u%04x".formatted((int) c));
          } else {
            text.append(c);
          }
        }
      }
    }
    text.append('"');
  }
}
