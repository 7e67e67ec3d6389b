# SPDX-License-Identifier: Apache-2.0
"""Times on one GPU: graphs, medians over rounds in which the systems take turns, the clock, and a plain read."""
import ctypes
import glob
import math
import os
import statistics
import time

import torch


class Clock:
    """The clock of the multiprocessors, from the driver's management library; 0 where it does not say."""

    def __init__(self):
        self.handle = ctypes.c_void_p()
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self.nvml = None
            return
        if self.nvml.nvmlInit_v2() or self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)):
            self.nvml = None

    def mhz(self):
        value = ctypes.c_uint()
        if self.nvml is None or self.nvml.nvmlDeviceGetClockInfo(self.handle, 1, ctypes.byref(value)):
            return 0
        return value.value


def capture(run, stream, passes=1):
    """A graph of so many runs."""
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for _ in range(passes):
            run()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def timed(runs, calls, rounds, least_us, clock):
    """By name: (median, 10th, 90th percentile) in microseconds a call, and the median clock. The systems take turns."""
    repeats, times, clocks = {}, {name: [] for name in runs}, {name: [] for name in runs}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        repeats[name] = max(1, math.ceil(least_us / max(1.0, (time.perf_counter() - start) * 1e6)))
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats[name]):
                run()
            end.record()
            clocks[name].append(clock.mhz())
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / repeats[name] / calls)
    result = {}
    for name, values in times.items():
        values.sort()
        result[name] = (statistics.median(values), values[round(0.1 * (len(values) - 1))],
                        values[round(0.9 * (len(values) - 1))], statistics.median(clocks[name]))
    return result


class PlainRead:
    """Reads memory once and keeps nothing: what any decode kernel must do at least."""

    SOURCE = r"""
    extern "C" __global__ void __launch_bounds__(512) plain_read(const uint4* from, long long count, unsigned* never) {
      unsigned sum = 0;
      const long long step = (long long)gridDim.x * 512 * 8;
      for (long long at = (long long)blockIdx.x * 512 * 8 + threadIdx.x; at < count; at += step) {
        uint4 v[8];
        #pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = at + i * 512 < count ? __ldcs(from + at + i * 512) : uint4{0, 0, 0, 0};
        #pragma unroll
        for (int i = 0; i < 8; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
      }
      if (sum == 0x9e3779b9u) *never = sum;
    }"""

    def __init__(self):
        nvrtc = self.library()
        program, log = ctypes.c_void_p(), ctypes.create_string_buffer(1 << 16)
        major, minor = torch.cuda.get_device_capability()
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{major}{minor}".encode())
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), self.SOURCE.encode(), b"plain_read.cu", 0, None, None)
        if nvrtc.nvrtcCompileProgram(program, 1, options):
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(log.value.decode())
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, image)
        self.driver, module, self.kernel = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
        for status in (self.driver.cuModuleLoadData(ctypes.byref(module), image),
                       self.driver.cuModuleGetFunction(ctypes.byref(self.kernel), module, b"plain_read")):
            if status:
                raise RuntimeError(f"plain read: CUDA driver error {status}")
        self.never = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.units = torch.cuda.get_device_properties(0).multi_processor_count

    @staticmethod
    def library():
        major = torch.version.cuda.split(".")[0]
        near = glob.glob(f"{os.path.dirname(torch.__file__)}/../nvidia/*/lib/libnvrtc.so.{major}*")
        for name in [f"libnvrtc.so.{major}", *near]:
            try:
                return ctypes.CDLL(name)
            except OSError:
                pass
        raise RuntimeError(f"no libnvrtc.so.{major}, neither in the loader's path nor beside torch")

    def call(self, memory, size, blocks):
        """A function that reads the first size bytes of a tensor with so many blocks a multiprocessor.

        blocks None: as many as there is work for, one pass each
        """
        count = size // 16
        grid = blocks * self.units if blocks else -(-count // (512 * 8))
        values = [ctypes.c_void_p(memory.data_ptr()), ctypes.c_longlong(count), ctypes.c_void_p(self.never.data_ptr())]
        arguments = (ctypes.c_void_p * 3)(*[ctypes.addressof(v) for v in values])

        def run(keep=values):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = self.driver.cuLaunchKernel(self.kernel, grid, 1, 1, 512, 1, 1, 0, stream, arguments, None)
            if status:
                raise RuntimeError(f"plain read: CUDA driver error {status}")
        return run
