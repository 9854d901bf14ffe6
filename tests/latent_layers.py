"""Small linear layers and convolutions, their latent layers, and inputs of theirs, always with the same numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_stompp import BinarizationConfig
from hf_stompp.layers import BinaryConv2d, BinaryLinear

_LATENT = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d}
_SIZES: dict[type[nn.Module], dict[str, Any]] = {
    nn.Linear: {"in_features": 11, "out_features": 6},
    nn.Conv2d: {"in_channels": 6, "out_channels": 8, "kernel_size": 3},
}
_INPUTS = {nn.Linear: (4, 5, 11), nn.Conv2d: (2, 6, 7, 6)}


def make_float(kind: type[nn.Module], **arguments: Any) -> Any:
    """A linear layer or a convolution; `arguments` are those of its class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**(_SIZES[kind] | arguments))


def make_latent(
    kind: type[nn.Module],
    arguments: dict[str, Any] | None = None,
    *,
    unsigned: bool = False,
    key: str = "layer",
    **config: Any,
) -> Any:
    """Its latent layer; scale and shift off their starting values."""
    layer, rules = make_float(kind, **(arguments or {})), BinarizationConfig(**config)
    latent = _LATENT[kind].from_float(layer, rules, key=key, unit=0, unsigned=unsigned)
    with torch.no_grad():
        if latent.activation_scale is not None:
            latent.activation_scale.fill_(0.6)
        if latent.activation_shift is not None:
            latent.activation_shift.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return latent


def make_inputs(kind: type[nn.Module], *shape: int) -> Tensor:
    """Inputs of the layer, by default a few."""
    return torch.randn(shape or _INPUTS[kind], generator=torch.Generator().manual_seed(1))
