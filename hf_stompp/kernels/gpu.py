"""Layers with 1-bit weights and 1-bit inputs (W1A1) on a GPU, in Triton: comparison, product, scale and bias in one
kernel.

What is read of the weights is bits. On the chip they and the outcomes of the comparisons become int8, ±1 or 0 and 1,
for the tensor cores; their sums are int32, so that they are exact. Xor and population count would do less: in a cycle
a multiprocessor counts the bits of 16 words, which are 512 multiplications, and its tensor cores do 2048 (A100) or
4096 (H100) of int8. For the tensor cores' own products of bits Triton has no operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_stompp.kernels.operands import Operands

# Rows and columns of the outputs that a program makes, how many features it multiplies at a time, and its warps.
_TILES = (128, 128, 64, 8), (64, 64, 128, 4), (16, 32, 256, 4)
_PROGRAMS = 128
"""Programs that keep a large GPU busy, which has about as many multiprocessors."""


def linear(input: Tensor, operands: Operands) -> Tensor:
    """The outputs `[…, N]` of inputs `[…, K]`, float32, bfloat16 or float16, in their dtype. Nothing of it waits for
    the GPU."""
    weight, threshold, levels = operands.weight, operands.threshold, operands.levels
    assert threshold is not None and levels is not None
    x, shape = input.contiguous(), (*input.shape[:-1], len(weight))
    rows, features, outputs = x.shape[:-1].numel(), x.shape[-1], len(weight)
    out = x.new_empty(shape)
    if out.numel() == 0:
        return out
    read = (None if x is None else x.contiguous() for x in (weight, operands.weight_scale, operands.bias))
    height, width, depth, warps = _tile(rows, outputs)
    across = triton.cdiv(outputs, width)
    with torch.cuda.device_of(x):  # the current GPU may be another
        _linear[(triton.cdiv(rows, height) * across,)](
            *(x, *read, threshold.contiguous(), levels.contiguous(), out),
            *(rows, features, outputs, weight.shape[1], across, height, width, depth),
            num_warps=warps,
        )
    return out


def try_out(device: torch.device) -> None:
    """Raises whatever keeps the kernel from this GPU, such as a missing C compiler, which Triton needs to start it."""
    one = torch.ones(1, 1, device=device)
    linear(one, Operands(one.to(torch.uint8), one[0], None, one[0], one[0].expand(2)))


def _tile(rows: int, outputs: int) -> tuple[int, int, int, int]:
    """The largest of the tiles that is at least half full, and of which there are enough; else the smallest."""
    for tile in _TILES[:-1]:
        if 2 * rows > tile[0] and triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]) >= _PROGRAMS:
            return tile
    return _TILES[-1]


# The functions of triton.language that are themselves in Triton, such as cdiv and zeros, are not used in it: they are
# interpreted or not as was decided when triton was imported, and the kernel is to be interpreted in tests.
@triton.jit(do_not_specialize=["rows", "across"])
def _linear(  # type: ignore[no-untyped-def]
    input, weight, weight_scale, bias, threshold, levels, out, rows, features, outputs, row_bytes, across,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile `[HEIGHT, WIDTH]` of the outputs, of which there are so many `across`. Tiles side by side, which run at
    the same time, read the same inputs: these are larger than the weights."""
    tile = tl.program_id(0)
    m = (tile // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)  # more than 2^31 inputs or outputs
    n = (tile % across).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    below = tl.where(tl.load(levels) != 0, -1, 0)
    sums = tl.full((HEIGHT, WIDTH), 0, tl.int32)
    for start in range(0, features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x_at = input + m[:, None] * features + k[None, :]
        x = tl.load(x_at, mask=(m < rows)[:, None] & (k < features)[None, :], other=0.0).to(tl.float32)
        # A feature beyond the last is 0: not at its threshold, and 0 below.
        least = tl.load(threshold + k, mask=k < features, other=float("inf"))
        lower = tl.where(k < features, below, 0)
        levels_of_x = tl.where(x >= least[None, :], 1, lower[None, :]).to(tl.int8)

        byte = start // 8 + tl.arange(0, DEPTH // 8)
        w_at = weight + n[:, None] * row_bytes + byte[None, :]
        w = tl.load(w_at, mask=(n < outputs)[:, None] & (byte < row_bytes)[None, :], other=0).to(tl.int32)
        # Each makes two of one along a new last axis; in the end bit i is the last of what was shifted by i.
        w = tl.join(w, w >> 4)
        w = tl.join(w, w >> 2)
        w = tl.join(w, w >> 1)
        signs = tl.reshape(tl.where((w & 1) != 0, 1, -1).to(tl.int8), (WIDTH, DEPTH))
        sums = tl.dot(levels_of_x, tl.trans(signs), sums, out_dtype=tl.int32)
    gain = tl.load(weight_scale + n, mask=n < outputs, other=0.0) * tl.load(levels + 1)
    y = sums.to(tl.float32) * gain[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    y_at = out + m[:, None] * outputs + n[None, :]
    tl.store(y_at, y.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])
