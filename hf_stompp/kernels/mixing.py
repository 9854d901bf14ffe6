"""The mixed forward and its two backward rules in one pass over memory each, on a CPU: see `hf_stompp.functional.mix`.

Rows are done in parallel, on as many threads as torch has. Sums are made in an order that does not depend on how many
those are.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from hf_stompp.kernels.threads import in_threads

_SOFT, _HARD, _MIXED = 0, 1, 2
_LARGE = 1 << 14
"""Entries below which a call is not worth its overhead, some ten microseconds."""
_NO_MASK, _NO_SHIFT = np.zeros((1, 1), dtype=np.bool_), np.zeros((1, 1), dtype=np.float32)


def fits(x: Tensor) -> bool:
    """Whether the kernels take a tensor: of float32 on a CPU, in memory order, and not small."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 and x.numel() >= _LARGE and (x.is_contiguous() or _channels_last(x))


def fits_with(x: Tensor, scale: Tensor, shift: Tensor | None, mask: Tensor | bool) -> bool:
    """Whether they cover what goes with it: one scale or one for each row, a shift of its last axis or of the channels
    of images, and such a mask, or one of the shape of `x`."""
    per_row = x.dim() == 2 and scale.shape == (x.shape[0], 1) and not scale.requires_grad
    if scale.dtype != torch.float32 or (scale.numel() != 1 and not per_row):
        return False
    if shift is not None and (shift.dtype != torch.float32 or not _fits_alongside(x, shift)):
        return False
    if isinstance(mask, bool):
        return True
    return mask.dtype == torch.bool and (_fits_alongside(x, mask) or (mask.shape == x.shape and _plain(mask, x)))


def _fits_alongside(x: Tensor, values: Tensor) -> bool:
    """Whether they are one for each entry of the last axis, or for each channel of images."""
    of_channels = x.dim() == 4 and values.shape == (x.shape[1], 1, 1)
    return of_channels or (values.shape == x.shape[-1:] and not _channels_last(x))


def _plain(mask: Tensor, x: Tensor) -> bool:
    return mask.is_contiguous() and not _channels_last(x)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor | None, mask: Tensor | bool, clip: float | None, unsigned: bool
) -> Tensor:
    """x̂, of the shape of `x`."""
    out = torch.empty_like(x)
    arrays = *_arrays(x, scale, shift, mask), _rows(out)
    options = {"clip": _clip(clip), "mode": _mode(mask), "unsigned": unsigned, "shifted": shift is not None}
    _on_rows(_forward, *arrays, **options)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    mask: Tensor | bool,
    clip: float | None,
    unsigned: bool,
    ste: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of the scale, which is right if there is one, and to be left alone if one a row."""
    out = torch.empty_like(x)
    arrays = _arrays(x, scale, shift, mask)
    sums = np.empty(len(arrays[0]), dtype=np.float64)
    order = torch.channels_last if _channels_last(x) else torch.contiguous_format
    options = {"clip": _clip(clip), "mode": _mode(mask), "unsigned": unsigned, "shifted": shift is not None}
    grads = _rows(grad.contiguous(memory_format=order))
    _on_rows(_backward, *arrays, grads, _rows(out), sums, **options, ste=ste)
    return out, torch.full_like(scale, sums.sum())


def row_means(rows: Tensor) -> Tensor:
    """mean |x| of each row of `[N, K]`."""
    out = torch.empty(len(rows), dtype=torch.float32, device="cpu")
    _on_rows(_row_means, rows.detach().numpy(), out.numpy())
    return out


def _on_rows(kernel: Callable[..., None], *arrays: np.ndarray, **options: Any) -> None:
    """Calls a kernel on blocks of rows, if these are large enough. An array of one row goes with each block."""

    def block(start: int, stop: int) -> None:
        kernel(*(array if len(array) == 1 else array[start:stop] for array in arrays), *options.values())

    in_threads(block, len(arrays[0]), most=arrays[0].size // _LARGE)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> np.ndarray:
    """In the order of the memory: an image is a row, or each pixel of it where the channels are last."""
    x = x.detach()
    if _channels_last(x):
        return x.permute(0, 2, 3, 1).view(-1, x.shape[1]).numpy()
    return x.view(-1, x.shape[-1] if x.dim() < 4 else x[0].numel()).numpy()


def _arrays(x: Tensor, scale: Tensor, shift: Tensor | None, mask: Tensor | bool) -> tuple[np.ndarray, ...]:
    """Rows of `x`, scales, rows of shifts and of the mask."""
    shifts = _NO_SHIFT if shift is None else _alongside(shift.detach(), x)
    masks = _NO_MASK if isinstance(mask, bool) else _alongside(mask, x)
    return _rows(x), scale.detach().reshape(-1).contiguous().numpy(), shifts, masks


def _alongside(values: Tensor, x: Tensor) -> np.ndarray:
    """The rows that belong to those of `x`, or the one that belongs to all of them."""
    if values.shape == x.shape:
        return _rows(values.contiguous())
    if x.dim() == 4 and not _channels_last(x):
        values = values.expand(x.shape[1:])
    return values.reshape(1, -1).contiguous().numpy()


def _mode(mask: Tensor | bool) -> int:
    return _MIXED if isinstance(mask, Tensor) else _HARD if mask else _SOFT


def _clip(clip: float | None) -> np.float32:
    return np.float32(math.inf if clip is None else clip)


@numba.njit(inline="always")
def _levels(scale, clip, unsigned):  # type: ignore[no-untyped-def]
    """Threshold, lower and upper level, lower and upper end of the soft range."""
    if unsigned:
        threshold, lower, low_end = scale / np.float32(2), np.float32(0), np.float32(0)
    else:
        threshold, lower, low_end = np.float32(0), -scale, -clip * scale
    if clip == np.inf:  # also where the scale is 0
        return threshold, lower, scale, np.float32(-np.inf), np.float32(np.inf)
    return threshold, lower, scale, low_end, clip * scale


# With their signatures, they are compiled when this is imported, by one process at a time.
_ROWS, _ONE_A_ROW = "float32[:, ::1]", "float32[::1]"
_INPUTS = f"{_ROWS}, {_ONE_A_ROW}, {_ROWS}, boolean[:, ::1]"
_OPTIONS = "float32, int64, boolean, boolean"


@numba.njit(f"void({_INPUTS}, {_ROWS}, {_OPTIONS})", nogil=True, cache=True, error_model="numpy")
def _forward(x, scales, shifts, masks, out, clip, mode, unsigned, shifted):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    shift = shifts[0]
    for at in range(rows):
        threshold, lower, upper, low_end, high_end = _levels(scales[at * (len(scales) > 1)], clip, unsigned)
        mask = masks[at * (len(masks) > 1)]
        if mode == _HARD:
            for k in range(columns):
                value = x[at, k] - shift[k] if shifted else x[at, k]
                out[at, k] = upper if value >= threshold else lower
        elif mode == _SOFT:
            for k in range(columns):
                value = x[at, k] - shift[k] if shifted else x[at, k]
                out[at, k] = low_end if value < low_end else high_end if value > high_end else value
        else:
            for k in range(columns):
                value = x[at, k] - shift[k] if shifted else x[at, k]
                soft = low_end if value < low_end else high_end if value > high_end else value
                hard = upper if value >= threshold else lower
                out[at, k] = hard if mask[k] else soft


@numba.njit(
    f"void({_INPUTS}, {_ROWS}, {_ROWS}, float64[::1], {_OPTIONS}, boolean)",
    nogil=True,
    cache=True,
    error_model="numpy",
    fastmath={"reassoc"},
)
def _backward(x, scales, shifts, masks, grad, out, sums, clip, mode, unsigned, shifted, ste):  # type: ignore
    rows, columns = x.shape
    shift = shifts[0]
    for at in range(rows):
        threshold, lower, upper, low_end, high_end = _levels(scales[at * (len(scales) > 1)], clip, unsigned)
        mask = masks[at * (len(masks) > 1)]
        # Of gradient times value, where the value is a multiple of the scale; else it does not depend on the scale.
        total = np.float32(0)
        for k in range(columns):
            value, g = x[at, k] - shift[k] if shifted else x[at, k], grad[at, k]
            frozen = mode == _HARD or (mode == _MIXED and mask[k])
            inside = value >= low_end and value <= high_end
            hard = upper if value >= threshold else lower
            clipped = high_end if value > high_end else low_end if value < low_end else np.float32(0)
            total += g * (hard if frozen else clipped)
            out[at, k] = g if inside and (ste or not frozen) else np.float32(0)
        sums[at] = total / upper


@numba.njit(f"void({_ROWS}, {_ONE_A_ROW})", nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _row_means(x, out):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    for at in range(rows):
        total = np.float32(0)
        for k in range(columns):
            total += abs(x[at, k])
        out[at] = total / np.float32(columns)
