"""What a training is refused for before its first step: a model without latent layers, a schedule that cannot end,
weights that masks do not follow."""

from collections.abc import Mapping

from torch import nn

from hf_stompp.layers import LatentWeight
from hf_stompp.patching import TRAINS_BASE, binary_layers, is_packed


def check_schedule(model: nn.Module, max_steps: int) -> None:
    """Refuses a model that is not binarized, or a schedule that cannot finish in `max_steps`."""
    layers = binary_layers(model)
    if is_packed(model):
        raise ValueError(
            f"StomppCallback has nothing to schedule in this {type(model).__name__}, which is packed. To train an "
            "adapter on it, leave the callback out; to train its bits on, take unpack(model)."
        )
    if hasattr(model, "peft_config") and not getattr(model, TRAINS_BASE, False):
        raise ValueError(
            f"StomppCallback changes the base of this {type(model).__name__}, which would be saved nowhere: call "
            "hf_stompp.peft.train_base(model) before you make the Trainer."
        )
    if not layers:
        raise ValueError(
            f"StomppCallback found no binarized layer in this {type(model).__name__}. Load the model with "
            "`from_pretrained(..., quantization_config=BinarizationConfig(...))`, or call `binarize(model, config)`, "
            "before building the Trainer."
        )
    config = next(iter(layers.values())).config
    recorded = getattr(getattr(model, "config", None), "quantization_config", None)
    if recorded is not None and dict(recorded) != dict(config):
        changed = sorted(key for key, value in dict(recorded).items() if dict(config).get(key) != value)
        raise ValueError(
            "model.config.quantization_config differs from the config that the model was binarized with, in "
            f"{changed}. Load the model again with the config that you mean."
        )
    units = 1 + max(layer.unit for layer in layers.values())
    steps = int(max_steps * config.progression_end) - int(max_steps * config.progression_start)
    if config.progression == "layerwise" and steps < units:
        enough = 1 + int(units / (config.progression_end - config.progression_start))  # whatever is rounded
        raise ValueError(
            f"The schedule cannot finish: {units} units have to freeze one by one, but the progression from "
            f"{config.progression_start} to {config.progression_end} of max_steps={max_steps} is {steps} steps. Train "
            f"for {enough} or more, widen progression_start and progression_end, or use progression='global'."
        )
    last = config.unit_fractions(max_steps, max_steps, units)
    if config.progression == "none" and min(last) < 1 and not config.never_freezes:
        raise ValueError(
            f"The schedule cannot finish: no step of max_steps={max_steps} comes after progression_start="
            f"{config.progression_start}. Train for longer, start earlier, or set it to 1.0 to never freeze anything."
        )
    if config.progression == "global" and steps < 1:
        raise ValueError(
            f"The schedule cannot finish: max_steps={max_steps} leaves no step between progression_start="
            f"{config.progression_start} and progression_end={config.progression_end}. Train for longer."
        )


def check_sharding(layers: Mapping[str, LatentWeight]) -> None:
    """Refuses weights that masks do not follow."""
    for name, layer in layers.items():
        if layer.weight.dim() < 2 or layer.weight.numel() == 0:
            raise ValueError(
                f"{name} has a weight of shape {tuple(layer.weight.shape)}: it is sharded as by FSDP 1 or ZeRO stage "
                "3, under which masks do not follow their weights; allowed: DDP, FSDP2 (fsdp_version: 2), ZeRO 2."
            )
