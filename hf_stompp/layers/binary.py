"""Latent layers whose weights and inputs are soft in part and binary in part: linear and convolution."""

from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix, weight_scale
from hf_stompp.layers.activation import LatentInput
from hf_stompp.layers.latent import LatentWeight

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


class BinaryLayer(LatentWeight, LatentInput):
    r"""A layer that is on its way from full precision to 1 bit: what [`BinaryLinear`] and [`BinaryConv2d`] share.

    `ŵ` and `x̂` are the mixtures of frozen and soft entries of [`~hf_stompp.functional.mix`]. The layer is made from a
    full-precision one by [`from_float`], shares its parameters, and has the same parameter names, so a full-precision
    checkpoint loads into it. `forward` is a pure function of parameters and masks: it draws nothing, counts nothing.

    Attributes:
        weight, weight_mask: See [`LatentWeight`].
        activation_scale, activation_shift, activation_mask, calibrated: See [`LatentInput`].

    Source: arXiv 2601.22660.
    """

    MASKS: ClassVar = ("weight", "activation")
    ATTRIBUTES: ClassVar[tuple[str, ...]]
    FEATURE_AXIS: ClassVar[int]
    """Which axis of the input the features are."""

    bias: Any

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
        latent._add_activation(unsigned)
        return latent

    def per_feature(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (-1 - self.FEATURE_AXIS))

    def features_last(self, x: Tensor) -> Tensor:
        return x.movedim(self.FEATURE_AXIS, -1)

    def effective_weight(self) -> Tensor:
        """ŵ, in the dtype of the latent weight."""
        if not self.config.weights:
            return self.weight
        rows = self.weight.flatten(1)
        scale = weight_scale(rows, self.config.scale).to(rows.dtype)
        mask, ste = self._mask(self.weight_mask.flatten(1)), self.config.surrogate == "ste"
        return mix(rows, scale, mask, clip=self.config.weight_clip, ste=ste).view(self.weight.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._levels()}"


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
