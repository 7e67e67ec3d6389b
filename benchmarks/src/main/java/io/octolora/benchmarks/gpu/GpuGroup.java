// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.gpu;

import io.octolora.runtime.DataType;
import io.octolora.runtime.DeviceMemory;
import io.octolora.runtime.Forward;
import io.octolora.runtime.ForwardCall;
import java.util.concurrent.TimeUnit;
import java.util.stream.IntStream;
import org.openjdk.jmh.annotations.Benchmark;
import org.openjdk.jmh.annotations.BenchmarkMode;
import org.openjdk.jmh.annotations.Fork;
import org.openjdk.jmh.annotations.Measurement;
import org.openjdk.jmh.annotations.Mode;
import org.openjdk.jmh.annotations.OperationsPerInvocation;
import org.openjdk.jmh.annotations.OutputTimeUnit;
import org.openjdk.jmh.annotations.Param;
import org.openjdk.jmh.annotations.Scope;
import org.openjdk.jmh.annotations.Setup;
import org.openjdk.jmh.annotations.State;
import org.openjdk.jmh.annotations.TearDown;
import org.openjdk.jmh.annotations.Warmup;

/**
 * Microseconds of layers that share x, each with an adapter: {@code together} as one call, {@code apart} as one call
 * each.
 */
@State(Scope.Benchmark)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.MICROSECONDS)
@Fork(value = 1, jvmArgsAppend = "--enable-native-access=ALL-UNNAMED")
@Warmup(iterations = 2, time = 1)
@Measurement(iterations = 5, time = 1)
public class GpuGroup {
  @Param("cuda:0")
  String device;

  /** M x K x the N of each: q/k/v and q/k/v/mlp of FLUX.1, gate/up while decoding. */
  @Param({"4608x3072x3072+3072+3072", "4608x3072x3072+3072+3072+12288", "1x4096x14336+14336"})
  String shape;

  @Param("16")
  int rank;

  private Workload work;
  private ForwardCall[] together;
  private ForwardCall[][] apart;

  @Setup
  public void open() {
    work = new Workload(device, shape, rank);
    together = new ForwardCall[work.sets];
    apart = new ForwardCall[work.sets][work.layers()];
    for (int set = 0; set < work.sets; set++) {
      int at = set;
      together[set] = call(set, IntStream.range(0, work.layers()).toArray());
      apart[set] = IntStream.range(0, work.layers()).mapToObj(layer -> call(at, layer)).toArray(ForwardCall[]::new);
    }
    long bytes = together[0].workspaceBytes();
    for (ForwardCall one : apart[0]) {
      bytes = Math.max(bytes, one.workspaceBytes());
    }
    DeviceMemory workspace = work.workspace(bytes);
    for (int set = 0; set < work.sets; set++) {
      together[set].workspace(workspace);
      for (ForwardCall one : apart[set]) {
        one.workspace(workspace);
      }
    }
  }

  private ForwardCall call(int set, int... layers) {
    ForwardCall call = new ForwardCall(
        IntStream.of(layers).mapToObj(layer -> work.layer(set, layer)).toArray(Forward[]::new));
    call.x(work.x(set), DataType.BFLOAT16, work.m).yType(DataType.BFLOAT16);
    for (int i = 0; i < layers.length; i++) {
      call.y(i, work.y(set, layers[i]));
    }
    return call;
  }

  @Benchmark
  @OperationsPerInvocation(Workload.BATCH)
  public void together() {
    for (int i = 0; i < Workload.BATCH; i++) {
      together[i % work.sets].enqueue(work.stream);
    }
    work.stream.synchronize();
  }

  @Benchmark
  @OperationsPerInvocation(Workload.BATCH)
  public void apart() {
    for (int i = 0; i < Workload.BATCH; i++) {
      for (ForwardCall one : apart[i % work.sets]) {
        one.enqueue(work.stream);
      }
    }
    work.stream.synchronize();
  }

  @TearDown
  public void close() throws Exception {
    work.check();
    work.close();
  }
}
