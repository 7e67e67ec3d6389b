# SPDX-License-Identifier: Apache-2.0
"""Octolora beside torch and PEFT on one GPU, in one process.

    python3 compare.py liboctolora.so [--out DIR] [--quick] [--only prefill|decode|ranks|modes]

Every row is bf16 in, bf16 out, quantization included. Each system runs once over several sets of (weights, x, y), more
than the L2 holds, captured in one CUDA graph; the graphs of the systems are replayed in turn, and the row gives the
median over the rounds of each, in microseconds a call. "eager" is the same loop without a graph. x and the weights are
normal random numbers. PEFT is lora.Linear over torch.nn.Linear in bf16, as get_peft_model makes it.
"""
import argparse
import csv
import ctypes
import math
import statistics
import subprocess
import sys
import time

import torch

FLUX = [  # M, K, N, times in one FLUX.1 step
    (4608, 3072, 3072, 19 * 4),
    (4608, 3072, 12288, 19),
    (4608, 12288, 3072, 19),
    (4608, 3072, 21504, 38),
    (4608, 15360, 3072, 38),
]
PREFILL = [(2048, 4096, 4096), (2048, 4096, 14336), (2048, 14336, 4096), (4096, 8192, 28672), (4608, 3072, 9216)]
DECODE = [(m, k, n) for k, n in ((4096, 4096), (4096, 14336), (8192, 28672), (28672, 8192)) for m in (1, 4, 16, 32, 64)]

F32, F16, BF16 = 0, 1, 2
W8A16, DYNAMIC = 0, 1
TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class LinearDesc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("n", ctypes.c_int32), ("k", ctypes.c_int32), ("mode", ctypes.c_int32),
                ("scale_count", ctypes.c_int32), ("round_x", ctypes.c_int32), ("x_scale", ctypes.c_float),
                ("x_divisor", ctypes.c_float), ("outlier_threshold", ctypes.c_float), ("weight", ctypes.c_void_p),
                ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class AdapterDesc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("rank", ctypes.c_int32), ("a_dtype", ctypes.c_int32),
                ("b_dtype", ctypes.c_int32), ("precision", ctypes.c_int32), ("b_stride", ctypes.c_int32),
                ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Octolora:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.octolora_last_error.restype = ctypes.c_char_p
        self.lib.octolora_version.restype = ctypes.c_char_p
        self.device = ctypes.c_void_p()
        self.check(self.lib.octolora_device_create(0, ctypes.byref(self.device)))

    def check(self, status):
        if status:
            raise RuntimeError(f"status {status}: {self.lib.octolora_last_error().decode()}")

    def version(self):
        return self.lib.octolora_version().decode()


class Linear:
    """One int8 linear with at most one adapter; weights from a float matrix, absmax/127 a row."""

    def __init__(self, lib, weight, rank, mode, m, threshold=0.0):
        self.lib, (self.n, self.k) = lib, weight.shape
        scale = (weight.float().abs().amax(1) / 127).cpu()
        codes = torch.round(weight.float() / scale.to(weight.device)[:, None]).clamp(-127, 127).to(torch.int8)
        desc = LinearDesc(ctypes.sizeof(LinearDesc), self.n, self.k, mode, self.n, F32, 0.0, 127.0, threshold,
                          codes.data_ptr(), scale.data_ptr(), None)
        self.handle, self.slots = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.synchronize()
        lib.check(lib.lib.octolora_linear_create(lib.device, ctypes.byref(desc), ctypes.byref(self.handle)))
        if rank:
            capacity = (ctypes.c_int32 * 1)(rank)
            lib.check(lib.lib.octolora_slots_create(self.handle, 1, capacity, 0, ctypes.byref(self.slots)))
            a = (torch.randn(rank, self.k) / math.sqrt(self.k)).bfloat16()
            b = (torch.randn(self.n, rank) * 0.05).bfloat16()
            adapter = AdapterDesc(ctypes.sizeof(AdapterDesc), rank, BF16, BF16, 0, 0, a.data_ptr(), b.data_ptr(), None)
            lib.check(lib.lib.octolora_slots_set(self.slots, 0, ctypes.byref(adapter), ctypes.c_float(1.0), None))
        size = ctypes.c_size_t()
        lib.check(lib.lib.octolora_linear_workspace(self.handle, self.slots, m, BF16, ctypes.byref(size)))
        self.workspace_bytes = size.value
        self.forward_c = lib.lib.octolora_linear_forward
        self.forward_c.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
                                   ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def forward(self, x, y, workspace):
        status = self.forward_c(self.handle, self.slots, x.data_ptr(), TYPES[x.dtype], y.data_ptr(), TYPES[y.dtype],
                                x.shape[0], workspace.data_ptr(), workspace.numel(), torch.cuda.current_stream().cuda_stream)
        if status:
            self.lib.check(status)

    def close(self):
        self.lib.lib.octolora_slots_destroy(self.slots)
        self.lib.lib.octolora_linear_destroy(self.handle)


def capture(run):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(runs, calls, rounds, floor_us=2000.0):
    """Medians in microseconds a call; the systems take turns."""
    repeats = {}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        repeats[name] = max(1, math.ceil(floor_us / max(1.0, (time.perf_counter() - start) * 1e6)))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats[name]):
                run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / repeats[name] / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def peft_linear(weight, rank):
    from peft.tuners.lora.config import LoraConfig
    from peft import get_peft_model
    n, k = weight.shape
    base = torch.nn.Module()
    base.proj = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    base.proj.weight.data.copy_(weight)
    base.forward = lambda x: base.proj(x)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"], init_lora_weights=False))
    layer = model.base_model.model.proj.to(torch.bfloat16)
    layer.requires_grad_(False)
    return layer


def measure(lib, m, k, n, ranks, rounds, peers=("linear", "peft"), modes=("w8a8",), eager=True):
    sets = max(3, min(16, math.ceil(300e6 / (n * k))))
    gen = torch.Generator(device="cuda").manual_seed(1)
    weights = [(torch.randn(n, k, device="cuda", generator=gen) / math.sqrt(k)).bfloat16() for _ in range(sets)]
    xs = [torch.randn(m, k, device="cuda", generator=gen).bfloat16() for _ in range(sets)]
    ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    runs, keep = {}, []
    if "linear" in peers:
        def linear():
            for w, x, y in zip(weights, xs, ys):
                torch.mm(x, w.t(), out=y)
        runs["bf16 linear"] = linear
    if "peft" in peers:
        for rank in [r for r in ranks if r]:
            layers = [peft_linear(w, rank) for w in weights]
            def peft(layers=layers):
                with torch.no_grad():
                    for layer, x in zip(layers, xs):
                        layer(x)
            runs[f"bf16 PEFT r{rank}"] = peft
    if "int_mm" in peers and m > 16:
        codes = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(sets)]
        qs = [torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8) for _ in range(sets)]
        def int_mm():
            for w, q in zip(codes, qs):
                torch._int_mm(q, w.t())
        runs["_int_mm"] = int_mm
    for mode in modes:
        for rank in ranks:
            threshold = 6.0 if mode == "outliers" else 0.0
            linears = [Linear(lib, w, rank, W8A16 if mode == "w8a16" else DYNAMIC, m, threshold) for w in weights]
            workspace = torch.empty(max(256, linears[0].workspace_bytes), dtype=torch.uint8, device="cuda")
            keep += linears
            def ours(linears=linears, workspace=workspace):
                for linear, x, y in zip(linears, xs, ys):
                    linear.forward(x, y, workspace)
            runs[f"{mode} r{rank}"] = ours
    graphs = {name: capture(run) for name, run in runs.items()}
    result = timed(graphs, sets, rounds)
    if eager:
        result.update({name + " eager": t for name, t in timed(runs, sets, max(3, rounds // 3)).items()})
    torch.cuda.synchronize()
    del graphs, runs
    for linear in keep:
        linear.close()
    torch.cuda.empty_cache()
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--out", default=".")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    lib = Octolora(options.library)
    state = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit",
                            "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    import peft
    header = [f"octolora {lib.version()}", f"torch {torch.__version__}, PEFT {peft.__version__}", f"GPU: {state}",
              f"command: python3 benchmarks/peers/compare.py {' '.join(sys.argv[1:])}"]
    print("\n".join(header), flush=True)
    rounds = 5 if options.quick else 15
    rows = []

    def add(part, m, k, n, times, count=0):
        tops = {name: 2e-6 * m * n * k / t for name, t in times.items()}
        for name, t in times.items():
            rows.append([part, m, k, n, count, name, f"{t:.2f}", f"{tops[name]:.1f}", f"{n * k / t / 1e3:.0f}",
                         f"{t / times['bf16 linear']:.3f}" if "bf16 linear" in times else ""])
        print(f"{part} {m}x{k}x{n}: " + "  ".join(f"{a} {b:.1f}" for a, b in times.items()), flush=True)

    want = lambda part: options.only in ("", part)
    if want("prefill"):
        sums = {}
        for m, k, n, count in FLUX:
            times = measure(lib, m, k, n, [0, 16], rounds, ("linear", "peft", "int_mm"))
            add("flux", m, k, n, times, count)
            for name, t in times.items():
                sums[name] = sums.get(name, 0) + t * count / 1e3
        print("FLUX step, ms: " + "  ".join(f"{a} {b:.1f}" for a, b in sums.items()), flush=True)
        rows += [["flux step ms", "", "", "", "", a, f"{b:.2f}", "", "", f"{b / sums['bf16 linear']:.3f}"] for a, b in sums.items()]
        for m, k, n in PREFILL:
            add("prefill", m, k, n, measure(lib, m, k, n, [0, 16], rounds))
    if want("ranks"):
        for m, k, n, _ in FLUX[1:3]:
            add("ranks", m, k, n, measure(lib, m, k, n, [0, 16, 64, 128], rounds, ("linear",), eager=False))
    if want("modes"):
        for m, k, n, _ in FLUX[:2]:
            add("modes", m, k, n, measure(lib, m, k, n, [0, 16], rounds, ("linear",), ("w8a16", "outliers"), eager=False))
    if want("decode"):
        for m, k, n in DECODE:
            add("decode", m, k, n, measure(lib, m, k, n, [0, 64], rounds, ("linear",), ("w8a8", "w8a16"), eager=False))
    with open(f"{options.out}/compare.csv", "w", newline="") as file:
        for line in header:
            file.write(f"# {line}\n")
        writer = csv.writer(file)
        writer.writerow(["part", "M", "K", "N", "times", "system", "us", "TOPS", "GB/s of int8 W", "of bf16 linear"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
