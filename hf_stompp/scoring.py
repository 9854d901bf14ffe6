"""Scoring a classifier of texts or images as the recipes do: the data of a split, the model's predictions, an
`evaluate` metric.

`datasets` and `evaluate` are imported where they are used: they come with the extra `recipes`.
"""

import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_stompp.results import METRICS, hub_id

_BATCH_SIZE = 32
_TASKS = ("text-classification", "image-classification")
# `evaluate` runs what it loads: without the caller's word only these of its own, whatever else a card names.
_MODULES = sorted({"glue", *METRICS.values()} - {"loss"})


def read_split(
    dataset: str | None, config: str | None, split: str, dataset_dir: str | os.PathLike[str] | None = None
) -> Any:
    """One split of a data set.

    Args:
        dataset (`str`, *optional*): Its id on the Hub.
        config (`str`, *optional*): Which of its configs.
        split (`str`): The split.
        dataset_dir (`str` or `Path`, *optional*): A folder of parquet files, `<dir>/<config>/` or `<dir>/`, holding
            `<split>.parquet` or the Hub's `<split>-00000-of-00001.parquet` …, or of images, `<split>/<class>/*.png` …;
            without it the data is the Hub's.

    Returns:
        `datasets.Dataset`: Its rows.

    Raises:
        FileNotFoundError: There is no such folder, or no file of the split in it.
        ConnectionError: The Hub cannot be reached.

    Example:

        >>> read_split("nyu-mll/glue", "sst2", "validation")[0]["sentence"]  # doctest: +SKIP
        "it 's a charming and often affecting journey . "
    """
    from datasets import load_dataset

    if dataset_dir is not None:
        if (Path(dataset_dir) / split).is_dir():
            images = str(Path(dataset_dir) / split / "**")
            return load_dataset("imagefolder", data_files={split: images}, split=split)
        files = [str(file) for file in _split_files(config, split, Path(dataset_dir))]
        return load_dataset("parquet", data_files={split: files}, split=split)
    try:
        return load_dataset(dataset, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"{dataset} ({config}, {split}) is neither in the local cache nor reachable on the Hub ({error}). "
            "Check the network and HF_HUB_OFFLINE, or pass --dataset_dir with a folder of its parquet files."
        ) from error


def _split_files(config: str | None, split: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        inside = f"{config}/{split}.parquet or {split}.parquet" if config else f"{split}.parquet"
        raise FileNotFoundError(
            f"dataset_dir: received {str(folder)!r}, which is not a folder. Pass one with {inside} in it, or of "
            f"images {split}/<class>/*.png; or leave it out to load the data from the Hub."
        )
    home = folder / config if config and (folder / config).is_dir() else folder
    single = home / f"{split}.parquet"
    files = [single] if single.is_file() else sorted(home.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
    if not files:
        found = sorted(file.name for file in home.glob("*.parquet"))
        found += sorted(f"{path.name}/" for path in home.iterdir() if path.is_dir())
        holds = ", ".join(found) or "no parquet file at all"
        raise FileNotFoundError(
            f"dataset_dir: {str(home)!r} has no split {split!r}; it holds {holds}. Add "
            f"{split}.parquet or {split}-00000-of-00001.parquet, or of images the folders {split}/<class>/; or "
            "name another split."
        )
    return files


def decide(logits: Any) -> Any:
    """Logits `[rows, outputs]` → the predicted classes, or the predicted scores of a regression: one output."""
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)


Encode = Callable[[Mapping[str, list]], Mapping[str, torch.Tensor]]


def text_encoder(folder: Path, columns: Sequence[str], max_length: int | None) -> Encode:
    """Rows → the inputs of a model of texts, by the tokenizer in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(rows: Mapping[str, list]) -> Mapping[str, torch.Tensor]:
        texts = [list(rows[column]) for column in columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")

    return encode


def image_encoder(folder: Path, column: str) -> Encode:
    """Rows → the inputs of a model of images, by the image processor in a folder."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda rows: processor([image.convert("RGB") for image in rows[column]], return_tensors="pt")


@torch.no_grad()
def predict(model: PreTrainedModel, encode: Encode, rows: Any) -> list[float]:
    """What a classifier (or regression) decides on each row; with a progress bar."""
    predictions: list[float] = []
    accepted = inspect.signature(model.forward).parameters  # as the Trainer does: not all models take token types
    for start in logging.tqdm(range(0, len(rows), _BATCH_SIZE), desc="Scoring"):
        inputs = encode(rows[start : start + _BATCH_SIZE])
        known = {name: tensor for name, tensor in inputs.items() if name in accepted}
        predictions += decide(model(**known).logits.float()).tolist()
    return predictions


class MissingExtra(ImportError):
    """A package that scoring needs is not installed."""


def require_extra() -> None:
    """Makes sure of the packages that scoring needs."""
    for package in ("datasets", "evaluate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"Scoring a model needs the package {package!r}: pip install 'hf_stompp[recipes]', or leave the "
                "scores out with scores=False (--no-scores)."
            )


class Scorer:
    """Scores a model as the structured results on its card say; predicts each split once.

    Args:
        model (`PreTrainedModel`): The model.
        folder (`Path`): Where its tokenizer or image processor is.
        dataset_dir (`str` or `Path`, *optional*): As in [`read_split`].
        metric (`str`, *optional*): An `evaluate` module instead of the one that the result names.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, dataset_dir: str | os.PathLike[str] | None, metric: str | None
    ) -> None:
        self.model, self.folder, self.dataset_dir, self.metric = model, folder, dataset_dir, metric
        self.predicted: dict[str, tuple[list[float], list[float]]] = {}

    def unfit(self, result: EvalResult) -> str:
        """Why a result cannot be checked; empty if it can."""
        if result.task_type not in _TASKS:
            return f"scores of {result.task_type} are not checked, only those of {' and '.join(_TASKS)}"
        if getattr(self.model.config, "problem_type", None) == "multi_label_classification":
            return "the model gives several labels to a text, and only one is checked"
        # The Trainer's own cards have a string there.
        if not (isinstance(result.dataset_args, Mapping) and result.dataset_args.get("columns")):
            return "the card does not say which columns the model reads"
        if self.dataset_dir is None and hub_id(result.dataset_type) is None:
            return f"its data, {result.dataset_type!r}, is not on the Hub; pass dataset_dir, a folder of the same data"
        return self._unsafe(result) if self.metric is None else ""

    def _unsafe(self, result: EvalResult) -> str:
        """Why the metric that a result names is not run; empty if it is one of `evaluate`'s own."""
        module, config = self._module(result), self._config(result)
        if module not in _MODULES:
            return f"its metric {module!r} is not one of {', '.join(_MODULES)}; pass metric"
        if Path(module).exists():
            return f"{module!r} is a file or folder here, which would be taken for its metric; pass metric"
        # `evaluate` makes a folder of that name.
        if config is not None and not re.fullmatch(r"\w[\w.-]*", str(config)):
            return f"its metric's config {config!r} is not a name; pass metric"
        return ""

    def _module(self, result: EvalResult) -> str:
        return self.metric or ("glue" if result.dataset_type == "nyu-mll/glue" else result.metric_type)

    @staticmethod
    def _config(result: EvalResult) -> Any:
        return result.metric_config or result.dataset_config

    def value(self, result: EvalResult) -> float:
        """The score that the model has."""
        import evaluate

        module, config = self._module(result), self._config(result)
        predictions, references = self._predictions(result)
        values = evaluate.load(module, config, keep_in_memory=True).compute(
            predictions=predictions, references=references
        )
        for key, value in values.items():
            if METRICS.get(key, key) == result.metric_type:
                return float(value)
        raise ValueError(f"The metric {module!r} gives {sorted(values)}, not {result.metric_type}; pass metric.")

    def _predictions(self, result: EvalResult) -> tuple[list[float], list[float]]:
        """What the model decides on the rows of a result's split, and their labels."""
        arguments = dict(result.dataset_args or {})
        key = json.dumps([result.dataset_type, result.dataset_config, result.dataset_split, arguments])
        if key not in self.predicted:
            split = result.dataset_split or "validation"
            rows = read_split(result.dataset_type, result.dataset_config, split, self.dataset_dir)
            rows = rows.select(range(min(arguments.get("first_rows", len(rows)), len(rows))))
            columns = arguments["columns"]
            if result.task_type == "image-classification":
                encode = image_encoder(self.folder, columns[0])
            else:
                encode = text_encoder(self.folder, columns, arguments.get("max_length"))
            labels = list(rows[arguments.get("label_column", "label")])
            self.predicted[key] = predict(self.model, encode, rows), labels
        return self.predicted[key]
