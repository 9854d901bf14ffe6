"""The packed layer: one bit a weight, a scale for each output, and no latent weights; and its float counterpart."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.functional import activation_threshold, weight_scale
from hf_stompp.layers.binary import BinaryLinear
from hf_stompp.packing import pack_signs, packed_length, unpack_signs


def _binary_input(input: Tensor, threshold: Tensor, levels: Tensor) -> Tensor:
    """The upper level where an input is at or above its threshold, else the lower, in the dtype of the input."""
    low, high = levels.unbind()
    return torch.where(input >= threshold, high, low).to(input.dtype)


class _ExactLinear(nn.Linear):
    """A linear layer whose buffers stay in float32 when the model is cast: they decide on bits."""

    FULL_PRECISION: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in self.FULL_PRECISION}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            if before is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, before.to(getattr(self, name).device))
        return self


class PackedLinear(_ExactLinear):
    r"""A 1-bit linear layer: \\(y = \hat x \, (s \odot \operatorname{bits}(w))^\top + b\\).

    It *is* an `nn.Linear` whose `weight` is the bits, so that a loader without this package fails on the shape instead
    of filling in random weights, and so that PEFT finds it.

    Attributes:
        weight (`Parameter`): uint8 `[out_features, ceil(in_features / 8)]`, as [`~hf_stompp.packing.pack_signs`].
        weight_scale (`Tensor`): float32 `[out_features]`.
        activation_threshold (`Tensor`, *optional*): float32 `[in_features]`; an input at or above it is the upper
            level, one below it the lower. Absent if the inputs are not binary.
        activation_levels (`Tensor`, *optional*): float32 `[2]`, the lower and the upper level: (-γ, γ) or (0, γ).
    """

    weight_scale: Tensor
    activation_threshold: Tensor | None
    activation_levels: Tensor | None
    FULL_PRECISION: ClassVar = ("weight_scale", "activation_threshold", "activation_levels")

    @classmethod
    def empty(cls, linear: nn.Linear, binary_input: bool) -> Self:
        """A layer of the shape of `linear`, on its device, whose tensors are still to be filled in."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.train(linear.training)
        device = linear.weight.device
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}  # also where the default is another
        bits = torch.zeros(layer.out_features, packed_length(layer.in_features), dtype=torch.uint8, device=device)
        layer.weight = nn.Parameter(bits, requires_grad=False)
        layer.register_parameter("bias", linear.bias)
        layer.register_buffer("weight_scale", torch.ones(layer.out_features, **float32))
        threshold = torch.zeros(layer.in_features, **float32) if binary_input else None
        layer.register_buffer("activation_threshold", threshold)
        layer.register_buffer("activation_levels", torch.ones(2, **float32) if binary_input else None)
        return layer

    @classmethod
    @torch.no_grad()
    def from_binary(cls, layer: BinaryLinear) -> Self:
        """Packs a latent layer, taking every entry as frozen."""
        packed = cls.empty(layer, binary_input=layer.activation_scale is not None)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        packed.weight.copy_(pack_signs(layer.weight))
        packed.weight_scale.copy_(weight_scale(layer.weight, layer.config.scale).flatten())
        if layer.activation_scale is not None and packed.activation_threshold is not None:
            assert packed.activation_levels is not None
            scale = layer.positive_scale()
            threshold = activation_threshold(scale, layer.activation_shift, layer.unsigned)
            packed.activation_threshold.copy_(threshold.expand(layer.in_features))
            packed.activation_levels.copy_(torch.cat([torch.zeros_like(scale) if layer.unsigned else -scale, scale]))
        return packed

    @torch.no_grad()
    def to_float(self) -> nn.Linear:
        """The `nn.Linear` with the same full-precision weight; it does not binarize its input."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized_weight())
        linear.bias = self.bias
        return linear.train(self.training)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the bits and scales stand for: `[out_features, in_features]`, rounded to `dtype`."""
        # In place and at once in `dtype`, which gives the same values: every forward makes this weight, and what the
        # allocator keeps of its copies would be several times the packed model.
        return unpack_signs(self.weight, self.in_features, dtype).mul_(self.weight_scale.to(dtype).unsqueeze(1))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.dequantized_weight(input.dtype)
        if self.activation_threshold is not None and self.activation_levels is not None:
            input = _binary_input(input, self.activation_threshold, self.activation_levels)
        return nn.functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits=1, input_bits={32 if self.activation_threshold is None else 1}"


class BinaryInputLinear(_ExactLinear):
    """What `dequantize()` makes of a [`PackedLinear`] with binary inputs: the same outputs from a float weight.

    A plain `nn.Linear` would see the inputs that the packed layer does not: it would be another model. All it takes is
    a comparison and a selection, which every exporter knows.
    """

    activation_threshold: Tensor
    activation_levels: Tensor
    FULL_PRECISION: ClassVar = ("activation_threshold", "activation_levels")

    @classmethod
    def from_packed(cls, layer: PackedLinear) -> Self:
        assert layer.activation_threshold is not None and layer.activation_levels is not None
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = layer.in_features, layer.out_features
        linear.train(layer.training)
        linear.weight = nn.Parameter(layer.dequantized_weight())
        linear.register_parameter("bias", layer.bias)
        linear.register_buffer("activation_threshold", layer.activation_threshold)
        linear.register_buffer("activation_levels", layer.activation_levels)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        input = _binary_input(input, self.activation_threshold, self.activation_levels)
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
