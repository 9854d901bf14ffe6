"""The verbs on models, `binarize` and `pack`, and what they find in them."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from hf_stompp.config import BinarizationConfig
from hf_stompp.folding import fold, foldable
from hf_stompp.layers import (
    BINARY,
    PACKED,
    BinaryActivation,
    BinaryEmbedding,
    BinaryLayer,
    FloatActivation,
    LatentLayer,
    LatentWeight,
    PackedActivation,
    PackedEmbedding,
    PackedLayer,
)
from hf_stompp.rewiring import rewire, rewires
from hf_stompp.selection import LayerPlan, embedding_tables, select
from hf_stompp.tracing import LAYERS, skeleton, trace

logger = logging.get_logger(__name__)


def binary_layers(model: nn.Module) -> dict[str, LatentLayer]:
    """The latent layers, tables and tensors of attention of a model by name, in the order of their units."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LatentLayer)}
    return dict(sorted(layers.items(), key=lambda item: item[1].unit))


def binary_weights(model: nn.Module) -> dict[str, LatentWeight]:
    """Those of them that have a weight."""
    return {name: layer for name, layer in binary_layers(model).items() if isinstance(layer, LatentWeight)}


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def packed_tables(model: nn.Module) -> dict[str, PackedEmbedding]:
    """The packed embedding tables of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}


def name_in_base(model: PreTrainedModel, name: str) -> str:
    """The name of a module inside the base model, the same with and without a head."""
    return name if model.base_model is model else name.removeprefix(model.base_model_prefix + ".")


TRAINS_BASE = "_hf_stompp_trains_base"
"""Of a model with adapters: whether its base is its own, and is saved with them (see [`~peft.train_base`])."""


def packed_activations(model: nn.Module) -> dict[str, PackedActivation]:
    """The packed tensors of attention of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedActivation)}


def is_packed(model: nn.Module) -> bool:
    """Whether anything in a model is packed."""
    return bool(packed_layers(model) or packed_tables(model))


def bits_of(model: nn.Module) -> str | None:
    """The SHA-256 of all that is packed in the layers of a model, or was before `dequantize()`: the same with and
    without a head, adapters, kernels and rounded norms. None of a model that is not packed, or not in memory."""
    layers = packed_layers(model).values()
    if not layers:
        return getattr(model, "dequantized_bits", None)
    if any(layer.weight.is_meta for layer in layers):
        return None
    digest = hashlib.sha256()
    for layer in layers:
        _digest(digest, layer.weight, layer.weight_scale, layer.activation_threshold, layer.activation_levels)
    for activation in packed_activations(model).values():
        _digest(digest, activation.activation_threshold, activation.activation_levels)
    return digest.hexdigest()


def _digest(digest: Any, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def frozen_fraction(model: nn.Module) -> float:
    """The share of the weights of a model's latent layers that is frozen now; 0 if it has none."""
    layers = binary_weights(model).values()
    frozen = sum(layer.fraction * layer.weight.numel() for layer in layers)
    return frozen / sum(layer.weight.numel() for layer in layers) if layers else 0.0


def binarize(model: PreTrainedModel, config: BinarizationConfig | None = None) -> PreTrainedModel:
    """Patches a loaded model in place for binarization: the same model as `from_pretrained(...,
    quantization_config=config)` gives.

    The selected layers become [`BinaryLinear`], [`BinaryConv2d`] and [`BinaryEmbedding`] around the same parameters,
    all soft; nothing is frozen until [`StomppCallback`] does it. The resolved selection is written into
    `model.config.quantization_config`.

    Args:
        model (`PreTrainedModel`): A full-precision model, with or without a head.
        config (`BinarizationConfig`, *optional*): Defaults to W1A1 StoMPP.

    Returns:
        `PreTrainedModel`: The same object.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: The model is binarized already, or the config selects nothing (see [`~selection.select`]).

    Example:

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> model = binarize(BertForSequenceClassification(tiny), BinarizationConfig())
        >>> len(binary_layers(model))
        6
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"binarize takes a transformers.PreTrainedModel, not a {type(model).__name__}.")
    if binary_layers(model) or is_packed(model):
        raise ValueError(f"This {type(model).__name__} is binarized already; load the full-precision model again.")
    config = copy.deepcopy(config or BinarizationConfig())
    plans = [plan for plan in select(model, config) if not plan.skipped]
    if rewires(config):
        rewire(model, {plan.name for plan in plans}, config)
        plans = [plan for plan in select(model, config) if not plan.skipped]  # inputs may have other levels now
    if config.include:
        _check_runs_packed(model, {plan.name for plan in plans})
    for plan in plans:
        assert plan.unit is not None
        module = model.get_submodule(plan.name)
        layer: LatentLayer
        if isinstance(module, nn.Embedding):
            layer = BinaryEmbedding.from_float(module, config, key=plan.key, unit=plan.unit)
        elif isinstance(module, FloatActivation):
            layer = BinaryActivation.from_float(module, config, key=plan.key, unit=plan.unit, unsigned=plan.unsigned)
        else:
            kind = BINARY[type(module)]
            layer = kind.from_float(module, config, key=plan.key, unit=plan.unit, unsigned=plan.unsigned)
        model.set_submodule(plan.name, layer)
    config.modules = {plan.key: _entry(plan, model.get_submodule(plan.name), config) for plan in plans}
    model.config.quantization_config = config
    # A file is to have the names that `modules` has, and that the Trainer looks for when it resumes.
    model._weight_conversions = []
    keep_masks_home(model)
    return model


def keep_masks_home(model: nn.Module) -> None:
    """Has DDP leave the masks out of what it sends: they are the same in every process by construction. DDP looks at
    the model that it is given, which may be one around that of [`binarize`]."""
    masks = [f"{name}.{kind}_mask" for name, layer in binary_layers(model).items() for kind in layer.MASKS]
    ignored: Any = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys([*ignored, *masks]))  # type: ignore[assignment]


def _check_runs_packed(model: PreTrainedModel, names: set[str]) -> None:
    """Refuses, before it is trained, what could not run once it is packed: some models read the dtype of a weight."""
    packed = skeleton(model)
    for name in names:
        layer = packed.get_submodule(name)
        if isinstance(layer, LAYERS):
            packed.set_submodule(name, PACKED[type(layer)].empty(layer, binary_input=True))
    try:
        trace(packed, with_head=True)
    except ValueError as error:
        raise ValueError(
            "BinarizationConfig.include selects a layer with which the model cannot run once it is packed, as a ViT "
            f"cannot with its patch embedding, whose dtype it reads: {error} Leave it out of include."
        ) from error


def _entry(plan: LayerPlan, layer: nn.Module, config: BinarizationConfig) -> dict[str, Any]:
    """What `config.modules` says of a binarized layer."""
    if plan.role == "embedding":
        return {"unit": plan.unit, "bits": 1}
    levels = ("unsigned" if plan.unsigned else "signed") if config.activations else None
    if isinstance(layer, BinaryActivation):
        return {"unit": plan.unit, "levels": levels, "features": layer.input_features}
    # A row of bits does not tell the shape of a kernel.
    shape = {"shape": list(layer.weight.shape[1:])} if isinstance(layer, nn.Conv2d) else {}
    return {"unit": plan.unit, "levels": levels, **shape}


def pack(
    model: PreTrainedModel,
    embedding_bits: int | None = None,
    dtype: torch.dtype | None = None,
    fold_batch_norm: bool = True,
) -> PreTrainedModel:
    """Makes the packed model: bits and scales instead of latent weights, and the same outputs, bit for bit.

    Every float operation of the packed layer is the one of the fully frozen latent layer, so that the logits are equal
    but for what a different alignment in memory does to the order of a sum; and, with the extra `fast`, for how its
    kernels round (see [`~hf_stompp.kernels`]). With `embedding_bits` or `dtype` they are not: the tables and whatever
    else is not 1-bit are rounded. The model passed in is not changed, and its latent weights are not copied.

    Args:
        model (`PreTrainedModel`): A binarized model whose every entry is frozen, as after a finished training run. A
            wrapper of DDP, mixed precision or `torch.compile` around it is taken off. Of a `PeftModel` the base is
            packed, without folding, and its adapters are copied onto it.
        embedding_bits (`int`, *optional*): 32, 16, 8, 4 or 1 bits an entry of the embedding tables, with a scale for
            each row (see [`~packing.quantize_rows`]); by default what the model's config says. A table that was
            binarized in training has 1 bit in any case, one that is tied to the output layer stays as it is.
        dtype (`torch.dtype`, *optional*): Of everything that is neither packed nor decides on bits: norms, biases,
            heads. By default it is not changed.
        fold_batch_norm (`bool`, *optional*, defaults to `True`): Leave out the batch norms, and the ReLUs after them,
            that stand between two binary convolutions alone: the second one's thresholds do their work, and not a bit
            changes (see [`~folding.fold`]). Such a model cannot be unpacked.

    Returns:
        `PreTrainedModel`: A new model of the same class in evaluation mode; `save_pretrained` writes the bits.

    Raises:
        ValueError: The model is not binarized, is packed already, has full-precision weights, or is not fully frozen;
            or `embedding_bits` is none of the widths.

    Example:

        >>> packed = pack(model, embedding_bits=8)  # doctest: +SKIP
        >>> packed.save_pretrained("bert-1bit")  # doctest: +SKIP
    """
    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    if hasattr(model, "peft_config"):
        return _pack_under_adapters(model, embedding_bits, dtype)
    layers = binary_layers(model)
    config = _check_packable(model)
    if embedding_bits is not None:
        config = BinarizationConfig.from_dict(config.to_dict() | {"embedding_bits": embedding_bits})
    tables = tables_to_pack(model, config)
    weights = binary_weights(model).values()
    replaced = [tensor for layer in weights for tensor in (layer.weight, layer.weight_mask)]
    replaced += [table.weight for table in tables.values()]
    packed = copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in replaced})
    packed = extract_model_from_parallel(packed, keep_fp32_wrapper=False)
    config = pack_modules(packed.eval(), layers, tables, config)
    if fold_batch_norm:
        binary_inputs = {
            name for name, layer in layers.items() if getattr(layer, "activation_scale", None) is not None
        }
        chains = foldable(model, layers, binary_inputs)
        config.folded = [name_in_base(packed, name) for chain in chains for name in fold(packed, chain)]
        for layer in packed_layers(packed).values():
            layer.straight_through = config.straight_through
    if dtype is not None:
        packed.to(dtype)
        packed.config.dtype = dtype
    _mark_packed(packed, config)
    return packed


def _pack_under_adapters(model: Any, embedding_bits: int | None, dtype: torch.dtype | None) -> Any:
    from hf_stompp.peft.base import PeftModel, on_other_base, without_adapters  # who has adapters has PEFT

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"This {type(model).__name__} has adapters in it. pack takes the PeftModel around it, and packs the base; "
            "hf_stompp.peft.without_adapters(model) is the base alone."
        )
    # An adapter reads what comes out of a batch norm, which would not be there.
    base = pack(without_adapters(model), embedding_bits, dtype, fold_batch_norm=False)
    base.name_or_path = ""  # it is not the model that the latent one was loaded from
    return on_other_base(model, base)


def pack_modules(
    model: PreTrainedModel,
    layers: Mapping[str, LatentLayer],
    tables: Mapping[str, nn.Embedding],
    config: BinarizationConfig,
) -> BinarizationConfig:
    """Puts the packed modules in the place of `layers`, which are taken as frozen, and of `tables`; returns the config
    that lists them."""
    config = copy.deepcopy(config)
    for name, layer in layers.items():
        if isinstance(layer, BinaryEmbedding):
            model.set_submodule(name, PackedEmbedding.from_binary(layer))
        elif isinstance(layer, BinaryActivation):
            model.set_submodule(name, PackedActivation.from_binary(layer))
        elif isinstance(layer, BinaryLayer):
            model.set_submodule(name, PACKED[type(layer)].from_binary(layer))
    for name, table in tables.items():
        if not table.weight.isfinite().all():
            raise ValueError(f"{name}.weight holds values that are not finite: the table cannot be packed.")
        model.set_submodule(name, PackedEmbedding.from_float(table, config.embedding_bits))
        config.modules[name_in_base(model, name)] = {"bits": config.embedding_bits}
    return config


def _check_packable(model: PreTrainedModel) -> BinarizationConfig:
    """Refuses a model that is not binarized, or not to the end; returns its config."""
    layers = binary_layers(model)
    if not layers:
        state = "packed already" if is_packed(model) else "not binarized; train it with StomppCallback first"
        raise ValueError(f"pack takes a binarized model, but this {type(model).__name__} is {state}.")
    config = next(iter(layers.values())).config
    if not config.weights:
        raise ValueError("pack writes 1-bit weights, but this model was binarized with weights=False.")
    unfinished = next(((name, layer) for name, layer in layers.items() if layer.fraction < 1), None)
    if unfinished:
        name, layer = unfinished
        raise ValueError(
            f"pack takes a fully frozen model, but the frozen fraction of this one is {frozen_fraction(model):.4f} "
            f"({name} has {layer.fraction:.4f}). Train to the end of the progression."
        )
    return config


def tables_to_pack(model: PreTrainedModel, config: BinarizationConfig) -> dict[str, nn.Embedding]:
    """The embedding tables that get `config.embedding_bits`; says which do not, and why."""
    if config.embedding_bits == 32:
        return {}
    reasons = embedding_tables(model)
    for name, reason in reasons.items():
        if reason:
            logger.warning(f"{name} stays in full precision: {reason}.")
    tables = {name: model.get_submodule(name) for name, reason in reasons.items() if not reason}
    return {name: table for name, table in tables.items() if not isinstance(table, BinaryEmbedding)}


def _mark_packed(model: PreTrainedModel, config: BinarizationConfig) -> None:
    """Gives the model the quantizer and the config that `from_pretrained` gives a packed checkpoint."""
    config = copy.deepcopy(config)
    config.mode = "packed"
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer, model.quantization_method, model.is_quantized = quantizer, config.quant_method, True
    quantizer.postprocess_model(model)
