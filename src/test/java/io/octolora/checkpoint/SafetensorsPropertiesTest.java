// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;

import io.octolora.Fixtures;
import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import net.jqwik.api.Arbitraries;
import net.jqwik.api.Arbitrary;
import net.jqwik.api.Combinators;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.Provide;
import net.jqwik.api.constraints.IntRange;
import net.jqwik.api.lifecycle.AfterContainer;
import net.jqwik.api.lifecycle.BeforeContainer;

/** Random valid files read back as written; random damage is reported, not suffered. */
class SafetensorsPropertiesTest {
  private static Path file;

  record Written(String name, ElementType type, long[] shape, byte[] bytes) {}

  @BeforeContainer
  static void create() throws IOException {
    file = Files.createTempFile("octolora", ".safetensors");
  }

  @AfterContainer
  static void delete() throws IOException {
    Files.deleteIfExists(file);
  }

  @Provide
  Arbitrary<List<Written>> tensors() {
    Arbitrary<String> names = Arbitraries.strings().all().ofMaxLength(12)
        .filter(name -> !name.equals("__metadata__") && name.equals(new String(name.getBytes(
            java.nio.charset.StandardCharsets.UTF_8), java.nio.charset.StandardCharsets.UTF_8)));
    Arbitrary<ElementType> types = Arbitraries.of(ElementType.class).filter(type -> type.bits() >= 8);
    Arbitrary<long[]> shapes = Arbitraries.longs().between(0, 5).array(long[].class).ofMaxSize(4);
    return Combinators.combine(names, types, shapes, Arbitraries.randomValue(Random::nextLong))
        .as((name, type, shape, seed) -> {
          byte[] bytes = new byte[(int) Arrays.stream(shape).reduce(1, (a, b) -> a * b) * type.bits() / 8];
          new Random(seed).nextBytes(bytes);
          return new Written(name, type, shape, bytes);
        }).list().ofMaxSize(8).uniqueElements(Written::name);
  }

  @Property(tries = 300)
  void readsBackWhatWasWritten(@ForAll("tensors") List<Written> written) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    written.forEach(tensor -> writer.bytes(tensor.name, tensor.type.name(), tensor.shape, tensor.bytes));
    writer.metadata("key", "\u00e9\ud83d\ude00\"\\").write(file);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      assertEquals(written.stream().map(Written::name).toList(), List.copyOf(opened.tensors().keySet()));
      assertEquals(Map.of("key", "\u00e9\ud83d\ude00\"\\"), opened.metadata());
      for (Written expected : written) {
        Tensor tensor = opened.tensors().get(expected.name);
        assertEquals(expected.type, tensor.type());
        assertArrayEquals(expected.shape, tensor.shape());
        byte[] bytes = new byte[tensor.bytes().remaining()];
        tensor.bytes().get(bytes);
        assertArrayEquals(expected.bytes, bytes);
      }
    }
  }

  /** Most damage hits the header's text and length; a few bytes in the data only change values. */
  @Property(tries = 2000)
  void damageEndsInAnExceptionThatNamesTheFile(@ForAll @IntRange(min = 1, max = 8) int changes, @ForAll long seed)
      throws IOException {
    Random random = new Random(seed);
    byte[] bytes = Files.readAllBytes(Fixtures.path("llama/adapters/r8_qv_bf16/adapter_model.safetensors"));
    int reach = random.nextInt(4) == 0 ? bytes.length : random.nextInt(2) == 0 ? 8 : 1200;
    for (int i = 0; i < changes; i++) {
      bytes[random.nextInt(reach)] = (byte) random.nextInt();
    }
    if (random.nextInt(4) == 0) {
      bytes = Arrays.copyOf(bytes, random.nextInt(bytes.length + 16));
    }
    Files.write(file, bytes);
    try (SafetensorsFile opened = SafetensorsFile.open(file)) {
      Map<String, float[]> values = new LinkedHashMap<>();
      opened.tensors().forEach((name, tensor) -> {
        if (tensor.type().isFloat()) {
          values.put(name, tensor.toFloats());
        }
      });
      values.forEach((name, floats) -> assertEquals(opened.tensors().get(name).elementCount(), floats.length));
    } catch (FormatException e) {
      assertEquals(true, e.getMessage().contains(file.toString()), e.getMessage());
    }
  }
}
