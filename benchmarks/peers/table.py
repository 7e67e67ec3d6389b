# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md from a result of compare.py.

    python3 table.py ../results/h200_compare.csv
"""
import csv
import math
import sys

from shapes import DECODE, FLUX, GROUPS, PREFILL


def main(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))

    def us(part, shape, system, adapters="", case=""):
        for row in rows:
            if (row["part"], row["case"], (int(row["M"]), int(row["K"]), int(row["N"])), row["system"],
                    row["adapters"]) == (part, case, shape, system, adapters):
                return float(row["us"])
        return math.nan

    def number(value, form="{:.0f}"):
        return "" if math.isnan(value) else form.format(value)

    systems = [("bf16 linear", ""), ("bf16 PEFT", "r16"), ("w8a8", ""), ("w8a8", "r16"), ("w8a8", "r64"),
               ("w8a16", "r16")]
    print("| M × K × N | torch bf16 `linear` | bf16 + PEFT r16 | W8A8 | W8A8 + r16 | W8A8 + r64 | W8A16 + r16 "
          "| W8A8 + r16 of bf16 `linear` |")
    print("|---|---|---|---|---|---|---|---|")
    sums = [0.0] * len(systems)
    shapes = [("flux", (m, k, n), times) for m, k, n, times in FLUX] + [("prefill", s, 0) for s in PREFILL[:4]]
    for part, shape, times in shapes:
        values = [us(part, shape, *system) for system in systems]
        sums = [total + times * value if times else total for total, value in zip(sums, values)]
        if not all(math.isnan(value) for value in values):
            print("| " + " × ".join(map(str, shape)) + " | " + " | ".join(map(number, values))
                  + f" | {number(values[3] / values[0], '{:.2f}')} |")
    form = lambda value: number(value / 1e3, "{:.1f}")
    print("| FLUX.1 step, all block linears, ms | " + " | ".join(map(form, sums))
          + f" | {number(sums[3] / sums[0], '{:.2f}')} |")
    grouped = []
    for system in systems[2:5]:
        total = sum(times * us("groups", (m, k, sum(ns)), *system, case=case) for case, m, k, ns, times in GROUPS)
        total += 19 * us("flux", (4608, 3072, 3072), *system)
        total += sum(times * us("flux", (m, k, n), *system) for m, k, n, times in FLUX if (k, n) not in
                     ((3072, 3072), (3072, 21504)))
        grouped.append(total)
    print("| the same, q/k/v and q/k/v/mlp as groups, ms | | | " + " | ".join(map(form, grouped))
          + f" | | {number(grouped[1] / sums[0], '{:.2f}')} |")
    print()
    print("| K × N | M | torch bf16 `linear` | plain read | W8A8 + r64 | of the read | of bf16 `linear` |")
    print("|---|---|---|---|---|---|---|")
    for k, n in DECODE:
        for m in (1, 16, 64):
            linear, read = us("decode", (m, k, n), "bf16 linear"), us("decode", (m, k, n), "plain read", "r64")
            ours = us("decode", (m, k, n), "w8a8", "r64")
            if not math.isnan(ours):
                print(f"| {k} × {n} | {m} | {linear:.1f} | {read:.1f} | {ours:.1f} | {ours / read:.2f} "
                      f"| {ours / linear:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1])
