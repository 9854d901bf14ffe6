"""What `--adapter` does in a recipe: PEFT's config from flags, the rows of the result table, and the card."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import cached_file, is_peft_available

from hf_stompp import pack
from hf_stompp.checkpoint import weight_bytes, whole_folder
from hf_stompp.patching import binary_layers, is_packed
from hf_stompp.results import result_row
from recipe_flags import read_mapping

NORMS_AND_BIASES = "norms_and_biases"
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "ia3": {},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "prompt_tuning": {"num_virtual_tokens": 20},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    NORMS_AND_BIASES: {"bias": "all"},
}


@dataclass
class AdapterArguments:
    adapter: Literal["lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "norms_and_biases"] | None = field(
        default=None,
        metadata={"help": "Train an adapter of PEFT on a packed model; with --binarize, one beside its weights."},
    )
    adapter_config: str | None = field(
        default=None, metadata={"help": """JSON of what its PEFT config is to have otherwise, as '{"r": 32}'."""}
    )


def add_adapter(model: PreTrainedModel, recipe: AdapterArguments, task_type: str) -> Any:
    """The `PeftModel` of a packed model, or of a latent one, whose weights are trained on.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `adapter_config` is no JSON object, or has a field that PEFT's config does not have.
    """
    if not is_peft_available():
        raise ImportError(f"adapter: {recipe.adapter} is one of PEFT; pip install peft, or hf_stompp[peft].")
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from hf_stompp.peft import train_base

    assert recipe.adapter is not None
    settings = DEFAULTS[recipe.adapter] | read_mapping("adapter_config", recipe.adapter_config)
    kind = recipe.adapter.upper()
    if recipe.adapter == NORMS_AND_BIASES:  # a LoRA of no layer, with what it may train besides
        norms = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_norm(module)}
        settings = {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": sorted(norms), **settings}
        kind = "LORA"
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = set(config_class.__dataclass_fields__)
    if recipe.adapter == NORMS_AND_BIASES:
        fields = {"bias", "modules_to_save", "target_modules"}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise ValueError(
            f"adapter_config: {recipe.adapter} has no field {unknown[0]!r}; allowed: {', '.join(sorted(fields))}. If "
            "the YAML file sets it for another adapter, pass --adapter_config '{}'."
        )
    adapted: Any = get_peft_model(model, config_class(task_type=task_type, **settings))
    peft_config = adapted.peft_config["default"]
    source = peft_config.base_model_name_or_path
    if source and Path(source).is_dir():  # as it will be found from everywhere here
        peft_config.base_model_name_or_path = str(Path(source).resolve())
    return train_base(adapted) if binary_layers(adapted) else adapted


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))


def score_adapter(trainer: Trainer, load_base: Callable[[str], PreTrainedModel], source: str) -> dict[str, Any]:
    """The rows of the base alone and with its adapter, both loaded again, and what the adapter takes.

    The base is the packed model that the adapter was trained on. A latent one, which was trained with it, is packed
    into `output_dir/packed`, and its adapter goes to `output_dir/adapter`.

    Args:
        trainer (`Trainer`): After training.
        load_base (`Callable`): Loads a base from a Hub id or a folder.
        source (`str`): Where the base was loaded from.
    """
    from peft import PeftModel

    from hf_stompp.peft.base import adapter_weights
    from hf_stompp.peft.records import FOLDER

    model: Any = trainer.model
    config = model.peft_config["default"]
    adapter, rows = Path(trainer.args.output_dir), []
    if binary_layers(model):
        rows.append(_row("latent fp32, with its adapter", trainer, adapter / FOLDER, adapter))
        source, adapter = str(adapter / "packed"), adapter / "adapter"
        if trainer.is_world_process_zero():
            save_apart(pack(model), trainer.processing_class, Path(source), adapter)
        trainer.accelerator.wait_for_everyone()
    facts = {
        "peft_type": config.peft_type.value,
        "parameters": sum(each.numel() for each in adapter_weights(model, "default").values()),
        "trained_parameters": model.get_nb_trainable_parameters()[0],
        "bytes": weight_bytes(adapter),
        "base": source,
        "folder": str(adapter),
    }
    _put(trainer, load_base(source))
    base = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
    rows.append(_row("base alone, reloaded", trainer, base))
    _put(trainer, PeftModel.from_pretrained(load_base(source), str(adapter)))
    rows.append(_row("base and adapter, reloaded", trainer, base, adapter))
    return {"rows": rows, "adapter": facts}


def save_apart(model: Any, tokenizer: Any, base_folder: Path, adapter_folder: Path) -> None:
    """The packed base and the adapter on it, each in a folder of its own, as they are pushed to the Hub."""
    from hf_stompp.peft import without_adapters

    with whole_folder(base_folder) as draft:
        without_adapters(model).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    model.peft_config["default"].base_model_name_or_path = str(base_folder.resolve())
    with whole_folder(adapter_folder) as draft:
        model.save_pretrained(str(draft))


def write_card(trainer: Trainer, results: dict[str, Any], dataset: str | None, command: str) -> None:
    """The card of the adapter that was scored, in its folder."""
    from hf_stompp.peft.card import adapter_card

    model: Any = trainer.model
    facts = results["adapter"]
    if not is_packed(model):  # PEFT's own is there
        return
    adapter_card(model, results=results, dataset=dataset, command=command).save(Path(facts["folder"]) / "README.md")
    print(
        f"The adapter, of {facts['bytes']:,} bytes, is in {facts['folder']} with its card; its base: {facts['base']}."
    )


def _put(trainer: Trainer, model: Any) -> None:
    """The constructor of Trainer takes no model that can only be evaluated."""
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)


def _row(name: str, trainer: Trainer, *folders: Path) -> dict[str, Any]:
    row = result_row(name, trainer.evaluate(), folders[0])
    return row | {"bytes": sum(weight_bytes(folder) for folder in folders)}
