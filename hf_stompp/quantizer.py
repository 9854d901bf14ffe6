"""The one file that touches the loading internals of transformers: `from_pretrained` of latent and packed models."""

from collections import defaultdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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

from hf_stompp.config import QUANT_METHOD, BinarizationConfig
from hf_stompp.layers import PackedLinear
from hf_stompp.packing import packed_length
from hf_stompp.patching import binarize, binary_layers, packed_layers, replace_gelu

_PACKED_TENSORS = ("weight", "bias", *PackedLinear.FULL_PRECISION)


class StomppHfQuantizer(HfQuantizer):
    """Loads full-precision and latent checkpoints for training (`mode="train"`) and packed ones (`mode="packed"`).

    A model in training is an ordinary model: the quantizer patches it before its weights are loaded and then lets go
    of it, leaving only `config.quantization_config`, by which its checkpoints are patched again when reloaded.
    """

    quantization_config: BinarizationConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.mode == "packed" and not self.pre_quantized:
            raise ValueError(
                'BinarizationConfig(mode="packed") is what pack() writes; it cannot be asked for on a full-precision '
                'checkpoint. Load with mode="train", train with StomppCallback, and call pack().'
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.mode == "train":
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
        names = _packed_modules(model, checkpoint_files, self.quantization_config)
        if self.quantization_config.replace_gelu:
            replace_gelu(model, set(names))
        for name, binary_input in names.items():
            model.set_submodule(name, PackedLinear.empty(model.get_submodule(name), binary_input))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.mode == "packed":
            for name, packed in packed_layers(model).items():
                _check_packed(name, packed)
            return model
        for name, layer in binary_layers(model).items():
            _fill_added(name, layer, missing_allowed=not self.pre_quantized)
            layer.load_masks()
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = False
        # Without this, save_pretrained writes the key names of the original checkpoint, which the Trainer's raw
        # load_state_dict silently does not match on resuming (transformers issue 48805).
        model._weight_conversions = []
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
        tensor = getattr(layer, key)
        if tensor is None or getattr(tensor, "_is_hf_initialized", False):
            continue
        if not missing_allowed:
            raise ValueError(f"The latent checkpoint has no tensor {name}.{key}: it is incomplete. Save it again.")
        tensor.fill_(value)


def _packed_modules(model: PreTrainedModel, files: list[str] | None, config: BinarizationConfig) -> dict[str, bool]:
    """The linears of `model` that are packed in the checkpoint, and whether their inputs are binary.

    They are found by the checkpoint's own keys, renamed as transformers renames them, so that a backbone loads from
    the checkpoint of a model with a head and the reverse.
    """
    base = "" if model.base_model is model else model.base_model_prefix + "."
    listed = {}
    for key, entry in config.modules.items():
        name = next((n for n in (base + key, key) if _is_linear(model, n)), None)
        if name is not None:
            listed[name] = entry["levels"] is not None
    if not files or not all(file.endswith(".safetensors") for file in files):
        return listed
    found = _checkpoint_tensors(model, files)
    missing = sorted(set(listed) - set(found))
    if missing:
        raise ValueError(
            f"The packed checkpoint has no tensor {missing[0]}.weight, which its quantization_config lists: the "
            "checkpoint is incomplete. Save or download it again."
        )
    for name, tensors in found.items():
        _check_layout(name, model.get_submodule(name), tensors)
    return {name: "activation_threshold" in tensors for name, tensors in found.items()}


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _checkpoint_tensors(model: PreTrainedModel, files: list[str]) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Module → tensor → (dtype, shape), for the modules of `model` that are packed in the safetensors `files`."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    expected = model.state_dict()
    tensors: dict[str, dict[str, tuple[str, list[int]]]] = defaultdict(dict)
    for file in files:
        try:
            with safe_open(file, framework="pt") as checkpoint:
                for key in checkpoint.keys():
                    module, _, tensor = key.rpartition(".")
                    if tensor not in _PACKED_TENSORS:
                        continue
                    # Ask where the layer's ordinary weight would have gone.
                    renamed, _ = rename_source_key(
                        f"{module}.weight", renamings, converters, model.base_model_prefix, expected
                    )
                    name = renamed.removesuffix(".weight")
                    if _is_linear(model, name):
                        view = checkpoint.get_slice(key)
                        tensors[name][tensor] = (view.get_dtype(), view.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupted: {error}. Save or download it again.") from error
    packed_keys = set(PackedLinear.FULL_PRECISION)
    return {
        name: found
        for name, found in tensors.items()
        if packed_keys & set(found) or found.get("weight", ("", []))[0] == "U8"
    }


def _check_layout(name: str, linear: nn.Linear, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Refuses a packed layer with a missing tensor, or one of another type or shape than the format's."""
    n, k = linear.out_features, linear.in_features
    layout: dict[str, tuple[str | None, list[int]]] = {
        "weight": ("U8", [n, packed_length(k)]),
        "weight_scale": ("F32", [n]),
    }
    if linear.bias is not None:
        layout["bias"] = (None, [n])
    if {"activation_threshold", "activation_levels"} & set(tensors):
        layout |= {"activation_threshold": ("F32", [k]), "activation_levels": ("F32", [2])}
    for tensor, (dtype, shape) in layout.items():
        if tensor not in tensors:
            raise ValueError(
                f"The packed checkpoint has no tensor {name}.{tensor}: it is incomplete. Save or download it again."
            )
        found_dtype, found_shape = tensors[tensor]
        if found_shape != shape or (dtype is not None and found_dtype != dtype):
            raise ValueError(
                f"{name}.{tensor} of the packed checkpoint is {found_dtype} {found_shape}, but {type(linear).__name__}"
                f"({k} → {n}) needs {dtype or 'a float'} {shape}: the checkpoint is of another model, or corrupted."
            )
    unexpected = set(tensors) - set(layout)
    if unexpected:
        raise ValueError(
            f"The packed checkpoint has a tensor {name}.{min(unexpected)} that the model has no place for."
        )


def _check_packed(name: str, layer: PackedLinear) -> None:
    """Refuses loaded values that no packed layer can have."""
    for key in ("weight", *PackedLinear.FULL_PRECISION):
        tensor = getattr(layer, key)
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", True):
            raise ValueError(f"{name}.{key} is missing from the packed checkpoint.")
        if tensor is not None and tensor.is_meta:
            return  # offloaded to disk
    bad = {
        "weight": _padding(layer).any(),
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


def _all(tensor: Tensor, condition: Any) -> Tensor:
    return (tensor.isfinite() & condition(tensor)).all()


def _padding(layer: PackedLinear) -> Tensor:
    """The bits of the last byte of each row that stand for no weight; the format has them 0."""
    used = layer.in_features % 8
    return layer.weight[:, -1] >> used if used else torch.zeros(1, dtype=torch.uint8)


def _are_levels(levels: Tensor) -> bool:
    low, high = levels.tolist()
    return high > 0 and low in (0.0, -high)


def register() -> None:
    """Makes transformers know `quant_method="stompp"`; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BinarizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(StomppHfQuantizer)
