"""LoRA on 1-bit layers, and what PEFT can do that is not for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.lora import Conv2d
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_stompp.fusion import unfuse
from hf_stompp.layers import (
    BinaryConv2d,
    BinaryEmbedding,
    BinaryInput,
    BinaryInputConv2d,
    BinaryLayer,
    PackedConv2d,
    PackedEmbedding,
    PackedLayer,
)

_LAYERS = (BinaryLayer, PackedLayer, BinaryInput, BinaryEmbedding, PackedEmbedding)
METHODS = (PeftType.LORA, PeftType.IA3)
"""Those that need no arithmetic with the weights that they adapt. (Prompts, which adapt none, are not asked for.)"""
INITIALISATIONS = (True, False, "gaussian", "eva")
"""Of LoRA, those that do not look at the weight, nor at its dtype."""
OF_WEIGHTS = ("use_dora", "use_qalora", "kasa_config")
"""Fields of a `LoraConfig` that ask for arithmetic with it."""


class LoraConv2d(Conv2d):
    """LoRA on a 1-bit convolution: PEFT makes the halves of an adapter of the type of the layer that it adapts, which
    here is to be that of the full-precision one."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self._kernel_dim = 4  # of the weight, not of its bits
        with _as_float(self):
            super().update_layer(*args, **kwargs)
        for half in self.lora_A.values():
            half.dilation = self.base_layer.dilation  # which PEFT leaves out


@contextmanager
def _as_float(adapted: LoraConv2d) -> Iterator[None]:
    """Within it, the base layer of an adapter is a full-precision one of the same shape, with nothing in it."""
    one_bit = adapted.base_layer
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    shape = {name: getattr(one_bit, name) for name in names}
    shape |= {"bias": one_bit.bias is not None, "device": one_bit.weight.device}
    shape |= {"dtype": one_bit.weight.dtype} if one_bit.weight.is_floating_point() else {}
    adapted.base_layer = nn.utils.skip_init(nn.Conv2d, **shape)
    try:
        yield
    finally:
        adapted.base_layer = one_bit


def check_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Refuses what needs the float weight of a layer that has none.

    Raises:
        ValueError: The adapter's config asks for it.
    """
    config, layers = tuner.peft_config[adapter_name], one_bit_layers(model)
    if not layers:
        return
    if config.peft_type == PeftType.LORA:  # PEFT would make the halves of the type of the layer
        config._register_custom_module(dict.fromkeys((BinaryConv2d, PackedConv2d, BinaryInputConv2d), LoraConv2d))
    _check_fields(config, next(iter(layers)))
    _check_copies(model, layers, config)
    biased = [name for name, each in tuner.peft_config.items() if getattr(each, "bias", "none") != "none"]
    if biased and len(tuner.peft_config) > 1:
        raise ValueError(
            f"The adapter {biased[0]!r} has bias={tuner.peft_config[biased[0]].bias!r}: it changes the biases of the "
            "base itself, under all others. Load it on a base of its own."
        )
    targets = [name for name in layers if _targets(tuner, config, name)]
    if not targets:
        return
    where = f"{len(targets)} layers with 1-bit weights, {targets[0]!r} and so on"
    if config.peft_type not in METHODS:
        raise ValueError(
            f"{config.peft_type.value} computes with the weights that it adapts, those of {where}. Allowed for them: "
            f"{', '.join(METHODS)}, and prompts and prefixes, which adapt no layer; or choose other `target_modules`."
        )
    if config.peft_type != PeftType.LORA:
        return
    for name in OF_WEIGHTS:
        if getattr(config, name, None):
            raise ValueError(
                f"LoraConfig.{name} is {getattr(config, name)!r}, which computes with the weights that are adapted, "
                f"those of {where}. Leave it out, or choose other `target_modules`."
            )
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"LoraConfig.init_lora_weights is {config.init_lora_weights!r}, which is made of the weights that are "
            f"adapted, those of {where}. Allowed for them: {', '.join(map(repr, INITIALISATIONS))}."
        )


def _check_copies(model: nn.Module, layers: dict[str, nn.Module], config: PeftConfig) -> None:
    """Refuses to train copies, whole or in part, of modules that are bits or become bits."""
    for asked in getattr(config, "modules_to_save", None) or []:
        for name, _ in model.named_modules():
            inside = [each for each in layers if each == name or each.startswith(f"{name}.")]
            if name.endswith(asked) and inside:
                raise ValueError(
                    f"modules_to_save: received {asked!r}, which asks for a copy of {name!r} to be trained, and in it "
                    f"is {inside[0]!r}, which has 1-bit weights. Name norms and heads there, or use LoRA."
                )


def _check_fields(config: PeftConfig, layer: str) -> None:
    """Refuses fields that look at layers in other ways than PEFT's own for them."""
    for field in ("target_parameters", "trainable_token_indices", "layer_replication"):
        if value := getattr(config, field, None):
            raise ValueError(
                f"{type(config).__name__}.{field} is {value!r}, which is not for models with 1-bit weights, as "
                f"{layer!r} has. Leave it out."
            )


def unfuse_base(tuner: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """What one layer hands to another in bits leaves out what an adapter adds to it."""
    unfuse(model)


def one_bit_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → latent, packed or dequantized layer, also those that have adapters already."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, _LAYERS) and not name.endswith(".base_layer"):
            found[name] = layer
    return found


def _targets(tuner: BaseTuner, config: PeftConfig, name: str) -> bool:
    """Whether an adapter is for the layer of that name; where PEFT is still to find out which, yes."""
    target = getattr(config, "target_modules", None)
    if target is None or target == "all-linear":
        return True
    return bool(tuner._check_target_module_exists(config, name))


def check_merge(tuner: BaseTuner) -> None:
    """Refuses to add what an adapter has learned to a weight of one bit.

    Raises:
        ValueError: There is one.
    """
    for name, layer in one_bit_layers(tuner.model).items():
        if not isinstance(tuner.model.get_submodule(name), BaseTunerLayer):
            continue
        scale_or_threshold = (
            getattr(layer, one, None) is not None for one in ("activation_scale", "activation_threshold")
        )
        instead = (
            "and it reads inputs of which the layer sees one bit, so that no one layer computes both"
            if any(scale_or_threshold)
            else "but `pack(model).dequantize()` has float weights: load the adapter on that, and merge it there"
        )
        raise ValueError(
            f"merge: the adapter of {name!r} has no room in a 1-bit weight, {instead}. Base and adapter run side by "
            "side as they are."
        )
