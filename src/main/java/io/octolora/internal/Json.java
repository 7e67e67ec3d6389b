// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonFactoryBuilder;
import com.fasterxml.jackson.core.JsonLocation;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.core.JsonToken;
import com.fasterxml.jackson.core.StreamReadFeature;
import io.octolora.FormatException;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.Reader;
import java.io.StringReader;
import java.nio.ByteBuffer;
import java.nio.CharBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.CharsetDecoder;
import java.nio.charset.CoderResult;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import org.jetbrains.annotations.Nullable;

/** Strict JSON: duplicate names, bad UTF-8, lone surrogates and anything behind the value are errors. */
public final class Json {
  /** Bytes of the largest JSON file that is read: an index of a few hundred thousand tensors. */
  public static final long MAX_FILE_BYTES = 100_000_000;

  /** Names of a file are used once: no table of them is kept. */
  private static final JsonFactory FACTORY = new JsonFactoryBuilder()
      .enable(StreamReadFeature.STRICT_DUPLICATE_DETECTION)
      .disable(JsonFactory.Feature.INTERN_FIELD_NAMES)
      .disable(JsonFactory.Feature.CANONICALIZE_FIELD_NAMES)
      .build();

  /** A place inside one of Jackson's messages, such as the start of an unfinished object; the source is hidden. */
  private static final Pattern SOURCE = Pattern.compile("\\[Source: [^\\[\\]]*; (line: \\d+, column: \\d+)]");

  private Json() {}

  /** A tree of LinkedHashMap, ArrayList, String, Long (other integers: BigInteger), Double, Boolean and null. */
  public static @Nullable Object parse(String text, String where) {
    return parse(new StringReader(text), where, Json::value);
  }

  /** The object in a file; {@link FormatException} if it is no JSON object, IOException if it cannot be read. */
  public static Map<String, Object> readObject(Path file) throws IOException {
    InputFiles.refuseSpecial(file);
    long size = Files.size(file);
    if (size > MAX_FILE_BYTES) {
      throw new FormatException("%s: %d bytes, expected at most %d".formatted(file, size, MAX_FILE_BYTES));
    }
    byte[] bytes;
    try (InputStream in = Files.newInputStream(file)) {
      bytes = in.readNBytes((int) MAX_FILE_BYTES);
    }
    return object(parse(bytes, 0, bytes.length, file.toString(), Json::value), file.toString());
  }

  /** Reads one value from bytes through a function that leaves the parser on the value's last token. */
  public static <T> T parse(byte[] bytes, int offset, int length, String where, Reading<T> reading) {
    requireUtf8(bytes, offset, length, where);
    return parse(new InputStreamReader(new ByteArrayInputStream(bytes, offset, length), StandardCharsets.UTF_8), where,
        reading);
  }

  /** Reads a value; the parser stands on its first token. */
  @FunctionalInterface
  public interface Reading<T> {
    T read(JsonParser parser, String where) throws IOException;
  }

  /** The value under the parser; leaves it on the last token. */
  public static @Nullable Object value(JsonParser parser, String where) throws IOException {
    switch (parser.currentToken()) {
      case START_OBJECT -> {
        Map<String, Object> map = new LinkedHashMap<>();
        while (parser.nextToken() != JsonToken.END_OBJECT) {
          String name = checked(parser.currentName(), where);
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
      case VALUE_STRING -> {
        return checked(parser.getText(), where);
      }
      case VALUE_NUMBER_INT -> {
        return parser.getNumberType() == JsonParser.NumberType.BIG_INTEGER
            ? parser.getBigIntegerValue()
            : (Object) parser.getLongValue();
      }
      case VALUE_NUMBER_FLOAT -> {
        return parser.getDoubleValue();
      }
      case VALUE_TRUE -> {
        return true;
      }
      case VALUE_FALSE -> {
        return false;
      }
      default -> {
        return null;
      }
    }
  }

  /** Checks the value under the parser and forgets it; leaves the parser on the last token. */
  public static void skip(JsonParser parser, String where) throws IOException {
    int depth = 0;
    JsonToken token = parser.currentToken();
    while (true) {
      switch (token) {
        case START_OBJECT, START_ARRAY -> depth++;
        case END_OBJECT, END_ARRAY -> depth--;
        case FIELD_NAME -> checked(parser.currentName(), where);
        case VALUE_STRING -> checked(parser.getText(), where);
        default -> { }
      }
      if (depth == 0) {
        return;
      }
      token = parser.nextToken();
    }
  }

  /** The text itself, if it is a sequence of whole characters. */
  public static String checked(String text, String where) {
    for (int i = 0; i < text.length(); i++) {
      char c = text.charAt(i);
      if (Character.isHighSurrogate(c) && i + 1 < text.length() && Character.isLowSurrogate(text.charAt(i + 1))) {
        i++;
      } else if (Character.isSurrogate(c)) {
        throw new FormatException("%s: lone surrogate \\u%04x in a string".formatted(where, (int) c));
      }
    }
    return text;
  }

  /** The value as an object with its order kept. */
  @SuppressWarnings("unchecked")
  public static Map<String, Object> object(@Nullable Object value, String where) {
    if (value instanceof Map<?, ?> map) {
      return (Map<String, Object>) map;
    }
    throw new FormatException("%s: %s, expected an object".formatted(where, describe(value)));
  }

  /** The value as text for a message, cut short. */
  public static String describe(@Nullable Object value) {
    String text = value instanceof String string ? '"' + string + '"' : String.valueOf(value);
    return text.length() <= 80 ? text : text.substring(0, 77) + "...";
  }

  private static <T> T parse(Reader reader, String where, Reading<T> reading) {
    try (JsonParser parser = FACTORY.createParser(reader)) {
      if (parser.nextToken() == null) {
        throw new FormatException("%s: no JSON value".formatted(where));
      }
      T value = reading.read(parser, where);
      if (parser.nextToken() != null) {
        throw new FormatException("%s: text after the JSON value, at character %d".formatted(where,
            parser.currentTokenLocation().getCharOffset()));
      }
      return value;
    } catch (JsonProcessingException e) {
      String problem = SOURCE.matcher(e.getOriginalMessage()).replaceAll("$1");
      JsonLocation at = e.getLocation();
      throw new FormatException("%s: bad JSON: %s%s".formatted(where, problem,
          at == null ? "" : " at line %d, column %d".formatted(at.getLineNr(), at.getColumnNr())), e);
    } catch (IOException e) {
      throw new FormatException("%s: bad JSON: %s".formatted(where, e.getMessage()), e);
    }
  }

  /** Piece by piece, so that a large header is not held twice. */
  private static void requireUtf8(byte[] bytes, int offset, int length, String where) {
    CharsetDecoder decoder = StandardCharsets.UTF_8.newDecoder();
    ByteBuffer in = ByteBuffer.wrap(bytes, offset, length);
    CharBuffer out = CharBuffer.allocate(8192);
    try {
      CoderResult result;
      do {
        out.clear();
        result = decoder.decode(in, out, true);
        if (result.isError()) {
          result.throwException();
        }
      } while (result.isOverflow());
    } catch (CharacterCodingException e) {
      throw new FormatException("%s: invalid UTF-8 at byte %d".formatted(where, in.position() - offset), e);
    }
  }
}
