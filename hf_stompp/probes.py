"""`Probes`: what is measured of each unit for the training log: the signs that flip, the gradient that comes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_stompp.layers import LatentLayer, LatentWeight


class Probes:
    r"""Measures of each unit the share of signs that changed since the last log, and the norm of the gradient that
    comes to it from above, \\(\lVert ∂L/∂y \rVert\\), over the outputs `y` of its layers: what a frozen activation
    above does not let through is missing in it.

    Hooks for gradients are there in the steps that are logged alone. With gradient accumulation the squares of all
    micro-batches are summed; with a gradient scaler the gradients are scaled; with several processes they are those of
    this one.

    Args:
        layers (`Mapping[str, LatentLayer]`): The binarized layers of a model.
        gradients (`bool`): Whether to measure gradients, which takes hooks.
    """

    def __init__(self, layers: Mapping[str, LatentLayer], gradients: bool) -> None:
        self._layers = dict(layers)
        self._weights = {name: layer for name, layer in layers.items() if isinstance(layer, LatentWeight)}
        self._gradients = gradients
        self._units = 1 + max(layer.unit for layer in layers.values())
        self._signs = self._read_signs()
        self._squares: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Measures gradients from here on."""
        self.stop()
        self._squares = {}
        if self._gradients:
            layers = self._layers.values()
            self._handles = [layer.register_forward_hook(partial(self._watch, layer.unit)) for layer in layers]

    def stop(self) -> None:
        """Measures gradients no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def flips(self) -> tuple[float, list[float]]:
        """The share of the signs that changed since the last call: of all weights, and of those of each unit."""
        signs = self._read_signs()
        # Counted where the weights are, and read once. Of a layer with many weights a sample is counted.
        shares = torch.stack(
            [(now != self._signs[name]).float().sum() / max(1, now.numel()) for name, now in signs.items()]
        ).tolist()
        self._signs = signs
        flipped, sizes = [0.0] * self._units, [0] * self._units
        for layer, share in zip(self._weights.values(), shares, strict=True):
            flipped[layer.unit] += share * layer.weight.numel()
            sizes[layer.unit] += layer.weight.numel()
        units = [_short(count / max(1, size)) for count, size in zip(flipped, sizes, strict=True)]
        return sum(flipped) / sum(sizes), units

    def gradient_norms(self) -> list[float]:
        """Of each unit, 0 where no gradient came; nothing at all if nothing was measured."""
        measured, self._squares = self._squares, {}
        if not measured:
            return []
        device = next(iter(measured.values())).device
        zero = torch.zeros((), device=device)
        squares = [measured.get(unit, zero).to(device) for unit in range(self._units)]
        return [_short(norm) for norm in torch.stack(squares).sqrt().tolist()]

    def _read_signs(self) -> dict[str, Tensor]:
        return {name: layer.sampled_signs() for name, layer in self._weights.items()}

    def _watch(self, unit: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, unit))

    def _add(self, unit: int, gradient: Tensor) -> None:
        square, before = gradient.detach().float().square().sum(), self._squares.get(unit)
        self._squares[unit] = square if before is None else before + square.to(before.device)


def _short(value: float) -> float:
    """In four digits: a log is read, and kept in each checkpoint."""
    return float(f"{value:.4g}")
