"""A sum and the layer norm of it in one pass: a row is read, added to, and normed while it is in the first cache."""

import ctypes

import numba
import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from hf_stompp.kernels.binary import FLAGS
from hf_stompp.kernels.threads import KERNEL, in_blocks
from hf_stompp.kernels.vectors import pointer

_ALONE = 1 << 16
"""Floats that a thread is worth."""
# Sums in another order, so that they are made of vectors; values that are not finite keep their meaning.
_SUMS = {**FLAGS, "fastmath": {"reassoc", "contract", "nsz"}}


def add_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    r"""\\(\operatorname{LayerNorm}(x + r)\\) over the last axis; float32, both `[…, N]`."""
    x, r = input.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    small = ctypes.c_double(eps)
    addresses = (tensor.data_ptr() for tensor in (x, r, weight, bias, out))
    operands = *addresses, ctypes.addressof(small), x.shape[-1]
    in_blocks(_add_norm, operands, x.shape[:-1].numel(), x.numel() // _ALONE)
    return out


@numba.njit(**_SUMS)
def _mean(values):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for n in range(len(values)):
        total += values[n]
    return total / np.float32(len(values))


@numba.njit(**_SUMS)
def _variance(values, mean):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for n in range(len(values)):
        total += (values[n] - mean) * (values[n] - mean)
    return total / np.float32(len(values))


@numba.cfunc(KERNEL, **FLAGS)
def _add_norm(at, start, stop):  # type: ignore[no-untyped-def]
    """The rows `start … stop`."""
    arguments = to_fixed_tuple(numba.carray(pointer(at), 7, np.int64), 7)
    x_at, residual_at, weight_at, bias_at, out_at, eps_at, features = arguments
    eps = numba.carray(pointer(eps_at), 1, np.float64)[0]
    x = numba.carray(pointer(x_at), (stop, features), np.float32)
    residual = numba.carray(pointer(residual_at), (stop, features), np.float32)
    out = numba.carray(pointer(out_at), (stop, features), np.float32)
    weight = numba.carray(pointer(weight_at), features, np.float32)
    bias = numba.carray(pointer(bias_at), features, np.float32)
    row = np.empty(features, dtype=np.float32)  # known to be apart from the others, so that all loops are of vectors
    for m in range(start, stop):
        first, second, to = x[m], residual[m], out[m]
        for n in range(features):
            row[n] = first[n] + second[n]
        mean = _mean(row)
        gain = np.float32(1 / np.sqrt(_variance(row, mean) + eps))
        for n in range(features):
            to[n] = (row[n] - mean) * gain * weight[n] + bias[n]
