"""Latent activations: the input of a layer, and tensors that no layer takes, on their way to 1 bit."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix
from hf_stompp.layers.latent import LatentLayer


class LatentInput(LatentLayer):
    r"""A [`LatentLayer`] of an activation, soft in part and binary in part.

    Attributes:
        activation_scale (`Parameter`, *optional*): γ, `[1]`; only with binary activations.
        activation_shift (`Parameter`, *optional*): β, one for each feature; only with a learned shift and signed
            levels.
        activation_mask (`Tensor`): Boolean, one for each feature, shared by all tokens or pixels.
        calibrated (`Tensor`): Whether the activation scale and shift have been set from data.
    """

    unsigned: bool
    activation_scale: nn.Parameter | None
    activation_shift: nn.Parameter | None
    activation_mask: Tensor
    calibrated: Tensor

    def _add_activation(self, unsigned: bool) -> None:
        """Scale, shift and mask of `input_features` features."""
        self.unsigned = unsigned
        device = self.frozen_fraction.device
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}  # also if the default is another
        scale = shift = None
        if self.config.activations:
            scale = nn.Parameter(torch.ones(1, **float32), requires_grad=self.config.learn_activation_scale)
            if self.config.learn_activation_shift and not unsigned:
                shift = nn.Parameter(torch.zeros(self.input_features, **float32))
        self.register_parameter("activation_scale", scale)
        self.register_parameter("activation_shift", shift)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=device))
        self._add_mask("activation", (self.input_features,))

    @property
    def input_features(self) -> int:
        """How many features the activation has."""
        raise NotImplementedError

    def per_feature(self, values: Tensor) -> Tensor:
        """`values`, one for each feature, in a shape that broadcasts against the activation."""
        raise NotImplementedError

    def features_last(self, x: Tensor) -> Tensor:
        """The activation with its features on the last axis."""
        raise NotImplementedError

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

    def _levels(self) -> str:
        bits = "32" if self.activation_scale is None else "1 unsigned" if self.unsigned else "1 signed"
        return f"input_bits={bits}, unit={self.unit}, frozen={self.fraction:.3f}"


class AttentionTensor(nn.Module):
    """A tensor that no layer takes, one of those that attention multiplies.

    Attributes:
        shape (`tuple[int, int, int]`): Of one number for each feature, as it broadcasts: `(heads, 1, head_dim)` for
            queries, keys and values `[B, heads, S, head_dim]`; `(heads, 1, 1)` for probabilities `[B, heads, S, S]`.
    """

    shape: tuple[int, int, int]

    @property
    def input_features(self) -> int:
        """How many features it has."""
        return self.shape[0] * self.shape[2]

    def per_feature(self, values: Tensor) -> Tensor:
        """`values`, one for each feature, in a shape that broadcasts against the tensor."""
        return values.view(self.shape)

    def features_last(self, x: Tensor) -> Tensor:
        """The tensor with its features on the last axis."""
        x = x.transpose(1, 2)
        return x.flatten(2) if self.shape[2] > 1 else x.transpose(2, 3)


class FloatActivation(AttentionTensor):
    """Hands a tensor on as it is: the place for a binary one.

    Attributes:
        device (`torch.device`): Of what takes its place.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__()
        self.shape, self.device = shape, device

    def forward(self, input: Tensor) -> Tensor:
        return input


class BinaryActivation(AttentionTensor, LatentInput):
    r"""The latent [`FloatActivation`]: \(\hat x\) of [`~hf_stompp.functional.mix`], without a weight.

    Source: binary queries, keys, values and probabilities are in BiBERT (Qin et al., 2022) and BiT (Liu et al., 2022).
    """

    MASKS: ClassVar = ("activation",)

    @classmethod
    def from_float(
        cls, activation: FloatActivation, config: BinarizationConfig, *, key: str, unit: int, unsigned: bool
    ) -> Self:
        """See [`BinaryLayer.from_float`]."""
        latent = cls()
        latent.shape = activation.shape
        latent._schedule(config, key, unit, activation.device)
        latent._add_activation(unsigned)
        return latent.train(activation.training)

    def forward(self, input: Tensor) -> Tensor:
        return self.effective_input(input)

    def extra_repr(self) -> str:
        return f"{self.input_features}, {self._levels()}"
