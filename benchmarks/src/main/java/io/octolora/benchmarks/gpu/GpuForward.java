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
 * Microseconds of a forward on a stream, from Java: wall time over {@value Workload#BATCH} calls and one wait. The
 * linears of a FLUX.1 step, then decoding.
 */
@State(Scope.Benchmark)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.MICROSECONDS)
@Fork(value = 1, jvmArgsAppend = "--enable-native-access=ALL-UNNAMED")
@Warmup(iterations = 2, time = 1)
@Measurement(iterations = 5, time = 1)
public class GpuForward {
  @Param("cuda:0")
  String device;

  /** M x K x N. */
  @Param({"4608x3072x3072", "4608x3072x12288", "4608x12288x3072", "4608x3072x21504", "4608x15360x3072",
      "1x4096x14336", "1x8192x28672", "16x8192x28672", "64x8192x28672"})
  String shape;

  @Param({"0", "16"})
  int rank;

  private Workload work;
  private DeviceMemory workspace;

  @Setup
  public void open() {
    work = new Workload(device, shape, rank);
    workspace = work.workspace(work.layer(0, 0).workspaceBytes(work.m, DataType.BFLOAT16));
  }

  @Benchmark
  @OperationsPerInvocation(Workload.BATCH)
  public void forward() {
    for (int i = 0; i < Workload.BATCH; i++) {
      int set = i % work.sets;
      work.layer(set, 0).forward(work.x(set), DataType.BFLOAT16, work.y(set, 0), DataType.BFLOAT16, work.m, workspace,
          work.stream);
    }
    work.stream.synchronize();
  }

  @TearDown
  public void close() throws Exception {
    work.check();
    work.close();
  }
}
