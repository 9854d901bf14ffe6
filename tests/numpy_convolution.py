"""Convolutions and batch norms in numpy and float64, by the definition: loops over the pixels and the taps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

_MODES = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}


def padding_of(layer: nn.Conv2d) -> list[tuple[int, int]]:
    """Pixels before and after the image, for height and width."""
    if layer.padding == "valid":
        return [(0, 0), (0, 0)]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def padded(layer: nn.Conv2d, x: np.ndarray) -> np.ndarray:
    """Images `[batch, channels, height, width]` with what the layer puts around them."""
    return np.pad(x, [(0, 0), (0, 0), *padding_of(layer)], mode=_MODES[layer.padding_mode])


def windows(layer: nn.Conv2d, x: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """For each output pixel its row, column and the pixels of padded images under its taps, `[batch, channels, kernel
    rows, kernel columns]`."""
    (sh, sw), (dh, dw), (kh, kw) = layer.stride, layer.dilation, layer.kernel_size
    for row in range((x.shape[2] - dh * (kh - 1) - 1) // sh + 1):
        for column in range((x.shape[3] - dw * (kw - 1) - 1) // sw + 1):
            rows, columns = row * sh + dh * np.arange(kh), column * sw + dw * np.arange(kw)
            yield row, column, x[:, :, rows][:, :, :, columns]


def collected(pixels: Iterator[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """Images `[batch, channels, height, width]` of their pixels `[batch, channels]`."""
    found = {(row, column): value for row, column, value in pixels}
    height, width = (1 + max(place[axis] for place in found) for axis in (0, 1))
    rows = [np.stack([found[row, column] for column in range(width)], axis=-1) for row in range(height)]
    return np.stack(rows, axis=-2)


def convolve(layer: nn.Conv2d, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What a convolution of the shape of `layer`, its bias included, makes of images with `weight`."""
    groups, bias = layer.groups, layer.bias

    def pixels() -> Iterator[tuple[int, int, np.ndarray]]:
        for row, column, window in windows(layer, padded(layer, x)):
            parts = zip(np.split(window, groups, axis=1), np.split(weight, groups), strict=True)
            yield row, column, np.concatenate([np.einsum("bchw,ochw->bo", a, w) for a, w in parts], axis=1)

    y = collected(pixels())
    return y if bias is None else y + bias.detach().double().numpy()[:, None, None]


def batch_norm(norm: Any, x: np.ndarray, batch_statistics: bool = False) -> np.ndarray:
    """What a batch norm makes of images, by its running statistics or by those of the batch."""
    mean, var = (t.double().numpy() for t in (norm.running_mean, norm.running_var))
    if batch_statistics:
        mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    weight, bias = (t.detach().double().numpy()[:, None, None] for t in (norm.weight, norm.bias))
    return (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + norm.eps) * weight + bias
