"""A base and its adapters: taken apart, trained together, and put onto another one."""

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp.layers import LatentInput
from hf_stompp.patching import TRAINS_BASE, binary_layers


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The base of a model with adapters, as it was before it had them: another structure around the same tensors.

    `PeftModel.unload()` takes the adapters out of the model itself. Here it keeps them: what is written into a tensor
    of the one is in the other.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With adapters, or without.

    Example:

        >>> without_adapters(model).save_pretrained("base")  # doctest: +SKIP
    """
    base: Any = model.base_model if isinstance(model, PeftModel) else model
    base = base.model if isinstance(base, BaseTuner) else base
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    bare: PreTrainedModel = copy.deepcopy(base, shared)
    replaced = "."
    for name, module in list(bare.named_modules()):
        if name.startswith(f"{replaced}."):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            replaced = name
            around = isinstance(module, AuxiliaryTrainingWrapper)
            bare.set_submodule(name, module.original_module if around else module.get_base_layer())
    vars(bare).pop("peft_config", None)
    bare._hf_peft_config_loaded = False
    return bare


def train_base(model: PeftModel) -> PeftModel:
    """Has the latent base of an adapter be trained with it: StoMPP with a side path in float, which stays.

    `get_peft_model` leaves the adapter alone trainable. After this call the base is trained too, its `StomppCallback`
    freezes it as ever, and it is saved beside the adapter, in the folder `latent_base`, and loaded with it;
    [`~hf_stompp.pack`] packs it, and keeps the adapter.

    Args:
        model (`PeftModel`): On a model that [`~hf_stompp.binarize`] has made.

    Returns:
        `PeftModel`: The same object.

    Raises:
        ValueError: The base has no latent layers, or there is no adapter.

    Example:

        >>> model = get_peft_model(binarize(model), LoraConfig(target_modules="all-linear"))  # doctest: +SKIP
        >>> model = train_base(model)  # doctest: +SKIP
    """
    layers = binary_layers(model)
    if not layers or not hasattr(model, "peft_config"):
        lacks = "no adapter" if layers else "no latent layer"
        raise ValueError(
            f"train_base takes an adapter on a model that binarize() has made, and this one has {lacks}. Call "
            "binarize(model, config), then get_peft_model, then this."
        )
    replaced = [module.original_module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    left = {id(parameter) for module in replaced for parameter in module.parameters()}
    left |= {
        id(layer.activation_scale)
        for layer in layers.values()
        if isinstance(layer, LatentInput) and not layer.config.learn_activation_scale
    }
    for parameter in without_adapters(model).parameters():
        parameter.requires_grad_(parameter.requires_grad or id(parameter) not in left)
    setattr(model, TRAINS_BASE, True)
    return model


def kind_of(config: PeftConfig) -> str:
    """PEFT's name of the method, but for a LoRA of no layer, which is there for what it trains besides."""
    nothing = getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES
    return "norms and biases" if nothing else str(config.peft_type.value)


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
        with torch.random.fork_rng():
            if other is None:
                other = get_peft_model(base, config, adapter_name=name)
            else:
                other.add_adapter(name, config)
        set_peft_model_state_dict(other, adapter_weights(model, name), adapter_name=name)
    assert other is not None
    active = model.active_adapters
    if model.active_peft_config.is_prompt_learning or active == [model.active_adapter]:
        other.set_adapter(model.active_adapter)
    else:
        other.base_model.set_adapter(active)  # several at once
    return other.eval()
