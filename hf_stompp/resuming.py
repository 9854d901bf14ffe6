"""`last_checkpoint`: where a run that was killed goes on."""

import json
import os
import pickle
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
_WEIGHTS = (".safetensors", "pytorch_model.bin", "adapter_model.bin", ".distcp", "model_states.pt")
"""What names of weight files end with: of models, adapters, FSDP, DeepSpeed."""
_ARCHIVES = ("optimizer", "scheduler", "scaler", "rng_state", "pytorch_model", "adapter_model", "training_args")
"""What names of the Trainer's archives begin with."""
_DEEPSPEED = ("model_states.pt", "optim_states.pt")
"""What names of DeepSpeed's archives end with."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last whole checkpoint in the output folder of a Trainer, to resume a run from that was killed.

    The Trainer writes a checkpoint file by file into its final place, and takes the folder with the highest number for
    the last one, also if it is half written: `resume_from_checkpoint=True` then fails, or goes on without what is
    missing. This takes a checkpoint only if it has weights, what belongs to them and the random state of each process,
    if every file ends where it says it does, and if `trainer_state.json` is there, which is written last; others are
    named in a warning, and left alone: the run writes them again when it comes there. Of several runs in one folder,
    the one that wrote last is taken: a run that is begun anew leaves those of an older one beside its own.

    Args:
        output_dir (`str` or `Path`): `TrainingArguments.output_dir`, which all processes have to share. It need not
            exist.

    Returns:
        `str`, *optional*: The folder of the checkpoint; None if there is no whole one.

    Example:

        >>> from hf_stompp import last_checkpoint
        >>> trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))  # doctest: +SKIP
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folder = Path(output_dir)
    found = [(pattern.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    checkpoints = [(_written(path), int(match[1]), path) for match, path in found if match and path.is_dir()]
    for *_, path in sorted(checkpoints, reverse=True):
        lack = _lack(path)
        if not lack:
            return str(path)
        logger.warning(f"{path} is not whole, and is not resumed from: {lack}.")
    return None


def _written(checkpoint: Path) -> float:
    """When it was made. Copies may not keep that; then an earlier one of the same run may be taken for the last, from
    which it comes to the same end."""
    try:
        return (checkpoint / TRAINER_STATE).stat().st_mtime
    except FileNotFoundError:
        return checkpoint.stat().st_mtime


def _lack(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        for path in sorted(checkpoint.rglob("*")):
            if reason := _torn(path):
                return f"{path.relative_to(checkpoint)} is cut off ({reason})"
        return _absent(checkpoint, state)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return f"it has no {name}, which is written last" if name == TRAINER_STATE else f"{name} has gone"
    except (ValueError, TypeError) as error:
        return f"its {TRAINER_STATE} is cut off ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"


def _torn(path: Path) -> str:
    """Why a file does not end where it says it does, or nothing; of files that are not the Trainer's, nothing."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.name.endswith(_DEEPSPEED) or (
            path.suffix in (".pt", ".pth", ".bin") and path.name.startswith(_ARCHIVES)
        ):
            with zipfile.ZipFile(path):  # what is in an archive is listed at its end
                pass
        elif path.name == "config.json" or path.name.endswith(".index.json"):
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name == ".metadata":
            return _torn_shards(path.parent)
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, pickle.UnpicklingError) as error:
        return str(error)
    return ""


def _torn_shards(folder: Path) -> str:
    """Which shard of FSDP is not as long as their list says, or nothing."""
    from torch.distributed.checkpoint import FileSystemReader  # it takes a second, and only runs with FSDP need it

    listed = FileSystemReader(folder).read_metadata().storage_data or {}  # unpickled, as a run that resumes does
    for shard in listed.values():
        path = folder / shard.relative_path
        if not path.is_file() or path.stat().st_size < shard.offset + shard.length:
            return f"it lists {shard.offset + shard.length} bytes of {path.name}"
    return ""


def _absent(checkpoint: Path, state: TrainerState) -> str:
    """Which file is not there, or nothing."""
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    if not any(name.endswith(_WEIGHTS) for name in names):
        return "it has no weights"
    for index in checkpoint.glob("*.index.json"):
        listed: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        for name in sorted(set(listed.values()) - names):
            return f"it has no {name}, which {index.name} lists"
    for folder in {name.rpartition("/")[0] for name in names if name.endswith(".distcp")}:
        if f"{folder}/.metadata" not in names:
            return f"{folder} has no .metadata"
    if "scheduler.pt" not in names:  # it was made to have no more than the model
        return ""
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        return "it has a scheduler.pt, and no optimizer.pt"
    return _absent_rng(names, state)


def _absent_rng(names: set[str], state: TrainerState) -> str:
    """Each process writes its random state, and the others do not wait for it."""
    saved: Any = state.stateful_callbacks.get("StomppCallback", {})
    saved = saved[-1] if isinstance(saved, list) else saved
    processes = saved.get("attributes", {}).get("processes")
    if processes is None:  # the callback was not there
        return "" if any(name.startswith("rng_state") for name in names) else "it has no rng_state.pth"
    expected = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    return next((f"it has no {name}" for name in expected if name not in names), "")
