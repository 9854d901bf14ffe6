"""The nine GLUE tasks: which columns they read, what they predict, how they are scored, and how to load them."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_stompp.scoring import read_split

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One text classification (or regression) task.

    Args:
        name (`str`): its config name on the Hub.
        columns (`tuple[str, ...]`): the one or two text columns the model reads.
        labels (`tuple[str, ...]`): class names in the order of their codes; empty for regression.
        metric (`str`): the metric quoted when only one number is.
        evaluation (`tuple[str, ...]`): the labelled splits a model is scored on.
        test (`tuple[str, ...]`): the splits with hidden labels.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    evaluation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """The width of the head: one output for a regression."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews_correlation"),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), metric="f1"),
        Task("stsb", _PAIR, (), metric="spearmanr"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metric="f1"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            evaluation=("validation_matched", "validation_mismatched"),
            test=("test_matched", "test_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        Task("rte", _PAIR, ("entailment", "not_entailment")),
        Task("wnli", _PAIR, ("not_entailment", "entailment")),
    )
}


def get_task(name: str | None, others: Iterable[str] = ()) -> Task:
    """The row of [`TASKS`] called `name`; `others` are further names to list in the error for an unknown one."""
    if name in TASKS:
        return TASKS[name]
    allowed = [*TASKS, *others]
    close = difflib.get_close_matches(str(name).lower().replace("-", ""), allowed, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Pass one of them, as in --task_name sst2."
    raise ValueError(f"task_name: received {name!r}; allowed: {', '.join(allowed)}. {hint}")


def load_task(
    name: str | None,
    dataset_dir: str | Path | None = None,
    with_test: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
) -> DatasetDict:
    """Load and check the splits of a GLUE task.

    Args:
        name (`str`): a key of [`TASKS`].
        dataset_dir (`str` or `Path`, *optional*): a folder of parquet files, `<dir>/<task>/` or `<dir>/`, holding
            `train.parquet` … or the Hub's `train-00000-of-00001.parquet` …; the Hub's `nyu-mll/glue` when not given.
        with_test (`bool`, *optional*, defaults to `False`): also load the test splits, without their hidden labels.
        max_train_samples, max_eval_samples, max_predict_samples (`int`, *optional*): keep the first rows only.

    Returns:
        `DatasetDict`: `train`, the task's evaluation splits (two for MNLI) and, if asked for, its test splits.

    Raises:
        ValueError: unknown task, missing column, a label that the head cannot hold, a sample limit below one.
        FileNotFoundError: no such folder, or no file of a split in it.
        ConnectionError: the Hub cannot be reached.

    Example:

        >>> data = load_task("sst2", max_train_samples=1000)
        >>> data["train"][0]["sentence"]
        'hide new secretions from the parental units '
    """
    task = get_task(name)
    limits = {"train": max_train_samples, **dict.fromkeys(task.evaluation, max_eval_samples)}
    if with_test:
        limits |= dict.fromkeys(task.test, max_predict_samples)
    splits = DatasetDict()
    for split, limit in limits.items():
        rows = read_split(HUB_ID, task.name, split, dataset_dir)
        _check_columns(rows, task, split)
        if split in task.test:  # -1 in every row but MRPC's: kept, it would only break the loss
            rows = rows.select_columns(list(task.columns))
        else:
            rows = rows.select_columns([*task.columns, "label"])
            _check_labels(rows, task, split)
            if task.is_regression:
                rows = rows.cast_column("label", Value("float32"))  # the loss wants floats, whatever the file has
        splits[split] = first_rows(rows, limit, split)
    return splits


def first_rows(rows: Dataset, limit: int | None, split: str) -> Dataset:
    """The first `limit` rows (all for `None`)."""
    if limit is not None and limit < 1:
        raise ValueError(
            f"number of samples for the split {split!r}: received {limit}; allowed: 1 or more. "
            "Leave the max_..._samples flag out to keep every row."
        )
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _check_columns(rows: Dataset, task: Task, split: str) -> None:
    needed = list(task.columns) if split in task.test else [*task.columns, "label"]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"the split {split!r} of {task.name} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(rows.column_names)}. Rename its columns to {', '.join(needed)}, or choose the task it is of."
        )
    for column in task.columns:
        kind, empty = rows.features[column], rows.data.column(column).null_count
        if kind not in (Value("string"), Value("large_string")) or empty:
            raise ValueError(
                f"the column {column!r} of the split {split!r} of {task.name}: received {kind} with {empty} nulls; "
                "allowed: strings only. Fill or drop the rows without a text."
            )


def _check_labels(rows: Dataset, task: Task, split: str) -> None:
    """Raise unless every label is one that the task's head can be trained on and scored against."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel) and tuple(feature.names) != task.labels:
        raise ValueError(
            f"the column 'label' of the split {split!r} has the classes {feature.names}; {task.name} has "
            f"{list(task.labels)}, in this order. Re-code the labels, or choose the task the file is of."
        )
    codes = ", ".join(f"{code} ({text})" for code, text in enumerate(task.labels))
    for label in rows.unique("label"):
        if task.is_regression:
            fits = isinstance(label, (int, float)) and math.isfinite(label)
        else:
            fits = isinstance(label, int) and 0 <= label < task.num_labels
        if not fits:
            hidden = " -1 marks the hidden labels of a test split: it cannot be scored." if label == -1 else ""
            raise ValueError(
                f"the column 'label' of the split {split!r} of {task.name}: received {label!r}; allowed: "
                f"{codes or 'any finite number'}.{hidden} Check that the file is this task's labelled split."
            )
