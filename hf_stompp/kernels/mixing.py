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
_NO_MASK = np.zeros((1, 1), dtype=np.bool_)


def fits(x: Tensor, scale: Tensor, mask: Tensor | bool) -> bool:
    """Whether the kernels cover these arguments: float32 on a CPU, one scale or one for each row, a mask of the shape
    of `x`, of its last axis, or of the channels of images."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float32 or scale.dtype != torch.float32 or x.numel() < _LARGE:
        return False
    if not x.is_contiguous() and not _channels_last(x):
        return False
    per_row = x.dim() == 2 and scale.shape == (x.shape[0], 1) and not scale.requires_grad
    if scale.numel() != 1 and not per_row:
        return False
    if isinstance(mask, bool):
        return True
    of_channels = x.dim() == 4 and mask.shape == (x.shape[1], 1, 1)
    of_entries = mask.shape in (x.shape, x.shape[-1:]) and not _channels_last(x)
    return mask.is_contiguous() and (of_channels or of_entries)


def forward(x: Tensor, scale: Tensor, mask: Tensor | bool, clip: float | None, unsigned: bool) -> Tensor:
    """x̂, of the shape of `x`."""
    out = torch.empty_like(x)
    arrays = *_arrays(x, scale, mask), _rows(out)
    _on_rows(_forward, *arrays, clip=_clip(clip), mode=_mode(mask), unsigned=unsigned)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mask: Tensor | bool,
    clip: float | None,
    unsigned: bool,
    ste: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of the scale, which is right if there is one, and to be left alone if one a row."""
    out = torch.empty_like(x)
    rows, scales, masks = _arrays(x, scale, mask)
    sums = np.empty(len(rows), dtype=np.float64)
    order = torch.channels_last if _channels_last(x) else torch.contiguous_format
    arrays = _rows(grad.contiguous(memory_format=order)), rows, scales, masks, _rows(out), sums
    _on_rows(_backward, *arrays, clip=_clip(clip), mode=_mode(mask), unsigned=unsigned, ste=ste)
    return out, torch.full_like(scale, sums.sum())


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


def _arrays(x: Tensor, scale: Tensor, mask: Tensor | bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `x`, scales, rows of the mask."""
    rows = _rows(x)
    if isinstance(mask, bool):
        masks = _NO_MASK
    elif mask.shape == x.shape:
        masks = _rows(mask)
    elif x.dim() < 4 or _channels_last(x):
        masks = mask.view(1, -1).numpy()
    else:
        masks = mask.expand(x.shape[1:]).reshape(1, -1).numpy()
    return rows, scale.detach().reshape(-1).numpy(), masks


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


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _forward(x, scales, masks, out, clip, mode, unsigned):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    for at in range(rows):
        threshold, lower, upper, low_end, high_end = _levels(scales[at * (len(scales) > 1)], clip, unsigned)
        mask = masks[at * (len(masks) > 1)]
        if mode == _HARD:
            for k in range(columns):
                out[at, k] = upper if x[at, k] >= threshold else lower
        elif mode == _SOFT:
            for k in range(columns):
                value = x[at, k]
                out[at, k] = low_end if value < low_end else high_end if value > high_end else value
        else:
            for k in range(columns):
                value = x[at, k]
                soft = low_end if value < low_end else high_end if value > high_end else value
                hard = upper if value >= threshold else lower
                out[at, k] = hard if mask[k] else soft


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _backward(grad, x, scales, masks, out, sums, clip, mode, unsigned, ste):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    for at in range(rows):
        threshold, lower, upper, low_end, high_end = _levels(scales[at * (len(scales) > 1)], clip, unsigned)
        mask = masks[at * (len(masks) > 1)]
        # Of gradient times value, where the value is a multiple of the scale; else it does not depend on the scale.
        total = np.float32(0)
        for k in range(columns):
            value, g = x[at, k], grad[at, k]
            frozen = mode == _HARD or (mode == _MIXED and mask[k])
            inside = value >= low_end and value <= high_end
            hard = upper if value >= threshold else lower
            clipped = high_end if value > high_end else low_end if value < low_end else np.float32(0)
            total += g * (hard if frozen else clipped)
            out[at, k] = g if inside and (ste or not frozen) else np.float32(0)
        sums[at] = total / upper
