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
from transformers.utils import logging

from hf_stompp.config import QUANT_METHOD, BinarizationConfig
from hf_stompp.layers import BinaryInputLinear, PackedEmbedding, PackedLinear
from hf_stompp.packing import packed_length
from hf_stompp.patching import (
    binarize,
    binary_layers,
    pack_modules,
    packed_layers,
    packed_tables,
    replace_gelu,
    tables_to_pack,
)
from hf_stompp.selection import tied_modules

logger = logging.get_logger(__name__)

_PACKED_TENSORS = ("weight", "bias", *PackedLinear.FULL_PRECISION)


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
        linears, tables = _packed_modules(model, checkpoint_files, self.quantization_config)
        if self.quantization_config.replace_gelu:
            replace_gelu(model, set(linears))
        for name, binary_input in linears.items():
            model.set_submodule(name, PackedLinear.empty(model.get_submodule(name), binary_input))
        for name, bits in tables.items():
            model.set_submodule(name, PackedEmbedding.empty(model.get_submodule(name), bits))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.mode == "packed" and self.pre_quantized:
            if self._loading:
                _check_loaded(model)
            for name, packed in packed_layers(model).items():
                _check_packed(name, packed)
            for name, table in packed_tables(model).items():
                _check_table(name, table)
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
        layers = packed_layers(model)
        for name, layer in layers.items():
            binary_input = layer.activation_threshold is not None
            floats = BinaryInputLinear.from_packed(layer) if binary_input else layer.to_float()
            model.set_submodule(name, floats.to(dtype))
        for name, table in packed_tables(model).items():
            model.set_submodule(name, table.to_float().to(dtype))
        if self.quantization_config.replace_gelu or any(
            layer.activation_threshold is not None for layer in layers.values()
        ):
            logger.warning(
                "The dequantized model computes what the packed one does, for use in this process and for export. Do "
                "not save it as a checkpoint: binary inputs and replaced activations are not in config.json, and it "
                "would load as another model. Save the packed one."
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
        if tensor is None or getattr(tensor, "_is_hf_initialized", False):
            continue
        if not missing_allowed:
            raise ValueError(f"The latent checkpoint has no tensor {name}.{key}: it is incomplete. Save it again.")
        tensor.fill_(value)


def _packed_modules(
    model: PreTrainedModel, files: list[str] | None, config: BinarizationConfig
) -> tuple[dict[str, bool], dict[str, int]]:
    """The linears of `model` that are packed in the checkpoint, and whether their inputs are binary; and the embedding
    tables that are packed, and in how many bits, which only the config says.

    They are found by the checkpoint's own keys, renamed as transformers renames them, so that a backbone loads from
    the checkpoint of a model with a head and the reverse.
    """
    base = "" if model.base_model is model else model.base_model_prefix + "."
    listed: dict[str, bool] = {}
    tables: dict[str, int] = {}
    for key, entry in config.modules.items():
        kind = nn.Embedding if "bits" in entry else nn.Linear
        name = next((n for n in (base + key, key) if _is_module(model, n, kind)), None)
        if name is not None and kind is nn.Embedding:
            tables[name] = entry["bits"]
        elif name is not None:
            listed[name] = entry["levels"] is not None
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
        _check_layout(name, module, tensors, tables.get(name, 1))
    return {name: "activation_threshold" in found[name] for name in found if name not in tables}, tables


def _is_module(model: nn.Module, name: str, kind: Any) -> bool:
    try:
        return isinstance(model.get_submodule(name), kind)
    except AttributeError:
        return False


def _check_all_present(model: PreTrainedModel, present: set[str], missing: list[str]) -> None:
    """Refuses a checkpoint that lacks packed weights (`missing`) or any other parameter of the base model, which
    transformers would make up with a warning. Heads are made up by right, and poolers, which another head has not."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    for name, _ in model.base_model.named_parameters(prefix=prefix.removesuffix(".")):
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
                    if _is_module(model, name, (nn.Linear, nn.Embedding)):
                        view = checkpoint.get_slice(key)
                        tensors[name][tensor] = (view.get_dtype(), view.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupted: {error}. Save or download it again.") from error
    packed_keys = set(PackedLinear.FULL_PRECISION)
    return present, {
        name: found
        for name, found in tensors.items()
        if packed_keys & set(found) or found.get("weight", ("", []))[0] == "U8"
    }


def _layout(
    module: nn.Linear | nn.Embedding, binary_input: bool, bits: int
) -> dict[str, tuple[str | None, list[int]]]:
    """Tensor → (dtype, shape) of a packed module; no dtype is any float."""
    if isinstance(module, nn.Embedding):
        rows = module.num_embeddings
        return {"weight": ("U8", [rows, packed_length(module.embedding_dim, bits)]), "weight_scale": ("F32", [rows])}
    n, k = module.out_features, module.in_features
    layout: dict[str, tuple[str | None, list[int]]] = {
        "weight": ("U8", [n, packed_length(k)]),
        "weight_scale": ("F32", [n]),
    }
    if module.bias is not None:
        layout["bias"] = (None, [n])
    if binary_input:
        layout |= {"activation_threshold": ("F32", [k]), "activation_levels": ("F32", [2])}
    return layout


def _check_layout(
    name: str, module: nn.Linear | nn.Embedding, tensors: dict[str, tuple[str, list[int]]], bits: int
) -> None:
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


def _check_loaded(model: nn.Module) -> None:
    """Refuses packed modules with a tensor that was not in the checkpoint, and is uninitialised memory now."""
    for name, module in (packed_layers(model) | packed_tables(model)).items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if key != "bias" and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(
                    f"The packed checkpoint has no tensor {name}.{key}: it is incomplete. Save or download it again."
                )


def _check_packed(name: str, layer: PackedLinear) -> None:
    """Refuses loaded values that no packed layer can have."""
    bad = {
        "weight": _padding(layer.weight, layer.in_features).any(),
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


def _check_table(name: str, table: PackedEmbedding) -> None:
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


def register() -> None:
    """Makes transformers know `quant_method="stompp"`; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BinarizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(StomppHfQuantizer)
