"""A saved model's folder: what kind it is, whether everything is in it that a user needs, and writing it whole."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_stompp.config import QUANT_METHOD

# Weights, configs, tokenizers: what decides on what the model predicts.
_DECIDING = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)


def load_complete(folder: str | os.PathLike[str], *, latent: bool = False) -> PreTrainedModel:
    """Loads the model of a folder, and makes sure that it is binarized and that nothing of it is missing.

    Headers of all weight files first, which is quick and names the file at fault; then `from_pretrained` itself is the
    judge, with its checks of every packed tensor, and no tensor may have been filled in at random.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote.
        latent (`bool`, *optional*, defaults to `False`): Also take a latent checkpoint, not only a packed one.

    Returns:
        `PreTrainedModel`: The model, of the class in its config, on the CPU.

    Raises:
        FileNotFoundError: There is no such folder, or it has no config, no weights, or not all shards of them.
        ValueError: The model is full-precision, or latent and not asked for, or a file is truncated or corrupted, or a
            tensor is missing.

    Example:

        >>> model = load_complete("bert-sst2-1bit")  # doctest: +SKIP
    """
    folder = Path(folder)
    config = read_json(folder, CONFIG_NAME)
    check_kind(config.get("quantization_config"), str(folder), latent=latent)
    weight_files(folder)
    auto_class = model_class(config.get("architectures"), str(folder / CONFIG_NAME))
    model, found = auto_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    absent = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if absent:
        raise ValueError(
            f"{folder} has no tensor {absent[0]} of {auto_class.__name__}, or one of another shape ({len(absent)} in "
            "all): the checkpoint is incomplete. Save it again."
        )
    return model


def model_class(architectures: list[str] | None, what: str) -> Any:
    """The class that the config `what` names, head and all: one of transformers, or of the running program's own."""
    name = (architectures or ["no class"])[0]
    found = getattr(transformers, name, None) or _own_class(name, PreTrainedModel)
    # Not an Auto class either, which might ask for code of the checkpoint's own.
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{what} names {name} in `architectures`; allowed: a model class of transformers, or one "
            "that has been imported."
        )
    return found


def _own_class(name: str, base: type) -> type | None:
    """The class of this name among those that derive from `base` and are defined already: nothing is imported."""
    derived: type
    for derived in reversed(base.__subclasses__()):  # the newest, where a notebook has defined it again
        found = derived if derived.__name__ == name else _own_class(name, derived)
        if found is not None:
            return found
    return None


def check_kind(quantization: Any, what: str, *, latent: bool) -> None:
    """Refuses a full-precision model, and a latent one unless it is asked for, by its quantization config."""
    if quantization is not None and not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    if quantization is None or quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{what} is not binarized: it has no quantization_config of hf_stompp. Train it with a BinarizationConfig "
            "and StomppCallback, then call pack(); a full-precision model has its own `push_to_hub`."
        )
    if quantization.get("mode") != "packed" and not latent:
        raise ValueError(
            f"{what} is a latent checkpoint: full-precision weights, which load as an ordinary model where hf_stompp "
            "is not imported. Call pack() first, or pass latent=True to share the training state itself."
        )


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a draft of `folder` to write into, which takes its place in one step when all of it has been written.

    `save_pretrained` writes `config.json` before the weights: where it fails over an older model, the new config is
    left with the old weights. Here an error leaves `folder` as it was, or not there. So does a kill, and what that
    leaves beside it the next call clears up; killed between two renames it leaves the old folder as `.NAME.old`.

    Args:
        folder (`str` or `Path`): Replaced with all that is in it. One process at a time may write it.

    Raises:
        OSError: It could not be written, as on a full disk.

    Example:

        >>> with whole_folder("bert-sst2-1bit") as draft:  # doctest: +SKIP
        ...     packed.save_pretrained(draft)
    """
    folder = Path(folder).resolve()  # where a link points to
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; pass the name of a folder.")
    draft, old = (folder.with_name(f".{folder.name}.{end}") for end in ("draft", "old"))
    _clear(folder, draft, old)
    try:
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        left = "It is as it was before" if folder.exists() or old.exists() else "There is none now"
        raise OSError(
            f"{folder} could not be written: {error}. {left}. If there is no room, make some, or save elsewhere."
        ) from error
    finally:
        _clear(folder, draft, old)


def _clear(folder: Path, draft: Path, old: Path) -> None:
    if old.exists() and not folder.exists():  # stopped between the two renames
        old.rename(folder)
    for path in (draft, old):
        shutil.rmtree(path, ignore_errors=True)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of a saved model."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; pass one that save_pretrained wrote.")
    if not (folder / name).is_file() and (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is an adapter of PEFT, which has no {name}; this is for whole models, as its base is. An "
            "adapter is loaded on that, saved with its card, and pushed with push(folder, ..., base_model=...)."
        )
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}: it is not a saved model, or an incomplete one.")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / name} is truncated or corrupted: {error}. Save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} holds {type(content).__name__}; allowed: a JSON object. Save it again.")
    return content


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes `content` in one step: a reader, or a crash, never sees half a file."""
    path = Path(path)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a saved model, all there, with whole headers, and with the tensors that their index lists.

    Raises:
        FileNotFoundError: There are no weights, or not all shards of them.
        ValueError: A file is truncated or corrupted, or it and the index do not list the same tensors.
    """
    single, sharded = (folder / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if single.is_file() and sharded.is_file():
        raise ValueError(f"{folder} has both {single.name} and {sharded.name}: two models in one.")
    shards: dict[str, set[str]] = {}
    if sharded.is_file():
        for tensor, shard in read_json(folder, sharded.name).get("weight_map", {}).items():
            shards.setdefault(shard, set()).add(tensor)
    names = list(shards or [SAFE_WEIGHTS_NAME])
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}"
                + (f", which {sharded.name} lists" if sharded.is_file() else "")
                + ": the checkpoint is incomplete. Save it again, as safetensors."
            )
    for name in names:
        present = set(_tensor_names(folder / name))
        absent, unlisted = sorted(shards.get(name, set()) - present), sorted(present - shards.get(name, present))
        if absent:
            raise ValueError(f"{folder / name} has no tensor {absent[0]}, which {sharded.name} lists. Save it again.")
        if unlisted:
            raise ValueError(f"{folder / name} has a tensor {unlisted[0]} that {sharded.name} does not list.")
    return [folder / name for name in names]


def _tensor_names(path: Path) -> Iterable[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}. Save it again.") from error


# --- what is in the files -----------------------------------------------------------------------------------------


def weight_bytes(folder: Path) -> int:
    """The size of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def checksums(folder: Path) -> str:
    """A line, as `sha256sum` prints it, for each file that decides on what the model predicts."""
    found = {file for pattern in _DECIDING for file in folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))  # hidden: not pushed
    return "\n".join(f"{_sha256(file)}  {file.name}" for file in files)


def _sha256(path: Path) -> str:
    """The checksum of a file, which is read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def wrong_file(folder: Path, stated: Mapping[str, str]) -> str:
    """Which file has another checksum than is stated of it, or is not there; empty if there is none."""
    for name, sha in stated.items():
        if not (folder / name).is_file():
            return f"states a checksum of {name}, which is not there"
        found = _sha256(folder / name)
        if found != sha:
            return f"states the SHA-256 {sha} of {name}, but that is {found}"
    return ""
