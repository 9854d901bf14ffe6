"""The model card of an adapter: which base it belongs to, what it adds, how to load both."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from hf_stompp.card import UNNAMED, template
from hf_stompp.config import BinarizationConfig
from hf_stompp.patching import bits_of
from hf_stompp.peft.base import adapter_weights, kind_of
from hf_stompp.results import Scored, hub_id, markdown_table, training_sentence

UNNAMED_BASE = "your-name/the-base-model"
"""Stands for the base in a card that is written before that is on the Hub; `push` puts the real id in its place."""
MARK = "<!-- hf_stompp writes this card anew when the adapter is saved here again; without this line it stays. -->"


def adapter_card(
    model: PeftModel,
    adapter_name: str = "default",
    *,
    results: Mapping[str, Any] | None = None,
    repo_id: str = UNNAMED,
    base_model: str | None = None,
    dataset: str | None = None,
    command: str | None = None,
) -> ModelCard:
    """Writes the card of an adapter on a 1-bit model.

    `model.save_pretrained` writes it too, with what the model alone knows.

    Args:
        model (`PeftModel`): On a packed or latent model.
        adapter_name (`str`, *optional*): Which of its adapters.
        results (`Mapping`, *optional*): `results.json` of the run that made the adapter.
        repo_id (`str`, *optional*): The repository it is for; without it, [`~hf_stompp.push`] fills it in.
        base_model (`str`, *optional*): Hub id of the base; by default the name that it was loaded by, if it is one.
        dataset (`str`, *optional*): Hub id of the data.
        command (`str`, *optional*): The training command.

    Returns:
        `huggingface_hub.ModelCard`: `card.save("adapter/README.md")` writes it.

    Raises:
        ValueError: The model is not of 1 bit, or has no adapter of this name.

    Example:

        >>> adapter_card(model, base_model="user/bert-sst2-1bit").save("adapter/README.md")  # doctest: +SKIP
    """
    quantization = _quantization(model)
    if not isinstance(quantization, BinarizationConfig):
        raise ValueError("adapter_card takes an adapter on a 1-bit model, and this one's base is not binarized.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: received {adapter_name!r}; allowed: {', '.join(sorted(model.peft_config))}.")
    config = model.peft_config[adapter_name]
    base_model = base_model or hub_id(config.base_model_name_or_path)
    weights = adapter_weights(model, adapter_name).values()
    kind = kind_of(config)
    recipe = (results or {}).get("recipe", {})
    task = recipe.get("task_name")
    tags = [
        "1-bit",
        "hf_stompp",
        config.peft_type.value.lower(),
        *([f"base_model:adapter:{base_model}"] if base_model else []),
    ]
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            base_model_relation="adapter" if base_model else None,
            datasets=hub_id(dataset),
            library_name="peft",
            tags=tags,
        ),
        template_path=str(template("adapter_template.md")),
        repo_id=repo_id,
        kind=kind,
        mark=MARK,
        base_model=base_model or UNNAMED_BASE,
        model_class=type(model.get_base_model()).__name__,
        bits=f"W{1 if quantization.weights else 32}A{1 if quantization.activations else 32}",
        sha256=bits_of(model),
        parameters=sum(tensor.numel() for tensor in weights),
        adapter_bytes=sum(tensor.nbytes for tensor in weights),
        scores=_scores((results or {}).get("rows", [])),
        split="validation",
        data=str(Scored(dataset or task, task if dataset else None)),
        eval_limit=recipe.get("max_eval_samples"),
        training=training_sentence(results),
        command=command,
        config=json.dumps(_settings(config), indent=2, default=str),
    )


def write(stock: Callable[..., None], model: PeftModel, output_dir: str) -> None:
    """In the place of PEFT's own card, unless somebody has written one."""
    path = Path(output_dir) / "README.md"
    ours = not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")
    if not ours or not model.peft_config or not isinstance(_quantization(model), BinarizationConfig):
        stock(model, output_dir)
        return
    adapter_card(model, model.active_adapters[0]).save(path)


def _quantization(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return getattr(getattr(base, "config", None), "quantization_config", None)


def _scores(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    metrics = [key for key in rows[0] if key not in ("model", "bytes", "eval_seconds")]
    cells = [[row["model"], *(f"{row[key]:.4f}" for key in metrics), f"{row['bytes']:,}"] for row in rows]
    return markdown_table(["model", *metrics, "bytes"], cells)


def _settings(config: Any) -> dict[str, Any]:
    """Of an adapter's config, what is not PEFT's default, and no path."""
    default = type(config)()
    apart = (
        "base_model_name_or_path",
        "auto_mapping",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
    )
    names = (field.name for field in dataclasses.fields(config) if field.name not in apart)
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name, None)}
    return {name: _plain(value) for name, value in changed.items()}


def _plain(value: Any) -> Any:
    """As JSON has it; PEFT adds the names of heads again each time that it makes a model."""
    names = isinstance(value, list | set) and all(isinstance(each, str) for each in value)
    return sorted(set(value)) if names else value
