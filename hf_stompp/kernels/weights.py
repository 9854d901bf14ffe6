"""Layers with 1-bit weights and full-precision inputs (W1A32), by tables.

Four features have 16 sums ±x₀ ±x₁ ±x₂ ±x₃, and four bits of a weight say which. The tables of an input are made once;
then a look-up and an addition do four multiplications for each of 16 outputs; or three for each of 8, with the shorter
vectors of AVX2. Sums are made in float32.
"""

import numba
import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from hf_stompp.kernels.binary import FLAGS, SERIAL, copy, result
from hf_stompp.kernels.blocks import WIDTH
from hf_stompp.kernels.operands import Operands
from hf_stompp.kernels.panels import panels
from hf_stompp.kernels.processor import features_of_lookup
from hf_stompp.kernels.threads import KERNEL, in_blocks
from hf_stompp.kernels.vectors import ladder, lookup_tile, pointer, sums_of_signs

_AT_ONCE = features_of_lookup()
_LANES, _GROUPS = 1 << _AT_ONCE, 32 // _AT_ONCE
_ROWS = 4 if _AT_ONCE == 4 else 1
"""Inputs whose tables are kept at a time; they share the shifts of the weights' bits. AVX2 has registers for one."""
_sums = ladder(lookup_tile, _ROWS)


def linear(input: Tensor, operands: Operands) -> Tensor:
    """The outputs `[…, N]` of inputs `[…, K]`, in float32 throughout."""
    x = input.float().contiguous()
    layer = panels(operands, 1, x.shape[-1], _GROUPS * _AT_ONCE)
    rows = x.shape[:-1].numel()
    out = result(x.shape[:-1], layer)
    by_rows = rows >= 16
    panels_at, _, gain_at, bias_at, *_ = layer.at
    arguments = (
        *(x.data_ptr(), rows, layer.features, panels_at, gain_at, bias_at, out.data_ptr(), layer.outputs, by_rows),
    )
    # A thread is worth less work than where all is bits.
    most = rows * layer.features * layer.outputs // (SERIAL // 4)
    in_blocks(_linear, arguments, rows if by_rows else layer.blocks, most)
    return out.to(input.dtype)


@numba.cfunc(KERNEL, **FLAGS)
def _linear(at, start, stop):  # type: ignore[no-untyped-def]
    """The outputs of the rows `start … stop`, or of all rows those of the panels `start … stop`."""
    arguments = to_fixed_tuple(numba.carray(pointer(at), 9, np.int64), 9)
    x_at, rows, features, panels_at, gain_at, bias_at, out_at, outputs, by_rows = arguments
    blocks, length = (outputs + WIDTH - 1) // WIDTH, (features + _GROUPS * _AT_ONCE - 1) // (_GROUPS * _AT_ONCE)
    first, last = (0, blocks) if by_rows else (start, stop)
    start, stop = (start, stop) if by_rows else (0, rows)
    x = numba.carray(pointer(x_at), (rows, features), np.float32)
    out = numba.carray(pointer(out_at), (rows, outputs), np.float32)
    tables = np.empty((_ROWS, _GROUPS * length, _LANES), dtype=np.float32)
    padded, aside = np.zeros(_GROUPS * _AT_ONCE * length, dtype=np.float32), np.empty((_ROWS, WIDTH), dtype=np.float32)
    stride = _GROUPS * length * _LANES
    for row in range(start, stop, _ROWS):
        count = min(_ROWS, stop - row)
        for m in range(count):
            padded[:features] = x[row + m]
            for group in range(_GROUPS * length):
                table = tables.ctypes.data + 4 * (m * stride + group * _LANES)
                sums_of_signs(padded.ctypes.data + 4 * _AT_ONCE * group, table)
        for block in range(first, last):
            column = WIDTH * block
            panel, width = panels_at + 4 * column * length, min(WIDTH, outputs - column)
            gain, bias = gain_at + 4 * column, bias_at + 4 * column
            m = 0
            while m < count:
                table = tables.ctypes.data + 4 * m * stride
                to, to_stride = out_at + 4 * ((row + m) * outputs + column), outputs
                if width < WIDTH:
                    to, to_stride = aside.ctypes.data, WIDTH
                done = _sums(count - m, table, stride, panel, length, gain, bias, to, to_stride)
                if width < WIDTH:
                    copy(aside, out[row + m :], done, column, width)
                m += done
