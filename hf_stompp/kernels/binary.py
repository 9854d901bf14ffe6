"""Layers with 1-bit weights and 1-bit inputs (W1A1): comparison, packing, xor and population count, scale and bias.

With the levels {-γ, γ} a sum is γ s (K - 2 popcount(x ⊕ w)), with {0, γ} it is γ s (popcount(w) - popcount(x ⊕ w)):
an integer until the end, times one float. Where nothing but the comparison of the next layer takes a result, it is
made here, and what is handed on is *bits*: int32 `[…, words]`, bit i of word k that of feature 32·k + i.
"""

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from hf_stompp.kernels.blocks import WIDTH
from hf_stompp.kernels.operands import Operands
from hf_stompp.kernels.panels import Panels, panels
from hf_stompp.kernels.processor import inputs_of_tile
from hf_stompp.kernels.threads import KERNEL, in_blocks
from hf_stompp.kernels.vectors import ladder, one_bit, pointer, popcount_tile, sixteen_bits

ROWS = 48
"""Inputs that are packed at a time: their bits stay in the first cache while all weights pass."""
SERIAL = 20_000_000
"""Multiplications that a thread is worth."""
FLAGS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}
"""Inputs: floats, or bits."""


def linear(input: Tensor, operands: Operands) -> Tensor:
    """The outputs `[…, N]` of inputs `[…, K]`, floats or bits; with `next_threshold`, bits."""
    assert operands.threshold is not None
    features = len(operands.threshold) if input.dtype == torch.int32 else input.shape[-1]
    layer = panels(operands, 1, features)
    x = readable(input).contiguous()
    shape = x.shape[:-1]
    rows, out = shape.numel(), result(shape, layer)
    by_rows = rows >= ROWS
    arguments = (
        *(x.data_ptr(), KINDS[x.dtype], rows, layer.features, x.shape[-1], *layer.at, layer.signed),
        *(out.data_ptr(), layer.outputs, out.shape[-1], by_rows),
    )
    most = rows * layer.features * layer.outputs // SERIAL
    in_blocks(_linear, arguments, rows if by_rows else layer.blocks, most)
    return as_expected(out, input, operands)


def readable(input: Tensor) -> Tensor:
    """The input in a dtype of [`KINDS`]; float16 becomes float32, in which it is compared anyway."""
    return input.float() if input.dtype == torch.float16 else input


def result(shape: tuple[int, ...], layer: Panels) -> Tensor:
    """Where the outputs go: floats, or bits, of which each panel makes two words."""
    if layer.above:
        return torch.empty(*shape, WIDTH // 32 * layer.blocks, dtype=torch.int32, device="cpu")
    return torch.empty(*shape, layer.outputs, dtype=torch.float32, device="cpu")


def as_expected(out: Tensor, input: Tensor, operands: Operands) -> Tensor:
    """The outputs in the dtype of the input; of bits, in that of the bias, which is the model's."""
    if out.dtype == torch.int32 or input.dtype == torch.float32:
        return out
    if input.dtype != torch.int32:
        return out.to(input.dtype)
    return out if operands.bias is None else out.to(operands.bias.dtype)


@numba.njit(**FLAGS)
def pack(x, threshold, words):  # type: ignore[no-untyped-def]
    """The bits of each row of `x`: whether a feature is at or above its threshold."""
    features = x.shape[1]
    whole = features // 32
    for m in range(len(x)):
        row = x[m]
        for k in range(whole):
            high = sixteen_bits(row, 32 * k + 16, threshold)
            words[m, k] = sixteen_bits(row, 32 * k, threshold) | high << np.uint32(16)
        if features % 32:
            word = np.uint32(0)
            for k in range(32 * whole, features):
                word |= one_bit(row, k, threshold) << np.uint32(k % 32)
            words[m, whole] = word


@numba.njit(**FLAGS)
def pack_rows(x_at, kind, stride, threshold, start, stop, words):  # type: ignore[no-untyped-def]
    """The bits of the inputs `start … stop`, which are floats of a kind, or bits already."""
    if kind == 2:
        words[: stop - start] = numba.carray(pointer(x_at), (stop, stride), np.uint32)[start:, : words.shape[1]]
    elif kind == 1:
        pack(numba.carray(pointer(x_at), (stop, stride), np.uint16)[start:], threshold, words)
    else:
        pack(numba.carray(pointer(x_at), (stop, stride), np.float32)[start:], threshold, words)


_TILE = inputs_of_tile()
_floats, _bits = (ladder(partial(popcount_tile, bits=bits), _TILE) for bits in (False, True))


@numba.njit(**FLAGS)
def multiply(words, rows, offsets, kinds, epilogue, factor, out_at, outputs, stride, first, last):  # type: ignore
    """`gain[n] · (offsets[kinds[m], n] - factor · popcount(words[m] ⊕ panel[n])) + bias[n]`, for `rows` inputs and the
    outputs of the panels `first … last`, into rows of `stride` floats at `out_at`; or whether it is at or `above`.

    `epilogue` has the addresses of the panels, γ s, the biases and the next thresholds.
    """
    panels_at, gain_at, bias_at, above_at = epilogue
    x_stride = words.shape[1]
    places = np.empty(rows, dtype=np.int64)
    for m in range(rows):
        places[m] = offsets[kinds[m]].ctypes.data
    aside = np.empty((_TILE, WIDTH), dtype=np.float32)
    words_at, places_at, aside_at = words.ctypes.data, places.ctypes.data, aside.ctypes.data
    for block in range(first, last):
        column = WIDTH * block
        panel, width = panels_at + 4 * column * x_stride, min(WIDTH, outputs - column)
        gain, bias, above = gain_at + 4 * column, bias_at + 4 * column, above_at + 4 * column
        m = 0
        while m < rows:
            left, x, place = rows - m, words_at + 4 * m * x_stride, places_at + 8 * m
            if above_at:
                to = out_at + 4 * (m * stride + WIDTH // 32 * block)
                m += _bits(left, x, x_stride, panel, x_stride, place, gain, bias, above, factor, to, stride, column)
                continue
            to, to_stride = out_at + 4 * (m * stride + column), stride
            if width < WIDTH:
                to, to_stride = aside_at, WIDTH
            done = _floats(left, x, x_stride, panel, x_stride, place, gain, bias, above, factor, to, to_stride, column)
            if width < WIDTH:
                copy(aside, numba.carray(pointer(out_at), (rows, stride), np.float32)[m:], done, column, width)
            m += done


@numba.njit(**FLAGS)
def copy(aside, out, rows, column, width):  # type: ignore[no-untyped-def]
    """The first columns of a tile to where they belong."""
    for m in range(rows):
        for n in range(width):
            out[m, column + n] = aside[m, n]


@numba.cfunc(KERNEL, **FLAGS)
def _linear(at, start, stop):  # type: ignore[no-untyped-def]
    """The outputs of the rows `start … stop`, or of all rows those of the panels `start … stop`."""
    (
        x_at, kind, rows, features, x_stride, panels_at, offsets_at, gain_at, bias_at, above_at, threshold_at, signed,
        out_at, outputs, stride, by_rows,
    ) = to_fixed_tuple(numba.carray(pointer(at), 16, np.int64), 16)  # fmt: skip
    blocks, length = (outputs + WIDTH - 1) // WIDTH, (features + 31) // 32
    first, last = (0, blocks) if by_rows else (start, stop)
    start, stop = (start, stop) if by_rows else (0, rows)
    threshold = numba.carray(pointer(threshold_at), features, np.float32)
    offsets = numba.carray(pointer(offsets_at), (1, blocks * WIDTH), np.int32)
    factor = np.int32(2) if signed else np.int32(1)
    kinds, words = np.zeros(ROWS, dtype=np.intp), np.empty((ROWS, length), dtype=np.uint32)
    epilogue = panels_at, gain_at, bias_at, above_at
    for row in range(start, stop, ROWS):
        count = min(ROWS, stop - row)
        pack_rows(x_at, kind, x_stride, threshold, row, row + count, words)
        to = out_at + 4 * row * stride
        multiply(words, count, offsets, kinds, epilogue, factor, to, outputs, stride, first, last)
