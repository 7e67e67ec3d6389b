# SPDX-License-Identifier: Apache-2.0
"""Octolora's C header through ctypes, as far as the comparison needs it. Tensors are torch's, on the GPU, in bf16."""
import ctypes
import math

import torch

ABI_VERSION = 3
F32, BF16 = 0, 2
W8A16, DYNAMIC, STATIC = 0, 1, 2
ACTIVATIONS = {"gelu_tanh": 1, "gelu_erf": 2, "silu": 3}


class LinearDesc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("n", ctypes.c_int32), ("k", ctypes.c_int32),
                ("mode", ctypes.c_int32), ("scale_count", ctypes.c_int32), ("round_x", ctypes.c_int32),
                ("x_scale", ctypes.c_float), ("x_divisor", ctypes.c_float), ("outlier_threshold", ctypes.c_float),
                ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class AdapterDesc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("rank", ctypes.c_int32), ("a_dtype", ctypes.c_int32),
                ("b_dtype", ctypes.c_int32), ("precision", ctypes.c_int32), ("b_stride", ctypes.c_int32),
                ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Output(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("activation", ctypes.c_int32), ("linear", ctypes.c_void_p),
                ("slots", ctypes.c_void_p), ("y", ctypes.c_void_p), ("residual", ctypes.c_void_p),
                ("gate", ctypes.c_void_p)]


class ForwardDesc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("rows", ctypes.c_int32), ("x", ctypes.c_void_p),
                ("x_dtype", ctypes.c_int32), ("y_dtype", ctypes.c_int32), ("row_slot", ctypes.c_void_p),
                ("outputs", ctypes.POINTER(Output)), ("output_count", ctypes.c_int32), ("workspace", ctypes.c_void_p),
                ("workspace_bytes", ctypes.c_size_t)]


class Octolora:
    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        self.c.octolora_last_error.restype = ctypes.c_char_p
        self.c.octolora_version.restype = ctypes.c_char_p
        self.c.octolora_forward.argtypes = [ctypes.POINTER(ForwardDesc), ctypes.c_void_p]
        if self.c.octolora_abi_version() != ABI_VERSION:
            raise RuntimeError(f"{path} has ABI {self.c.octolora_abi_version()}, this program {ABI_VERSION}")
        self.version = self.c.octolora_version().decode()
        self.device = ctypes.c_void_p()
        self.check(self.c.octolora_device_create(0, ctypes.byref(self.device)))

    def check(self, status):
        if status:
            raise RuntimeError(f"status {status}: {self.c.octolora_last_error().decode()}")


class Linear:
    """One int8 linear and its adapters; weights from a float matrix, absmax / 127 a row."""

    def __init__(self, lib, weight, ranks=(), mode=DYNAMIC, threshold=0.0, bias=None):
        self.lib, self.weight, (self.n, self.k), self.factors = lib, weight, weight.shape, []
        scale = weight.abs().amax(1).float() / 127
        codes = torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8)
        scale = scale.cpu()
        x_scale = 4.5 / 127 if mode == STATIC else 0.0  # normal x seldom goes beyond 4.5
        desc = LinearDesc(ctypes.sizeof(LinearDesc), self.n, self.k, mode, self.n, F32, x_scale, 127.0, threshold,
                          codes.data_ptr(), scale.data_ptr(), bias.data_ptr() if bias is not None else None)
        self.handle, self.slots = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.synchronize()
        lib.check(lib.c.octolora_linear_create(lib.device, ctypes.byref(desc), ctypes.byref(self.handle)))
        if ranks:
            capacity = (ctypes.c_int32 * len(ranks))(*ranks)
            lib.check(lib.c.octolora_slots_create(self.handle, len(ranks), capacity, 0, ctypes.byref(self.slots)))
            for slot, rank in enumerate(ranks):
                self.factors.append(factors(rank, self.k, self.n))
                a, b = (t.cpu() for t in self.factors[slot])
                adapter = AdapterDesc(ctypes.sizeof(AdapterDesc), rank, BF16, BF16, 0, 0, a.data_ptr(), b.data_ptr(),
                                      None)
                lib.check(lib.c.octolora_slots_set(self.slots, slot, ctypes.byref(adapter), ctypes.c_float(1.0), None))

    def check(self, x, y, row_slot=None):
        """Whether some rows of y are those of x but for int8's error, which is 1.5 % of normal numbers."""
        for row in {0, x.shape[0] // 2, x.shape[0] - 1}:
            want = x[row] @ self.weight.t()
            for slot, (a, b) in enumerate(self.factors):
                if row_slot is None or row_slot[row] == slot:
                    want += (x[row] @ a.t()) @ b.t()
            error = float((y[row] - want).float().norm() / want.float().norm())
            if not error < 0.03:
                raise RuntimeError(f"row {row} of {x.shape[0]} x {self.k} x {self.n} is off by {error:.1%}")

    def close(self):
        self.lib.c.octolora_slots_destroy(self.slots)
        self.lib.c.octolora_linear_destroy(self.handle)


class Forward:
    """A call of octolora_forward with everything but the stream in place."""

    def __init__(self, lib, linears, x, ys, row_slot=None, activation=0, residual=None, gate=None):
        self.lib, self.keep = lib, (x, ys, row_slot, residual, gate)
        pointer = lambda t: None if t is None else t.data_ptr()
        self.outputs = (Output * len(linears))(*[
            Output(ctypes.sizeof(Output), activation, linear.handle, linear.slots, y.data_ptr(), pointer(residual),
                   pointer(gate)) for linear, y in zip(linears, ys)])
        self.desc = ForwardDesc(ctypes.sizeof(ForwardDesc), x.shape[0], x.data_ptr(), BF16, BF16, pointer(row_slot),
                                self.outputs, len(linears), None, 0)
        size = ctypes.c_size_t()
        lib.check(lib.c.octolora_forward_workspace(ctypes.byref(self.desc), ctypes.byref(size)))
        workspace = scratch(size.value)
        self.desc.workspace, self.desc.workspace_bytes = workspace.data_ptr(), workspace.numel()

    def __call__(self):
        status = self.lib.c.octolora_forward(self.desc, torch.cuda.current_stream().cuda_stream)
        if status:
            self.lib.check(status)


class Quantize:
    """The first half of a W8A8 call, from x to codes and scales in the workspace."""

    def __init__(self, lib, linear, x):
        self.lib, m = lib, x.shape[0]
        size = ctypes.c_size_t()
        lib.check(lib.c.octolora_linear_workspace(linear.handle, None, m, BF16, ctypes.byref(size)))
        self.keep = x, scratch(size.value)
        x, space = (ctypes.c_void_p(t.data_ptr()) for t in self.keep)
        self.arguments = [linear.handle, x, BF16, None, None, None, m, space, ctypes.c_size_t(self.keep[1].numel())]

    def __call__(self):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.lib.check(self.lib.c.octolora_linear_quantized(*self.arguments, stream))


workspaces = {}


def scratch(size):
    """Calls of about one size share a workspace: they run one after the other."""
    size = 1 << max(8, (size - 1).bit_length())
    if size not in workspaces:
        workspaces[size] = torch.empty(size, dtype=torch.uint8, device="cuda")
    return workspaces[size]


def factors(rank, k, n):
    a = torch.randn(rank, k, device="cuda", dtype=torch.bfloat16) / math.sqrt(k)
    b = torch.randn(n, rank, device="cuda", dtype=torch.bfloat16) * 0.05
    return a, b
