// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonGenerator;
import io.octolora.checkpoint.ElementType;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Collection;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * Where every tensor of a safetensors file lies, before any is known: the header as the reference writer makes it, with
 * tensors ordered by type, then name.
 */
final class ShardLayout {
  /** From the last in a file to the first, as the reference implementation declares its types. */
  private static final List<ElementType> TYPE_ORDER = List.of(ElementType.BOOL, ElementType.F4, ElementType.F6_E2M3,
      ElementType.F6_E3M2, ElementType.U8, ElementType.I8, ElementType.F8_E5M2, ElementType.F8_E4M3,
      ElementType.F8_E8M0, ElementType.F8_E4M3FNUZ, ElementType.F8_E5M2FNUZ, ElementType.I16, ElementType.U16,
      ElementType.F16, ElementType.BF16, ElementType.I32, ElementType.U32, ElementType.F32, ElementType.C64,
      ElementType.F64, ElementType.I64, ElementType.U64);

  private final byte[] start;
  private final Map<String, Long> positions = new HashMap<>();
  private final long fileBytes;

  ShardLayout(Collection<TensorSpec> tensors) {
    List<TensorSpec> ordered = tensors.stream().sorted(
        Comparator.comparingInt((TensorSpec tensor) -> -TYPE_ORDER.indexOf(tensor.type()))
            .thenComparing(tensor -> tensor.name().getBytes(StandardCharsets.UTF_8), Arrays::compareUnsigned)).toList();
    byte[] json = header(ordered);
    int padded = (json.length + 7) / 8 * 8;
    ByteBuffer bytes = ByteBuffer.allocate(8 + padded).order(ByteOrder.LITTLE_ENDIAN).putLong(padded).put(json);
    while (bytes.hasRemaining()) {
      bytes.put((byte) ' ');
    }
    start = bytes.array();
    long position = start.length;
    for (TensorSpec tensor : ordered) {
      positions.put(tensor.name(), position);
      position += tensor.bytes();
    }
    fileBytes = position;
  }

  /** The header with its length before it. */
  ByteBuffer start() {
    return ByteBuffer.wrap(start);
  }

  /** From the start of the file. */
  long position(TensorSpec tensor) {
    return positions.get(tensor.name());
  }

  long fileBytes() {
    return fileBytes;
  }

  private static byte[] header(List<TensorSpec> ordered) {
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (JsonGenerator json = new JsonFactory().createGenerator(bytes)) {
      json.writeStartObject();
      json.writeObjectFieldStart("__metadata__");
      json.writeStringField("format", "pt");
      json.writeEndObject();
      long offset = 0;
      for (TensorSpec tensor : ordered) {
        json.writeObjectFieldStart(tensor.name());
        json.writeStringField("dtype", tensor.type().name());
        json.writeFieldName("shape");
        json.writeArray(tensor.shape(), 0, tensor.shape().length);
        json.writeFieldName("data_offsets");
        json.writeArray(new long[] {offset, offset + tensor.bytes()}, 0, 2);
        json.writeEndObject();
        offset += tensor.bytes();
      }
      json.writeEndObject();
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
    return bytes.toByteArray();
  }
}
