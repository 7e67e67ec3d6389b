# SPDX-License-Identifier: Apache-2.0
"""Octolora beside torch and PEFT on one GPU, in one process. table.py makes the tables of README.md from the result.

    python3 compare.py liboctolora.so [--out FILE.csv] [--only PART,...] [--quick] [--commit HASH]

Every row is bf16 in, bf16 out, quantization included. A system runs over several sets of (weights, x, y), more than the
L2 holds, captured in one CUDA graph; the graphs of a case are replayed in turn, and a row gives the median and the 10th
and 90th percentile over the rounds, in microseconds a call. x and the weights are normal random numbers. PEFT is
lora.Linear over torch.nn.Linear in bf16, as get_peft_model makes it.

Parts
    flux       the linears of a FLUX.1 step at 4608 tokens, with every rank, and what quantizing x alone takes
    groups     q/k/v and q/k/v/mlp as one call with separate outputs, weights and adapters
    prefill    linears of language models at 2048 and 4096 tokens
    epilogues  bias, activation, residual and gate in the same store
    rows       an adapter of its own for every row (row_slot) beside torch doing the same adapter by adapter
    modes      bitsandbytes' outlier search, a static scale
    decode     every M from 1 to 64, beside a plain read of the same bytes

Columns
    part, case      which measurement; case tells those of one shape apart
    M, K, N         x [M,K], y [M,N]; N is the sum over the outputs of a group
    times           calls of this shape in one FLUX.1 step, 0 where it is none of them
    system          "w8a8", "w8a16", "w8a8 outliers", "w8a8 static", "w8a8 quantize"; "bf16 linear", "bf16 PEFT",
                    "_int_mm", "torch per adapter"; "plain read" of W, A, B, x and y once each
    adapters        their ranks, joined by + or, where there are many of one rank, counted: 8xr16
    us, p10, p90    microseconds a call in a graph
    eager_us        the same without a graph
    floor_us        the larger of arithmetic / peak and bytes / bandwidth, from the data sheet; empty for other devices
    TOPS, GBs       2 M N K / us; bytes of the floor / us
    of_bf16         us / that of "bf16 linear" of the same shape in this run
    sm_mhz          clock of the multiprocessors while this row ran, median
    commit          of the library
"""
import argparse
import csv
import math
import os
import subprocess
import sys
import time

import torch

from octolora import ACTIVATIONS, DYNAMIC, STATIC, W8A16, Forward, Linear, Octolora, Quantize, factors
from shapes import DECODE, FLUX, GROUPS, PEAKS, PREFILL
from timing import Clock, PlainRead, capture, timed

COLUMNS = ["part", "case", "M", "K", "N", "times", "system", "adapters", "us", "p10", "p90", "eager_us", "floor_us",
           "TOPS", "GBs", "of_bf16", "sm_mhz", "commit"]
PARTS = ["flux", "groups", "prefill", "epilogues", "rows", "modes", "decode"]


def peft_linear(weight, rank):
    from peft import LoraConfig, get_peft_model
    n, k = weight.shape
    base = torch.nn.Module()
    base.proj = torch.nn.Linear(1, 1, bias=False, device="cuda", dtype=torch.bfloat16)
    base.proj.in_features, base.proj.out_features = k, n
    base.proj.weight = torch.nn.Parameter(weight, requires_grad=False)  # shared with "bf16 linear"
    base.forward = lambda x: base.proj(x)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"], init_lora_weights=False))
    layer = model.base_model.model.proj.to(torch.bfloat16)
    layer.requires_grad_(False)
    return layer


def ranks_text(ranks):
    if len(ranks) > 2 and len(set(ranks)) == 1:
        return f"{len(ranks)}xr{ranks[0]}"
    return "+".join(f"r{r}" for r in ranks)


class Bench:
    def __init__(self, lib, options, writer, file):
        self.lib, self.writer, self.file, self.quick = lib, writer, file, options.quick
        self.commit = options.commit
        self.clock, self.stream = Clock(), torch.cuda.Stream()
        name = torch.cuda.get_device_name(0)
        self.peaks = next((peak for key, peak in PEAKS.items() if key in name), None)
        self.rounds = 5 if options.quick else 25
        self.bf16 = {}  # (M, K, N): microseconds of bf16 linear, over all parts

    def sets(self, m, k, n, least=3):
        """So many (W int8, x, y) that they exceed three times the L2."""
        return max(least, min(16, math.ceil(160e6 / (n * k + 2 * m * (n + k)))))

    def weights(self, count, n, k):
        return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / math.sqrt(k) for _ in range(count)]

    def activations(self, count, m, k):
        return [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]

    def floor(self, system, m, k, n, ranks, one_adapter_a_row):
        """Microseconds by the data sheet, and the bytes that must move. 16-bit operations count as two of 8 bits."""
        narrow = system.startswith(("w8a8", "w8a16", "plain"))
        size = n * k * (1 if narrow else 2) + 2 * m * (k + n) + 2 * sum(ranks) * (n + k)
        rank = max(ranks, default=0) if one_adapter_a_row else sum(ranks)
        operations = 2.0 * m * n * k * (1 if system.startswith("w8a8") else 2) + 4.0 * m * rank * (n + k)
        if system == "plain read":
            operations = 0
        elif system == "w8a8 quantize":
            size, operations = 3 * m * k, 0
        if not self.peaks:
            return None, size
        return max(operations / self.peaks[0], size / self.peaks[1]) * 1e6, size

    def measure(self, part, case, shape, runs, calls, times=0, eager=True, rounds=None, least_us=1500.0):
        """Each run becomes a row.

        runs: (system, ranks) or (system, ranks, case) -> a function that makes `calls` calls
        eager: whether to time them without a graph too, or the systems of which to do so
        """
        m, k, n = shape
        rounds = rounds or self.rounds
        passes = -(-(24 if m <= 64 else 12) // calls)  # runs a graph, so many that its launch does not count
        graphs = {key: capture(run, self.stream, passes) for key, run in runs.items()}
        graph_times = timed({key: graph.replay for key, graph in graphs.items()}, calls * passes, rounds, least_us,
                            self.clock)
        which = runs if eager is True else {key: run for key, run in runs.items() if key[0] in eager} if eager else {}
        eager_times = timed(which, calls, max(3, rounds // 3), least_us, self.clock) if which else {}
        for key, (us, *_) in graph_times.items():
            if key[:2] == ("bf16 linear", ()):
                self.bf16[shape] = us
        said = []
        for key, (us, p10, p90, mhz) in graph_times.items():
            system, ranks, own = (*key, case)[:3]
            floor, size = self.floor(system, m, k, n, ranks, one_adapter_a_row=part == "rows")
            late = eager_times.get(key)
            product = system not in ("plain read", "w8a8 quantize")
            self.writer.writerow([
                part, own, m, k, n, times, system, ranks_text(ranks), f"{us:.2f}", f"{p10:.2f}", f"{p90:.2f}",
                f"{late[0]:.2f}" if late else "", f"{floor:.2f}" if floor else "",
                f"{2e-6 * m * n * k / us:.1f}" if product else "", f"{size / us / 1e3:.0f}",
                f"{us / self.bf16[shape]:.3f}" if shape in self.bf16 else "", f"{mhz:.0f}", self.commit])
            said.append(" ".join(filter(None, [system, ranks_text(ranks), own if own != case else ""])) + f" {us:.1f}")
        self.file.flush()
        print(f"{part} {case} {m}x{k}x{n}: " + "  ".join(said), flush=True)

    # Functions that run one system over all sets.

    def ours(self, weights, xs, ys, ranks=(), mode=DYNAMIC, threshold=0.0, *, keep):
        linears = [Linear(self.lib, w, ranks, mode, threshold) for w in weights]
        keep += linears
        return self.forwards(linears, xs, ys)

    def forwards(self, linears, xs, ys, row_slot=None):
        run = self.each([Forward(self.lib, [linear], x, [y], row_slot) for linear, x, y in zip(linears, xs, ys)])
        run()
        linears[-1].check(xs[-1], ys[-1], row_slot)
        return run

    @staticmethod
    def each(calls):
        def run():
            for call in calls:
                call()
        return run

    @staticmethod
    def linear(weights, xs, ys):
        def run():
            for w, x, y in zip(weights, xs, ys):
                torch.mm(x, w.t(), out=y)
        return run

    @staticmethod
    def peft(weights, xs, rank):
        layers = [peft_linear(w, rank) for w in weights]

        def run():
            with torch.no_grad():
                for layer, x in zip(layers, xs):
                    layer(x)
        return run

    @staticmethod
    def int_mm(m, k, n, count):
        codes = [torch.randn(n, k, device="cuda").mul_(32).clamp_(-127, 127).to(torch.int8) for _ in range(count)]
        qs = [torch.randn(m, k, device="cuda").mul_(32).clamp_(-127, 127).to(torch.int8) for _ in range(count)]

        def run():
            for w, q in zip(codes, qs):
                torch._int_mm(q, w.t())
        return run

    def shape(self, part, m, k, n, ranks, times=0, int_mm=False):
        count = self.sets(m, k, n)
        weights, xs = self.weights(count, n, k), self.activations(count, m, k)
        ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        keep = []
        runs = {("bf16 linear", ()): self.linear(weights, xs, ys), ("bf16 PEFT", (16,)): self.peft(weights, xs, 16)}
        if int_mm:
            runs["_int_mm", ()] = self.int_mm(m, k, n, count)
        for r in ranks:
            runs["w8a8", r] = self.ours(weights, xs, ys, r, keep=keep)
        runs["w8a8 quantize", ()] = self.each([Quantize(self.lib, linear, x) for linear, x in zip(keep[:count], xs)])
        runs["w8a16", (16,)] = self.ours(weights, xs, ys, (16,), W8A16, keep=keep)
        self.measure(part, "", (m, k, n), runs, count, times)
        self.release(keep)

    @staticmethod
    def release(linears):
        torch.cuda.synchronize()
        for linear in linears:
            linear.close()
        torch.cuda.empty_cache()

    def flux(self):
        ranks = [(), (16,)] if self.quick else [(), (16,), (32,), (64,), (128,), (16, 16)]
        for m, k, n, times in FLUX:
            self.shape("flux", m, k, n, ranks, times, int_mm=True)

    def prefill(self):
        for m, k, n in PREFILL[3:4] if self.quick else PREFILL:
            self.shape("prefill", m, k, n, [(), (16,)])

    def groups(self):
        """A group beside bf16 with the weights joined to one: the strongest that torch can do."""
        for case, m, k, ns, times in GROUPS:
            n, count = sum(ns), self.sets(m, k, sum(ns))
            weights, xs, keep, runs = self.weights(count, n, k), self.activations(count, m, k), [], {}
            ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            runs["bf16 linear", ()] = self.linear(weights, xs, ys)
            for ranks in [(), (16,)] if self.quick else [(), (16,), (64,)]:
                calls = []
                for w, x in zip(weights, xs):
                    members = [Linear(self.lib, part, ranks) for part in w.split(ns)]
                    keep += members
                    outputs = [torch.empty(m, i, device="cuda", dtype=torch.bfloat16) for i in ns]
                    calls.append(Forward(self.lib, members, x, outputs))
                    calls[-1]()
                    for member, y in zip(members, outputs):
                        member.check(x, y)
                runs["w8a8", ranks] = self.each(calls)
            self.measure("groups", case, (m, k, n), runs, count, times)
            self.release(keep)

    def epilogues(self):
        for m, k, n in [(4608, 3072, 12288)] if self.quick else [(4608, 3072, 12288), (4608, 12288, 3072)]:
            count = self.sets(m, k, n)
            weights, xs = self.weights(count, n, k), self.activations(count, m, k)
            ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            residual = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            gate = torch.randn(n, device="cuda", dtype=torch.bfloat16)
            bias, keep = torch.randn(n), []
            linears = [Linear(self.lib, w, (16,)) for w in weights]
            biased = [Linear(self.lib, w, (16,), bias=bias) for w in weights]
            keep += linears + biased
            cases = {"plain": {}, "bias": {}, **{name: {"activation": code} for name, code in ACTIVATIONS.items()},
                     "residual": {"residual": residual}, "residual and gate": {"residual": residual, "gate": gate}}
            runs = {}
            for case, options in cases.items():
                use = biased if case == "bias" else linears
                runs["w8a8", (16,), case] = self.each(
                    [Forward(self.lib, [linear], x, [y], **options) for linear, x, y in zip(use, xs, ys)])
            self.measure("epilogues", "", (m, k, n), runs, count, eager=False)
            self.release(keep)

    def rows(self):
        m, k, n, rank = 4608, 3072, 12288, 16
        count = self.sets(m, k, n)
        weights, xs, keep = self.weights(count, n, k), self.activations(count, m, k), []
        ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        everyone = [factors(rank, k, n) for _ in range(8)]
        shuffled = torch.randperm(m, device="cuda")
        base = self.linear(weights, xs, ys)
        runs = {("bf16 linear", (), "no adapter"): base,
                ("w8a8", (), "no adapter"): self.ours(weights, xs, ys, keep=keep)}
        for adapters in (1, 4, 8):
            linears = [Linear(self.lib, w, (rank,) * adapters) for w in weights]
            keep += linears
            order = torch.arange(m, device="cuda", dtype=torch.int32) * adapters // m
            cases = {"contiguous": order, "shuffled": order[shuffled].contiguous()}
            if adapters == 1:
                cases = {"contiguous": order, "none": torch.full_like(order, -1)}
            for case, slot in cases.items():
                runs["w8a8", (rank,) * adapters, f"{adapters} {case}"] = self.forwards(linears, xs, ys, slot)
                if case == "none":
                    continue
                where = [(slot == i).nonzero()[:, 0] for i in range(adapters)]
                if case == "contiguous":
                    where = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in where]

                def per_adapter(where=where):
                    base()
                    for x, y in zip(xs, ys):
                        for rows, (a, b) in zip(where, everyone):
                            delta = (x[rows] @ a.t()) @ b.t()
                            if isinstance(rows, slice):
                                y[rows] += delta
                            else:
                                y.index_add_(0, rows, delta)
                runs["torch per adapter", (rank,) * adapters, f"{adapters} {case}"] = per_adapter
        self.measure("rows", "", (m, k, n), runs, count, eager=False)
        self.release(keep)
        m, k, n = 64, 4096, 14336
        count, keep = self.sets(m, k, n), []
        weights, xs = self.weights(count, n, k), self.activations(count, m, k)
        ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        slot = torch.randperm(m, device="cuda").int()
        linears = [Linear(self.lib, w, (rank,) * m) for w in weights]
        keep += linears
        a = torch.randn(m, k, rank, device="cuda", dtype=torch.bfloat16) / math.sqrt(k)
        b = torch.randn(m, rank, n, device="cuda", dtype=torch.bfloat16) * 0.05

        def batched():
            for w, x, y in zip(weights, xs, ys):
                torch.mm(x, w.t(), out=y)
                y += torch.bmm(torch.bmm(x[:, None], a), b)[:, 0]
        self.measure("rows", "64 shuffled", (m, k, n), {
            ("bf16 linear", ()): self.linear(weights, xs, ys), ("w8a8", ()): self.ours(weights, xs, ys, keep=keep),
            ("w8a8", (rank,) * m): self.forwards(linears, xs, ys, slot),
            ("torch per adapter", (rank,) * m): batched}, count, eager=False)
        self.release(keep)

    def modes(self):
        for m, k, n, _ in FLUX[:1] if self.quick else FLUX[:2]:
            count, keep = self.sets(m, k, n), []
            weights, calm = self.weights(count, n, k), self.activations(count, m, k)
            ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            loud = [x.clone() for x in calm]
            for x in loud:
                x[:, :6] *= 20  # six columns beyond the threshold, as in real models
            runs = {("bf16 linear", ()): self.linear(weights, calm, ys)}
            for ranks in [(), (16,)]:
                runs["w8a8 outliers", ranks] = self.ours(weights, loud, ys, ranks, threshold=6.0, keep=keep)
                runs["w8a8 static", ranks] = self.ours(weights, calm, ys, ranks, STATIC, keep=keep)
            self.measure("modes", "", (m, k, n), runs, count, eager=False)
            self.release(keep)

    def decode(self):
        read, rank = PlainRead(), 64
        some = (1, 4, 16, 32, 64)
        every = (1, 2, 4, 8, 15, 16, 17, 32, 33, 64) if self.quick else range(1, 65)
        for k, n in DECODE:
            count, keep = self.sets(1, k, n), []
            weights = self.weights(count, n, k)
            most = n * k + 2 * rank * (n + k) + 2 * 64 * (n + k)
            buffers = [torch.empty(most, dtype=torch.int8, device="cuda").random_(-127, 128) for _ in range(count)]
            adapted = [Linear(self.lib, w, (rank,)) for w in weights]
            plain = [Linear(self.lib, w) for w in weights]
            wide = [Linear(self.lib, w, (16,), W8A16) for w in weights]
            keep += adapted + plain + wide
            layers = [peft_linear(w, rank) for w in weights]
            reads = {blocks: self.each([read.call(buffer, n * k, blocks) for buffer in buffers])
                     for blocks in (2, 4, 8, None)}
            graphs = {blocks: capture(run, self.stream) for blocks, run in reads.items()}
            times = timed({blocks: graph.replay for blocks, graph in graphs.items()}, count, 5, 1000.0, self.clock)
            blocks = min(times, key=times.get)  # what reads fastest here
            for m in every:
                xs = self.activations(count, m, k)
                ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
                size = n * k + 2 * rank * (n + k) + 2 * m * (n + k)
                runs = {("bf16 linear", ()): self.linear(weights, xs, ys),
                        ("w8a8", (rank,)): self.forwards(adapted, xs, ys),
                        ("plain read", (rank,)): self.each([read.call(buffer, size, blocks) for buffer in buffers])}
                if m in some:
                    runs["w8a8", ()] = self.forwards(plain, xs, ys)

                    def peft(layers=layers, xs=xs):
                        with torch.no_grad():
                            for layer, x in zip(layers, xs):
                                layer(x)
                    runs["bf16 PEFT", (rank,)] = peft
                if m <= 16 and m & (m - 1) == 0:
                    runs["w8a16", (16,)] = self.forwards(wide, xs, ys)
                self.measure("decode", "", (m, k, n), runs, count, rounds=5 if self.quick else 15, least_us=400.0,
                             eager=("w8a8", "bf16 linear") if m in some else False)
            self.release(keep)


def commit_here():
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="liboctolora.so with CUDA")
    parser.add_argument("--out", default="compare.csv", help="default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts, by commas")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, ranks, shapes and M")
    parser.add_argument("--commit", default=commit_here(), help="what the library was built from; default: this source")
    options = parser.parse_args()
    parts = options.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {options.only}: the parts are {', '.join(PARTS)}")
    import peft
    torch.manual_seed(1)
    lib = Octolora(options.library)
    state = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit",
                            "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    header = [f"octolora {lib.version}, commit {options.commit}", f"torch {torch.__version__}, PEFT {peft.__version__}",
              f"GPU: {state}", f"command: python3 benchmarks/peers/compare.py {' '.join(sys.argv[1:])}"]
    print("\n".join(header), flush=True)
    with open(options.out, "w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        bench = Bench(lib, options, writer, file)
        for part in PARTS:
            if part in parts:
                start = time.perf_counter()
                getattr(bench, part)()
                print(f"{part}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
