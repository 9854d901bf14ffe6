"""The formulas of the method in numpy and float64: what a latent layer gives, and the level of unsigned inputs."""

from typing import Any

import numpy as np
from numpy_convolution import convolve
from torch import Tensor

from hf_stompp.layers import BinaryLinear


def forward(layer: Any, x: Tensor) -> np.ndarray:
    """What a latent linear layer or convolution makes of its input, from its parameters and masks."""
    w, x64 = _weight(layer), _input(layer, x.detach().double().numpy())
    if not isinstance(layer, BinaryLinear):
        return convolve(layer, x64, w)
    return x64 @ w.T + (0 if layer.bias is None else layer.bias.detach().double().numpy())


def _weight(layer: Any) -> np.ndarray:
    config, w = layer.config, layer.weight.detach().double().numpy()
    if not config.weights:
        return w
    mean = np.abs(w).mean(axis=tuple(range(1, w.ndim)), keepdims=True)
    alpha = np.broadcast_to({"channel": mean, "tensor": np.abs(w).mean(), "none": 1.0}[config.scale], w.shape)
    clip = np.inf if config.clip is None or not config.clip_weights else config.clip
    return np.where(layer.weight_mask, np.where(w >= 0, alpha, -alpha), np.clip(w, -clip * alpha, clip * alpha))


def _input(layer: Any, x: np.ndarray) -> np.ndarray:
    if not layer.config.activations:
        return x
    features = (-1,) if isinstance(layer, BinaryLinear) else (-1, 1, 1)
    gamma, frozen = layer.activation_scale.item(), layer.activation_mask.numpy().reshape(features)
    clip = np.inf if layer.config.clip is None else layer.config.clip
    if layer.activation_shift is not None:
        x = x - layer.activation_shift.detach().double().numpy().reshape(features)
    if layer.unsigned:
        soft = x if layer.config.clip is None else np.clip(x, 0, clip * gamma)
        return np.where(frozen, np.where(x >= gamma / 2, gamma, 0.0), soft)
    return np.where(frozen, np.where(x >= 0, gamma, -gamma), np.clip(x, -clip * gamma, clip * gamma))


def lloyd_level(x: np.ndarray) -> float:
    """The upper level of the two-level quantizer {0, γ}, by Lloyd's algorithm from 2·mean."""
    level = 2 * np.maximum(x, 0).mean()
    for _ in range(1000):
        previous, level = level, x[x >= level / 2].mean()
        if level == previous:
            break
    return level
