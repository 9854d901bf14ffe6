"""An adapter on its way to the Hub: what `push` publishes of it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_stompp.checkpoint import read_json, write_json
from hf_stompp.patching import binary_layers
from hf_stompp.peft.card import UNNAMED_BASE
from hf_stompp.peft.records import BASE, CONFIG
from hf_stompp.results import hub_id

WEIGHTS, CARD = "adapter_model.safetensors", "README.md"


def saved_adapter(model: Any, files: Mapping[str, Path], base_model: str | None, temporary: Path) -> tuple[Path, str]:
    """A copy of an adapter whose config names its base by a Hub id, and its card.

    Args:
        model (`PeftModel`, *optional*): The model whose active adapter is pushed.
        files (`Mapping`): Without it, what is pushed of the adapter's folder.
        base_model (`str`, *optional*): Hub id of the base.
        temporary (`Path`): Where the copy goes.

    Returns:
        The folder of the copy, and the text of its card.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The base has no Hub id, or is trained with the adapter; or the weights are corrupted.
    """
    folder = temporary
    if model is not None:
        if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
            raise ValueError(
                f"push takes a PeftModel with one active adapter, and this {type(model).__name__} has several, or has "
                "them inside: choose one with set_adapter, or save them, and push the folder of one."
            )
        _check_base(bool(binary_layers(model)))
        name = model.active_adapters[0]
        model.save_pretrained(str(temporary), selected_adapters=[name])
        folder = temporary if name == "default" else temporary / name
        if folder != temporary:
            shutil.copy(temporary / CARD, folder / CARD)
    else:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    config = read_json(folder, CONFIG)
    _check_base(BASE in config)
    named = base_model or config.get("base_model_name_or_path")
    base = hub_id(named)
    if base is None:
        raise ValueError(
            f"base_model: the adapter names its base {named!r}, which is no id on the Hub, so that nobody could load "
            'it. Push the base first, push(base, "user/base"), and pass base_model="user/base".'
        )
    _check_weights(folder)
    write_json(folder / CONFIG, config | {"base_model_name_or_path": base})
    return folder, _with_base(folder / CARD, base)


def _check_base(latent: bool) -> None:
    if latent:
        raise ValueError(
            "The base of this adapter is latent. Call pack(model), push the base, "
            "hf_stompp.peft.without_adapters(packed), and then the adapter on it."
        )


def _check_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: the adapter is incomplete. Save it again.")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or corrupted: {error}. Save it again.") from error
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} holds values that are not finite, in {wrong[0]}. Train it again.")


def _with_base(path: str | os.PathLike[str], base: str) -> str:
    """The text of a card that names this base."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing: the adapter has no card. Write one, adapter_card(model).save(...), or pass card=."
        )
    card: Any = ModelCard(
        Path(path).read_text(encoding="utf-8").replace(UNNAMED_BASE, base), ignore_metadata_errors=True
    )
    card.data["base_model"], card.data["base_model_relation"] = base, "adapter"
    tags = [tag for tag in card.data.get("tags") or [] if not tag.startswith("base_model:")]
    card.data["tags"] = [*tags, f"base_model:adapter:{base}"]
    return str(card)
