"""The latent linear layer: weights and inputs that are soft in part and binary in part."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix, weight_scale
from hf_stompp.layers.latent import LatentLayer


class BinaryLinear(LatentLayer, nn.Linear):
    r"""A linear layer that is on its way from full precision to 1 bit: \\(y = \hat x \hat w^\top + b\\).

    `ŵ` and `x̂` are the mixtures of frozen and soft entries of [`~hf_stompp.functional.mix`]. The layer is made from an
    `nn.Linear` by [`from_float`], shares its parameters, and has the same parameter names, so a full-precision
    checkpoint loads into it. `forward` is a pure function of parameters and masks: it draws nothing, counts nothing.

    Attributes:
        weight (`Parameter`): Latent weight `[out_features, in_features]`, and its mask: see [`LatentLayer`].
        activation_scale (`Parameter`, *optional*): γ, `[1]`; only with binary activations.
        activation_shift (`Parameter`, *optional*): β, `[in_features]`; only with a learned shift and signed levels.
        activation_mask (`Tensor`): Boolean, `[in_features]`, shared by all tokens.
        calibrated (`Tensor`): Whether the activation scale and shift have been set from data.

    Source: arXiv 2601.22660.
    """

    MASKS: ClassVar = ("weight", "activation")

    unsigned: bool
    activation_scale: nn.Parameter | None
    activation_shift: nn.Parameter | None
    activation_mask: Tensor
    calibrated: Tensor

    @classmethod
    def from_float(cls, linear: nn.Linear, config: BinarizationConfig, *, key: str, unit: int, unsigned: bool) -> Self:
        """Makes the layer around the parameters of `linear`, on its device, without drawing random numbers.

        Args:
            linear (`nn.Linear`): The layer to replace.
            config (`BinarizationConfig`): The rules.
            key (`str`): What the masks are keyed by: the name of the layer inside the base model.
            unit (`int`): Place of the layer's unit in execution order, from 0.
            unsigned (`bool`): Whether its inputs have the levels {0, γ}.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.train(linear.training)
        layer._adopt(linear.weight, config, key, unit)
        layer.register_parameter("bias", linear.bias)
        layer.unsigned = unsigned
        device = linear.weight.device
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}  # also where the default is another
        scale = shift = None
        if config.activations:
            scale = nn.Parameter(torch.ones(1, **float32), requires_grad=config.learn_activation_scale)
            if config.learn_activation_shift and not unsigned:
                shift = nn.Parameter(torch.zeros(layer.in_features, **float32))
        layer.register_parameter("activation_scale", scale)
        layer.register_parameter("activation_shift", shift)
        layer.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=device))
        layer._add_mask("activation", (layer.in_features,))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return nn.functional.linear(self.effective_input(input), weight.to(input.dtype), self.bias)

    def effective_weight(self) -> Tensor:
        """ŵ, in the dtype of the latent weight."""
        if not self.config.weights:
            return self.weight
        scale = weight_scale(self.weight, self.config.scale).to(self.weight.dtype)
        ste = self.config.surrogate == "ste"
        return mix(self.weight, scale, self._mask(self.weight_mask), clip=self.config.clip, ste=ste)

    def effective_input(self, input: Tensor) -> Tensor:
        """x̂, in the dtype of the input."""
        if self.activation_scale is None:
            return input
        # In the precision of the scale, as the packed layer compares: rounding must not decide on a bit.
        centred = input.to(self.activation_scale.dtype)
        if self.activation_shift is not None:
            # Not `-`: its backward negates the whole gradient before it sums it.
            centred = centred + (-self.activation_shift)
        ste = self.config.surrogate == "ste"
        scale, mask = self.positive_scale(), self._mask(self.activation_mask)
        mixed = mix(centred, scale, mask, clip=self.config.clip, unsigned=self.unsigned, ste=ste)
        return mixed.to(input.dtype)

    def positive_scale(self) -> Tensor:
        """γ, kept above zero whatever the optimizer did to it."""
        assert self.activation_scale is not None
        return self.activation_scale.abs().clamp_min(1e-6)

    def extra_repr(self) -> str:
        levels = "32" if self.activation_scale is None else "1 unsigned" if self.unsigned else "1 signed"
        return f"{super().extra_repr()}, input_bits={levels}, unit={self.unit}, frozen={self.fraction:.3f}"
