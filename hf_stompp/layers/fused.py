"""What [`~hf_stompp.fusion.fuse`] puts between packed layers, for models that are served on a CPU."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_stompp.kernels import operators
from hf_stompp.kernels.operands import Operands, are_signed

if TYPE_CHECKING:
    from hf_stompp.layers.packed import PackedLinear

_MADE = "_hf_stompp_outputs"
_PARTS = "dense", "dropout", "LayerNorm"


class PassesBits(nn.Module):
    """An activation function for floats; bits, for which it has been reckoned with, go through."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def unfused(self) -> nn.Module:
        return self.activation

    def forward(self, input: Tensor) -> Tensor:
        return input if input.dtype == torch.int32 else self.activation(input)


class ResidualNorm(nn.Module):
    r"""\\(\operatorname{LayerNorm}(\operatorname{dense}(x) + r)\\), the sum and the norm in one pass; what BERT calls
    an output block, whose parts keep their names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.__dict__["block"] = block  # not as a part: its names would be others

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a block has these parts, and, tried on numbers, computes this of them."""
        parts = dict(block.named_children())
        norm = parts.get("LayerNorm")
        if parts.keys() != set(_PARTS) or type(norm) is not nn.LayerNorm:
            return False
        dense: Any = parts["dense"]
        if norm.weight is None or norm.bias is None or norm.normalized_shape != (dense.out_features,):
            return False
        generator = torch.Generator().manual_seed(0)
        x, residual = (
            torch.randn(1, 2, features, generator=generator, device="cpu").to(norm.weight)
            for features in (dense.in_features, dense.out_features)
        )
        try:
            return torch.equal(block(x, residual), norm(dense(x) + residual))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False  # it takes something else

    def unfused(self) -> nn.Module:
        block: nn.Module = self.__dict__["block"]
        for name, part in self.named_children():  # they may be others by now
            block.add_module(name, part)
        return block.train(self.training)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, dropout, norm = (self.get_submodule(name) for name in _PARTS)
        y: Any = dropout(dense(hidden_states))
        if isinstance(norm, nn.LayerNorm) and operators.cover_norm(y, input_tensor, norm):
            return operators.add_norm(y, input_tensor, norm)
        out: Tensor = norm(y + input_tensor)
        return out


class _Outputs:
    """What each layer of a group gives, left with an input of which this was the version; nothing in a copy of it."""

    def __init__(self, group: "SharedInput", version: int | None, each: list[Tensor]) -> None:
        self.group, self.version, self.each = group, version, dict(enumerate(each))

    def __reduce__(self) -> Any:
        return type(None), ()


class SharedInput:
    """Packed linear layers that binarize the same input in the same way, as a query, a key and a value: the first of
    them that is called computes what all of them give, and leaves it with the input for the others.

    An input from inference mode does not tell whether it was written to in between; [`~hf_stompp.fusion.fuse`] groups
    no layers between which a model does that."""

    def __init__(self, layers: Iterable["PackedLinear"]) -> None:
        layers = list(layers)
        self.sizes = [layer.out_features for layer in layers]
        operands = [layer.operands() for layer in layers]
        first, levels = operands[0], torch.stack([one.levels for one in operands if one.levels is not None])
        # Levels of ±1 or 0 and 1, and their size in the scale, with which it is multiplied anyway.
        scales = torch.cat([one.weight_scale * high for one, high in zip(operands, levels[:, 1], strict=True)])
        biases = [one.bias.detach() for one in operands if one.bias is not None]
        bias, weight = torch.cat(biases) if biases else None, torch.cat([one.weight for one in operands])
        self.operands = Operands(weight, scales, bias, first.threshold, levels[0].sign())

    def __call__(self, input: Tensor, place: int) -> Tensor:
        """What the layer of this place gives."""
        version = None if input.is_inference() else input._version
        made: _Outputs | None = getattr(input, _MADE, None)
        if made is None or made.group is not self or made.version != version or place not in made.each:
            made = _Outputs(self, version, list(operators.linear(input, self.operands).split(self.sizes, dim=-1)))
            setattr(input, _MADE, made)
        out = made.each.pop(place)  # a second call is another one
        if not made.each:
            delattr(input, _MADE)
        return out


def sharing(layers: Sequence[Any]) -> bool:
    """Whether packed layers with binary inputs, which take the same one, see the same bits of it."""
    first, *others = layers
    return all(
        torch.equal(one.activation_threshold, first.activation_threshold)
        and are_signed(one.activation_levels) == are_signed(first.activation_levels)
        and (one.bias is None) == (first.bias is None)
        for one in others
    )
