"""Latent layers whose weights and inputs are soft in part and binary in part: linear and convolution."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix, weight_scale
from hf_stompp.layers.latent import LatentLayer

Module = TypeVar("Module", bound=nn.Module)

LINEAR_ATTRIBUTES = ("in_features", "out_features")
CONV_ATTRIBUTES = (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice")
"""What the layers have besides tensors; architectures read some of it, as MobileNet's padding does."""


def shaped_as(layer: nn.Module, kind: type[Module], attributes: tuple[str, ...]) -> Module:
    """A module of `kind` with these attributes of `layer`, and without tensors; no random number is drawn."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name in attributes:
        setattr(made, name, getattr(layer, name))
    return made.train(layer.training)


class BinaryLayer(LatentLayer):
    r"""A layer that is on its way from full precision to 1 bit: what [`BinaryLinear`] and [`BinaryConv2d`] share.

    `ŵ` and `x̂` are the mixtures of frozen and soft entries of [`~hf_stompp.functional.mix`]. The layer is made from a
    full-precision one by [`from_float`], shares its parameters, and has the same parameter names, so a full-precision
    checkpoint loads into it. `forward` is a pure function of parameters and masks: it draws nothing, counts nothing.

    Attributes:
        weight (`Parameter`): Latent weight, and its mask: see [`LatentLayer`].
        activation_scale (`Parameter`, *optional*): γ, `[1]`; only with binary activations.
        activation_shift (`Parameter`, *optional*): β, one for each input feature; only with a learned shift and signed
            levels.
        activation_mask (`Tensor`): Boolean, one for each input feature, shared by all tokens or pixels.
        calibrated (`Tensor`): Whether the activation scale and shift have been set from data.

    Source: arXiv 2601.22660.
    """

    MASKS: ClassVar = ("weight", "activation")
    ATTRIBUTES: ClassVar[tuple[str, ...]]
    FEATURE_AXIS: ClassVar[int]
    """Which axis of the input the features are."""

    unsigned: bool
    bias: Any
    activation_scale: nn.Parameter | None
    activation_shift: nn.Parameter | None
    activation_mask: Tensor
    calibrated: Tensor

    @classmethod
    def from_float(
        cls, layer: nn.Linear | nn.Conv2d, config: BinarizationConfig, *, key: str, unit: int, unsigned: bool
    ) -> Self:
        """Makes the layer around the parameters of `layer`, on its device, without drawing random numbers.

        Args:
            layer (`nn.Linear` or `nn.Conv2d`): The layer to replace.
            config (`BinarizationConfig`): The rules.
            key (`str`): What the masks are keyed by: the name of the layer inside the base model.
            unit (`int`): Place of the layer's unit in execution order, from 0.
            unsigned (`bool`): Whether its inputs have the levels {0, γ}.
        """
        latent = shaped_as(layer, cls, cls.ATTRIBUTES)
        latent._adopt(layer.weight, config, key, unit)
        bias: Any = layer.bias
        latent.register_parameter("bias", bias)
        latent.unsigned = unsigned
        float32: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}  # also if default is another
        scale = shift = None
        if config.activations:
            scale = nn.Parameter(torch.ones(1, **float32), requires_grad=config.learn_activation_scale)
            if config.learn_activation_shift and not unsigned:
                shift = nn.Parameter(torch.zeros(latent.input_features, **float32))
        latent.register_parameter("activation_scale", scale)
        latent.register_parameter("activation_shift", shift)
        latent.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=layer.weight.device))
        latent._add_mask("activation", (latent.input_features,))
        return latent

    @property
    def input_features(self) -> int:
        """How many features the input has."""
        raise NotImplementedError

    def per_feature(self, values: Tensor) -> Tensor:
        """`values`, one for each feature, in a shape that broadcasts against an input."""
        return values.view(-1, *(1,) * (-1 - self.FEATURE_AXIS))

    def effective_weight(self) -> Tensor:
        """ŵ, in the dtype of the latent weight."""
        if not self.config.weights:
            return self.weight
        rows = self.weight.flatten(1)
        scale = weight_scale(rows, self.config.scale).to(rows.dtype)
        mask, ste = self._mask(self.weight_mask.flatten(1)), self.config.surrogate == "ste"
        return mix(rows, scale, mask, clip=self.config.clip, ste=ste).view(self.weight.shape)

    def effective_input(self, input: Tensor) -> Tensor:
        """x̂, in the dtype of the input."""
        if self.activation_scale is None:
            return input
        # In the precision of the scale, as the packed layer compares: rounding must not decide on a bit.
        x = input.to(self.activation_scale.dtype)
        shift = None if self.activation_shift is None else self.per_feature(self.activation_shift)
        scale, mask = self.positive_scale(), self._mask(self.per_feature(self.activation_mask))
        clip, ste = self.config.clip, self.config.surrogate == "ste"
        return mix(x, scale, mask, clip=clip, unsigned=self.unsigned, ste=ste, shift=shift).to(input.dtype)

    def positive_scale(self) -> Tensor:
        """γ, kept above zero whatever the optimizer did to it."""
        assert self.activation_scale is not None
        return self.activation_scale.abs().clamp_min(1e-6)

    def extra_repr(self) -> str:
        levels = "32" if self.activation_scale is None else "1 unsigned" if self.unsigned else "1 signed"
        return f"{super().extra_repr()}, input_bits={levels}, unit={self.unit}, frozen={self.fraction:.3f}"


class BinaryLinear(BinaryLayer, nn.Linear):
    r"""The latent linear layer: \\(y = \hat x \hat w^\top + b\\), features on the last axis. See [`BinaryLayer`]."""

    ATTRIBUTES: ClassVar = LINEAR_ATTRIBUTES
    FEATURE_AXIS: ClassVar = -1

    @property
    def input_features(self) -> int:
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return nn.functional.linear(self.effective_input(input), weight.to(input.dtype), self.bias)


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    r"""The latent convolution: \\(y = \hat x * \hat w + b\\), of inputs `[batch, channels, height, width]`.

    The features are the channels: a mask entry and a shift for each. Padding is put around `x̂`: with zeros, a position
    outside of the image adds nothing to the sum, which is neither of the two levels of an input inside. See
    [`BinaryLayer`].
    """

    ATTRIBUTES: ClassVar = CONV_ATTRIBUTES
    FEATURE_AXIS: ClassVar = -3

    @property
    def input_features(self) -> int:
        return self.in_channels

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return self._conv_forward(self.effective_input(input), weight.to(input.dtype), self.bias)
