// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import java.nio.ByteBuffer;
import org.bytedeco.javacpp.annotation.Cast;
import org.bytedeco.javacpp.annotation.Const;
import org.bytedeco.javacpp.annotation.Name;
import org.bytedeco.javacpp.annotation.NoException;
import org.bytedeco.javacpp.annotation.Platform;
import org.bytedeco.javacpp.annotation.Properties;
import org.jetbrains.annotations.Nullable;

/**
 * The functions of {@code octolora/octolora.h}, one line each and without logic; that header documents them. Handles,
 * device pointers and streams are addresses, a status is its number. {@link NativeLibrary} loads the library first.
 */
@Properties(
    @Platform(
        value = "linux-x86_64",
        cinclude = "octolora/octolora.h",
        include = "octolora_java.h",
        link = "octolora@.3",
        library = "jnioctolora"))
@NoException
final class NativeOctolora {
  private NativeOctolora() {}

  @Name("octolora_last_error") static native @Cast("const char*") String lastError();
  @Name("octolora_abi_version") static native int abiVersion();
  @Name("octolora_version") static native @Cast("const char*") String version();

  @Name("octolora_cuda_device_count") static native int cudaDeviceCount(int[] count);
  @Name("octolora_device_create") static native int deviceCreate(int ordinal, @Cast("octolora_device**") long[] device);
  @Name("octolora_device_destroy") static native void deviceDestroy(@Cast("octolora_device*") long device);
  @Name("octolora_java_device_info")
  static native int deviceInfo(@Cast("const octolora_device*") long device, int[] numbers,
      @Cast("int64_t*") long[] memory, byte[] name, byte[] kernels);
  @Name("octolora_device_set_threads")
  static native int deviceSetThreads(@Cast("octolora_device*") long device, int threads);
  @Name("octolora_device_memory_in_use")
  static native int deviceMemoryInUse(@Cast("const octolora_device*") long device, @Cast("uint64_t*") long[] bytes);
  @Name("octolora_device_alloc")
  static native int deviceAlloc(@Cast("octolora_device*") long device, @Cast("size_t") long bytes,
      @Cast("void**") long[] memory);
  @Name("octolora_device_free")
  static native int deviceFree(@Cast("octolora_device*") long device, @Cast("void*") long memory);
  @Name("octolora_device_copy")
  static native int deviceCopy(@Cast("octolora_device*") long device, @Cast("void*") long to,
      @Cast("const void*") long from, @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);

  @Name("octolora_host_alloc")
  static native int hostAlloc(@Cast("octolora_device*") long device, @Cast("size_t") long bytes,
      @Cast("void**") long[] memory);
  @Name("octolora_host_free")
  static native int hostFree(@Cast("octolora_device*") long device, @Cast("void*") long memory);
  @Name("octolora_java_address") static native long address(@Cast("const void*") ByteBuffer direct);

  // Direct buffers count from their position. Of an array the generated code hands over a copy that lasts as long as
  // the call, so these wait for the stream.
  @Name("octolora_java_copy")
  static native int copyIn(@Cast("octolora_device*") long device, @Cast("void*") long to,
      @Cast("const void*") ByteBuffer from, @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyIn(@Cast("octolora_device*") long device, @Cast("void*") long to,
      @Const float[] from, @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyIn(@Cast("octolora_device*") long device, @Cast("void*") long to,
      @Const byte[] from, @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyOut(@Cast("octolora_device*") long device, @Cast("void*") ByteBuffer to,
      @Cast("const void*") long from, @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyOut(@Cast("octolora_device*") long device, float[] to, @Cast("const void*") long from,
      @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyOut(@Cast("octolora_device*") long device, byte[] to, @Cast("const void*") long from,
      @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_copy")
  static native int copyOut(@Cast("octolora_device*") long device, int[] to, @Cast("const void*") long from,
      @Cast("size_t") long bytes, @Cast("CUstream_st*") long stream);

  @Name("octolora_stream_create")
  static native int streamCreate(@Cast("octolora_device*") long device, @Cast("CUstream_st**") long[] stream);
  @Name("octolora_stream_destroy")
  static native int streamDestroy(@Cast("octolora_device*") long device, @Cast("CUstream_st*") long stream);
  @Name("octolora_stream_synchronize")
  static native int streamSynchronize(@Cast("octolora_device*") long device, @Cast("CUstream_st*") long stream);

  @Name("octolora_device_synchronize")
  static native int deviceSynchronize(@Cast("octolora_device*") long device);

  @Name("octolora_java_linear_create")
  static native int linearCreate(@Cast("octolora_device*") long device, int n, int k, int mode, int roundX,
      float xScale, float xDivisor, float outlierThreshold, @Cast("const void*") @Nullable ByteBuffer weight,
      int scaleCount, @Const float[] scale, int scaleBlock, @Cast("const void*") @Nullable ByteBuffer blockScale,
      @Const float @Nullable [] bias, @Cast("octolora_linear**") long[] linear);
  @Name("octolora_linear_destroy") static native void linearDestroy(@Cast("octolora_linear*") long linear);
  @Name("octolora_linear_write")
  static native int linearWrite(@Cast("octolora_linear*") long linear, int firstRow, int rows,
      @Cast("const int8_t*") ByteBuffer weight);

  @Name("octolora_slots_create")
  static native int slotsCreate(@Cast("octolora_linear*") long linear, int slotCount, @Const int[] capacity,
      int precision, @Cast("octolora_slots**") long[] slots);
  @Name("octolora_slots_destroy") static native void slotsDestroy(@Cast("octolora_slots*") long slots);
  // numbers: ten for each fill, see octolora_java.h.
  @Name("octolora_java_slots_set")
  static native int slotsSet(@Cast("const int64_t*") long[] numbers, @Const float[] scales, int count,
      @Cast("CUstream_st*") long stream);
  @Name("octolora_slots_set_scale")
  static native int slotsSetScale(@Cast("octolora_slots*") long slots, int slot, float scale,
      @Cast("CUstream_st*") long stream);
  @Name("octolora_slots_scales")
  static native int slotsScales(@Cast("octolora_slots*") long slots, @Cast("float**") long[] scales);
  @Name("octolora_slots_refresh")
  static native int slotsRefresh(@Cast("octolora_slots*") long slots, @Cast("CUstream_st*") long stream);
  @Name("octolora_slots_clear")
  static native int slotsClear(@Cast("octolora_slots*") long slots, int slot, @Cast("CUstream_st*") long stream);

  // outputs: six numbers each, see octolora_java.h.
  @Name("octolora_java_forward")
  static native int forward(int rows, int xType, int yType, @Cast("const void*") long x,
      @Cast("const int32_t*") long rowSlots, @Cast("const int64_t*") long[] outputs, int outputCount,
      @Cast("void*") long workspace, @Cast("size_t") long workspaceBytes, @Cast("CUstream_st*") long stream);
  @Name("octolora_java_forward_workspace")
  static native int forwardWorkspace(int rows, int xType, int yType, @Cast("const void*") long x,
      @Cast("const int32_t*") long rowSlots, @Cast("const int64_t*") long[] outputs, int outputCount,
      @Cast("size_t*") long[] bytes);
  @Name("octolora_java_forward_explain")
  static native int forwardExplain(int rows, int xType, int yType, @Cast("const void*") long x,
      @Cast("const int32_t*") long rowSlots, @Cast("const int64_t*") long[] outputs, int outputCount, byte[] text,
      @Cast("size_t") long size);
  @Name("octolora_linear_workspace")
  static native int linearWorkspace(@Cast("const octolora_linear*") long linear,
      @Cast("const octolora_slots*") long slots, int rows, int xType, @Cast("size_t*") long[] bytes);
  @Name("octolora_linear_forward")
  static native int linearForward(@Cast("const octolora_linear*") long linear,
      @Cast("const octolora_slots*") long slots, @Cast("const void*") long x, int xType, @Cast("void*") long y,
      int yType, int rows, @Cast("void*") long workspace, @Cast("size_t") long workspaceBytes,
      @Cast("CUstream_st*") long stream);
  @Name("octolora_linear_quantized")
  static native int linearQuantized(@Cast("const octolora_linear*") long linear, @Cast("const void*") long x, int xType,
      @Cast("int32_t*") long sums, @Cast("int8_t*") long codes, @Cast("float*") long rowScale, int rows,
      @Cast("void*") long workspace, @Cast("size_t") long workspaceBytes, @Cast("CUstream_st*") long stream);
}
