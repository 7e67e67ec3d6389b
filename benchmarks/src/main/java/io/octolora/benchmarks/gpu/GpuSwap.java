// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.gpu;

import io.octolora.runtime.DataType;
import io.octolora.runtime.DeviceMemory;
import java.util.concurrent.TimeUnit;
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
 * Microseconds of another adapter for every call: {@code swapAndForward} fills the layer's slot from the Java heap
 * before each forward, {@code swap} does that alone.
 */
@State(Scope.Benchmark)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.MICROSECONDS)
@Fork(value = 1, jvmArgsAppend = "--enable-native-access=ALL-UNNAMED")
@Warmup(iterations = 2, time = 1)
@Measurement(iterations = 5, time = 1)
public class GpuSwap {
  @Param("cuda:0")
  String device;

  /** M x K x N. */
  @Param({"4608x3072x12288", "1x4096x14336"})
  String shape;

  @Param({"16", "64"})
  int rank;

  private Workload work;
  private DeviceMemory workspace;

  @Setup
  public void open() {
    work = new Workload(device, shape, rank);
    workspace = work.workspace(work.layer(0, 0).workspaceBytes(work.m, DataType.BFLOAT16));
    for (int set = 0; set < work.sets; set++) {
      forward(set); // swap alone leaves y as it is, and y is checked
    }
  }

  private void forward(int set) {
    work.layer(set, 0).forward(work.x(set), DataType.BFLOAT16, work.y(set, 0), DataType.BFLOAT16, work.m, workspace,
        work.stream);
  }

  @Benchmark
  @OperationsPerInvocation(Workload.BATCH)
  public void swapAndForward() {
    for (int i = 0; i < Workload.BATCH; i++) {
      work.swap(i % work.sets, 0);
      forward(i % work.sets);
    }
    work.stream.synchronize();
  }

  @Benchmark
  @OperationsPerInvocation(Workload.BATCH)
  public void swap() {
    for (int i = 0; i < Workload.BATCH; i++) {
      work.swap(i % work.sets, 0);
    }
    work.stream.synchronize();
  }

  @TearDown
  public void close() throws Exception {
    work.check();
    work.close();
  }
}
