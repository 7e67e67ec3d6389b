// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.octolora.ArabicDigits;
import io.octolora.Fixtures;
import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.SafetensorsWriter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Json;
import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.FileTime;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.LockSupport;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class QuantizerTest {
  private static final Path LLAMA = Fixtures.path("llama/base_bf16");
  private static final Path FLUX_PART = Fixtures.path("flux/base_bf16_part");
  private static final Quantizer.Progress SILENT = (tensor, done, total) -> { };

  @TempDir
  Path folder;

  private static Quantizer.Options options(TargetFormat format, Long maxShardBytes, String... skip) {
    return new Quantizer.Options(format, List.of(skip), 6, maxShardBytes);
  }

  private static Quantizer.Result run(Path in, Path out, Quantizer.Options options) throws IOException {
    return Quantizer.run(in, out, options, false, SILENT);
  }

  /** Every file of a folder with its content. */
  private static Map<String, byte[]> contents(Path path) throws IOException {
    Map<String, byte[]> contents = new TreeMap<>();
    try (Stream<Path> files = Files.list(path)) {
      for (Path file : files.toList()) {
        contents.put(file.getFileName().toString(), Files.readAllBytes(file));
      }
    }
    return contents;
  }

  private static void assertSame(Map<String, byte[]> expected, Map<String, byte[]> actual) {
    assertEquals(expected.keySet(), actual.keySet());
    expected.forEach((name, bytes) -> assertArrayEquals(bytes, actual.get(name), name));
  }

  private static byte[] bytes(Tensor tensor) {
    byte[] bytes = new byte[(int) tensor.byteSize()];
    tensor.bytes().get(bytes);
    return bytes;
  }

  // ---- The same as the tools

  @Test
  void transformersAndBitsandbytesByteForByte() throws IOException {
    Path out = folder.resolve("int8");
    Quantizer.Result result = run(LLAMA, out, Quantizer.Options.of(TargetFormat.BITSANDBYTES));
    assertSame(contents(Fixtures.path("llama/base_bnb8")), contents(out));
    assertEquals(14, result.quantized().size());
    assertEquals(List.of("lm_head", "model.embed_tokens"), result.left());
    assertEquals(7, result.copied());
  }

  /** Part of the model in, the same part of the tool's tensors out: values, types, shapes and their order. */
  @ParameterizedTest
  @CsvSource({"BITSANDBYTES, flux/base_bnb8", "QUANTO, flux/base_quanto_diffusers"})
  void diffusersTensorForTensor(TargetFormat format, String tools) throws IOException {
    Path out = folder.resolve("int8");
    run(FLUX_PART, out, Quantizer.Options.of(format));
    try (SafetensorsFile ours = SafetensorsFile.open(out.resolve("diffusion_pytorch_model.safetensors"));
        SafetensorsFile theirs = SafetensorsFile.open(
            Fixtures.path(tools).resolve("diffusion_pytorch_model.safetensors"))) {
      List<String> expected = theirs.tensors().keySet().stream().filter(ours.tensors()::containsKey).toList();
      assertEquals(expected, List.copyOf(ours.tensors().keySet()));
      assertEquals(theirs.metadata(), ours.metadata());
      for (Tensor tensor : ours.tensors().values()) {
        Tensor other = theirs.tensors().get(tensor.name());
        assertEquals(other.type(), tensor.type(), tensor.name());
        assertArrayEquals(other.shape(), tensor.shape(), tensor.name());
        assertArrayEquals(bytes(other), bytes(tensor), tensor.name());
      }
    }
    Map<String, Object> ours = Json.readObject(out.resolve("config.json"));
    Map<String, Object> theirs = Json.readObject(Fixtures.path(tools).resolve("config.json"));
    theirs.remove("_name_or_path"); // where the tool had read the model from
    assertEquals(theirs, ours);
  }

  @Test
  void nothingDisagreesWhenTheResultIsRead() throws IOException {
    for (boolean transformers : new boolean[] {true, false}) {
      for (TargetFormat format : TargetFormat.values()) {
        for (String skip : new String[] {"", transformers ? "*o_proj" : "to_out.0", "v_proj", "to_q"}) {
          if (format != TargetFormat.QUANTO && skip.startsWith("*")) {
            continue; // no regular expression
          }
          Path out = folder.resolve(transformers + "-" + format + "-" + skip.replace('*', '-'));
          Quantizer.Result result = run(transformers ? LLAMA : FLUX_PART, out,
              options(format, null, skip.isEmpty() ? new String[0] : new String[] {skip}));
          try (Checkpoint checkpoint = Checkpoint.open(out)) {
            assertEquals(List.of(), checkpoint.notes(), out.toString());
            result.quantized().forEach(module -> assertTrue(checkpoint.linear(module).quantized(), module));
            result.left().forEach(module -> assertFalse(checkpoint.linear(module).quantized(), module));
          }
        }
      }
    }
  }

  @Test
  void compressedTensorsLayout() throws IOException {
    Path out = folder.resolve("int8");
    run(LLAMA, out, Quantizer.Options.of(TargetFormat.COMPRESSED_TENSORS));
    try (SafetensorsFile file = SafetensorsFile.open(out.resolve("model.safetensors"))) {
      Tensor scale = file.tensors().get("model.layers.0.mlp.up_proj.weight_scale");
      assertEquals("BF16 [176, 1]", scale.type() + " " + Arrays.toString(scale.shape()));
      assertEquals("I8", file.tensors().get("model.layers.0.mlp.up_proj.weight").type().name());
      assertEquals("BF16", file.tensors().get("lm_head.weight").type().name());
    }
    Map<String, Object> config = Json.object(
        Json.readObject(out.resolve("config.json")).get("quantization_config"), "quantization_config");
    assertEquals("compressed-tensors", config.get("quant_method"));
    assertEquals("int-quantized", config.get("format"));
    assertEquals(List.of("lm_head"), config.get("ignore"));
  }

  @Test
  void aSingleOutputOfQuantoHasAScaleWithoutDimensions() throws IOException {
    Path in = new SafetensorsWriter().floats("head.weight", new long[] {1, 2}, 1, -2)
        .write(folder.resolve("in.safetensors"));
    run(in, folder.resolve("out"), Quantizer.Options.of(TargetFormat.QUANTO));
    try (SafetensorsFile file = SafetensorsFile.open(folder.resolve("out/model.safetensors"))) {
      assertEquals(0, file.tensors().get("head.weight._scale").dimensions());
    }
  }

  // ---- Shards

  @ParameterizedTest
  @CsvSource({"BITSANDBYTES", "QUANTO", "COMPRESSED_TENSORS"})
  void shardsHoldTheSameTensors(TargetFormat format) throws IOException {
    run(LLAMA, folder.resolve("one"), Quantizer.Options.of(format));
    Quantizer.Result result = run(LLAMA, folder.resolve("many"), options(format, 30_000L));
    assertTrue(result.shards() > 3, result.toString());
    Map<String, Object> index =
        Json.readObject(folder.resolve("many/model.safetensors.index.json"));
    Map<String, Object> map = Json.object(index.get("weight_map"), "weight_map");
    try (SafetensorsFile one = SafetensorsFile.open(folder.resolve("one/model.safetensors"))) {
      assertEquals(new TreeMap<>(one.tensors()).keySet(), map.keySet());
      long total = 0;
      for (Map.Entry<String, Object> entry : map.entrySet()) {
        try (SafetensorsFile shard = SafetensorsFile.open(folder.resolve("many").resolve((String) entry.getValue()))) {
          byte[] bytes = bytes(shard.tensors().get(entry.getKey()));
          assertArrayEquals(bytes(one.tensors().get(entry.getKey())), bytes, entry.getKey());
          total += bytes.length;
        }
      }
      assertEquals(total, Json.object(index.get("metadata"), "metadata").get("total_size"));
    }
    assertTrue(Files.exists(folder.resolve("many/model-00001-of-%05d.safetensors".formatted(result.shards()))),
        contents(folder.resolve("many")).keySet().toString());
  }

  @Test
  void namesOfShardsDoNotFollowTheLocale() throws IOException {
    try (ArabicDigits egypt = new ArabicDigits()) {
      run(LLAMA, folder.resolve("many"), options(TargetFormat.QUANTO, 100_000L));
    }
    assertTrue(Files.exists(folder.resolve("many/model-00001-of-00002.safetensors")),
        contents(folder.resolve("many")).keySet().toString());
  }

  @Test
  void shardsAreReadAsOne() throws IOException {
    Path in = Files.createDirectory(folder.resolve("in"));
    SafetensorsWriter[] shards = {new SafetensorsWriter(), new SafetensorsWriter()};
    List<String> map = new ArrayList<>();
    try (SafetensorsFile whole = SafetensorsFile.open(FLUX_PART.resolve("diffusion_pytorch_model.safetensors"))) {
      int i = 0;
      for (Tensor tensor : whole.tensors().values()) {
        int shard = i++ % 2; // parts weights from their biases
        shards[shard].bytes(tensor.name(), tensor.type().name(), tensor.shape(), bytes(tensor));
        map.add("\"%s\":\"diffusion_pytorch_model-0000%d-of-00002.safetensors\"".formatted(tensor.name(), shard + 1));
      }
    }
    for (int i = 0; i < 2; i++) {
      shards[i].write(in.resolve("diffusion_pytorch_model-0000%d-of-00002.safetensors".formatted(i + 1)));
    }
    Files.writeString(in.resolve("diffusion_pytorch_model.safetensors.index.json"),
        "{\"weight_map\":{" + String.join(",", map) + "}}");
    Files.copy(FLUX_PART.resolve("config.json"), in.resolve("config.json"));
    run(in, folder.resolve("a"), Quantizer.Options.of(TargetFormat.BITSANDBYTES));
    run(FLUX_PART, folder.resolve("b"), Quantizer.Options.of(TargetFormat.BITSANDBYTES));
    assertSame(contents(folder.resolve("b")), contents(folder.resolve("a")));
  }

  // ---- Interruptions and failures

  private static final class Interruption extends RuntimeException {
    private static final long serialVersionUID = 1;
  }

  @Test
  void anInterruptedRunGoesOnAndGivesTheSameBytes() throws IOException {
    Quantizer.Options options = options(TargetFormat.BITSANDBYTES, 40_000L);
    int shards = run(LLAMA, folder.resolve("whole"), options).shards();
    Map<String, byte[]> expected = contents(folder.resolve("whole"));
    long total = Files.size(LLAMA.resolve("model.safetensors"));
    for (long stop = total / 20; stop < total; stop += total / 7) {
      Path out = folder.resolve("out" + stop);
      Path partial = folder.resolve("out" + stop + ".partial");
      long limit = stop;
      assertThrows(Interruption.class, () -> Quantizer.run(LLAMA, out, options, true, (tensor, done, all) -> {
        if (done >= limit) {
          throw new Interruption();
        }
      }));
      assertFalse(Files.exists(out), "a run that failed has no result");
      if (Files.exists(partial)) {
        assertThrows(FormatException.class, () -> Checkpoint.open(partial).close());
        assertThrows(OctoloraException.class, () -> run(LLAMA, out, options), "only on request");
      }
      boolean some = Files.exists(partial);
      Quantizer.Result result = Quantizer.run(LLAMA, out, options, true, SILENT);
      assertEquals(some, result.resumedShards() > 0);
      assertTrue(result.resumedShards() < shards);
      assertSame(expected, contents(out));
      assertFalse(Files.exists(partial));
    }
  }

  /** For a JVM of its own: quantizes the fixture to args[0] until half of it is done, says so and stays there. */
  public static final class Stuck {
    public static void main(String[] args) throws IOException {
      Quantizer.run(LLAMA, Path.of(args[0]), options(TargetFormat.BITSANDBYTES, 40_000L), false,
          (tensor, done, total) -> {
            if (done > total / 2) {
              System.out.println("stuck");
              while (true) {
                LockSupport.park();
              }
            }
          });
    }
  }

  /** SIGKILL: no code of the process runs any more, no file is closed by it and no lock given back. */
  @Test
  void aKilledProcessIsResumed() throws Exception {
    Path out = folder.resolve("out");
    Path output = folder.resolve("output");
    Process process = new ProcessBuilder(java(Stuck.class, List.of(), out.toString())).redirectErrorStream(true)
        .redirectOutput(output.toFile()).start();
    long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(120);
    while (process.isAlive() && Files.size(output) == 0 && System.nanoTime() < deadline) {
      Thread.sleep(20);
    }
    OctoloraException busy = assertThrows(OctoloraException.class,
        () -> Quantizer.run(LLAMA, out, options(TargetFormat.BITSANDBYTES, 40_000L), true, SILENT));
    process.destroyForcibly().waitFor();
    assertEquals("stuck", Files.readString(output).strip());
    assertTrue(busy.getMessage().endsWith("another run is writing there"), busy.getMessage());
    assertFalse(Files.exists(out));
    Quantizer.Options options = options(TargetFormat.BITSANDBYTES, 40_000L);
    Quantizer.Result result = Quantizer.run(LLAMA, out, options, true, SILENT);
    assertTrue(result.resumedShards() > 0 && result.resumedShards() < result.shards(), result.toString());
    run(LLAMA, folder.resolve("whole"), options);
    assertSame(contents(folder.resolve("whole")), contents(out));
  }

  /** A command that starts a class of this one's class path. */
  private static List<String> java(Class<?> main, List<String> jvmOptions, String... args) {
    List<String> command = new ArrayList<>(
        List.of(Path.of(System.getProperty("java.home"), "bin", "java").toString()));
    command.addAll(jvmOptions);
    command.addAll(List.of("-cp", System.getProperty("java.class.path")));
    String fixtures = System.getProperty("octolora.fixtures");
    if (fixtures != null) {
      command.add("-Doctolora.fixtures=" + fixtures);
    }
    command.add(main.getName());
    command.addAll(List.of(args));
    return command;
  }

  @Test
  void anInterruptionAfterTheLastShardLosesNothing() throws IOException {
    Quantizer.Options options = options(TargetFormat.QUANTO, 40_000L);
    run(LLAMA, folder.resolve("whole"), options);
    Path partial = interrupted(options);
    // as if the process had ended between two renames: one shard already has its own name
    try (Stream<Path> files = Files.list(partial)) {
      Path part = files.filter(file -> file.toString().endsWith(".part")).findFirst().orElseThrow();
      Files.move(part, Path.of(part.toString().replaceFirst("\\.part$", "")));
    }
    Quantizer.run(LLAMA, folder.resolve("out"), options, true, SILENT);
    assertSame(contents(folder.resolve("whole")), contents(folder.resolve("out")));
  }

  /** A run into "out" that ends with some shards finished. */
  private Path interrupted(Quantizer.Options options) throws IOException {
    assertThrows(Interruption.class,
        () -> Quantizer.run(LLAMA, folder.resolve("out"), options, false, (tensor, done, total) -> {
          if (done > total / 2) {
            throw new Interruption();
          }
        }));
    return folder.resolve("out.partial");
  }

  @Test
  void anotherJobIsNotResumed() throws IOException {
    Path partial = interrupted(options(TargetFormat.BITSANDBYTES, 40_000L));
    for (Quantizer.Options other : List.of(options(TargetFormat.QUANTO, 40_000L),
        options(TargetFormat.BITSANDBYTES, 50_000L), options(TargetFormat.BITSANDBYTES, 40_000L, "v_proj"),
        new Quantizer.Options(TargetFormat.BITSANDBYTES, List.of(), 5, 40_000L))) {
      OctoloraException e = assertThrows(OctoloraException.class,
          () -> Quantizer.run(LLAMA, folder.resolve("out"), other, true, SILENT));
      assertTrue(e.getMessage().contains("another job") && e.getMessage().contains(partial.toString()),
          e.getMessage());
    }
  }

  @Test
  void aChangedSourceIsNotResumed() throws IOException {
    Path in = Files.createDirectory(folder.resolve("in"));
    for (String name : List.of("config.json", "model.safetensors")) {
      Files.copy(LLAMA.resolve(name), in.resolve(name));
    }
    Quantizer.Options options = options(TargetFormat.BITSANDBYTES, 40_000L);
    Path out = folder.resolve("out");
    assertThrows(Interruption.class, () -> Quantizer.run(in, out, options, false, (tensor, done, total) -> {
      if (done > total / 2) {
        throw new Interruption();
      }
    }));
    Files.setLastModifiedTime(in.resolve("model.safetensors"), FileTime.fromMillis(1));
    OctoloraException e =
        assertThrows(OctoloraException.class, () -> Quantizer.run(in, out, options, true, SILENT));
    assertTrue(e.getMessage().contains("the source"), e.getMessage());
  }

  @Test
  void aShardThatIsGoneIsNoticed() throws IOException {
    Quantizer.Options options = options(TargetFormat.BITSANDBYTES, 40_000L);
    Path partial = interrupted(options);
    try (Stream<Path> files = Files.list(partial)) {
      Files.delete(files.filter(file -> file.toString().endsWith(".part")).findFirst().orElseThrow());
    }
    OctoloraException e = assertThrows(OctoloraException.class,
        () -> Quantizer.run(LLAMA, folder.resolve("out"), options, true, SILENT));
    assertTrue(e.getMessage().contains("which is not there"), e.getMessage());
  }

  @ParameterizedTest
  @CsvSource(delimiter = ';', value = {"''", "{", "[]", "{\"finished\": 3}", "{\"job\": \"x\"}"})
  void aDamagedListIsNamedWithTheWayOut(String text) throws IOException {
    Quantizer.Options options = options(TargetFormat.BITSANDBYTES, 40_000L);
    Path partial = interrupted(options);
    Files.writeString(partial.resolve(Manifest.NAME), text);
    OctoloraException e = assertThrows(OctoloraException.class,
        () -> Quantizer.run(LLAMA, folder.resolve("out"), options, true, SILENT));
    assertTrue(e.getMessage().startsWith(partial.resolve(Manifest.NAME).toString()), e.getMessage());
    assertTrue(e.getMessage().endsWith("; delete " + partial + " to start anew"), e.getMessage());
  }

  @Test
  void oneRunAtATime() throws IOException {
    Path out = folder.resolve("out");
    List<String> messages = new ArrayList<>();
    Quantizer.run(LLAMA, out, Quantizer.Options.of(TargetFormat.BITSANDBYTES), false, (tensor, done, total) -> {
      if (messages.isEmpty()) {
        messages.add(assertThrows(OctoloraException.class, () -> Quantizer.run(LLAMA, out,
            Quantizer.Options.of(TargetFormat.BITSANDBYTES), true, SILENT)).getMessage());
      }
    });
    assertTrue(messages.get(0).contains("another run"), messages.get(0));
  }

  @Test
  void weightsWithoutACodeAreNamedAndLeaveNothing() throws IOException {
    Path in = new SafetensorsWriter().floats("a.weight", new long[] {2, 2}, 1, 2, 70000, 4)
        .write(folder.resolve("in.safetensors"));
    FormatException e = assertThrows(FormatException.class,
        () -> run(in, folder.resolve("out"), Quantizer.Options.of(TargetFormat.BITSANDBYTES)));
    assertTrue(e.getMessage().contains("a.weight F32 [2, 2]: row 1"), e.getMessage());
    assertEquals(List.of("in.safetensors"), List.copyOf(contents(folder).keySet()));
    run(in, folder.resolve("out"), Quantizer.Options.of(TargetFormat.QUANTO)); // holds them well
  }

  @Test
  void whatIsNotTakenIsNamed() throws IOException {
    Quantizer.Options options = Quantizer.Options.of(TargetFormat.QUANTO);
    Path out = folder.resolve("out");
    assertMessage("already", () -> run(Fixtures.path("llama/base_bnb8"), out, options));
    Path alone = Files.copy(Fixtures.path("llama/base_bnb8/model.safetensors"), folder.resolve("alone.safetensors"));
    assertMessage("is int8 already", () -> run(alone, out, options));
    assertMessage("none of 16 linear layers", () -> run(LLAMA, out, options(TargetFormat.QUANTO, null, "*")));
    Files.createDirectory(out);
    Files.writeString(out.resolve("precious"), "data");
    assertMessage("out exists", () -> run(LLAMA, out, options));
    assertEquals("data", Files.readString(out.resolve("precious")));
    Files.delete(out.resolve("precious"));
    run(LLAMA, out, options); // an empty folder is no obstacle
  }

  @ParameterizedTest
  @CsvSource({"QUANTO, input_scale", "QUANTO, output_scale", "COMPRESSED_TENSORS, input_scale",
      "COMPRESSED_TENSORS, weight_zero_point"})
  void aTensorThatWouldBeReadAsPartOfAnInt8LayerIsNamed(TargetFormat format, String part) throws IOException {
    Path source = Files.createDirectory(folder.resolve("parts"));
    new SafetensorsWriter().ramp("m.weight", 1, 4, 8).floats("m." + part, new long[0], 2).ramp("o.weight", 1, 4, 8)
        .write(source.resolve("model.safetensors"));
    Path out = folder.resolve("int8");
    assertMessage("m." + part, () -> Quantizer.run(source, out, Quantizer.Options.of(format), false, (a, b, c) -> { }));
    assertFalse(Files.exists(out.resolveSibling("int8.partial")));
  }

  @ParameterizedTest
  @ValueSource(booleans = {true, false})
  void aLinkIsRefusedBeforeTheWork(boolean dangling) throws IOException {
    Path source = Files.createDirectory(folder.resolve("linked"));
    new SafetensorsWriter().ramp("m.weight", 1, 4, 8).write(source.resolve("model.safetensors"));
    Path real = folder.resolve("real");
    if (!dangling) {
      Files.createDirectory(real);
    }
    Path link = Files.createSymbolicLink(folder.resolve("link"), real);
    assertMessage("link is a symbolic link to " + real, () -> Quantizer.run(source, link,
        Quantizer.Options.of(TargetFormat.QUANTO), false, (a, b, c) -> { }));
    assertFalse(Files.exists(folder.resolve("link.partial")));
  }

  /** Writing to a full disk fails in a channel, whose error has no name. */
  @Test
  void aFileThatCannotBeWrittenIsNamed() throws IOException {
    Path source = Files.createDirectory(folder.resolve("large"));
    new SafetensorsWriter().ramp("m.weight", 1, 4, 8).write(source.resolve("model.safetensors"));
    Path work = Files.createDirectory(folder.resolve("full.partial"));
    Path full = Path.of("/dev/full");
    assumeTrue(Files.exists(full));
    Files.createSymbolicLink(work.resolve("model.safetensors.full"), full);
    Plan.Shard shard;
    try (Checkpoint checkpoint = Checkpoint.open(source)) {
      shard = new Plan(Source.of(checkpoint), Quantizer.Options.of(TargetFormat.QUANTO)).shards().get(0);
      Path target = work.resolve("model.safetensors.full");
      IOException e = assertThrows(IOException.class,
          () -> new ShardWriter(shard, TargetFormat.QUANTO, (tensor, bytes) -> { }).write(target));
      assertTrue(e.getMessage().contains(target.toString()), e.getMessage());
    }
  }

  private static void assertMessage(String part, Executable executable) {
    String message = assertThrows(OctoloraException.class, executable).getMessage();
    assertTrue(message.contains(part), message);
  }

  // ---- Memory

  /** For a JVM of its own: quantizes args[0] to args[1] and prints "done". */
  public static final class Small {
    public static void main(String[] args) throws IOException {
      for (TargetFormat format : TargetFormat.values()) {
        run(Path.of(args[0]), Path.of(args[1] + format), Quantizer.Options.of(format));
      }
      System.out.println("done");
    }
  }

  /** A tensor of 256 MiB passes through a JVM with a heap of 48 MiB and 16 MiB of buffers. */
  @Test
  void memoryDoesNotGrowWithTheTensor() throws Exception {
    long k = 8192;
    long n = (256L << 20) / 2 / k;
    byte[] header = "{\"a.weight\":{\"dtype\":\"BF16\",\"shape\":[%d,%d],\"data_offsets\":[0,%d]}}"
        .formatted(n, k, n * k * 2).getBytes(StandardCharsets.UTF_8);
    Path in = folder.resolve("large.safetensors");
    try (RandomAccessFile file = new RandomAccessFile(in.toFile(), "rw")) { // a file of holes, which read as zeros
      file.write(ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(header.length).array());
      file.write(header);
      file.setLength(8 + header.length + n * k * 2);
    }
    Path output = folder.resolve("output");
    List<String> command = java(Small.class, List.of("-Xmx48m", "-XX:MaxDirectMemorySize=16m"), in.toString(),
        folder.resolve("out-").toString());
    Process process = new ProcessBuilder(command).redirectErrorStream(true).redirectOutput(output.toFile()).start();
    if (!process.waitFor(120, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError("still runs after 120 s");
    }
    assertEquals("done", Files.readString(output).strip());
    try (SafetensorsFile file = SafetensorsFile.open(folder.resolve("out-bitsandbytes/model.safetensors"))) {
      assertEquals(n * k, file.tensors().get("a.weight").byteSize());
    }
  }
}
