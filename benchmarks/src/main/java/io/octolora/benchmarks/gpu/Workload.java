// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.gpu;

import io.octolora.checkpoint.Quantization;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle;
import io.octolora.oracle.Oracle.Arithmetic;
import io.octolora.oracle.OracleAdapter;
import io.octolora.oracle.OracleLinear;
import io.octolora.runtime.AdapterSlots;
import io.octolora.runtime.Device;
import io.octolora.runtime.DeviceMemory;
import io.octolora.runtime.Forward;
import io.octolora.runtime.Int8Linear;
import io.octolora.runtime.LoraPrecision;
import io.octolora.runtime.Stream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayDeque;
import java.util.Arrays;
import java.util.Deque;
import java.util.List;
import java.util.Random;

/**
 * A device with several sets of (layers, x, y), together more than any cache holds, in normal random numbers; x and y
 * in bf16. A call takes the next set, so that no weight is read twice in a row.
 */
final class Workload implements AutoCloseable {
  /** Launches between two waits: what a wait costs is spread over them. */
  static final int BATCH = 32;

  private static final long CACHES = 160L << 20;
  private static final int POOL = 1_048_573; // a prime, so that rows differ
  private static final Quantization DYNAMIC = new Quantization(Quantization.Mode.W8A8_DYNAMIC, false, 0, 127, 0);

  final Device device;
  final Stream stream;
  final int m;
  final int k;
  final int sets;
  private final int[] ns;
  private final Deque<AutoCloseable> opened = new ArrayDeque<>();
  private final float[] normal = new float[POOL];
  private final byte[] weight;
  private final float[] x;
  private final DeviceMemory[] xs;
  private final DeviceMemory[][] ys;
  private final Int8Linear[][] linears;
  private final AdapterSlots[][] slots;
  private final float[] a;
  private final float[] b;
  private final int rank;

  /**
   * @param device cpu or cuda:N
   * @param mkn rows, inputs, outputs; several layers that share x by their outputs: 4608x3072x3072+3072
   * @param rank of an adapter in each layer, or 0
   */
  Workload(String device, String mkn, int rank) {
    String[] sizes = mkn.split("x");
    this.m = Integer.parseInt(sizes[0]);
    this.k = Integer.parseInt(sizes[1]);
    this.ns = Arrays.stream(sizes[2].split("\\+")).mapToInt(Integer::parseInt).toArray();
    this.rank = rank;
    int n = Arrays.stream(ns).sum();
    int widest = Arrays.stream(ns).max().orElseThrow();
    this.sets = (int) Math.max(3, Math.min(16, CACHES / ((long) n * k + 2L * m * (n + k)) + 1));
    this.device = opened(device.equals("cpu") ? Device.cpu() : Device.cuda(Integer.parseInt(device.substring(5))));
    this.stream = opened(this.device.createStream());
    Random random = new Random(1);
    for (int i = 0; i < POOL; i++) {
      normal[i] = (float) random.nextGaussian();
    }
    weight = new byte[Math.multiplyExact(widest, k)];
    for (int i = 0; i < weight.length; i++) {
      weight[i] = (byte) Math.max(-127, Math.min(127, Math.round(normal[i % POOL] * 32)));
    }
    x = bf16(m * k, 1, 7);
    a = bf16(rank * k, (float) (1 / Math.sqrt(k)), 11);
    b = bf16(rank * widest, 0.05f, 13);
    xs = new DeviceMemory[sets];
    ys = new DeviceMemory[sets][ns.length];
    linears = new Int8Linear[sets][ns.length];
    slots = new AdapterSlots[sets][ns.length];
    ByteBuffer packed = pack(x);
    for (int set = 0; set < sets; set++) {
      xs[set] = opened(this.device.allocate(2L * m * k));
      xs[set].copyFrom(packed, null);
      for (int i = 0; i < ns.length; i++) {
        ys[set][i] = opened(this.device.allocate(2L * m * ns[i]));
        linears[set][i] = opened(this.device.load("layer " + i, ns[i], k, DYNAMIC,
            ByteBuffer.wrap(weight, 0, ns[i] * k), scale(ns[i]), null));
        if (rank > 0) {
          slots[set][i] = opened(linears[set][i].slots(LoraPrecision.BITS_16, rank));
          swap(set, i);
        }
      }
    }
    stream.synchronize();
  }

  private <T extends AutoCloseable> T opened(T resource) {
    opened.push(resource);
    return resource;
  }

  private static float[] scale(int n) {
    float[] scale = new float[n];
    Arrays.fill(scale, 1 / 1024f);
    return scale;
  }

  private float[] bf16(int count, float size, int start) {
    float[] values = new float[count];
    for (int i = 0; i < count; i++) {
      values[i] = normal[(i + start) % POOL] * size;
    }
    FloatFormat.BFLOAT16.roundAll(values);
    return values;
  }

  private static ByteBuffer pack(float[] values) {
    ByteBuffer bytes = ByteBuffer.allocateDirect(2 * values.length).order(ByteOrder.nativeOrder());
    for (float value : values) {
      bytes.putShort((short) (Float.floatToRawIntBits(value) >>> 16));
    }
    return bytes.flip();
  }

  DeviceMemory x(int set) {
    return xs[set];
  }

  DeviceMemory y(int set, int layer) {
    return ys[set][layer];
  }

  int layers() {
    return ns.length;
  }

  /** The layer with its adapter. */
  Forward layer(int set, int layer) {
    return rank > 0 ? slots[set][layer] : linears[set][layer];
  }

  /** A workspace for so many bytes. */
  DeviceMemory workspace(long bytes) {
    return opened(device.allocate(Math.max(256, bytes)));
  }

  /** Puts the adapter into the layer's slot, on the stream. */
  void swap(int set, int layer) {
    slots[set][layer].set(0, rank, a, layer == 0 ? b : Arrays.copyOf(b, rank * ns[layer]), 1, stream.address());
  }

  /** @throws AssertionError unless the first row of every y of every set is that of the oracle */
  void check() {
    stream.synchronize();
    for (int layer = 0; layer < ns.length; layer++) {
      int n = ns[layer];
      OracleLinear linear = new OracleLinear(n, k, Arrays.copyOf(weight, n * k), scale(n), null, DYNAMIC);
      List<OracleAdapter> adapters = rank == 0 ? List.of() : List.of(new OracleAdapter(rank, a, FloatFormat.BFLOAT16,
          Arrays.copyOf(b, rank * n), FloatFormat.BFLOAT16, null, 1));
      var expected = Oracle.evaluate(linear, adapters, Arrays.copyOf(x, k), 1, FloatFormat.BFLOAT16,
          FloatFormat.BFLOAT16, device.info().isCuda() ? Arithmetic.TENSOR_CORES : Arithmetic.FP32);
      for (int set = 0; set < sets; set++) {
        byte[] bytes = new byte[(int) ys[set][layer].bytes()];
        ys[set][layer].copyTo(bytes, null);
        ByteBuffer all = ByteBuffer.wrap(bytes).order(ByteOrder.nativeOrder());
        float[] y = new float[n];
        for (int i = 0; i < n; i++) {
          y[i] = Float.intBitsToFloat(all.getShort() << 16);
        }
        Deviation deviation = expected.compare(y);
        if (!deviation.withinBound()) {
          throw new AssertionError("set %d, layer %d: %s".formatted(set, layer, deviation));
        }
      }
    }
  }

  @Override
  public void close() throws Exception {
    while (!opened.isEmpty()) {
      opened.pop().close();
    }
  }
}
