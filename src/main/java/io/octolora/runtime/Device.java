// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Quantization;
import io.octolora.mapping.ModuleMap;
import java.lang.ref.Reference;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Objects;
import java.util.Optional;
import org.bytedeco.javacpp.Pointer;
import org.jetbrains.annotations.Nullable;

/**
 * A CUDA device or the CPU, and the way to everything that lives there.
 *
 * <p>Device pointers are addresses of the device's memory: CUDA memory, or plain host memory for the CPU. Pointers
 * given as {@code long} are used as they are; a wrong one ends the process, as in C. {@link DeviceMemory} knows its
 * size and is checked. Streams are CUDA streams; 0 is the default stream, and the only one of the CPU.
 *
 * <p>The caller owns the device and what it makes, and closes both, in any order: a closed device takes no new work,
 * and its native half goes when the last object made on it does. All methods may be called from any thread. They throw
 * {@link IllegalStateException} after {@link #close()}, {@link OctoloraException} for what the device refuses, and
 * {@link NativeLibraryException} where the native library does not load. Defined by {@code octolora/octolora.h}.
 */
public final class Device implements AutoCloseable {
  private final NativeHandle handle;
  private final DeviceInfo info;

  private Device(int ordinal) {
    NativeLibrary.ensure();
    long[] device = new long[1];
    NativeLibrary.check(NativeOctolora.deviceCreate(ordinal, device));
    boolean made = false;
    try {
      this.info = readInfo(device[0]);
      this.handle = new NativeHandle("Device " + info.id(), device[0], NativeOctolora::deviceDestroy);
      made = true;
    } finally {
      if (!made) {
        NativeOctolora.deviceDestroy(device[0]);
      }
    }
  }

  private static DeviceInfo readInfo(long device) {
    int[] numbers = new int[3];
    long[] memory = new long[1];
    byte[] name = new byte[128];
    byte[] kernels = new byte[32];
    NativeLibrary.check(NativeOctolora.deviceInfo(device, numbers, memory, name, kernels));
    return new DeviceInfo(numbers[0], numbers[1], numbers[2], memory[0], text(name), text(kernels));
  }

  private static String text(byte[] bytes) {
    int length = 0;
    while (length < bytes.length && bytes[length] != 0) {
      length++;
    }
    return new String(bytes, 0, length, StandardCharsets.UTF_8);
  }

  /** The CPU. It takes its instruction set from the processor, or from OCTOLORA_CPU_ISA where that is lower. */
  public static Device cpu() {
    return new Device(DeviceInfo.CPU);
  }

  /**
   * A CUDA device.
   *
   * @param ordinal from 0, below {@link #cudaCount()}
   * @throws OctoloraException {@link Status#NO_DEVICE} with the reason where there is none of this ordinal
   */
  public static Device cuda(int ordinal) {
    if (ordinal < 0) {
      throw new IllegalArgumentException("CUDA ordinal " + ordinal + ", expected 0 or more");
    }
    return new Device(ordinal);
  }

  /** The first CUDA device, or the CPU where there is none; {@link #cudaUnavailableReason()} then says why. */
  public static Device best() {
    return cudaCount() > 0 ? cuda(0) : cpu();
  }

  /** Usable CUDA devices. */
  public static int cudaCount() {
    NativeLibrary.ensure();
    int[] count = new int[1];
    int status = NativeOctolora.cudaDeviceCount(count);
    if (status == Status.NO_DEVICE.code()) {
      return 0;
    }
    NativeLibrary.check(status);
    return count[0];
  }

  /** Why there is no CUDA device, such as a missing driver; empty where there is one. */
  public static Optional<String> cudaUnavailableReason() {
    NativeLibrary.ensure();
    int status = NativeOctolora.cudaDeviceCount(new int[1]);
    return status == 0 ? Optional.empty() : Optional.of(NativeOctolora.lastError());
  }

  /** The native library's version and what it was built with, such as {@code "0.1.0 (cuda 13.0: sm_80 sm_90a)"}. */
  public static String libraryVersion() {
    return NativeLibrary.version();
  }

  /** What this device is; also after {@link #close()}. */
  public DeviceInfo info() {
    return info;
  }

  /** Bytes that this library holds on the device now, through every object made on this handle. */
  public long memoryInUse() {
    long[] bytes = new long[1];
    long device = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.deviceMemoryInUse(device, bytes));
    } finally {
      handle.release();
    }
    return bytes[0];
  }

  /**
   * Threads that the CPU device may use in a call, the caller's included.
   *
   * @param threads 1 to 1024; initially OCTOLORA_NUM_THREADS or the processors this process may run on
   * @throws OctoloraException {@link Status#UNSUPPORTED} on CUDA
   */
  public void setThreads(int threads) {
    long device = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.deviceSetThreads(device, threads));
    } finally {
      handle.release();
    }
  }

  /** For tests that make objects in other ways than the public ones. */
  NativeHandle handle() {
    return handle;
  }

  // ---- Layers

  /**
   * Puts a layer's weights on the device, in the mode its checkpoint asks for. They are read from the file's mapping in
   * pieces, without a copy on the Java heap but for formats whose codes do not lie in one piece; the checkpoint may be
   * closed afterwards, and its file must keep its length meanwhile.
   *
   * @throws OctoloraException {@link Status#UNSUPPORTED} for a layer that is not quantized,
   *     {@link Status#OUT_OF_MEMORY} with nothing kept where it does not fit
   */
  public Int8Linear load(BaseLinear linear) {
    Quantization quantization = linear.quantization();
    if (quantization == null) {
      throw notQuantized(linear);
    }
    return load(linear, quantization);
  }

  /** The same with another treatment of the activations than the checkpoint's, such as another outlier threshold. */
  public Int8Linear load(BaseLinear linear, Quantization quantization) {
    if (!linear.quantized()) {
      throw notQuantized(linear);
    }
    return Int8Linear.create(handle, linear.name(), linear.n(), linear.k(), quantization, linear.weight()::bytes,
        linear.scale(), linear.scaleBlock(), linear.blockScale(), linear.bias(),
        linear.scaleBlock() > 0 ? Int8Linear.HEAP_WRITE_BYTES : Int8Linear.WRITE_BYTES);
  }

  private static OctoloraException notQuantized(BaseLinear linear) {
    return new OctoloraException(Status.UNSUPPORTED,
        "%s: the weight is %s and not quantized; only int8 layers run here".formatted(linear.name(),
            linear.weight().type()));
  }

  /**
   * A layer from memory of the caller, who may reuse all of it on return.
   *
   * @param name for messages
   * @param n output features
   * @param k input features, 1 to 131071, where the int32 sum is exact
   * @param weight [n, k] int8 from the buffer's position on; the real weight is scale[row] · weight[row, column]
   * @param scale n values, one an output feature, or one for the whole matrix
   * @param bias n values, or null
   */
  public Int8Linear load(String name, int n, int k, Quantization quantization, ByteBuffer weight, float[] scale,
      float @Nullable [] bias) {
    long bytes = (long) n * k;
    if (weight.remaining() < bytes) {
      throw new IllegalArgumentException(
          "%s: weight holds %d bytes, expected %d x %d = %d".formatted(name, weight.remaining(), n, k, bytes));
    }
    return Int8Linear.create(handle, name, n, k, quantization, (offset, length) -> {
      ByteBuffer part = weight.slice(Math.toIntExact(weight.position() + offset), length);
      return part.isDirect() ? part : ByteBuffer.allocateDirect(length).put(part).flip();
    }, scale, bias, weight.isDirect() ? Int8Linear.WRITE_BYTES : Int8Linear.HEAP_WRITE_BYTES);
  }

  // ---- Adapters

  /**
   * Copies an adapter's factors to pinned host memory, from which slots on this device are filled without waiting. The
   * adapter may be closed afterwards; the caller closes the copy.
   *
   * @param name for messages
   * @throws OctoloraException {@link Status#OUT_OF_MEMORY} with nothing kept
   */
  public PinnedAdapter pin(String name, ModuleMap map) {
    return new PinnedAdapter(handle, name, HostAdapter.bytes(map), memory -> HostAdapter.all(map, memory));
  }

  // ---- Memory and streams

  /** Device memory of bytes bytes, 256-byte aligned and not cleared. The caller closes it. */
  public DeviceMemory allocate(long bytes) {
    if (bytes < 0) {
      throw new IllegalArgumentException("bytes = " + bytes + ", expected 0 or more");
    }
    return new DeviceMemory(handle, bytes);
  }

  /** A new stream; on the CPU, where calls finish before they return, the default one. The caller closes it. */
  public Stream createStream() {
    return new Stream(handle, "Stream on " + info.id());
  }

  /**
   * Enqueues a copy of bytes bytes: host to device, device to host or within the device, as the addresses say. A copy
   * from or to pageable host memory may wait for the stream. The caller keeps both memories until the stream is past
   * it.
   */
  public void copy(long to, long from, long bytes, long stream) {
    if (bytes < 0) {
      throw new IllegalArgumentException("bytes = " + bytes + ", expected 0 or more");
    }
    long device = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.deviceCopy(device, to, from, bytes, stream));
    } finally {
      handle.release();
    }
  }

  /** {@link #copy(long, long, long, long)} with JavaCPP's pointers, from their positions on; a null stream is 0. */
  public void copy(Pointer to, Pointer from, long bytes, @Nullable Pointer stream) {
    try {
      copy(address(to, "to"), address(from, "from"), bytes, stream == null ? 0 : stream.address());
    } finally { // a pointer that owns its memory frees it when it is collected
      Reference.reachabilityFence(to);
      Reference.reachabilityFence(from);
      Reference.reachabilityFence(stream);
    }
  }

  /** Waits for all work enqueued on the stream and throws its errors. */
  public void synchronize(long stream) {
    long device = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.streamSynchronize(device, stream));
    } finally {
      handle.release();
    }
  }

  /** The address that a pointer's position means. */
  static long address(Pointer pointer, String what) {
    Objects.requireNonNull(pointer, what);
    long position = pointer.position();
    return position == 0 ? pointer.address() : pointer.address() + position * pointer.sizeof();
  }

  /**
   * Closes the device; a second time does nothing. Objects made on it work on until they are closed, but for calls that
   * allocate on the device, {@link Forward#forward(float[], int)} and {@link Int8Linear#quantized}: those throw
   * {@link IllegalStateException}.
   */
  @Override
  public void close() {
    handle.close();
  }

  /** Such as {@code "cuda:0 (NVIDIA H200, sm_90a)"}. */
  @Override
  public String toString() {
    return "%s (%s, %s)".formatted(info.id(), info.name(), info.kernels());
  }
}
