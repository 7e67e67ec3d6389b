// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

/**
 * What a device is.
 *
 * @param ordinal CUDA ordinal, or {@value #CPU} for the CPU
 * @param computeCapability 90 for 9.0; 0 on the CPU
 * @param units multiprocessors; threads on the CPU
 * @param memoryBytes total memory of the device in bytes; 0 when unknown
 * @param name such as {@code "NVIDIA H200"}
 * @param kernels what runs there, such as {@code "wgmma s8, mma.sync s8"}, {@code "avx512-vnni"} or {@code "portable"}
 */
public record DeviceInfo(
    int ordinal, int computeCapability, int units, long memoryBytes, String name, String kernels) {
  /** The ordinal of the CPU. */
  public static final int CPU = -1;

  /** Whether this is a CUDA device. */
  public boolean isCuda() {
    return ordinal != CPU;
  }

  /** {@code "cpu"} or {@code "cuda:0"}. */
  public String id() {
    return isCuda() ? "cuda:" + ordinal : "cpu";
  }
}
