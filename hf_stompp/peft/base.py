"""The base of an adapter: its bits, which the adapter belongs to, and its weights where both are trained."""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_stompp.checkpoint import weight_files
from hf_stompp.layers import BinaryLayer
from hf_stompp.patching import binary_layers, bits_of

logger = logging.get_logger(__name__)

BITS = "hf_stompp_base_bits"
"""The field of `adapter_config.json` that has the SHA-256 of the bits which the adapter was trained on."""
FOLDER = "base"
"""Where, beside an adapter, the weights of a base are that is trained with it."""
_TRAINED_ON, _INJECTED_INTO = f"_{BITS}", f"_{BITS}_now"


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The base of a model with adapters, as it was before it had them: another structure around the same tensors.

    `PeftModel.unload()` takes the adapters out of the model itself. Here it keeps them: what is written into a tensor
    of the one is in the other.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With adapters, or without.

    Example:

        >>> without_adapters(model).save_pretrained("base")  # doctest: +SKIP
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    bare: PreTrainedModel = copy.deepcopy(base, shared)
    for name, module in list(bare.named_modules()):
        if isinstance(module, BaseTunerLayer):
            bare.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            bare.set_submodule(name, module.original_module)
    vars(bare).pop("peft_config", None)
    bare._hf_peft_config_loaded = False
    return bare


def train_base(model: PeftModel) -> PeftModel:
    """Has the latent base of an adapter be trained with it: StoMPP with a side path in float, which stays.

    `get_peft_model` leaves the adapter alone trainable. After this call the base is trained too, its `StomppCallback`
    freezes it as ever, and checkpoints have its weights in the folder `base`; [`~hf_stompp.pack`] packs it, and keeps
    the adapter.

    Args:
        model (`PeftModel`): On a model that [`~hf_stompp.binarize`] has made.

    Returns:
        `PeftModel`: The same object.

    Raises:
        ValueError: The base has no latent layers.

    Example:

        >>> model = get_peft_model(binarize(model), LoraConfig(target_modules="all-linear"))  # doctest: +SKIP
        >>> model = train_base(model)  # doctest: +SKIP
    """
    layers = binary_layers(model)
    if not layers:
        raise ValueError(
            "train_base takes an adapter on a model that binarize() has made, and this one has no latent layer. Call "
            "binarize(model, config) before get_peft_model."
        )
    replaced = [module.original_module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    left = {id(parameter) for module in replaced for parameter in module.parameters()}
    left |= {
        id(layer.activation_scale)
        for layer in layers.values()
        if isinstance(layer, BinaryLayer) and not layer.config.learn_activation_scale
    }
    for parameter in without_adapters(model).parameters():
        parameter.requires_grad_(parameter.requires_grad or id(parameter) not in left)
    return model


def adapter_weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What is saved of an adapter, and of the modules that are saved with it."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return weights


def on_other_base(model: PeftModel, base: PreTrainedModel) -> PeftModel:
    """A new model of `base` with copies of the adapters of `model`, and of what is saved with them."""
    other: PeftModel | None = None
    for name, config in model.peft_config.items():
        config = copy.deepcopy(config)
        config.base_model_name_or_path = None
        vars(config).update({_TRAINED_ON: None, _INJECTED_INTO: None})
        with torch.random.fork_rng():
            if other is None:
                other = get_peft_model(base, config, adapter_name=name)
            else:
                other.add_adapter(name, config)
        set_peft_model_state_dict(other, adapter_weights(model, name), adapter_name=name)
    assert other is not None
    other.set_adapter(model.active_adapter)
    return other.eval()


# --- which bits an adapter belongs to --------------------------------------------------------------------------------


def check_injection(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Refuses an adapter that was trained on other bits.

    Raises:
        ValueError: It was.
    """
    check_base(tuner.peft_config[adapter_name], model)


def check_prompt(model: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
    """The same of prompts, which are not put into a model."""
    if peft_config.is_prompt_learning:
        check_base(peft_config, model.base_model)


def check_base(config: PeftConfig, model: nn.Module) -> None:
    """Refuses the config of an adapter that was trained on other bits; else it knows these from now on."""
    now, before = bits_of(model), vars(config).get(_TRAINED_ON)
    if before is not None and now != before and not binary_layers(model):
        has = f"has others ({now[:12]}…)" if now else "has none"
        raise ValueError(
            f"The adapter was trained on the bits of {_quoted(config.base_model_name_or_path)} (SHA-256 "
            f"{before[:12]}…), and {_quoted(getattr(model, 'name_or_path', None))} {has}: it would add to them what "
            "repairs the others. Load it on the model that it was trained on, or train one for this."
        )
    vars(config)[_INJECTED_INTO] = now


def _quoted(name: str | None) -> str:
    return repr(name) if name else "a model without a name"


def remember_base(from_peft_type: Callable[..., PeftConfig], cls: type, **kwargs: Any) -> PeftConfig:
    """What `adapter_config.json` says of the base goes with the config."""
    bits = kwargs.pop(BITS, None)
    config = from_peft_type(cls, **kwargs)
    vars(config)[_TRAINED_ON] = bits
    return config


def name_base(to_dict: Callable[..., dict[str, Any]], config: PeftConfig) -> dict[str, Any]:
    """And into `adapter_config.json` goes what the config knows."""
    known = vars(config)
    bits = known.get(_INJECTED_INTO) or known.get(_TRAINED_ON)
    return to_dict(config) | ({BITS: bits} if bits else {})


# --- a base that is trained with its adapter -------------------------------------------------------------------------


def save_with_base(save: Callable[..., Any], model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Saves the adapter, and the base beside it if that is trained too: it is nowhere else."""
    save(model, save_directory, *args, **kwargs)
    trained = any(layer.weight.requires_grad for layer in binary_layers(model).values())
    if trained and kwargs.get("is_main_process", True):
        without_adapters(model).save_pretrained(Path(save_directory) / FOLDER)


def load_with_base(
    load: Callable[..., Any], model: PeftModel, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Loads the adapter, and the base that was trained with it.

    Raises:
        ValueError: The base is not that of this model.
    """
    folder = Path(model_id) / FOLDER
    if folder.is_dir():
        _load_base(model, folder)
    return load(model, model_id, *args, **kwargs)


def _load_base(model: PeftModel, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= load_file(file)
    base = without_adapters(model)
    tied: Mapping[str, Any] = getattr(base, "all_tied_weights_keys", None) or {}
    expected = {name: tensor.shape for name, tensor in base.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if expected.get(name) != tensor.shape]
    wrong += [name for name in expected if name not in tensors and name not in tied]
    if wrong:
        raise ValueError(
            f"The adapter was trained with its base, which is in {str(folder)!r}, and "
            f"{_quoted(getattr(base, 'name_or_path', None))} is another one ({wrong[0]}). Load {str(folder)!r} with "
            "from_pretrained, and the adapter on that."
        )
    base.load_state_dict(tensors, strict=False)
    for layer in binary_layers(model).values():  # `base` has layers of its own around the same tensors
        layer.load_masks()
