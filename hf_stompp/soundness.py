"""What the tensors and the config of a packed checkpoint must be; what is not so is refused by name."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp.config import BinarizationConfig
from hf_stompp.folding import foldable
from hf_stompp.layers import PACKED, FloatActivation, PackedActivation, PackedEmbedding, PackedLayer
from hf_stompp.packing import packed_length
from hf_stompp.patching import name_in_base
from hf_stompp.rewiring import rewire, rewires

_ENTRIES = (
    {"bits"},
    {"unit", "bits"},
    {"unit", "levels"},
    {"unit", "levels", "shape"},
    {"unit", "levels", "features"},
)


def _allowed(field: str, value: Any) -> bool:
    if field == "levels":
        return value in (None, "signed", "unsigned")
    if field == "shape":
        return isinstance(value, list) and all(type(size) is int for size in value)
    numbers = range(1 << 16) if field in ("unit", "features") else (1, 4, 8, 16)
    return type(value) is int and value in numbers  # neither True nor 1.0


def check_entry(key: str, entry: Any) -> None:
    """Refuses what is no entry of `config.modules`."""
    right = isinstance(entry, dict) and set(entry) in _ENTRIES
    if not right or not all(_allowed(field, value) for field, value in entry.items()):
        raise ValueError(
            f"quantization_config.modules[{key!r}] in config.json is {entry!r}; allowed: unit, a number, with levels, "
            "'signed', 'unsigned' or null, and of a convolution shape, a list of numbers, or of a tensor of attention "
            "features, a number; or bits of a table, 1, 4, 8 or 16. The config is corrupted: save or download it "
            "again."
        )


def check_shape(name: str, layer: nn.Module, entry: dict[str, Any]) -> None:
    shape = list(layer.weight.shape[1:]) if isinstance(layer, nn.Conv2d) else None
    if entry.get("shape") != shape:
        raise ValueError(
            f"quantization_config.modules in config.json has the shape {entry.get('shape')} for {name}, but that of "
            f"this {type(layer).__name__} is {shape}: the config is of another model, or corrupted. Save or download "
            "it again."
        )


def check_features(name: str, activation: FloatActivation, entry: dict[str, Any]) -> None:
    features = activation.input_features
    if entry["features"] != features or entry["levels"] is None:
        raise ValueError(
            f"quantization_config.modules in config.json has {entry} for {name}, which has {features} features and "
            "levels: the config is of another model, or corrupted. Save or download it again."
        )


def _layout(module: nn.Module, binary_input: bool, bits: int) -> dict[str, tuple[str | None, list[int]]]:
    """Tensor → (dtype, shape) of a packed module; no dtype is any float."""
    if isinstance(module, nn.Embedding):
        rows = module.num_embeddings
        return {"weight": ("U8", [rows, packed_length(module.embedding_dim, bits)]), "weight_scale": ("F32", [rows])}
    shape = PACKED[type(module)].empty(module, binary_input)
    layout: dict[str, tuple[str | None, list[int]]] = {
        "weight": ("U8", list(shape.weight.shape)),
        "weight_scale": ("F32", [shape.outputs]),
    }
    if module.bias is not None:
        layout["bias"] = (None, [shape.outputs])
    if binary_input:
        layout |= {"activation_threshold": ("F32", [shape.input_features]), "activation_levels": ("F32", [2])}
    return layout


def check_folded(packed: PreTrainedModel) -> None:
    """Refuses a packed model whose `config.folded` is not of whole chains."""
    config: BinarizationConfig = packed.config.quantization_config
    if not config.folded:
        return
    plain = copy.deepcopy(packed.config)
    del plain.quantization_config
    with torch.device("meta"):
        model = type(packed)(plain)
    names = {name_in_base(model, name): name for name, _ in model.named_modules()}
    layers = {names[key]: entry for key, entry in config.modules.items() if key in names}
    if rewires(config):
        rewire(model, set(layers), config)
    chains = foldable(model, layers, {name for name, entry in layers.items() if entry.get("levels")})
    expected: set[str] = set()
    for chain in chains:
        whole = {name_in_base(model, name) for name in (chain.norm, chain.activation) if name}
        expected |= whole if whole & set(config.folded) else set()
    wrong = sorted(expected.symmetric_difference(config.folded))
    if wrong:
        raise ValueError(
            f"quantization_config.folded in config.json is wrong about {wrong[0]}: what packing folds is a batch norm "
            "between two binary convolutions, with the ReLU after it. It is corrupted: save or download it again."
        )


def check_layout(name: str, module: nn.Module, tensors: dict[str, tuple[str, list[int]]], bits: int) -> None:
    """Refuses a packed module with a missing tensor, or one of another type or shape than the format's."""
    binary_input = bool({"activation_threshold", "activation_levels"} & set(tensors))
    layout = _layout(module, binary_input, bits)
    for tensor, (dtype, shape) in layout.items():
        if tensor not in tensors:
            raise ValueError(
                f"The packed checkpoint has no tensor {name}.{tensor}: it is incomplete. Save or download it again."
            )
        found_dtype, found_shape = tensors[tensor]
        if found_shape != shape or (dtype is not None and found_dtype != dtype):
            raise ValueError(
                f"{name}.{tensor} of the packed checkpoint is {found_dtype} {found_shape}, but the "
                f"{type(module).__name__} of this model needs {dtype or 'a float'} {shape}: the checkpoint is of "
                "another model, or corrupted."
            )
    unexpected = set(tensors) - set(layout)
    if unexpected:
        raise ValueError(
            f"The packed checkpoint has a tensor {name}.{min(unexpected)} that the model has no place for."
        )


def check_packed(name: str, layer: PackedLayer) -> None:
    """Refuses loaded values that no packed layer can have."""
    bad = {
        "weight": _padding(layer.weight, layer.row_length).any(),
        "weight_scale": ~_all(layer.weight_scale, lambda x: x >= 0),
        "activation_threshold": layer.activation_threshold is not None
        and not layer.activation_threshold.isfinite().all(),
        "activation_levels": layer.activation_levels is not None and not _are_levels(layer.activation_levels),
    }
    for key, is_bad in bad.items():
        if is_bad:
            raise ValueError(
                f"{name}.{key} holds values that no packed layer has (not finite, a negative scale, levels other than "
                "{-γ, γ} or {0, γ}, or set padding bits): the checkpoint is corrupted. Save or download it again."
            )


def check_activation(name: str, activation: PackedActivation) -> None:
    """Refuses loaded values that no packed tensor of attention can have."""
    threshold, levels = activation.activation_threshold, activation.activation_levels
    assert threshold is not None and levels is not None
    if not threshold.isfinite().all() or not _are_levels(levels):
        raise ValueError(
            f"{name} holds values that no packed tensor of attention has (a threshold that is not finite, or levels "
            "other than {-γ, γ} or {0, γ}): the checkpoint is corrupted. Save or download it again."
        )


def check_table(name: str, table: PackedEmbedding) -> None:
    """Refuses loaded values that no packed table can have."""
    if not table.weight_scale.isfinite().all() or _padding(table.weight, table.embedding_dim * table.bits).any():
        raise ValueError(
            f"{name} holds values that no packed table has (a scale that is not finite, or set padding bits): the "
            "checkpoint is corrupted. Save or download it again."
        )


def _all(tensor: Tensor, condition: Any) -> Tensor:
    return (tensor.isfinite() & condition(tensor)).all()


def _padding(packed: Tensor, bits: int) -> Tensor:
    """What is behind the `bits` bits of each row in its last byte; the format has zeros there."""
    return packed[:, -1] >> bits % 8 if bits % 8 else torch.zeros(1, dtype=torch.uint8)


def _are_levels(levels: Tensor) -> bool:
    low, high = levels.tolist()
    return high > 0 and low in (0.0, -high)
