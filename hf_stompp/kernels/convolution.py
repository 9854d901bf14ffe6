"""Convolutions with 1-bit weights and 1-bit inputs (W1A1): the bits of a window side by side, then as a linear layer.

A bit cannot be 0, and zero padding is. With the levels {0, γ} the lower bit stands for 0, also outside of the image.
With {-γ, γ} the places of a window that are outside count neither as features nor as differences: their weights' bits,
which differ from the zeros that are put there, are taken off again. So the integers are exact at borders too.
"""

import numba
import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from hf_stompp.kernels.binary import FLAGS, KINDS, ROWS, SERIAL, as_expected, multiply, pack_rows, readable, result
from hf_stompp.kernels.blocks import WIDTH
from hf_stompp.kernels.operands import Geometry, Operands
from hf_stompp.kernels.panels import panels
from hf_stompp.kernels.threads import KERNEL, in_blocks
from hf_stompp.kernels.vectors import pointer

_PACKED_ALONE = 1 << 16
"""Floats whose packing a thread is worth."""


def conv2d(input: Tensor, operands: Operands, geometry: Geometry) -> Tensor:
    """The outputs `[B, N, …, …]` of images `[B, C, H, W]`, floats or bits; channels are last in memory.

    Bits, as in [`~hf_stompp.kernels.binary.linear`], are `[B, words, H, W]`.
    """
    batch, _, *size = input.shape
    height, width = geometry.output_size(size)
    if min(height, width) < 1:
        raise RuntimeError(
            f"A kernel of {tuple(geometry.kernel)} does not fit into images of {tuple(size)}, padded by "
            f"{geometry.padding}."
        )
    assert operands.threshold is not None
    channels = len(operands.threshold) if input.dtype == torch.int32 else input.shape[1]
    places = geometry.kernel[0] * geometry.kernel[1]
    layer = panels(operands, places, channels)
    bits = x = readable(input).contiguous(memory_format=torch.channels_last)
    bits_stride = x.shape[1]
    if x.dtype != torch.int32:
        bits_stride = (channels + 31) // 32
        bits = torch.empty(batch, *size, bits_stride, dtype=torch.int32, device="cpu")
        source = x.data_ptr(), KINDS[x.dtype], channels, layer.at[-1], bits.data_ptr()
        in_blocks(_pack, source, batch * size[0] * size[1], x.numel() // _PACKED_ALONE)
    out = result((batch, height, width), layer)
    flat = (number for pair in geometry for number in pair)
    arguments = (
        *(bits.data_ptr(), bits_stride, batch, channels, *size, *flat, height, width),
        *(*layer.at[:-1], layer.counts.data_ptr(), layer.signed, out.data_ptr(), layer.outputs, out.shape[-1]),
    )
    pixels = batch * height * width
    in_blocks(_multiply, arguments, pixels, pixels * layer.outputs * places * channels // SERIAL)
    return as_expected(out.permute(0, 3, 1, 2), input, operands)


@numba.cfunc(KERNEL, **FLAGS)
def _pack(at, start, stop):  # type: ignore[no-untyped-def]
    """The bits of the pixels `start … stop`."""
    x_at, kind, channels, threshold_at, bits_at = to_fixed_tuple(numba.carray(pointer(at), 5, np.int64), 5)
    threshold = numba.carray(pointer(threshold_at), channels, np.float32)
    bits = numba.carray(pointer(bits_at), (stop, (channels + 31) // 32), np.uint32)[start:]
    pack_rows(x_at, kind, channels, threshold, start, stop, bits)


@numba.njit(**FLAGS)
def _kinds(size, kernel, stride, padding, dilation, length):  # type: ignore[no-untyped-def]
    """Which places of the kernel are inside of the image, of each kind `[kinds, kernel]`; the kind of each output."""
    kinds, inside = np.empty(length, dtype=np.intp), np.empty((length, kernel), dtype=np.bool_)
    found = 0
    for at in range(length):
        for k in range(kernel):
            inside[found, k] = 0 <= at * stride + k * dilation - padding < size
        kind = 0
        while not (inside[kind] == inside[found]).all():
            kind += 1
        kinds[at] = kind
        found += kind == found
        if found == length:
            break
    return inside[:found], kinds


@numba.njit(**FLAGS)
def _offsets(counts, rows, columns, channels):  # type: ignore[no-untyped-def]
    """What the population counts of signed levels are taken off, for each kind of window and each output."""
    offsets = np.zeros((len(rows) * len(columns), counts.shape[1]), dtype=np.int32)
    for kind in range(len(offsets)):
        for i in range(rows.shape[1]):
            for j in range(columns.shape[1]):
                if rows[kind // len(columns), i] and columns[kind % len(columns), j]:
                    offsets[kind] += np.int32(channels)
                else:
                    offsets[kind] += np.int32(2) * counts[i * columns.shape[1] + j]
    return offsets


@numba.cfunc(KERNEL, **FLAGS)
def _multiply(at, start, stop):  # type: ignore[no-untyped-def]
    """The pixels `start … stop` of the output."""
    (
        bits_at, bits_stride, batch, channels, in_height, in_width, kernel_height, kernel_width, stride_y, stride_x,
        padding_y, padding_x, dilation_y, dilation_x, height, width, panels_at, offsets_at, gain_at, bias_at, above_at,
        counts_at, signed, out_at, outputs, stride,
    ) = to_fixed_tuple(numba.carray(pointer(at), 26, np.int64), 26)  # fmt: skip
    words, places, blocks = (channels + 31) // 32, kernel_height * kernel_width, (outputs + WIDTH - 1) // WIDTH
    bits = numba.carray(pointer(bits_at), (batch, in_height, in_width, bits_stride), np.uint32)
    offsets, factor = numba.carray(pointer(offsets_at), (1, blocks * WIDTH), np.int32), np.int32(1)
    rows, row_kinds = _kinds(in_height, kernel_height, stride_y, padding_y, dilation_y, height)
    columns, column_kinds = _kinds(in_width, kernel_width, stride_x, padding_x, dilation_x, width)
    if signed:
        counts = numba.carray(pointer(counts_at), (places, blocks * WIDTH), np.int32)
        offsets, factor = _offsets(counts, rows, columns, channels), np.int32(2)
    window, kinds = np.empty((ROWS, places * words), dtype=np.uint32), np.zeros(ROWS, dtype=np.intp)
    epilogue = panels_at, gain_at, bias_at, above_at
    for pixel in range(start, stop, ROWS):
        count = min(ROWS, stop - pixel)
        for m in range(count):
            line, x = divmod(pixel + m, width)
            image, y = divmod(line, height)
            kinds[m] = row_kinds[y] * len(columns) + column_kinds[x] if signed else 0
            for i in range(kernel_height):
                for j in range(kernel_width):
                    at = (i * kernel_width + j) * words
                    from_y = y * stride_y + i * dilation_y - padding_y
                    from_x = x * stride_x + j * dilation_x - padding_x
                    if 0 <= from_y < in_height and 0 <= from_x < in_width:
                        for word in range(words):
                            window[m, at + word] = bits[image, from_y, from_x, word]
                    else:
                        window[m, at : at + words] = 0
        to = out_at + 4 * pixel * stride
        multiply(window, count, offsets, kinds, epilogue, factor, to, outputs, stride, 0, blocks)
