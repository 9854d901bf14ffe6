"""The float weights that bits stand for, for whatever other kernels do not cover."""

import numba
import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from hf_stompp.kernels.binary import FLAGS
from hf_stompp.kernels.threads import KERNEL, in_blocks
from hf_stompp.kernels.vectors import pointer

_ALONE = 1 << 18
"""Weights that a thread is worth."""


def dense(weight: Tensor, scale: Tensor, length: int) -> Tensor:
    """±s, float32 `[N, K]`, of bits, uint8 `[N, ceil(K / 8)]`, and scales `[N]`; K is `length`."""
    bits, scale = weight.contiguous(), scale.float().contiguous()
    out = torch.empty(len(bits), length, dtype=torch.float32, device="cpu")
    operands = bits.data_ptr(), scale.data_ptr(), out.data_ptr(), length
    in_blocks(_dense, operands, len(bits), out.numel() // _ALONE)
    return out


@numba.cfunc(KERNEL, **FLAGS)
def _dense(at, start, stop):  # type: ignore[no-untyped-def]
    """The rows `start … stop`."""
    bits_at, scale_at, out_at, length = to_fixed_tuple(numba.carray(pointer(at), 4, np.int64), 4)
    bits = numba.carray(pointer(bits_at), (stop, (length + 7) // 8), np.uint8)
    scale = numba.carray(pointer(scale_at), stop, np.float32)
    out = numba.carray(pointer(out_at), (stop, length), np.float32)
    for n in range(start, stop):
        row = out[n]
        for byte in range(length // 8):
            value = bits[n, byte]
            for i in range(8):
                row[8 * byte + i] = scale[n] if value >> i & 1 else -scale[n]
        for k in range(length // 8 * 8, length):
            row[k] = scale[n] if bits[n, k // 8] >> (k % 8) & 1 else -scale[n]
