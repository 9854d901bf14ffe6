"""The record of a training run, as recipes write it to `results.json`: how it is made, checked and shown."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import TrainingArguments

from hf_stompp.checkpoint import weight_bytes
from hf_stompp.config import RESOLVED, BinarizationConfig

OWN = ""
"""The name of the run that made the checkpoint, among the runs of a card."""

COLLAPSED = " (collapsed)"
"""What is added to the name of a model that says the same of everything."""

# What recipes and Trainers report → its id on the Hub.
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews_correlation": "matthews_correlation",
    "pearson": "pearsonr",
    "spearmanr": "spearmanr",
    "loss": "loss",
}
# What the recipes put before the metrics of several splits: MNLI's.
_PARTS = ("matched", "mismatched")
# What is read of a run in `results.json`.
_RUN_KEYS = (
    "recipe",
    "rows",
    "binarization",
    "seed",
    "mask_seed",
    "steps",
    "batch_size",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "weight_decay",
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """What was scored: `name` is the Hub id of the data, or what the recipe calls it."""

    name: str | None = None
    config: str | None = None
    split: str | None = "validation"

    def __str__(self) -> str:
        if self.name is None:
            return "data that was not named"
        return f"`{self.name}`" + (f" (`{self.config}`)" if self.config else "")


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a Hub id; a local path is nobody else's business, and says nothing to a reader."""
    return name if name and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


# --- making ---------------------------------------------------------------------------------------------------------


def training_facts(args: TrainingArguments, config: BinarizationConfig | None) -> dict[str, Any]:
    """What a reader needs to train like this, in the keys of the recipes' `results.json`."""
    return {
        "binarization": config and config.to_dict(),
        "seed": args.seed,
        "mask_seed": config and config.mask_seed,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler": str(args.lr_scheduler_type.value),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
    }


def result_row(
    model: str, metrics: Mapping[str, Any], folder: str | Path, parts: Iterable[str] = ()
) -> dict[str, Any]:
    """A row of the result table out of what `Trainer.evaluate` returned for `model`, saved in `folder`.

    The loss, of each evaluation set in `parts`, is left out, unless there is nothing else; and a model that has
    collapsed, as the recipes tell, is marked in its name.
    """
    parts = tuple(parts)
    other = ("_runtime", "_per_second", "_preparation_time", "epoch")
    values = {key.removeprefix("eval_"): value for key, value in metrics.items() if not key.endswith(other)}
    collapsed = [key for key in values if key.endswith("collapsed")]
    values = {key: value for key, value in values.items() if key not in collapsed}
    model += COLLAPSED if collapsed else ""
    scores = {key: value for key, value in values.items() if split_key(key, parts)[1] != "loss"} or values
    seconds = sum(value for key, value in metrics.items() if key.endswith("_runtime"))
    return {"model": model, **scores, "bytes": weight_bytes(Path(folder)), "eval_seconds": seconds}


# --- checking and showing --------------------------------------------------------------------------------------------


def check_run(name: str, run: Mapping[str, Any], own: Mapping[str, Any], config: BinarizationConfig) -> None:
    """Refuses scores that are not this checkpoint's, or that cannot stand beside them."""
    _check_keys("results" if name == OWN else f"compared[{name!r}]", run)
    if name == OWN:
        made = {key: value for key, value in (run["binarization"] or {}).items() if key not in ("mode", *RESOLVED)}
        other = sorted(key for key, value in config.to_dict().items() if key in made and made[key] != value)
        if not made or other:
            raise ValueError(
                f"results are of a run with another BinarizationConfig ({', '.join(other) or 'full precision'}) than "
                "the model's. Pass the results.json of the run that made this checkpoint."
            )
        scored_row(run, config.mode)
    for key in ("task_name", "dataset_name", "dataset_config", "eval_split", "max_eval_samples"):
        here, there = own["recipe"].get(key), run["recipe"].get(key)
        if here != there:
            raise ValueError(
                f"compared[{name!r}] has {key} {there!r}, but results has {here!r}: scores on other data cannot stand "
                "beside each other."
            )


def _check_keys(what: str, run: Mapping[str, Any]) -> None:
    """Refuses what is not as a recipe writes it, and names what is missing."""
    wrong = ""
    missing = [key for key in _RUN_KEYS if key not in run]
    if not missing and not isinstance(run["recipe"], Mapping):
        wrong = "recipe is no mapping"
    elif not missing and not (isinstance(run["rows"], list) and all(isinstance(row, Mapping) for row in run["rows"])):
        wrong = "rows is no list of mappings"
    elif not missing:
        rows = enumerate(run["rows"])
        missing = [f"rows[{i}].{key}" for i, row in rows for key in ("model", "bytes") if key not in row]
    if missing or wrong:
        wrong = wrong or f"no {', '.join(missing)}"
        raise ValueError(f"{what}: {wrong}; allowed: what a recipe writes to results.json.")


def scored_row(run: Mapping[str, Any], mode: str) -> Mapping[str, Any]:
    """The row of a run's table that a model in `mode` was scored in."""
    start = {"packed": "packed", "train": "latent"}[mode]
    for row in run["rows"]:
        if row["model"].startswith(start):
            return row
    raise ValueError(f"results have no row of a {start} model, only of {[row['model'] for row in run['rows']]}.")


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("model", "step", "bytes", "eval_seconds")}


def split_key(key: str, parts: Iterable[str] = ()) -> tuple[str, str]:
    """The split and the metric of what an evaluation reports; of any other metric the underscores are its own.

    Args:
        key (`str`): What is reported.
        parts (`Iterable[str]`, *optional*): Names of the run's evaluation sets, besides those of the recipes.

    Example:

        >>> split_key("mismatched_accuracy"), split_key("balanced_accuracy")
        (('mismatched', 'accuracy'), ('', 'balanced_accuracy'))
    """
    known = sorted({*_PARTS, *parts}, key=len, reverse=True)
    part = next((part for part in known if key.startswith(f"{part}_")), "")
    return part, key.removeprefix(f"{part}_") if part else key


def is_final(run: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether the weights that were scored are those that the run ended with; a row may name the step it is of."""
    return row.get("step", run["steps"]) == run["steps"]


def eval_results(run: Mapping[str, Any], mode: str, task: str, data: Scored) -> list[EvalResult]:
    """One structured result a metric; with several splits the Trainer puts `matched_` and the like before each."""
    results = []
    # What it takes to score the model again.
    read = {key: run.get(key) for key in ("columns", "label_column", "max_length")}
    read["first_rows"] = run["recipe"].get("max_eval_samples")
    for key, value in _metrics(scored_row(run, mode)).items():
        part, metric = split_key(key, run.get("parts", ()))
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=data.name or "unknown",
                dataset_name=str(data).replace("`", ""),
                dataset_config=data.config,
                dataset_split="_".join(filter(None, (data.split, part))) or None,
                dataset_args={key: value for key, value in read.items() if value} or None,
                metric_type=METRICS.get(metric, metric),
                metric_value=value,
                metric_config=run.get("metric_config"),
                metric_args={"seed": run["seed"], "mask_seed": run["mask_seed"]},
            )
        )
    return results


def scores_table(runs: Mapping[str, Mapping[str, Any]], mode: str) -> str:
    """A row for each stage of this run, the one of this checkpoint in bold, then the last stage of each other run."""
    rows: list[list[str]] = []
    metrics = list(_metrics(scored_row(runs[OWN], mode))) if runs else []
    if not metrics:
        return ""
    for name, run in runs.items():
        own = scored_row(run, mode) if name == OWN else None
        for row in run["rows"] if own else run["rows"][-1:]:
            absent = [metric for metric in metrics if metric not in row]
            if absent:
                raise ValueError(f"{name or 'results'}: the row {row['model']!r} has no {', '.join(absent)}.")
            title = f"this run, {row['model']}" if own else f"{name} ({row['model']})"
            values = [f"{row[metric]:.4f}" for metric in metrics]
            seeds = [str(run["seed"]), "" if run["mask_seed"] is None else str(run["mask_seed"])]
            cells = [title, *values, *seeds, f"{row.get('step', run['steps']):,}", f"{row['bytes']:,}"]
            bold = own is not None and row is own and is_final(run, own)
            rows.append([f"**{cell}**" if cell and bold else cell for cell in cells])
    return markdown_table(["model", *metrics, "seed", "mask seed", "steps", "bytes"], rows)


def training_sentence(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    limit = run["recipe"].get("max_train_samples")
    examples = f"{run['batch_size']} examples" + (f" of the first {limit:,}" if limit else "")
    return (
        f"{run['steps']:,} steps of {examples}; learning rate {run['learning_rate']:g} ({run['lr_scheduler']}, "
        f"{_warmup(run['warmup_steps'])}); weight decay {run['weight_decay']:g}; seed {run['seed']}"
        + ("." if run["mask_seed"] is None else f"; mask seed {run['mask_seed']}.")
        + _taught(run["recipe"])
    )


def _warmup(steps: float) -> str:
    """The Trainer takes less than one for a share of all steps."""
    return f"{steps:.0%} warmup" if 0 < steps < 1 else f"{steps:g} warmup steps"


def _taught(recipe: Mapping[str, Any]) -> str:
    """What a student was taught by, which the recipe of texts knows."""
    if not recipe.get("teacher"):
        return ""
    parts = {"logits_weight": "logits", "hidden_weight": "hidden states", "labels_weight": "the labels"}
    weights = [f"{recipe[key]:g} for {what}" for key, what in parts.items() if recipe.get(key)]
    return (
        " The loss is the distance to a full-precision model that was fine-tuned for the task, with the weights "
        f"{', '.join(weights)} and temperature {recipe['temperature']:g}." + _augmented(recipe)
    )


def _augmented(recipe: Mapping[str, Any]) -> str:
    """Which other texts it judges than those of the task."""
    others, share = recipe.get("join_texts", 1) - 1, recipe.get("replace_words", 0)
    copies = recipe.get("text_copies", 1)
    said = {
        f"with up to {others} random others behind them": others > 0,
        f"in which a share of {share:g} of the words that are one token is replaced by near ones": share > 0,
        f"drawn anew for each of {copies} copies": copies > 1,
    }
    parts = [text for text, so in said.items() if so]
    return f" It judges texts {', and '.join(parts)}." if parts else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
