"""The one file that touches the loading internals of transformers: `from_pretrained` of latent and packed models."""

from collections import defaultdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_stompp.config import QUANT_METHOD, BinarizationConfig
from hf_stompp.folding import FOLDED, remove
from hf_stompp.fusion import unfuse
from hf_stompp.layers import (
    BINARY_INPUT,
    PACKED,
    FloatActivation,
    PackedActivation,
    PackedEmbedding,
    PackedLayer,
)
from hf_stompp.patching import (
    binarize,
    binary_layers,
    bits_of,
    pack_modules,
    packed_activations,
    packed_layers,
    packed_tables,
    tables_to_pack,
)
from hf_stompp.rewiring import rewire, rewires
from hf_stompp.selection import tied_modules
from hf_stompp.soundness import (
    check_activation,
    check_entry,
    check_features,
    check_layout,
    check_packed,
    check_shape,
    check_table,
)
from hf_stompp.tracing import LAYERS

logger = logging.get_logger(__name__)

_PACKED_TENSORS = ("weight", "bias", *PackedLayer.FULL_PRECISION)


class StomppHfQuantizer(HfQuantizer):
    """Loads full-precision and latent checkpoints for training (`mode="train"`) and packed ones (`mode="packed"`); a
    full-precision one asked for with `mode="packed"` is binarized after training, at a heavy price in accuracy.

    A model in training is an ordinary model: the quantizer patches it before its weights are loaded and then lets go
    of it, leaving only `config.quantization_config`, by which its checkpoints are patched again when reloaded.
    """

    quantization_config: BinarizationConfig
    _loading = False  # `pack` makes packed models too, whose tensors have never been in a file

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on disk, which 1-bit layers do not support (and hardly need). Map them to "
                '"cpu" or a GPU.'
            )
        if self._packs_while_loading and self.quantization_config.activations:
            raise ValueError(
                'BinarizationConfig(mode="packed") on a full-precision checkpoint binarizes the weights alone: the '
                'scales of binary activations come from data. Set activations=False, or load with mode="train", '
                "train with StomppCallback, and call pack()."
            )

    @property
    def _packs_while_loading(self) -> bool:
        return self.quantization_config.mode == "packed" and not self.pre_quantized

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.mode == "train" or self._packs_while_loading:
            binarize(model, self.quantization_config)
            self.quantization_config = model.config.quantization_config
            # A latent step is smaller than half precision resolves.
            strict = set(model._keep_in_fp32_modules_strict or ())
            kept = ("weight", "activation_scale", "activation_shift", "frozen_fraction")
            model._keep_in_fp32_modules_strict = strict | {f"{n}.{key}" for n in binary_layers(model) for key in kept}
            if not self.pre_quantized:
                ignored = list(model._keys_to_ignore_on_load_missing or ())
                model._keys_to_ignore_on_load_missing = ignored + [rf"\.{name}$" for name in _added_tensors(model)]
            return
        self._loading = True
        config = self.quantization_config
        remove(model, _folded_modules(model, config))
        layers, tables = _packed_modules(model, checkpoint_files, config)
        rewire(model, set(layers), config)
        for name in _packed_tensors(model, checkpoint_files, config):
            place = model.get_submodule(name)
            model.set_submodule(name, PackedActivation.empty(place, place.device, config.straight_through))
        for name, binary_input in layers.items():
            layer = model.get_submodule(name)
            model.set_submodule(name, PACKED[type(layer)].empty(layer, binary_input, config.straight_through))
        for name, bits in tables.items():
            model.set_submodule(name, PackedEmbedding.empty(model.get_submodule(name), bits))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.mode == "packed" and self.pre_quantized:
            if self._loading:
                _check_loaded(model)
            for name, packed in packed_layers(model).items():
                check_packed(name, packed)
            for name, activation in packed_activations(model).items():
                check_activation(name, activation)
            for name, table in packed_tables(model).items():
                check_table(name, table)
            return model
        for name, layer in binary_layers(model).items():
            _fill_added(name, layer, missing_allowed=not self.pre_quantized)
            layer.load_masks()
        if self._packs_while_loading:
            config = self.quantization_config
            config = pack_modules(model, binary_layers(model), tables_to_pack(model, config), config)
            self.quantization_config = model.config.quantization_config = config
            logger.warning(
                f"{type(model).__name__} was binarized without training: expect its accuracy to be near chance. Train "
                "it with StomppCallback (README) for a 1-bit model of use."
            )
            return model
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = False
        # Without this, save_pretrained writes the key names of the original checkpoint, which the Trainer's raw
        # load_state_dict silently does not match on resuming (transformers issue 48805).
        model._weight_conversions = []
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a string once it has been saved
        unfuse(model)
        model.dequantized_bits = model.base_model.dequantized_bits = bits_of(model)  # to which adapters belong
        layers = packed_layers(model)
        for name, layer in layers.items():
            binary_input = layer.activation_threshold is not None
            floats = BINARY_INPUT[type(layer)].from_packed(layer) if binary_input else layer.to_float()
            model.set_submodule(name, floats.to(dtype))
        for name, table in packed_tables(model).items():
            model.set_submodule(name, table.to_float().to(dtype))
        if rewires(self.quantization_config) or any(
            layer.activation_threshold is not None for layer in layers.values()
        ):
            logger.warning(
                "The dequantized model computes what the packed one does, for use in this process and for export. Do "
                "not save it as a checkpoint: binary inputs, replaced activations and added shortcuts are not in "
                "config.json, and it would load as another model. Save the packed one."
            )
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _added_tensors(model: nn.Module) -> set[str]:
    """Names, inside a latent layer, of what a full-precision checkpoint does not have."""
    return {name for layer in binary_layers(model).values() for name in layer.state_dict()} - {"weight", "bias"}


@torch.no_grad()
def _fill_added(name: str, layer: nn.Module, missing_allowed: bool) -> None:
    """Gives the tensors that were not in the checkpoint, which are uninitialised memory now, their starting value."""
    start = {
        "activation_scale": 1.0,
        "activation_shift": 0.0,
        "frozen_fraction": 0.0,
        "mask_step": 0,
        "calibrated": False,
    }
    for key, value in start.items():
        tensor = getattr(layer, key, None)
        # What a stage before has frozen and calibrated, by rules of its own, is to be so anew.
        kept = not missing_allowed or key in ("activation_scale", "activation_shift")
        if tensor is None or (kept and getattr(tensor, "_is_hf_initialized", False)):
            continue
        if not missing_allowed:
            raise ValueError(f"The latent checkpoint has no tensor {name}.{key}: it is incomplete. Save it again.")
        tensor.fill_(value)


def _packed_modules(
    model: PreTrainedModel, files: list[str] | None, config: BinarizationConfig
) -> tuple[dict[str, bool], dict[str, int]]:
    """The layers of `model` that are packed in the checkpoint, and whether their inputs are binary; and the embedding
    tables that are packed, and in how many bits, which only the config says.

    They are found by the checkpoint's own keys, renamed as transformers renames them, so that a backbone loads from
    the checkpoint of a model with a head and the reverse.
    """
    listed: dict[str, bool] = {}
    tables: dict[str, int] = {}
    for key, entry in config.modules.items():
        check_entry(key, entry)
        if "features" in entry:
            continue  # see `_packed_tensors`
        kind = nn.Embedding if "bits" in entry else LAYERS
        name = _named(model, key, kind)
        if name is not None and kind is nn.Embedding:
            tables[name] = entry["bits"]
        elif name is not None:
            listed[name] = entry["levels"] is not None
            check_shape(name, model.get_submodule(name), entry)
    if not files or not all(file.endswith(".safetensors") for file in files):
        return listed, tables
    tied = sorted(tables.keys() & tied_modules(model)) if tables else []
    if tied:
        raise ValueError(
            f"The checkpoint has the table {tied[0]} packed, but {type(model).__name__} shares it with its output "
            "layer, which needs floats. Load the class it was trained as, or dequantize() it first."
        )
    present, found = _checkpoint_tensors(model, files)
    _check_all_present(model, present, [f"{name}.weight" for name in [*listed, *tables] if name not in found])
    for name, tensors in found.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and name not in tables:
            raise ValueError(
                f"The packed checkpoint has a packed table {name}, but quantization_config.modules in its config.json "
                "does not list it with its bits: one of the two is corrupted. Save or download it again."
            )
        check_layout(name, module, tensors, tables.get(name, 1))
    return {name: "activation_threshold" in found[name] for name in found if name not in tables}, tables


def _packed_tensors(model: PreTrainedModel, files: list[str] | None, config: BinarizationConfig) -> list[str]:
    """The tensors of attention that are packed, in the places that `rewire` has made for them. Both the config and
    the checkpoint say which they are."""
    listed = {key: entry for key, entry in config.modules.items() if "features" in entry}
    found = []
    for key, entry in listed.items():
        name = _named(model, key, FloatActivation)
        if name is None:
            raise ValueError(
                f"quantization_config.modules in config.json lists {key!r} with features, which is no place for a "
                f"tensor of attention in this {type(model).__name__}, with attention={config.attention}: the config "
                "is of another model, or corrupted. Save or download it again."
            )
        check_features(name, model.get_submodule(name), entry)
        found.append(name)
    for module in _without_weight(files or []):
        if not any(f".{module}".endswith(f".{key}") for key in listed):
            raise ValueError(
                f"The packed checkpoint has the levels of {module}, but quantization_config.modules in its "
                "config.json does not list it: one of the two is corrupted. Save or download it again."
            )
    return found


def _without_weight(files: list[str]) -> list[str]:
    """What has levels in a checkpoint, and no weight."""
    keys: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as checkpoint:  # has been read once, and is no broken one
                keys |= set(checkpoint.keys())
    modules = (key.removesuffix(".activation_levels") for key in keys if key.endswith(".activation_levels"))
    return sorted(module for module in modules if f"{module}.weight" not in keys)


def _folded_modules(model: PreTrainedModel, config: BinarizationConfig) -> list[str]:
    names = {key: _named(model, key, FOLDED) for key in config.folded}
    for key, name in names.items():
        if name is None:
            raise ValueError(
                f"quantization_config.folded in config.json lists {key!r}, which is no batch norm or ReLU of "
                f"{type(model).__name__}: the config is of another model, or corrupted. Save or download it again."
            )
    return [name for name in names.values() if name]


def _named(model: PreTrainedModel, key: str, kind: Any) -> str | None:
    """The name in `model` of the module of a kind that is called `key` in the base model, if it has it."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    return next((name for name in (base + key, key) if _is_module(model, name, kind)), None)


def _is_module(model: nn.Module, name: str, kind: Any) -> bool:
    try:
        return isinstance(model.get_submodule(name), kind)
    except AttributeError:
        return False


def _check_all_present(model: PreTrainedModel, present: set[str], missing: list[str]) -> None:
    """Refuses a checkpoint that lacks packed weights (`missing`) or anything else of the base model, which
    transformers would make up with a warning. Heads are made up by right, and poolers, which another head has not."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    for name in model.base_model.state_dict(prefix=prefix):
        if name not in present and name not in tied and "pooler" not in name.split("."):
            missing.append(name)
    if missing:
        raise ValueError(
            f"The packed checkpoint has no tensor {missing[0]}: it is incomplete. Save or download it again."
        )


def _checkpoint_tensors(
    model: PreTrainedModel, files: list[str]
) -> tuple[set[str], dict[str, dict[str, tuple[str, list[int]]]]]:
    """The names in `model` of all tensors in the safetensors `files`; and module → tensor → (dtype, shape), for the
    modules that are packed in them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    expected = model.state_dict()
    present: set[str] = set()
    tensors: dict[str, dict[str, tuple[str, list[int]]]] = defaultdict(dict)
    for file in files:
        try:
            with safe_open(file, framework="pt") as checkpoint:
                for key in checkpoint.keys():
                    module, _, tensor = key.rpartition(".")
                    present.add(rename_source_key(key, renamings, converters, model.base_model_prefix, expected)[0])
                    if tensor not in _PACKED_TENSORS:
                        continue
                    # Ask where the layer's ordinary weight would have gone.
                    renamed, _ = rename_source_key(
                        f"{module}.weight", renamings, converters, model.base_model_prefix, expected
                    )
                    name = renamed.removesuffix(".weight")
                    if _is_module(model, name, (*LAYERS, nn.Embedding)):
                        view = checkpoint.get_slice(key)
                        tensors[name][tensor] = (view.get_dtype(), view.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupted: {error}. Save or download it again.") from error
    packed_keys = set(PackedLayer.FULL_PRECISION)
    return present, {
        name: found
        for name, found in tensors.items()
        if packed_keys & set(found) or found.get("weight", ("", []))[0] == "U8"
    }


def _check_loaded(model: nn.Module) -> None:
    """Refuses packed modules with a tensor that was not in the checkpoint, and is uninitialised memory now."""
    packed = packed_layers(model) | packed_tables(model) | packed_activations(model)
    for name, module in packed.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if key != "bias" and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(
                    f"The packed checkpoint has no tensor {name}.{key}: it is incomplete. Save or download it again."
                )


def register() -> None:
    """Makes transformers know `quant_method="stompp"`; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BinarizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(StomppHfQuantizer)
