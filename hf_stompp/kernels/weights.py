"""Layers with 1-bit weights and full-precision inputs (W1A32), by tables.

Four features have 16 sums ±x₀ ±x₁ ±x₂ ±x₃, and four bits of a weight say which. The tables of an input are made once;
then a look-up and an addition do four multiplications for each of 16 outputs. Sums are made in float32.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from hf_stompp.kernels.binary import FLAGS, SERIAL, copy, result
from hf_stompp.kernels.panels import panels
from hf_stompp.kernels.threads import in_blocks
from hf_stompp.kernels.vectors import LANES, WIDTH, lookup_tile, pointer, sums_of_signs

_ROWS = 4
"""Inputs whose tables are kept at a time; they share the shifts of the weights' bits."""
_four, _two, _one = (lookup_tile(rows) for rows in (4, 2, 1))


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs `[…, N]` of inputs `[…, K]`, in float32 throughout."""
    x = input.float().contiguous()
    layer = panels(weight, 1, x.shape[-1], weight_scale, bias, None, None, None)
    rows = x.shape[:-1].numel()
    out = result(x.shape[:-1], layer, None)
    panels_at, _, gain_at, bias_at, *_ = layer.at
    operands = x.data_ptr(), rows, layer.features, panels_at, gain_at, bias_at, out.data_ptr(), layer.outputs
    # A thread is worth less work than where all is bits.
    most = rows * layer.features * layer.outputs // (SERIAL // 4)
    if rows >= 4 * _ROWS:
        in_blocks(lambda start, stop: _linear(*operands, start, stop, 0, layer.blocks), rows, most)
    else:
        in_blocks(lambda start, stop: _linear(*operands, 0, rows, start, stop), layer.blocks, most)
    return out if input.dtype == torch.float32 else out.to(input.dtype)


@numba.njit(f"void({', '.join(['intp'] * 12)})", **FLAGS)
def _linear(x_at, rows, features, panels_at, gain_at, bias_at, out_at, outputs, start, stop, first, last):  # type: ignore
    """Rows `start … stop` of the outputs of the panels `first … last`."""
    length = (features + 31) // 32
    x = numba.carray(pointer(x_at), (rows, features), np.float32)
    tables = np.empty((_ROWS, 8 * length, LANES), dtype=np.float32)
    padded, aside = np.zeros(32 * length, dtype=np.float32), np.empty((_ROWS, WIDTH), dtype=np.float32)
    stride = 8 * length * LANES
    for row in range(start, stop, _ROWS):
        count = min(_ROWS, stop - row)
        for m in range(count):
            padded[:features] = x[row + m]
            for group in range(8 * length):
                sums_of_signs(padded.ctypes.data + 16 * group, tables.ctypes.data + 4 * (m * stride + group * LANES))
        for block in range(first, last):
            column = WIDTH * block
            panel = panels_at + 4 * column * length
            width = min(WIDTH, outputs - column)
            gain, bias = gain_at + 4 * column, bias_at + 4 * column
            m = 0
            while m < count:
                left, table = count - m, tables.ctypes.data + 4 * m * stride
                to, to_stride = out_at + 4 * ((row + m) * outputs + column), outputs
                if width < WIDTH:
                    to, to_stride = aside.ctypes.data, WIDTH
                if left >= 4:
                    done = 4
                    _four(table, stride, panel, length, gain, bias, to, to_stride)
                elif left >= 2:
                    done = 2
                    _two(table, stride, panel, length, gain, bias, to, to_stride)
                else:
                    done = 1
                    _one(table, stride, panel, length, gain, bias, to, to_stride)
                if width < WIDTH:
                    out = numba.carray(pointer(out_at), (rows, outputs), np.float32)
                    copy(aside, out[row + m :], done, column, width)
                m += done
