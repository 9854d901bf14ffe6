"""`last_checkpoint`: where a run that was killed goes on."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

TRAINER_STATE = "trainer_state.json"
_WEIGHTS = ("model", "adapter_model", "pytorch_model")
"""What names of weight files begin with, and folders of shards: of models, adapters, FSDP."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last whole checkpoint in the output folder of a Trainer, to resume a run from that was killed.

    The Trainer writes a checkpoint file by file into its final place, and takes the folder with the highest number for
    the last one, also if it is half written: `resume_from_checkpoint=True` then fails, or goes on without what is
    missing. This takes a checkpoint only if it has weights, if every file in it ends where it says it does, and if
    `trainer_state.json` is there, which is written after the others; others are named in a warning, and left alone:
    the run writes them again when it comes there.

    Args:
        output_dir (`str` or `Path`): `TrainingArguments.output_dir`. It need not exist.

    Returns:
        `str`, *optional*: The folder of the checkpoint; None if there is no whole one.

    Example:

        >>> from hf_stompp import last_checkpoint
        >>> trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))  # doctest: +SKIP
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folder = Path(output_dir)
    found = [(pattern.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    checkpoints = sorted((int(match[1]), path) for match, path in found if match and path.is_dir())
    for _, path in reversed(checkpoints):
        lack = _lack(path)
        if not lack:
            return str(path)
        logger.warning(f"{path} is not whole, and is not resumed from: {lack}.")
    return None


def _lack(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE}, which is written last"
    except (ValueError, TypeError) as error:
        return f"its {TRAINER_STATE} is cut off ({error})"
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        if reason := _torn(path):
            return f"{path.relative_to(checkpoint)} is cut off ({reason})"
    names = [path.relative_to(checkpoint).parts[0] for path in files if path.suffix != ".json"]
    if not any(name.startswith(_WEIGHTS) for name in names):
        return "it has no weights"
    return _absent_shard(checkpoint)


def _torn(path: Path) -> str:
    """Why a file does not end where it says it does, or nothing; of files that do not say it, nothing."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):  # archives, whose contents are listed at their end
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
        return str(error)
    return ""


def _absent_shard(checkpoint: Path) -> str:
    for index in checkpoint.glob("*.index.json"):
        listed: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        for name in sorted(set(listed.values())):
            if not (checkpoint / name).is_file():
                return f"it has no {name}, which {index.name} lists"
    return ""
