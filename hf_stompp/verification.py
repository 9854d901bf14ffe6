"""`verify`: whether a packed model is what its files and its card say."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hf_stompp.card import render
from hf_stompp.checkpoint import check_kind, load_complete, read_json, weight_files, wrong_file
from hf_stompp.config import BinarizationConfig
from hf_stompp.figures import Figures
from hf_stompp.results import Scored
from hf_stompp.scoring import MissingExtra, Scorer, require_extra
from hf_stompp.soundness import check_entry, check_folded

_CARD = "README.md"
_QUANTIZATION = "quantization_config"
# No BERT is as deep; of shared layers, no other number in the files says how many there are.
_DEEPEST = 1000


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that [`verify`] looked at, and what came of it."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    message: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """What [`verify`] returns; `print` it, or read its `checks`.

    Attributes:
        source (`str`): The folder or repository.
        checks (`tuple[Check, ...]`): In the order in which they were made.
    """

    source: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.name:{width}}  {check.status:7}  {check.message}" for check in self.checks]
        return "\n".join([*lines, f"{self.source}: {'ok' if self.ok else 'FAILED'}"])


def verify(
    folder_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dataset_dir: str | os.PathLike[str] | None = None,
    metric: str | None = None,
    tolerance: float = 0.005,
    scores: bool = True,
) -> Verification:
    """Checks a packed model: its files, that they are what `save_pretrained` gives again, its card, and its scores.

    A bad model never raises: the check that fails has the reason, and those after it are skipped. The checksums that
    the card states cover every byte of the weights, config and tokenizer; without a card, a value that another model
    may have as well, such as a dropout rate, cannot be told from the right one.

    Args:
        folder_or_repo (`str` or `Path`): What `save_pretrained` wrote of a packed model, or a Hub id.
        revision (`str`, *optional*): Of the repository; by default `main`.
        token (`str` or `bool`, *optional*): Without it the one of the environment or of `hf auth login`.
        dataset_dir (`str` or `Path`, *optional*): Folder with the parquet files of the data that the card names, as
            the recipes take it; by default the data is the Hub's.
        metric (`str`, *optional*): An `evaluate` module, its path or Hub id, which is run. By default the Hub's `glue`
            for GLUE, and for other data the metric of the card's result, if it is one that the recipes report.
        tolerance (`float`, *optional*, defaults to 0.005): How far a score may be from the one on the card.
        scores (`bool`, *optional*, defaults to `True`): Score the model again as the card says.

    Returns:
        `Verification`: The checks; `ok` is whether none failed.

    Raises:
        FileNotFoundError: There is neither such a folder nor such a repository; or no such data or metric.
        ConnectionError: The Hub cannot be reached, and the repository is not in the local cache.
        ImportError: There are scores, and the extra `recipes` is not installed.
        ValueError: A revision of a folder, or a tolerance below 0.

    Example:

        >>> print(verify("bert-sst2-1bit", dataset_dir="glue", metric="recipes/metrics/glue"))  # doctest: +SKIP
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: received {tolerance}; allowed: a finite number, 0 or above.")
    if dataset_dir is not None and not Path(dataset_dir).is_dir():
        raise FileNotFoundError(f"dataset_dir: received {str(dataset_dir)!r}; allowed: a folder of parquet files.")
    subject = _Subject(_fetch(folder_or_repo, revision, token))
    steps: dict[str, Callable[[], str]] = {
        "files": subject.check_files,
        "checksums": subject.check_checksums,
        "config": subject.check_config,
        "model": subject.check_model,
        "resave": subject.check_resaved,
        "card": subject.check_card,
    }
    checks = list(_run(steps))
    if not scores or any(check.status == "failed" for check in checks):
        checks.append(Check("scores", "skipped", "not reached" if scores else "not asked for"))
    else:
        checks += _check_scores(subject, dataset_dir, metric, tolerance)
    return Verification(str(folder_or_repo), tuple(checks))


class _Skipped(Exception):
    """Why a check does not apply."""


def _run(steps: Mapping[str, Callable[[], str]]) -> Iterator[Check]:
    """Makes one check after the other; none after one that failed."""
    failed = ""
    for name, step in steps.items():
        if failed:
            yield Check(name, "skipped", f"not reached: {failed} failed")
            continue
        try:
            yield Check(name, "passed", step())
        except _Skipped as reason:
            yield Check(name, "skipped", str(reason))
        except Exception as error:  # a corrupted config makes transformers raise anything
            failed = name
            yield Check(name, "failed", _line(error))


def _line(error: BaseException) -> str:
    """An error in one line; with its type, if that says more than its text."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def _fetch(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision: received {revision!r}, but {str(source)!r} is a folder, which has none.")
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, ignore_patterns=["*/*"]))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{str(source)!r} (revision {revision or 'main'}) is neither a folder nor a repository that the Hub shows "
            f"you. Check the name; for a private one log in with `hf auth login`, or set HF_TOKEN. ({_line(error)})"
        ) from error
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"{str(source)!r} is not a folder, and could not be downloaded from the Hub: {_line(error)}"
        ) from error


class _Subject:
    """The model in a folder; each check builds on what those before it found sound."""

    model: PreTrainedModel

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: list[EvalResult] = []

    def check_files(self) -> str:
        """All there, and written as `save_pretrained` writes: a changed header may mean the same and yet be wrong."""
        self.config = read_json(self.folder, CONFIG_NAME)
        check_kind(self.config.get(_QUANTIZATION), str(self.folder), latent=False)
        self.files = weight_files(self.folder)
        self.bytes = 0
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            content = file.read_bytes()
            tensors = load(content)
            if save(tensors, metadata={"format": "pt"}) != content:
                raise ValueError(f"{file} is not as save_pretrained writes its tensors: its header was changed.")
            self.bytes += len(content)
            self.tensors |= tensors
        stray = {file.name for file in self.folder.glob("model-*-of-*.safetensors")} - {f.name for f in self.files}
        if stray:
            raise ValueError(f"{self.folder} has {min(stray)}, which is of another model or not in its index.")
        if (self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            index = read_json(self.folder, SAFE_WEIGHTS_INDEX_NAME)
            stated, size = index["metadata"]["total_size"], sum(tensor.nbytes for tensor in self.tensors.values())
            if stated != size:
                raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} says total_size {stated}, but the tensors have {size}.")
        return f"{len(self.tensors)} tensors, {self.bytes:,} bytes in {len(self.files)} file(s)"

    def check_checksums(self) -> str:
        stated = Figures.read(self._card_text()).checksums
        if not stated:
            raise _Skipped(f"{_CARD} states none")
        wrong = wrong_file(self.folder, stated)
        if wrong:
            raise ValueError(f"{_CARD} {wrong}.")
        return f"{len(stated)} files are those of the card"

    def check_config(self) -> str:
        """What can be told without a model, which might be of any size."""
        _check_numbers(self.config, max(max(tensor.shape, default=1) for tensor in self.tensors.values()))
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        config.quantization_config = BinarizationConfig.from_dict(self.config[_QUANTIZATION])
        _check_same_config(self.config, json.loads(config.to_json_string()))
        _check_modules(config.quantization_config, self.tensors)
        return f"{len(config.quantization_config.modules)} packed modules, as the tensors are"

    def check_model(self) -> str:
        # Each weight takes a bit of the files at least; twice that, because packed ones are registered twice.
        with _bounded(2 * 8 * self.bytes):
            self.model = load_complete(self.folder)
        check_folded(self.model)
        return f"{type(self.model).__name__} loads, with nothing missing"

    def check_resaved(self) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            self.model.save_pretrained(temporary)
            _check_same_config(self.config, read_json(Path(temporary), CONFIG_NAME))
            again = {k: v for file in weight_files(Path(temporary)) for k, v in load(file.read_bytes()).items()}
        for name, tensor in self.tensors.items():
            other = again.pop(name, None)
            if other is None or not _identical(tensor, other):
                raise ValueError(f"{name} is not in the model, or is another tensor when it is saved again.")
        if again:
            raise ValueError(f"{min(again)} is in the model that was loaded, but not in the files.")
        return "config and tensors are the same after loading and saving"

    def check_card(self) -> str:
        card = ModelCard(self._card_text())
        there = dataclasses.asdict(Figures.read(card.content))
        here = dataclasses.asdict(Figures.read(render(self.model, self.folder, {}, Scored()).content))
        stated = [key for key in here if key != "checksums" and there[key] is not None]
        for key in stated:
            if there[key] != here[key]:
                ours, theirs = (shorten(str(figures[key]), 120) for figures in (here, there))
                raise ValueError(f"{_CARD} states {key} {theirs}, but the model has {ours}.")
        self.results = card.data.get("eval_results") or []
        return f"{', '.join(stated) or 'no figures'}; {len(self.results)} evaluation results"

    def _card_text(self) -> str:
        if not (self.folder / _CARD).is_file():
            raise _Skipped(f"there is no {_CARD}")
        return (self.folder / _CARD).read_text(encoding="utf-8")


# --- files and config ------------------------------------------------------------------------------------------------


def _identical(one: Tensor, other: Tensor) -> bool:
    """To the bit, where `equal` says that a NaN is not itself."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of whatever is not a mapping with something in it."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _check_numbers(config: Mapping[str, Any], largest: int) -> None:
    """Refuses sizes that the files do not have, before anything of such a size is made."""
    for key, value in _leaves({key: value for key, value in config.items() if key != _QUANTIZATION}):
        # Inputs that are packed eight in a byte are the largest dimension; positions may have no table at all.
        allowed = _DEEPEST if key.endswith("layers") else max(8 * largest, 1 << 14)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > allowed:
                raise ValueError(
                    f"{CONFIG_NAME} has {key} {number}, but tensors of at most {largest} rows or columns are in the "
                    f"files; allowed: up to {allowed}."
                )


def _check_same_config(here: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Refuses a config that is not what it becomes when it is loaded and saved."""
    if here.get("transformers_version", transformers.__version__) != transformers.__version__:
        # Another version has other fields, and other defaults.
        here, again = {_QUANTIZATION: here[_QUANTIZATION]}, {_QUANTIZATION: again[_QUANTIZATION]}
    if "use_cache" not in again:  # the Trainer writes it into any config, and some take it for none of theirs
        here = {key: value for key, value in here.items() if key != "use_cache"}
    before, after = dict(_leaves(here)), dict(_leaves(again))
    for key in sorted(before.keys() | after.keys()):
        values = [json.dumps(leaves[key]) if key in leaves else "nothing" for leaves in (before, after)]
        if values[0] != values[1]:
            raise ValueError(f"{CONFIG_NAME} has {key} {values[0]}, which is {values[1]} once it is loaded and saved.")


def _check_modules(config: BinarizationConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a list of packed modules other than those whose `weight` is bits, or that have levels and no weight."""
    packed = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    packed = [name for name in packed if tensors[f"{name}.weight"].dtype == torch.uint8]
    levels = [name.removesuffix(".activation_levels") for name in tensors if name.endswith(".activation_levels")]
    packed += [name for name in levels if f"{name}.weight" not in tensors]
    listed = dict(config.modules)
    for module, entry in listed.items():
        check_entry(module, entry)
    for name in packed:
        # Names are those inside the base model.
        key = max((key for key in listed if f".{name}".endswith(f".{key}")), key=len, default=None)
        if key is None:
            raise ValueError(f"{_QUANTIZATION}.modules does not list {name}, which is packed in the files.")
        _check_module(f"{_QUANTIZATION}.modules[{key!r}]", listed.pop(key), name, config, tensors)
    if listed:
        raise ValueError(f"{_QUANTIZATION}.modules lists {min(listed)}, which is not packed in the files.")
    units = {entry["unit"] for entry in config.modules.values() if "unit" in entry}
    if units != set(range(len(units))):
        raise ValueError(f"{_QUANTIZATION}.modules has the units {sorted(units)}; allowed: all from 0 on.")


def _check_module(
    what: str, entry: Mapping[str, Any], name: str, config: BinarizationConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Refuses an entry that says something else of a packed module than its tensors."""
    if f"{name}.weight" in tensors and f"{name}.weight_scale" not in tensors:
        raise ValueError(f"{name} is packed, but has no weight_scale in the files.")
    levels = tensors.get(f"{name}.activation_levels")
    if (levels is None) != (f"{name}.activation_threshold" not in tensors):
        raise ValueError(f"{name} has one of activation_levels and activation_threshold in the files, not both.")
    # Nothing in the tensors says the unit, and what they say of a shape is checked as they are loaded.
    if "bits" in entry:
        expected = {**entry, "bits": 1 if "unit" in entry else config.embedding_bits}
    else:
        sign = None if levels is None else "unsigned" if levels.flatten()[0] == 0 else "signed"
        expected = {**entry, "levels": sign}
        if f"{name}.weight" not in tensors:
            expected["features"] = len(tensors[f"{name}.activation_threshold"].flatten())
        if config.activations != (levels is not None):
            raise ValueError(f"{_QUANTIZATION} has activations={config.activations}, but {name} is not like that.")
    if entry != expected:
        raise ValueError(f"{what} is {entry}, but the files have {expected}.")


@contextmanager
def _bounded(limit: int) -> Iterator[None]:
    """Refuses to make modules of more than `limit` weights, when the first of them that is too much is made."""
    total = 0

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total > limit:
            raise ValueError(f"{CONFIG_NAME} describes a model of more weights than the files can hold ({limit:,}).")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


# --- scores --------------------------------------------------------------------------------------------------------


def _check_scores(
    subject: _Subject, dataset_dir: str | os.PathLike[str] | None, metric: str | None, tolerance: float
) -> Iterator[Check]:
    """One check for each structured result on the card."""
    if not subject.results:
        asked = dataset_dir is not None or metric is not None
        yield Check("scores", "failed" if asked else "skipped", "there is no card that states any")
    scorer = Scorer(subject.model, subject.folder, dataset_dir, metric)
    for result in subject.results:
        name = f"{result.metric_type}, {result.dataset_split}"
        try:
            reason = scorer.unfit(result)
            if reason:
                yield Check(name, "skipped", reason)
                continue
            require_extra()
            value = scorer.value(result)
            close = abs(value - result.metric_value) <= tolerance
            message = f"{value:.4f} on {result.dataset_name}; the card says {result.metric_value:.4f}"
            yield Check(name, "passed" if close else "failed", message)
        except Exception as error:
            named = dataset_dir is not None or metric is not None  # by the caller: a wrong argument, not a bad model
            if isinstance(error, MissingExtra) or (named and isinstance(error, FileNotFoundError)):
                raise
            yield Check(name, "failed", _line(error))
