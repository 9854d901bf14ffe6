"""Batch norms folded into thresholds: between two binary convolutions, all that counts is which bit comes out."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp.layers import PackedConv2d
from hf_stompp.packing import pack_signs, unpack_signs
from hf_stompp.tracing import CONVOLUTIONS, Call, trace

_CEILINGS: dict[type[nn.Module], float] = {nn.ReLU: float("inf"), nn.ReLU6: 6.0}
FOLDED = (nn.BatchNorm2d, *_CEILINGS)
"""What is folded."""
_LARGEST = torch.tensor(torch.finfo(torch.float32).max).view(torch.int32).item()


@dataclass(frozen=True)
class Fold:
    """A chain convolution → batch norm (→ ReLU) → convolutions, in which each takes nothing but the last one's output.

    Attributes:
        first (`str`): Name of the convolution before the norm.
        norm, activation (`str`): Of the norm and of the ReLU; empty without one.
        second (`tuple[str, ...]`): Of the convolutions that take the outcome.
    """

    first: str
    norm: str
    activation: str
    second: tuple[str, ...]


def foldable(model: PreTrainedModel, binary: Collection[str], binary_inputs: Collection[str]) -> list[Fold]:
    """The chains that can be folded without changing a bit.

    Args:
        model (`PreTrainedModel`): The model; of its layers only the kind counts.
        binary (`Collection[str]`): Names of its binary layers.
        binary_inputs (`Collection[str]`): Of those whose inputs are binary too.
    """
    found = trace(model)
    calls = [*found.layers, *found.norms, *found.activations]
    by_output = {id(call.output): call for call in calls}
    once = {name for name in {call.name for call in calls} if sum(call.name == name for call in calls) == 1}

    def before(tensor: Tensor, readers: int, *kinds: type[nn.Module]) -> Call | None:
        """The call that made a tensor which has no other readers, if it is of one of the kinds."""
        call = by_output.get(id(tensor))
        alone = call is not None and call.name in once and found.readers[id(tensor)] == readers
        return call if call and alone and type(model.get_submodule(call.name)) in kinds else None

    users: dict[int, list[Call]] = {}
    for call in found.layers:
        users.setdefault(id(call.input), []).append(call)
    folds = []
    for second in users.values():
        if not all(call.name in once and call.name in binary_inputs for call in second):
            continue
        if not all(isinstance(model.get_submodule(call.name), CONVOLUTIONS) for call in second):
            continue
        activation = before(second[0].input, len(second), *_CEILINGS)
        tensor, readers = (activation.input, 1) if activation else (second[0].input, len(second))
        norm = before(tensor, readers, nn.BatchNorm2d)
        first = before(norm.input, 1, *CONVOLUTIONS) if norm else None
        if norm and first and first.name in binary:
            names = tuple(call.name for call in second)
            folds.append(Fold(first.name, norm.name, activation.name if activation else "", names))
    return folds


@torch.no_grad()
def fold(model: PreTrainedModel, chain: Fold) -> list[str]:
    r"""Folds one chain of a packed model, in place; returns the names of the modules that are no longer there.

    An input of the second convolution is the upper level where \\(\operatorname{bn}(y) \ge t\\) for what y the first
    one gives. Where the slope of the norm is negative, the first one's signs are turned, so that it gives -y; then the
    outcome rises with y, and \\(y \ge t'\\) says the same, with t' the smallest float32 number for which it is so. It
    is found by bisection with the norm itself: not a bit changes. A norm that no threshold follows stays in float, as
    folding it into the scale would round.
    """
    norm, first = model.get_submodule(chain.norm), model.get_submodule(chain.first)
    second = [model.get_submodule(name) for name in chain.second]
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(first, PackedConv2d)
    if norm.running_mean is None or any(tensor.dtype != torch.float32 for tensor in norm.parameters()):
        return []  # no slope to know before, or values that half precision rounds
    ceiling = _CEILINGS[type(model.get_submodule(chain.activation))] if chain.activation else None
    for layer in second:
        threshold = layer.activation_threshold
        if ceiling is not None and not ((threshold > 0) & (threshold <= ceiling)).all():
            return []
    slope = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    direction = torch.where(slope < 0, -1.0, 1.0)
    signs = unpack_signs(first.weight, first.row_length) * direction.unsqueeze(1)
    first.weight.copy_(pack_signs(signs))
    if first.bias is not None:
        first.bias.mul_(direction)
    for layer in second:
        outcome = partial(_outcome, norm, direction)
        layer.activation_threshold.copy_(smallest_reaching(layer.activation_threshold, outcome))
    gone = [name for name in (chain.norm, chain.activation) if name]
    remove(model, gone)
    return gone


def remove(model: nn.Module, names: list[str]) -> None:
    """Puts nothing in the place of modules."""
    for name in names:
        model.set_submodule(name, nn.Identity())


def _outcome(norm: nn.BatchNorm2d, direction: Tensor, y: Tensor) -> Tensor:
    """What a norm makes of ±y, one value for each channel."""
    return norm((direction * y).view(1, -1, 1, 1)).flatten()


def smallest_reaching(threshold: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """For each entry the smallest finite float32 y for which a function that rises with y reaches the threshold; the
    largest if there is none."""
    # Floats are ordered as their bits are, but for the sign: integers from -largest to largest stand for them.
    low = torch.full(threshold.shape, -_LARGEST, dtype=torch.int64, device=threshold.device)
    high = -low
    while (low < high).any():
        middle = (low + high).div(2, rounding_mode="floor")
        reached = function(_float(middle)) >= threshold
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle + 1).minimum(high)
    return _float(low)


def _float(order: Tensor) -> Tensor:
    return order.abs().to(torch.int32).view(torch.float32) * torch.where(order < 0, -1.0, 1.0)
