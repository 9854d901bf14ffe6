"""`unpack`: a latent model out of a packed one."""

import copy
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from hf_stompp.config import BinarizationConfig
from hf_stompp.layers import (
    BINARY,
    BinaryActivation,
    BinaryEmbedding,
    BinaryLayer,
    FloatActivation,
    LatentInput,
    PackedActivation,
    PackedLayer,
)
from hf_stompp.patching import is_packed, name_in_base, packed_activations, packed_layers, packed_tables

Input = TypeVar("Input", bound=LatentInput)


def unpack(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a latent, fully frozen model out of a packed one, to go on training it: the inverse of [`~patching.pack`].

    The latent weights are `scale · sign`, and embedding tables have the values they were rounded to; what they were
    before packing is gone, so that all of a row are equally far from turning. To train it with everything frozen, set
    `model.config.quantization_config.progression = "none"`; another progression opens it again. Packing again gives
    the same bits, and the same scales up to float rounding. The model passed in is not changed.

    Raises:
        ValueError: The model is not packed, or batch norms were folded when it was.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "unpack takes a model without adapters, which belong to its bits: unpack(hf_stompp.peft.without_adapters("
            "model)), and train new ones."
        )
    if not is_packed(model):
        raise ValueError(f"unpack takes a packed model, but this {type(model).__name__} has no packed layer.")
    config = copy.deepcopy(model.config.quantization_config)
    if config.folded:
        raise ValueError(
            f"The batch norm {config.folded[0]} was folded into thresholds when this model was packed: it cannot be "
            "trained again. Unpack one made by pack(model, fold_batch_norm=False), or go on with the latent model."
        )
    config.mode = "train"
    config.modules = {key: entry for key, entry in config.modules.items() if "unit" in entry}
    latent = copy.deepcopy(model)
    for name, layer in packed_layers(model).items():
        latent.set_submodule(name, _to_binary(layer, config, name_in_base(model, name)))
    for name, activation in packed_activations(model).items():
        latent.set_submodule(name, _to_binary_activation(activation, config, name_in_base(model, name)))
    for name, packed in packed_tables(model).items():
        table, key = packed.to_float(), name_in_base(model, name)
        if key in config.modules:
            table = BinaryEmbedding.from_float(table, config, key=key, unit=config.modules[key]["unit"])
            table.set_frozen(1.0, step=0)
        latent.set_submodule(name, table)
    latent.hf_quantizer.remove_quantization_config(latent)
    latent.config.quantization_config = config
    latent.config._is_quantized = False
    return latent


@torch.no_grad()
def _to_binary(layer: PackedLayer, config: BinarizationConfig, key: str) -> BinaryLayer:
    levels = layer.activation_levels
    unsigned = levels is not None and levels[0].item() == 0
    unit, floats = _unit(config, key), layer.to_float()
    binary = BINARY[type(floats)].from_float(floats, config, key=key, unit=unit, unsigned=unsigned)
    return _as_packed(binary, layer)


def _unit(config: BinarizationConfig, key: str) -> int:
    if key not in config.modules:
        raise ValueError(f"model.config.quantization_config.modules does not list {key!r}, so its unit is not known.")
    unit: int = config.modules[key]["unit"]
    return unit


def _to_binary_activation(packed: PackedActivation, config: BinarizationConfig, key: str) -> BinaryActivation:
    assert packed.activation_levels is not None
    place, unsigned = FloatActivation(packed.shape, packed.activation_levels.device), packed.activation_levels[0] == 0
    binary = BinaryActivation.from_float(place, config, key=key, unit=_unit(config, key), unsigned=bool(unsigned))
    return _as_packed(binary, packed)


@torch.no_grad()
def _as_packed(binary: Input, packed: PackedLayer | PackedActivation) -> Input:
    """A latent module with the levels and thresholds of a packed one, all frozen."""
    if binary.activation_scale is not None and packed.activation_levels is not None:
        binary.activation_scale.copy_(packed.activation_levels[1:])
    if binary.activation_shift is not None and packed.activation_threshold is not None:
        binary.activation_shift.copy_(packed.activation_threshold)
    binary.calibrated.fill_(True)
    binary.set_frozen(1.0, step=0)
    return binary
