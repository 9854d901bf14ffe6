"""`UnitGradients`: how much gradient reaches each unit, measured in the steps that are logged."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_stompp.layers import LatentLayer


class UnitGradients:
    r"""The norm of the gradient that comes to each unit from above, \\(\lVert ∂L/∂y \rVert\\), over the outputs `y` of
    its layers: what a frozen activation above does not let through is missing in it.

    Hooks are there in the steps that are measured alone. With gradient accumulation the squares of all micro-batches
    are summed; with a gradient scaler the gradients are scaled; with several processes they are those of this one.

    Args:
        layers (`Mapping[str, LatentLayer]`): The binarized layers of a model.
    """

    def __init__(self, layers: Mapping[str, LatentLayer]) -> None:
        self._layers = tuple(layers.values())
        self._squares: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Measures from here on."""
        self.stop()
        self._squares = {}
        self._handles = [layer.register_forward_hook(partial(self._watch, layer.unit)) for layer in self._layers]

    def stop(self) -> None:
        """Measures no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def norms(self) -> list[float]:
        """Of each unit, in four digits; 0 where no gradient came, and nothing at all if nothing was measured."""
        if not self._squares:
            return []
        units = 1 + max(layer.unit for layer in self._layers)
        device = next(iter(self._squares.values())).device
        zero = torch.zeros((), device=device)
        norms = torch.stack([self._squares.get(unit, zero).to(device) for unit in range(units)]).sqrt()
        return [float(f"{norm:.4g}") for norm in norms.tolist()]

    def _watch(self, unit: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, unit))

    def _add(self, unit: int, gradient: Tensor) -> None:
        square = gradient.detach().float().square().sum()
        self._squares[unit] = self._squares[unit] + square if unit in self._squares else square
