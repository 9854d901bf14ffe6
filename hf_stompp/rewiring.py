"""Changes of a model that are no layer's own: activations that are replaced, shortcuts that are added, places for
binary tensors in attention.

They are made before weights are loaded and add no parameters, so that any checkpoint of the model fits, and they are
made again by the config whenever the model is loaded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from hf_stompp.attention import install
from hf_stompp.config import BinarizationConfig
from hf_stompp.tracing import activations_feeding

_RELUS = (nn.ReLU, nn.ReLU6)


def rewires(config: BinarizationConfig) -> bool:
    """Whether [`rewire`] has anything to do."""
    return config.replace_gelu or config.replace_relu or config.bireal_shortcuts or config.attention


def rewire(model: PreTrainedModel, names: set[str], config: BinarizationConfig) -> None:
    """Makes the changes that `config` asks for, in place; `names` are the layers that are, or will be, binary.

    Raises:
        ValueError: There is nothing to change.
    """
    blocks = _residual_blocks(model) if config.bireal_shortcuts else []  # may refuse, so before anything is changed
    if config.replace_gelu:
        _replace_activations(model, names, "replace_gelu", nn.ReLU)
    if config.replace_relu:
        _replace_activations(model, names, "replace_relu", nn.Identity)
    for block in blocks:
        # Parameters, names and hooks stay what they are: only the forward is another.
        block.__class__ = _BIREAL[type(block)]
    if config.attention:
        install(model)


def _replace_activations(model: PreTrainedModel, names: set[str], field: str, by: type[nn.Module]) -> None:
    """Puts `by` in the place of the activation modules that feed the layers `names`; who else reads them does so
    still."""
    # A ReLU is what is dropped, or what takes the place of another.
    wanted = [
        name
        for name in activations_feeding(model, names)
        if isinstance(model.get_submodule(name), _RELUS) == (by is nn.Identity)
    ]
    if not wanted:
        raise ValueError(
            f"BinarizationConfig.{field} is set, but no activation module of {type(model).__name__} that it could "
            f"replace feeds a binarized layer (a functional activation cannot be replaced). Set {field}=False, or "
            "change the activation in the model's config."
        )
    for name in wanted:
        model.set_submodule(name, by())


# --- shortcuts ------------------------------------------------------------------------------------------------------


def _residual_blocks(model: PreTrainedModel) -> list[nn.Module]:
    blocks = [module for module in model.modules() if type(module) in _BIREAL]
    if not blocks:
        kinds = " or ".join(kind.__name__ for kind in _BIREAL)
        raise ValueError(
            f"BinarizationConfig.bireal_shortcuts is set, but {type(model).__name__} has no {kinds}. Set "
            "bireal_shortcuts=False."
        )
    return blocks


class _BiRealBlock(nn.Module):
    r"""A residual block with a shortcut around each of its convolutions: \\(x_{i+1} = a_i(n_i(c_i(x_i)) + x_i)\\).

    Where the convolution changes the number of channels or the resolution, so does the shortcut: the block's own, a
    full-precision one, around the first convolution that has the block's width (in a bottleneck that is the last one,
    and the shortcut goes around the whole block); averages or copies of channels and averages of pixels else, without
    parameters.

    Source: Liu et al., Bi-Real Net, 2018.
    """

    layer: Any
    shortcut: nn.Module
    activation: nn.Module

    def forward(self, hidden_state: Tensor) -> Tensor:
        widths = [layer.convolution.out_channels for layer in self.layer]
        own = widths.index(widths[-1])
        x = hidden_state
        for i, layer in enumerate(self.layer):
            out = layer.normalization(layer.convolution(x))
            out = out + (self.shortcut(hidden_state) if i == own else _fitted(x, out))
            x = (self.activation if i == len(widths) - 1 else layer.activation)(out)
        return x


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the shape of `like`, without parameters."""
    if x.shape[2:] != like.shape[2:]:
        x = nn.functional.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
    channels, wanted = x.shape[1], like.shape[1]
    if max(channels, wanted) % min(channels, wanted):
        raise ValueError(
            f"BinarizationConfig.bireal_shortcuts is set, but a convolution makes {wanted} channels of {channels}, no "
            "multiple and no part of it: no shortcut fits. Set bireal_shortcuts=False."
        )
    if wanted > channels:
        return torch.cat([x] * (wanted // channels), dim=1)
    return x if wanted == channels else x.unflatten(1, (wanted, channels // wanted)).mean(dim=2)


class BiRealBasicLayer(_BiRealBlock, ResNetBasicLayer):
    """A `ResNetBasicLayer` with a shortcut around each convolution."""


class BiRealBottleNeckLayer(_BiRealBlock, ResNetBottleNeckLayer):
    """A `ResNetBottleNeckLayer` with a shortcut around each convolution."""


_BIREAL: dict[type[nn.Module], type[nn.Module]] = {
    ResNetBasicLayer: BiRealBasicLayer,
    ResNetBottleNeckLayer: BiRealBottleNeckLayer,
}
