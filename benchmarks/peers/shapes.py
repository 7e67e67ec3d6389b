# SPDX-License-Identifier: Apache-2.0
"""The shapes that are measured, and the peaks of the data sheets."""

FLUX = [  # M, K, N, times in one FLUX.1 step
    (4608, 3072, 3072, 19 * 4),
    (4608, 3072, 12288, 19),
    (4608, 12288, 3072, 19),
    (4608, 3072, 21504, 38),
    (4608, 15360, 3072, 38),
]
GROUPS = [  # name, M, K, the outputs' N, times in one FLUX.1 step
    ("qkv", 4608, 3072, (3072, 3072, 3072), 19),
    ("qkv+mlp", 4608, 3072, (3072, 3072, 3072, 12288), 38),
]
PREFILL = [(2048, 4096, 4096), (2048, 4096, 14336), (2048, 14336, 4096), (4096, 8192, 28672), (4608, 3072, 9216)]
DECODE = [(4096, 4096), (4096, 14336), (8192, 28672), (28672, 8192)]  # K, N

PEAKS = {"H200": (1979e12, 4.8e12), "H100": (1979e12, 3.35e12)}  # int8 operations and bytes a second; bf16: half
