"""Fusing a packed model for a CPU: what stands between its layers is left out, or done together."""

from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_stompp import kernels
from hf_stompp.folding import smallest_reaching
from hf_stompp.layers import PackedConv2d, PackedLayer, PackedLinear
from hf_stompp.layers.fused import PassesBits, ResidualNorm, SharedInput, sharing
from hf_stompp.patching import binary_layers
from hf_stompp.tracing import HALF_RECTIFIED_MODULES, Trace, trace

logger = logging.get_logger(__name__)


class Fused(NamedTuple):
    """What [`fuse`] found, by the names of modules.

    Attributes:
        bits (`list[tuple[str, str]]`): Pairs of layers of which the first hands bits on to the second.
        inputs (`list[list[str]]`): Layers that are computed together, on an input that is packed once.
        norms (`list[str]`): Blocks that add and norm in one pass.
    """

    bits: list[tuple[str, str]]
    inputs: list[list[str]]
    norms: list[str]


@torch.inference_mode(False)  # whose tensors do not tell that they were written to
@torch.no_grad()
def fuse(model: PreTrainedModel) -> Fused:
    r"""Makes a packed model faster on a CPU, in place, and leaves its numbers as they are.

    - **Bits between layers.** Where one packed layer's outputs go, by nothing or by an activation function f, into the
      binary inputs of another one alone, as in the feed-forward blocks of a BERT, all that counts is whether
      \\(f(y) \ge t\\). For a threshold t > 0 and f a ReLU, GELU or SiLU that is \\(y \ge t'\\), with t' the smallest
      float32 number for which it is so. That comparison is made as soon as y is there, so that floats are neither
      written nor read, and f is not computed.
    - **One input, packed once.** Linear layers that compare the same tensor with the same thresholds, as a query, a
      key and a value, are computed as one.
    - **Residual and norm.** `LayerNorm(dense(x) + r)` adds and norms in one pass.

    The first two give the same bits, but for what two ways of computing f round differently in its last place, the
    third the same floats to their rounding. Without the kernels for a CPU, where gradients are kept and under
    torch.compile, nothing changes. Nothing of it is saved. It is for a model that is served as it is: do it last. What
    is done to the layers afterwards, such as hooks, adapters around them, other weights, another device or dtype, it
    does not know of; [`unfuse`] takes it back.

    Args:
        model (`PreTrainedModel`): A packed model in evaluation mode. Modules with hooks are left as they are.

    Raises:
        TypeError: It is no model of transformers; of a pipeline, fuse its `.model`.
        ValueError: The model is latent, or in training mode, or has adapters.

    Example:

        >>> fuse(AutoModelForSequenceClassification.from_pretrained("bert-sst2-1bit"))  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
        raise TypeError(f"fuse takes a transformers.PreTrainedModel, not a {type(model).__name__}.")
    if hasattr(model, "peft_config"):
        raise ValueError("This model has adapters, which read what fuse would leave out: serve it as it is.")
    if binary_layers(model):
        raise ValueError("fuse is for packed models, and this one is latent: fuse what pack(model) gives.")
    if model.training:
        raise ValueError("fuse is for models that are served, and this one is in training mode: call model.eval().")
    unfuse(model)
    found = trace(model)
    if kernels.backend() == "reference":
        logger.warning("fuse changes nothing here, for what it fuses is done by the kernels: see kernels.info().")
    return Fused(_hand_bits_on(model, found), _share_inputs(model, found), _norm_sums(model))


def unfuse(model: nn.Module) -> None:
    """Takes back what [`fuse`] did; nothing, if it did nothing."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PassesBits | ResidualNorm):
            model.set_submodule(name, module.unfused())
        if isinstance(module, PackedLayer):
            module.next_threshold, module.takes_bits = None, False
        if isinstance(module, PackedLinear):
            module.shared = None


def _hand_bits_on(model: PreTrainedModel, found: Trace) -> list[tuple[str, str]]:
    pairs = []
    for first, activation, second in _chains(model, found):
        one, other = model.get_submodule(first), model.get_submodule(second)
        assert isinstance(one, PackedLayer) and isinstance(other, PackedLayer)
        threshold = other.activation_threshold
        assert threshold is not None
        function = model.get_submodule(activation) if activation else nn.Identity()
        if activation and not (threshold > 0).all():
            continue
        if activation:
            model.set_submodule(activation, PassesBits(function))
        one.next_threshold = _before(function, threshold, model.dtype, above_zero=bool(activation))
        other.takes_bits = True
        pairs.append((first, second))
    return pairs


def _chains(model: PreTrainedModel, found: Trace) -> list[tuple[str, str, str]]:
    """Layer, activation module or nothing, and the one layer of the same kind that takes what comes out of it."""
    calls = Counter(call.name for call in found.layers + found.activations)
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    made = {id(call.output): call for call in found.layers + found.activations}
    chains = []
    for call in found.layers:
        second = model.get_submodule(call.name)
        if not isinstance(second, PackedLayer) or second.activation_threshold is None or calls[call.name] != 1:
            continue
        before, activation = made.get(id(call.input)), ""
        if before and _rises(model.get_submodule(before.name)):
            function = model.get_submodule(before.name)
            alone = calls[before.name] == 1 and places[function] == 1 and not _hooked(function)
            if not alone or found.readers[id(call.input)] != 1:
                continue
            activation, taken = before.name, before.input
            before = made.get(id(taken))
        else:
            taken = call.input
        if before is None or calls[before.name] != 1 or found.readers[id(taken)] != 1:
            continue
        first = model.get_submodule(before.name)
        if isinstance(first, PackedLayer) and _fit(first, second, model.dtype):
            chains.append((before.name, activation, call.name))
    return chains


def _fit(first: PackedLayer, second: PackedLayer, dtype: torch.dtype) -> bool:
    """Whether the kernels know both, so that the one does not hand on what the other cannot take, and the other knows
    in which dtype to go on."""
    if first.activation_threshold is None or (dtype != torch.float32 and second.bias is None):
        return False
    if _hooked(first) or _hooked(second):
        return False
    if isinstance(first, PackedLinear) and isinstance(second, PackedLinear):
        return first.out_features == second.in_features
    if isinstance(first, PackedConv2d) and isinstance(second, PackedConv2d):
        return first.known_to_kernels and second.known_to_kernels
    return False


def _hooked(module: nn.Module) -> bool:
    """Whether somebody else looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _rises(module: nn.Module) -> bool:
    """Whether it is an activation function that rises from 0 on, and is not above 0 before."""
    return isinstance(module, HALF_RECTIFIED_MODULES) and not isinstance(module, nn.Sigmoid)


@torch.no_grad()
def _before(function: nn.Module, threshold: Tensor, dtype: torch.dtype, above_zero: bool) -> Tensor:
    """The smallest float32 y at which `function`, of y in the model's dtype, reaches the threshold; it rises, or, with
    `above_zero`, it rises from 0 on and is not above 0 before."""

    def value(y: Tensor) -> Tensor:
        # Of an infinite number, which the largest float32 ones are in float16, some functions make no number.
        result = function(y.to(dtype).clamp(max=torch.finfo(dtype).max)).float()
        return torch.where(y >= 0, result, -torch.inf) if above_zero else result

    return smallest_reaching(threshold, value)


def _share_inputs(model: PreTrainedModel, found: Trace) -> list[list[str]]:
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for call in found.layers:
        groups[id(call.input), call.version].append(call.name)
    distinct = set(map(tuple, groups.values()))  # a layer that is executed again may be in the same group again
    members = Counter(name for names in distinct for name in names)
    shared = []
    for names in sorted(distinct):
        layers = [layer for name in names if isinstance(layer := model.get_submodule(name), PackedLinear)]
        binary = len(layers) == len(names) and all(layer.activation_threshold is not None for layer in layers)
        if not binary or len(names) == 1 or any(members[name] > 1 for name in names) or not sharing(layers):
            continue
        if any(map(_hooked, layers)):
            continue
        group = SharedInput(layers)
        for place, layer in enumerate(layers):
            layer.shared = group, place
        shared.append(list(names))
    return shared


def _norm_sums(model: PreTrainedModel) -> list[str]:
    blocks = [
        (name, block)
        for name, block in model.named_modules()
        if isinstance(getattr(block, "dense", None), PackedLinear)
        and not any(map(_hooked, (block, *block.children())))
        and ResidualNorm.fits(block)
    ]
    for name, block in blocks:
        model.set_submodule(name, ResidualNorm(block).train(block.training))
    return [name for name, _ in blocks]
