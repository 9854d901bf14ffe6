"""Attention whose queries, keys, values and probabilities can be binary: an implementation for transformers, and the
places in a model where the binary tensors go."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from hf_stompp.layers import FloatActivation
from hf_stompp.tracing import example_inputs, skeleton

IMPLEMENTATION = "stompp"
"""The name of [`attend`] among the attention implementations of transformers."""
PLACE = "binary_attention"
"""The name, inside a module of attention, of its [`AttentionTensors`]."""
_CHANGES_SCORES = ("position_bias", "softcap", "s_aux")
"""What some models give their attention, and [`attend`] does not know."""


class AttentionTensors(nn.Module):
    """The four tensors that an attention multiplies, each in a module that hands it on, in 1 bit or in floats.

    Attributes:
        query, key, value, probabilities (`Module`): [`FloatActivation`], [`BinaryActivation`] or [`PackedActivation`].
    """

    def __init__(self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
        super().__init__()
        heads = query[1]
        self.query = FloatActivation((heads, 1, query[3]))
        self.key = FloatActivation((key[1], 1, key[3]))
        self.value = FloatActivation((value[1], 1, value[3]))
        self.probabilities = FloatActivation((heads, 1, 1))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    r"""Attention of binary tensors, where `module` has a place for them: \\(y = \hat p\,\hat v\\) with \\(p =
    \operatorname{softmax}(c\,\hat q \hat k^\top + m)\\). Without, it is transformers' eager one.

    Args:
        module (`Module`): The attention that calls.
        query, key, value (`Tensor`): `[B, heads, S, head_dim]`; of keys and values there may be fewer heads.
        attention_mask (`Tensor`, *optional*): m, added to the scores, as transformers' `eager_mask` makes it.
        scaling (`float`, *optional*): c; by default \\(1 / \sqrt{\text{head\_dim}}\\).
        dropout (`float`, *optional*, defaults to 0.0): Of the probabilities, in training, before they are binary.

    Returns:
        `tuple`: The output `[B, S, heads, head_dim]`, and \\(\hat p\\).

    Source: of which tensors are binary, with which levels: BiT (Liu et al., 2022).
    """
    unknown = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} gives its attention {unknown[0]}, which 1-bit attention does not know."
        )
    tensors = getattr(module, PLACE, None)
    if tensors is not None:
        query, key, value = tensors.query(query), tensors.key(key), tensors.value(value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    if tensors is not None:
        probabilities = tensors.probabilities(probabilities)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def register() -> None:
    """Makes transformers know the implementation; a second call does nothing."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def install(model: PreTrainedModel) -> None:
    """Has a model attend by [`attend`], and puts [`AttentionTensors`] into each attention of its base model.

    Raises:
        ValueError: No attention of the model asks transformers for its implementation.
    """
    with torch.no_grad():
        shapes = _attentions(model)
    if not shapes:
        raise ValueError(
            f"BinarizationConfig.attention is set, but no attention of {type(model).__name__} asks transformers for "
            "its implementation, so that none can be changed. Set attention=False."
        )
    model.set_attn_implementation(IMPLEMENTATION)
    for name, (query, key, value) in shapes.items():
        tensors = AttentionTensors(query, key, value).train(model.training)
        model.get_submodule(name).add_module(PLACE, tensors)


def with_places(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it has places for binary tensors; else a copy of it without data that has them."""
    if any(isinstance(module, AttentionTensors) for module in model.modules()):
        return model
    planned = skeleton(model)
    install(planned)
    return planned


def check_installed(model: nn.Module) -> None:
    """Refuses a model that has places for binary tensors, and another implementation, which passes them by.

    Raises:
        ValueError: `set_attn_implementation` was called after `binarize`.
    """
    placed = any(isinstance(module, AttentionTensors) for module in model.modules())
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", IMPLEMENTATION)
    if placed and chosen != IMPLEMENTATION:
        raise ValueError(
            f"The attention of this {type(model).__name__} is to be binary, but its implementation was set to "
            f"{chosen!r}, which does not know of that. Call model.set_attn_implementation({IMPLEMENTATION!r})."
        )


def _attentions(model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The modules of a model that call [`attend`], and the shapes of the queries, keys and values."""
    copied = skeleton(model)
    if not copied._can_set_attn_implementation():
        return {}
    copied.set_attn_implementation(IMPLEMENTATION)
    names = {module: name for name, module in copied.named_modules()}
    found: dict[str, tuple[tuple[int, ...], ...]] = {}

    def watch(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found[names[module]] = tuple(tuple(tensor.shape) for tensor in tensors[:3])
        return attend(module, *tensors, **kwargs)

    with ExitStack() as restored:
        AttentionInterface.register(IMPLEMENTATION, watch)
        restored.callback(partial(AttentionInterface.register, IMPLEMENTATION, attend))
        base = copied.base_model
        base(**example_inputs(copied))
    return found
