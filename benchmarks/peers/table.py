# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md from a result of compare.py, or puts them into it.

    python3 table.py ../results/h200_compare.csv [README.md]

In a README they stand between the lines BEGIN and END.
"""
import csv
import math
import sys

from shapes import DECODE, FLUX, GROUPS, PREFILL

BEGIN = "<!-- benchmarks/peers/table.py writes from here -->"
END = "<!-- to here -->"
SYSTEMS = [("bf16 linear", ""), ("bf16 PEFT", "r16"), ("w8a8", ""), ("w8a8", "r16"), ("w8a8", "r64"), ("w8a16", "r16")]


class Results:
    def __init__(self, path):
        with open(path, newline="") as file:
            rows = csv.DictReader(line for line in file if not line.startswith("#"))
            self.times = {(row["part"], row["case"], int(row["M"]), int(row["K"]), int(row["N"]), row["system"],
                           row["adapters"]): float(row["us"]) for row in rows}

    def us(self, part, shape, system, adapters="", case=""):
        """Microseconds; NaN where it was not measured."""
        return self.times.get((part, case, *shape, system, adapters), math.nan)


def number(value, form):
    return "" if math.isnan(value) else form.format(value)


def table(rows):
    """Lines of a table, the titles first, without columns that are empty below theirs."""
    keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    for row in [rows[0], None, *rows[1:]]:
        yield "|---" * len(keep) + "|" if row is None else "| " + " | ".join(row[i] for i in keep) + " |"


def prefill(results):
    yield ("M × K × N", "torch bf16 `linear`", "bf16 + PEFT r16", "W8A8", "W8A8 + r16", "W8A8 + r64", "W8A16 + r16",
           "W8A8 + r16 of bf16 `linear`", "of bf16 + PEFT")

    def row(title, values, form):
        ratios = [number(values[3] / values[i], "{:.2f}") for i in (0, 1)]
        return (title, *(number(value, form) for value in values), *ratios)

    step = [0.0] * len(SYSTEMS)
    for part, shape, times in [("flux", s[:3], s[3]) for s in FLUX] + [("prefill", s, 0) for s in PREFILL[:4]]:
        values = [results.us(part, shape, *system) for system in SYSTEMS]
        step = [total + times * value if times else total for total, value in zip(step, values)]
        if not all(math.isnan(value) for value in values):
            yield row(" × ".join(map(str, shape)), values, "{:.0f}")
    step = [value / 1e3 for value in step]
    yield row("FLUX.1 step, all block linears, ms", step, "{:.1f}")

    # q, k and v of a double block are one call and its output is one more; a single block's wide linear is one of four
    grouped = step[:2] + [math.nan] * 4
    for i in (2, 3, 4):
        single = 19 * results.us("flux", (4608, 3072, 3072), *SYSTEMS[i])
        single += sum(times * results.us("flux", (m, k, n), *SYSTEMS[i]) for m, k, n, times in FLUX
                      if n != 21504 and (k, n) != (3072, 3072))
        groups = sum(times * results.us("groups", (m, k, sum(ns)), *SYSTEMS[i], case=case)
                     for case, m, k, ns, times in GROUPS)
        grouped[i] = (single + groups) / 1e3
    yield row("the same, q/k/v and q/k/v/mlp as groups, ms", grouped, "{:.1f}")


def decode(results):
    yield ("K × N", "M", "torch bf16 `linear`", "plain read of the bytes", "W8A8 + r64", "of the read",
           "of bf16 `linear`")
    for k, n in DECODE:
        for m in (1, 16, 64):
            linear, read, ours = (results.us("decode", (m, k, n), *system) for system in
                                  (("bf16 linear", ""), ("plain read", "r64"), ("w8a8", "r64")))
            if not math.isnan(ours):
                yield (f"{k} × {n}", str(m), f"{linear:.1f}", f"{read:.1f}", f"{ours:.1f}", f"{ours / read:.2f}",
                       f"{ours / linear:.2f}")


def adapters_of_rows(results):
    yield ("an adapter for each row", "M × K × N", "torch, adapter by adapter", "W8A8", "of torch")
    large, few = (4608, 3072, 12288), (64, 4096, 14336)
    cases = [(large, "none", "no adapter", "", None),
             (large, "none, but rows that may name one", "1 none", "r16", None)]
    cases += [(large, f"{count} of r16, rows {order}", f"{count} {case}", ranks, ranks)
              for count, ranks in ((1, "r16"), (4, "4xr16"), (8, "8xr16"))
              for case, order in (("contiguous", "in order"), ("shuffled", "shuffled"))]
    cases.append((few, "64 of r16, one a row", "64 shuffled", "64xr16", "64xr16"))
    for shape, title, case, ranks, torch in cases:
        ours = results.us("rows", shape, "w8a8", ranks, case)
        theirs = results.us("rows", shape, "torch per adapter", torch, case) if torch else math.nan
        if not math.isnan(ours):
            yield (title, " × ".join(map(str, shape)), number(theirs, "{:.0f}"), f"{ours:.0f}",
                   number(ours / theirs, "{:.2f}"))


def main(path, readme=None):
    results = Results(path)
    tables = [table(list(rows(results))) for rows in (prefill, decode, adapters_of_rows)]
    text = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    if readme is None:
        print(text, end="")
        return
    with open(readme) as file:
        before, rest = file.read().split(BEGIN + "\n")
    after = rest.split(END + "\n")[1]
    with open(readme, "w") as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n{END}\n{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
