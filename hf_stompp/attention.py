"""Attention whose queries, keys, values and probabilities can be binary: an implementation for transformers, and the
places in a model where the binary tensors go."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from hf_stompp.layers import FloatActivation
from hf_stompp.tracing import example_inputs, execute, skeleton

IMPLEMENTATION = "stompp"
"""The name of [`attend`] among the attention implementations of transformers."""
PLACE = "binary_attention"
"""The name, inside a module of attention, of its [`AttentionTensors`]."""
_PROBE = "stompp_probe"
"""An implementation that leaves the shapes of its tensors in the module that calls it, under this name."""
_CHANGES_SCORES = ("position_bias", "softcap", "s_aux", "sinks", "indices", "block_indices")
"""What some models give their attention, and [`attend`] does not know."""

Shape = tuple[int, ...]


class AttentionTensors(nn.Module):
    """The four tensors that an attention multiplies, each in a module that hands it on, in 1 bit or in floats.

    Their names are in the plural, for PEFT finds the layers to adapt by the end of their names: `query`, `value`.

    Attributes:
        queries, keys, values, probabilities (`Module`): [`FloatActivation`], [`BinaryActivation`] or
            [`PackedActivation`].
    """

    def __init__(self, query: Shape, key: Shape, value: Shape, device: torch.device) -> None:
        super().__init__()
        self.queries = FloatActivation((query[1], 1, query[3]), device)
        self.keys = FloatActivation((key[1], 1, key[3]), device)
        self.values = FloatActivation((value[1], 1, value[3]), device)
        self.probabilities = FloatActivation((query[1], 1, 1), device)


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
        dropout (`float`, *optional*, defaults to 0.0): Of the probabilities, in training. Binary ones are dropped
            once they are: scaled up before, more of them would reach the threshold than in evaluation.

    Returns:
        `tuple`: The output `[B, S, heads, head_dim]`, and \\(\hat p\\).

    Raises:
        ValueError: The model gives its attention something else that changes the scores.

    Source: which tensors are binary, and with which levels: BiT (Liu et al., 2022).
    """
    unknown = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} gives its attention {unknown[0]}, which 1-bit attention does not know. Set "
            "attention=False for this model."
        )
    places = getattr(module, PLACE, None)
    if places is not None:
        query, key, value = places.queries(query), places.keys(key), places.values(value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1)
    if places is not None:
        probabilities = places.probabilities(probabilities)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def register() -> None:
    """Makes transformers know the implementation; a second call does nothing."""
    for name, function in ((IMPLEMENTATION, attend), (_PROBE, _probe)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, eager_mask)


def install(model: PreTrainedModel) -> None:
    """Has a model attend by [`attend`], and puts [`AttentionTensors`] into each attention of its base model.

    Raises:
        ValueError: No attention of the model asks transformers for its implementation; or the model cannot be run on
            its skeleton.
    """
    shapes = _attentions(model)
    if not shapes:
        raise ValueError(
            f"BinarizationConfig.attention is set, but no attention of {type(model).__name__} asks transformers for "
            "its implementation, so that none can be changed. Set attention=False."
        )
    model.set_attn_implementation(IMPLEMENTATION)
    for name, (query, key, value) in shapes.items():
        attention = model.get_submodule(name)
        device = next(attention.parameters(), next(model.parameters())).device
        attention.add_module(PLACE, AttentionTensors(query, key, value, device).train(attention.training))
        attention.register_forward_pre_hook(_check_implementation)


def with_places(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it has places for binary tensors; else a copy of it without data that has them."""
    if any(isinstance(module, AttentionTensors) for module in model.modules()):
        return model
    planned = skeleton(model)
    install(planned)
    return planned


def _check_implementation(attention: nn.Module, args: Any) -> None:
    """Refuses to attend by another implementation, which would pass the binary tensors by."""
    chosen = getattr(getattr(attention, "config", None), "_attn_implementation", IMPLEMENTATION)
    if chosen not in (IMPLEMENTATION, _PROBE):
        raise ValueError(
            f"This {type(attention).__name__} is to be binary, but its implementation was set to {chosen!r}, which "
            f"does not know of that. Call model.set_attn_implementation({IMPLEMENTATION!r})."
        )


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    vars(module)[_PROBE] = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    return attend(module, query, key, value, *args, **kwargs)


@torch.inference_mode(False)
@torch.no_grad()
def _attentions(model: PreTrainedModel) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The modules of a model that ask transformers for their attention, and the shapes of queries, keys and values."""
    copied = skeleton(model)
    if not copied._can_set_attn_implementation():
        return {}
    copied.set_attn_implementation(_PROBE)
    execute(copied, example_inputs(copied))
    return {name: vars(module)[_PROBE] for name, module in copied.named_modules() if _PROBE in vars(module)}
