"""Packed layers that hand bits on: where nothing but the comparison of the next one takes what a layer gives."""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp.folding import smallest_reaching
from hf_stompp.layers import PackedConv2d, PackedLayer, PackedLinear
from hf_stompp.tracing import HALF_RECTIFIED_MODULES, Trace, trace


class PassesBits(nn.Module):
    """An activation function for floats; bits, for which it has been reckoned with, go through."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return input if input.dtype == torch.int32 else self.activation(input)


def fuse(model: PreTrainedModel) -> list[tuple[str, str]]:
    r"""Lets packed layers hand bits on, in place; returns the pairs of layers.

    Where one packed layer's outputs go, by nothing or by an activation function f, into the binary inputs of another
    one alone, as in the feed-forward blocks of a BERT, all that counts is whether \\(f(y) \ge t\\). For a threshold
    t > 0 and f a ReLU, GELU or SiLU that is \\(y \ge t'\\), with t' the smallest float32 number for which it is so.
    The kernels for a CPU make that comparison as soon as they have y, so that floats are neither written nor read, and
    f is not computed. Elsewhere, where gradients are kept and under torch.compile, nothing changes.

    The same bits come out, but for what two ways of computing f round differently in its last place. Nothing of it is
    saved. It is for a model that is served as it is: do it last. What is done to one of the layers afterwards, such as
    hooks, adapters around it, other weights, another device, does not know of the bits.

    Args:
        model (`PreTrainedModel`): A packed model in evaluation mode.

    Example:

        >>> fuse(AutoModelForSequenceClassification.from_pretrained("bert-sst2-1bit"))  # doctest: +SKIP
    """
    found = trace(model)
    pairs = []
    for first, activation, second in _chains(model, found):
        one, other = model.get_submodule(first), model.get_submodule(second)
        assert isinstance(one, PackedLayer) and isinstance(other, PackedLayer)
        threshold = other.activation_threshold
        assert threshold is not None
        if activation:
            if not (threshold > 0).all():
                continue
            function = model.get_submodule(activation)
            threshold = _before(function, threshold)
            model.set_submodule(activation, PassesBits(function))
        one.next_threshold = threshold.clone()
        pairs.append((first, second))
    return pairs


def _chains(model: PreTrainedModel, found: Trace) -> list[tuple[str, str, str]]:
    """Layer, activation module or nothing, and the one layer of the same kind that takes what comes out of it."""
    calls = Counter(call.name for call in found.layers + found.activations)
    made = {id(call.output): call for call in found.layers + found.activations}
    chains = []
    for call in found.layers:
        second = model.get_submodule(call.name)
        if not isinstance(second, PackedLayer) or second.activation_threshold is None or calls[call.name] != 1:
            continue
        before, activation = made.get(id(call.input)), ""
        if before and _rises(model.get_submodule(before.name)):
            if calls[before.name] != 1 or found.readers[id(call.input)] != 1:
                continue
            activation, taken = before.name, before.input
            before = made.get(id(taken))
        else:
            taken = call.input
        if before is None or calls[before.name] != 1 or found.readers[id(taken)] != 1:
            continue
        first = model.get_submodule(before.name)
        if isinstance(first, PackedLayer) and first.activation_threshold is not None and _fit(first, second):
            chains.append((before.name, activation, call.name))
    return chains


def _fit(first: PackedLayer, second: PackedLayer) -> bool:
    """Whether the kernels know both, so that the one does not hand on what the other cannot take."""
    if isinstance(first, PackedLinear) and isinstance(second, PackedLinear):
        return first.out_features == second.in_features
    if isinstance(first, PackedConv2d) and isinstance(second, PackedConv2d):
        return first.known_to_kernels and second.known_to_kernels
    return False


def _rises(module: nn.Module) -> bool:
    """Whether it is an activation function that rises from 0 on, and is not above 0 before."""
    return isinstance(module, HALF_RECTIFIED_MODULES) and not isinstance(module, nn.Sigmoid)


@torch.no_grad()
def _before(function: nn.Module, threshold: Tensor) -> Tensor:
    """The smallest y at which `function`, which rises from 0 on and is not above 0 before, reaches the threshold."""
    return smallest_reaching(threshold, lambda y: torch.where(y >= 0, function(y), -torch.inf))
