"""Packed layers: one bit a weight, a scale for each output, and no latent weights; and their float counterparts."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.functional import activation_threshold, pass_straight, weight_scale
from hf_stompp.kernels import operators
from hf_stompp.kernels.operands import Geometry, Operands
from hf_stompp.layers.activation import AttentionTensor, BinaryActivation, LatentInput
from hf_stompp.layers.binary import (
    CONV_ATTRIBUTES,
    LINEAR_ATTRIBUTES,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    shaped_as,
)
from hf_stompp.layers.fused import SharedInput
from hf_stompp.packing import pack_signs, packed_length


class _Levels(torch.autograd.Function):
    """The levels of binary inputs, with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, levels: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x, threshold, levels)
        ctx.clip = clip
        return torch.where(x >= threshold, levels[1], levels[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold, levels = ctx.saved_tensors
        return pass_straight(grad, x, threshold, levels, ctx.clip), None, None, None


class ExactLayer(nn.Module):
    """A layer whose buffers stay in float32 when the model is cast: they decide on bits."""

    FULL_PRECISION: ClassVar[tuple[str, ...]]
    ATTRIBUTES: ClassVar[tuple[str, ...]]
    FEATURE_AXIS: ClassVar[int]
    """Which axis of the input the features are."""

    activation_threshold: Tensor | None
    activation_levels: Tensor | None
    straight_through: float = 0.0

    def binary_input(self, input: Tensor) -> Tensor:
        """The upper level where an input is at or above its threshold, else the lower, in the dtype of the input.

        Raises:
            TypeError: The input is not of floats, as where a model casts it to the dtype of a packed weight.
        """
        if not input.is_floating_point():
            raise TypeError(f"A {type(self).__name__} takes floats, but its input is {input.dtype}.")
        if self.activation_threshold is None or self.activation_levels is None:
            return input
        threshold = self.per_feature(self.activation_threshold)
        if self.straight_through > 0 and torch.is_grad_enabled() and input.requires_grad:
            passed: Tensor = _Levels.apply(input, threshold, self.activation_levels, self.straight_through)
            return passed
        low, high = self.activation_levels.unbind()
        return torch.where(input >= threshold, high, low).to(input.dtype)

    @torch.no_grad()
    def take_levels(self, latent: LatentInput) -> None:
        """Takes over the threshold and the levels of a latent input, if it is to be binary."""
        if latent.activation_scale is not None and self.activation_threshold is not None:
            assert self.activation_levels is not None
            scale = latent.positive_scale()
            threshold = activation_threshold(scale, latent.activation_shift, latent.unsigned)
            self.activation_threshold.copy_(threshold.expand(latent.input_features))
            self.activation_levels.copy_(torch.cat([torch.zeros_like(scale) if latent.unsigned else -scale, scale]))

    def per_feature(self, values: Tensor) -> Tensor:
        """`values`, one for each feature, in a shape that broadcasts against an input."""
        return values.view(-1, *(1,) * (-1 - self.FEATURE_AXIS))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in self.FULL_PRECISION}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            if before is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, before.to(getattr(self, name).device))
        return self


class PackedLayer(ExactLayer):
    r"""A 1-bit layer: what [`PackedLinear`] and [`PackedConv2d`] share.

    It *is* an `nn.Linear` or `nn.Conv2d` whose `weight` is the bits, so that a loader without this package fails on
    the shape instead of filling in random weights, and so that PEFT finds it.

    Attributes:
        weight (`Parameter`): uint8 `[outputs, ceil(K / 8)]`, the K signs of an output's weight as
            [`~hf_stompp.packing.pack_signs`].
        weight_scale (`Tensor`): float32 `[outputs]`.
        activation_threshold (`Tensor`, *optional*): float32, one for each input feature; an input at or above it is
            the upper level, one below it the lower. Absent if the inputs are not binary.
        activation_levels (`Tensor`, *optional*): float32 `[2]`, the lower and the upper level: (-γ, γ) or (0, γ).
        next_threshold (`Tensor`, *optional*): float32 `[outputs]`, not saved: the layer may hand on whether its
            outputs are at or above it (see [`~hf_stompp.fusion.fuse`]).
        straight_through (`float`): κ of the straight-through gradient of binary inputs, which reaches the adapters of
            layers below: that of the training with `surrogate="ste"`; 0, and no gradient, without.
    """

    FULL_PRECISION: ClassVar = ("weight_scale", "activation_threshold", "activation_levels", "next_threshold")
    FLOAT: ClassVar[type[nn.Module]]
    """The full-precision layer."""

    weight: Any
    bias: Any
    weight_scale: Tensor
    next_threshold: Tensor | None
    takes_bits: bool = False
    """Whether another layer hands bits on to this one (see [`~hf_stompp.fusion.fuse`]); else int32 is refused."""

    @classmethod
    @torch.inference_mode(False)  # whose tensors do not tell when they are written to
    @torch.no_grad()
    def empty(cls, layer: Any, binary_input: bool, straight_through: float = 0.0) -> Self:
        """A layer of the shape of `layer`, on its device, whose tensors are still to be filled in."""
        packed = shaped_as(layer, cls, cls.ATTRIBUTES)
        packed.straight_through = straight_through
        float32: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}  # also if default is another
        outputs, features = packed.outputs, packed.input_features
        shape = outputs, packed_length(packed.row_length)
        bits = torch.zeros(shape, dtype=torch.uint8, device=layer.weight.device)
        packed.weight = nn.Parameter(bits, requires_grad=False)
        packed.register_parameter("bias", layer.bias)
        packed.register_buffer("weight_scale", torch.ones(outputs, **float32))
        packed.register_buffer("activation_threshold", torch.zeros(features, **float32) if binary_input else None)
        packed.register_buffer("activation_levels", torch.tensor([-1.0, 1.0], **float32) if binary_input else None)
        packed.register_buffer("next_threshold", None, persistent=False)
        return packed

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_binary(cls, layer: BinaryLayer) -> Self:
        """Packs a latent layer, taking every entry as frozen."""
        packed = cls.empty(layer, layer.activation_scale is not None, layer.config.straight_through)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        packed.weight.copy_(pack_signs(cls._as_rows(layer.weight)))
        packed.weight_scale.copy_(weight_scale(layer.weight, layer.config.scale).flatten())
        packed.take_levels(layer)
        return packed

    @torch.no_grad()
    def to_float(self) -> Any:
        """The full-precision layer with the same weight; it does not binarize its input."""
        layer = shaped_as(self, self.FLOAT, self.ATTRIBUTES)
        layer.register_parameter("weight", nn.Parameter(self.dequantized_weight()))
        layer.register_parameter("bias", self.bias)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        operators.forget(self.weight)
        return super()._apply(fn, recurse)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the bits and scales stand for, in the shape of the full-precision one, rounded to
        `dtype`."""
        return self._from_rows(operators.dense_rows(self.weight, self.weight_scale, self.row_length, dtype))

    def operands(self) -> Operands:
        """What the kernels take."""
        own: Any = self._buffers  # as `self.weight_scale` is, in half the time: of a small layer that is much
        next_threshold = None if self.training else own["next_threshold"]
        scale, threshold, levels = own["weight_scale"], own["activation_threshold"], own["activation_levels"]
        return Operands(self.weight, scale, self._parameters["bias"], threshold, levels, next_threshold)

    @property
    def known_to_kernels(self) -> bool:
        """Whether the kernels know layers of this kind."""
        return True

    @property
    def outputs(self) -> int:
        """How many outputs the layer has, each with its row of bits."""
        raise NotImplementedError

    @property
    def input_features(self) -> int:
        """How many features the input has."""
        raise NotImplementedError

    @property
    def row_length(self) -> int:
        """K, how many weights an output has."""
        raise NotImplementedError

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        """The weights of each output in the order of their bits, `[outputs, K]`."""
        raise NotImplementedError

    def _from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `_as_rows`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        binary = self.activation_threshold is not None
        backend = "reference"
        if self.known_to_kernels:
            backend = operators.backend(self.weight.device, self.FEATURE_AXIS, binary)
        return f"{super().extra_repr()}, weight_bits=1, input_bits={1 if binary else 32}, backend={backend}"


class PackedLinear(PackedLayer, nn.Linear):
    r"""The 1-bit linear layer: \\(y = \hat x \, (s \odot \operatorname{bits}(w))^\top + b\\). See [`PackedLayer`]."""

    FLOAT: ClassVar = nn.Linear
    ATTRIBUTES: ClassVar = LINEAR_ATTRIBUTES
    FEATURE_AXIS: ClassVar = BinaryLinear.FEATURE_AXIS

    shared: "tuple[SharedInput, int] | None" = None
    """The layers that take the same bits, if [`~hf_stompp.fusion.fuse`] found some, and its place among them."""

    @property
    def outputs(self) -> int:
        return self.out_features

    @property
    def input_features(self) -> int:
        return self.in_features

    @property
    def row_length(self) -> int:
        return self.in_features

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def forward(self, input: Tensor) -> Tensor:
        binary = self._buffers["activation_threshold"] is not None
        if operators.cover(input, -1, self.in_features, binary, self.takes_bits):
            operands = self.operands()
            served = input.device.type == "cpu" and not operators.as_operator(input, operands)
            if self.shared is not None and served:  # its tensors stay on the CPU
                group, place = self.shared
                return group(input, place)
            return operators.linear(input, operands, self.straight_through)
        return nn.functional.linear(self.binary_input(input), self.dequantized_weight(input.dtype), self.bias)


class PackedConv2d(PackedLayer, nn.Conv2d):
    r"""The 1-bit convolution: \\(y = \hat x * (s \odot \operatorname{bits}(w)) + b\\).

    The bits of an output are in the order (kernel row, kernel column, input channel of the group), so that a kernel
    finds the channels of one pixel side by side. A bit cannot be 0, and zero padding is not made of bits: a position
    outside of the image has no level and takes no part in the sum. See [`PackedLayer`].
    """

    FLOAT: ClassVar = nn.Conv2d
    ATTRIBUTES: ClassVar = CONV_ATTRIBUTES
    FEATURE_AXIS: ClassVar = BinaryConv2d.FEATURE_AXIS

    @property
    def outputs(self) -> int:
        return self.out_channels

    @property
    def input_features(self) -> int:
        return self.in_channels

    @property
    def row_length(self) -> int:
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).flatten(1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        shape = (self.out_channels, *self.kernel_size, self.in_channels // self.groups)
        return rows.view(shape).permute(0, 3, 1, 2)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32, as_packed: bool = False) -> Tensor:
        """The float weight, in the memory order of a latent one, without which a convolution may sum in another order;
        or, without a copy, `as_packed`, with its channels last."""
        weight = super().dequantized_weight(dtype)
        # `contiguous()` would leave a 1x1 kernel as it is, whose strides say "channels last".
        return weight if as_packed else weight.clone(memory_format=torch.contiguous_format)

    @property
    def known_to_kernels(self) -> bool:
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return plain and self.activation_threshold is not None

    def forward(self, input: Tensor) -> Tensor:
        if self.known_to_kernels and operators.cover(
            input, self.FEATURE_AXIS, self.in_channels, True, self.takes_bits
        ):
            padding: Any = self.padding  # numbers: see `known_to_kernels`
            geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation)
            return operators.conv2d(input, self.operands(), geometry, self.straight_through)
        weight = self.dequantized_weight(input.dtype, as_packed=operators.cover_dense(self.weight, input.dtype))
        return self._conv_forward(self.binary_input(input), weight, self.bias)


class PackedActivation(AttentionTensor, ExactLayer):
    """The packed [`BinaryActivation`]: one bit a number, told by a threshold for each feature.

    Attributes:
        shape (`tuple[int, int, int]`): See [`AttentionTensor`].
        activation_threshold, activation_levels, straight_through: See [`PackedLayer`].
    """

    FULL_PRECISION: ClassVar = ("activation_threshold", "activation_levels")

    @classmethod
    def empty(cls, activation: AttentionTensor, device: Any, straight_through: float) -> Self:
        """A place of the shape of `activation`, whose tensors are still to be filled in."""
        packed = cls()
        packed.shape, packed.straight_through = activation.shape, straight_through
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        packed.register_buffer("activation_threshold", torch.zeros(packed.input_features, **float32))
        packed.register_buffer("activation_levels", torch.tensor([-1.0, 1.0], **float32))
        return packed.train(activation.training)

    @classmethod
    def from_binary(cls, latent: BinaryActivation) -> Self:
        """Packs a latent activation, taking every feature as frozen."""
        packed = cls.empty(latent, latent.frozen_fraction.device, latent.config.straight_through)
        packed.take_levels(latent)
        return packed

    def forward(self, input: Tensor) -> Tensor:
        return self.binary_input(input)

    def extra_repr(self) -> str:
        return f"{self.input_features}, input_bits=1"


class BinaryInput(ExactLayer):
    """What `dequantize()` makes of a [`PackedLayer`] with binary inputs: the same outputs from a float weight.

    A plain layer would see the inputs that the packed one does not: it would be another model. All it takes is a
    comparison and a selection, which every exporter knows.
    """

    FULL_PRECISION: ClassVar = ("activation_threshold", "activation_levels")

    @classmethod
    def from_packed(cls, packed: PackedLayer) -> Self:
        layer = shaped_as(packed, cls, cls.ATTRIBUTES)
        layer.weight = nn.Parameter(packed.dequantized_weight())
        layer.register_parameter("bias", packed.bias)
        layer.register_buffer("activation_threshold", packed.activation_threshold)
        layer.register_buffer("activation_levels", packed.activation_levels)
        return layer


class BinaryInputLinear(BinaryInput, nn.Linear):
    """The dequantized [`PackedLinear`] with binary inputs: see [`BinaryInput`]."""

    ATTRIBUTES: ClassVar = PackedLinear.ATTRIBUTES
    FEATURE_AXIS: ClassVar = PackedLinear.FEATURE_AXIS

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.binary_input(input), self.weight.to(input.dtype), self.bias)


class BinaryInputConv2d(BinaryInput, nn.Conv2d):
    """The dequantized [`PackedConv2d`] with binary inputs: see [`BinaryInput`]."""

    ATTRIBUTES: ClassVar = PackedConv2d.ATTRIBUTES
    FEATURE_AXIS: ClassVar = PackedConv2d.FEATURE_AXIS

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.binary_input(input), self.weight.to(input.dtype), self.bias)
