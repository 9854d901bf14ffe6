"""`model_card`: what a reader of the Hub must know of a binarized model, from the model itself and its results."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_stompp.checkpoint import check_kind, load_complete
from hf_stompp.config import BinarizationConfig
from hf_stompp.report import LayerSummary, Summary, summary

UNNAMED = "your-name/your-model"
"""Stands for the repository in a card that is written before there is one; `push` puts the real id in its place."""

_OWN = ""  # the name of the run that made the checkpoint, among the runs of a card
_PAPERS = ("2601.22660", "2606.27759")
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
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
_METHODS = {
    "layerwise": "layer by layer under stochastic masks (StoMPP)",
    "global": "in all layers together under stochastic masks (global progressive freezing)",
}


def model_card(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    *,
    results: Mapping[str, Any] | None = None,
    compared: Mapping[str, Mapping[str, Any]] | None = None,
    repo_id: str = UNNAMED,
    base_model: str | None = None,
    dataset: str | None = None,
    split: str = "validation",
    command: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Writes the card of a packed (or latent) model: bits per part, bytes, scores, how it was made, how to use it.

    The bits and bytes are read off the model, the scores out of what the recipes write to `results.json`; nothing is
    stated that was not given. The scores are in the metadata too, as structured evaluation results.

    Args:
        model_or_folder (`PreTrainedModel`, `str` or `Path`): The model, or the folder it was saved in; of a folder the
            card also knows the size of the files and whether there is a tokenizer.
        results (`Mapping`, *optional*): `results.json` of the run that made this checkpoint.
        compared (`Mapping`, *optional*): Name → `results.json` of runs to show beside it, as
            `{"full precision": …, "STE baseline": …}`.
        repo_id (`str`, *optional*): The repository it is for; without it, `push` fills it in.
        base_model (`str`, *optional*): Hub id of the pretrained model.
        dataset (`str`, *optional*): Hub id of the data; its config is the task of the results.
        split (`str`, *optional*, defaults to `"validation"`): What the results were scored on.
        command (`str`, *optional*): The training command.
        license (`str`, *optional*): A license id of the Hub; what the license of the base model allows.

    Returns:
        `huggingface_hub.ModelCard`: `card.save("folder/README.md")` writes it.

    Raises:
        ValueError: The model is not binarized; the results are of another config, task or kind of model; or there are
            results to compare with, and none to compare.

    Example:

        >>> card = model_card("out/sst2/packed", results=json.load(open("out/sst2/results.json")))  # doctest: +SKIP
        >>> card.save("out/sst2/packed/README.md")  # doctest: +SKIP
    """
    if isinstance(model_or_folder, PreTrainedModel):
        model, folder = model_or_folder, None
        check_kind(getattr(model.config, "quantization_config", None), type(model).__name__, latent=True)
    else:
        model, folder = load_complete(model_or_folder, latent=True), Path(model_or_folder)
    if compared and results is None:
        raise ValueError(f"compared has {sorted(compared)}, but there are no results to compare: pass results too.")
    runs = {_OWN: results, **(compared or {})} if results is not None else {}
    for name, run in runs.items():
        _check_run(name, run, runs[_OWN], model.config.quantization_config)
    recipe = (results or {}).get("recipe", {})
    data = Scored(dataset or recipe.get("task_name"), recipe.get("task_name") if dataset else None, split)
    return render(model, folder, runs, data, repo_id=repo_id, base_model=base_model, command=command, license=license)


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


def render(
    model: PreTrainedModel,
    folder: Path | None,
    runs: Mapping[str, Mapping[str, Any]],
    data: Scored,
    *,
    repo_id: str = UNNAMED,
    base_model: str | None = None,
    command: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Fills in the template for a loaded model; `runs` has its own results under "", and those beside it by name."""
    config: BinarizationConfig = model.config.quantization_config
    table = summary(model)
    own = runs.get(_OWN)
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), "feature-extraction")
    final = own is not None and _is_final(own, _row(own, config.mode))
    results = _eval_results(own, config.mode, task, data) if own and final else []
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            base_model_relation="quantized" if base_model else None,
            datasets=hub_id(data.name),
            eval_results=results or None,
            library_name="transformers",
            license=license,
            model_name=repo_id if results else None,
            pipeline_tag=task,
            tags=["1-bit", "binarization", "hf_stompp", *(f"arxiv:{paper}" for paper in _PAPERS)],
        ),
        template_path=str(_template()),
        repo_id=repo_id,
        packed=config.mode == "packed",
        model_class=type(model).__name__,
        bits=f"W{1 if config.weights else 32}A{1 if config.activations else 32}",
        binary_inputs=config.activations,
        frozen=f"{math.floor(100 * table.frozen_fraction)}%",  # 100% is all
        clipped=config.never_freezes,
        embeddings=config.embeddings,
        method=_method(config),
        file_bytes=_file_bytes(folder, table, config.mode),
        float_bytes=table.float_bytes,
        checksums=checksums(folder) if config.mode == "packed" else "",
        example=_example(repo_id, type(model).__name__, task, folder, config),
        parts=_parts(table),
        split=data.split,
        data=str(data),
        eval_limit=own and own["recipe"].get("max_eval_samples"),
        scores=_scores(runs, config.mode),
        final=final,
        training=_training(own),
        command=command,
        config=json.dumps({k: v for k, v in config.to_dict().items() if k != "modules"}, indent=2),
    )


def _template() -> Path:
    """In a wheel the template lies beside this file; in the repository it has one place, `model_cards/`."""
    here = Path(__file__)
    packaged = here.with_name("model_card_template.md")
    return packaged if packaged.is_file() else here.parents[1] / "model_cards" / "template.md"


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a Hub id; a local path is nobody else's business, and says nothing to a reader."""
    return name if name and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


# --- scores --------------------------------------------------------------------------------------------------------


def _check_run(name: str, run: Mapping[str, Any], own: Mapping[str, Any], config: BinarizationConfig) -> None:
    """Refuses scores that are not this checkpoint's, or that cannot stand beside them."""
    _check_keys("results" if name == _OWN else f"compared[{name!r}]", run)
    if name == _OWN:
        made = {key: value for key, value in (run["binarization"] or {}).items() if key not in ("mode", "modules")}
        other = sorted(key for key, value in config.to_dict().items() if key in made and made[key] != value)
        if not made or other:
            raise ValueError(
                f"results are of a run with another BinarizationConfig ({', '.join(other) or 'full precision'}) than "
                "the model's. Pass the results.json of the run that made this checkpoint."
            )
        _row(run, config.mode)
    for key in ("task_name", "max_eval_samples"):
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


def _row(run: Mapping[str, Any], mode: str) -> Mapping[str, Any]:
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


def _is_final(run: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether the weights that were scored are those that the run ended with; a row may name the step it is of."""
    return row.get("step", run["steps"]) == run["steps"]


def _eval_results(run: Mapping[str, Any], mode: str, task: str, data: Scored) -> list[EvalResult]:
    """One structured result a metric; with several splits the Trainer puts `matched_` and the like before each."""
    results = []
    # What it takes to score the model again.
    read = {"columns": run.get("columns"), "max_length": run.get("max_length")}
    read["first_rows"] = run["recipe"].get("max_eval_samples")
    for key, value in _metrics(_row(run, mode)).items():
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


def _scores(runs: Mapping[str, Mapping[str, Any]], mode: str) -> str:
    """A row for each stage of this run, the one of this checkpoint in bold, then the last stage of each other run."""
    rows: list[list[str]] = []
    metrics = list(_metrics(_row(runs[_OWN], mode))) if runs else []
    if not metrics:
        return ""
    for name, run in runs.items():
        own = _row(run, mode) if name == _OWN else None
        for row in run["rows"] if own else run["rows"][-1:]:
            absent = [metric for metric in metrics if metric not in row]
            if absent:
                raise ValueError(f"{name or 'results'}: the row {row['model']!r} has no {', '.join(absent)}.")
            title = f"this run, {row['model']}" if own else f"{name} ({row['model']})"
            values = [f"{row[metric]:.4f}" for metric in metrics]
            seeds = [str(run["seed"]), "" if run["mask_seed"] is None else str(run["mask_seed"])]
            cells = [title, *values, *seeds, f"{row.get('step', run['steps']):,}", f"{row['bytes']:,}"]
            bold = own is not None and row is own and _is_final(run, own)
            rows.append([f"**{cell}**" if cell and bold else cell for cell in cells])
    return _markdown(["model", *metrics, "seed", "mask seed", "steps", "bytes"], rows)


def _training(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    limit = run["recipe"].get("max_train_samples")
    examples = f"{run['batch_size']} examples" + (f" of the first {limit:,}" if limit else "")
    return (
        f"{run['steps']:,} steps of {examples}; learning rate {run['learning_rate']:g} ({run['lr_scheduler']}, "
        f"{run['warmup_steps']:g} warmup steps); weight decay {run['weight_decay']:g}; seed {run['seed']}; mask seed "
        f"{run['mask_seed']}."
    )


# --- what the model says of itself -----------------------------------------------------------------------------------


def _parts(table: Summary) -> str:
    """Bits and bytes, with the layers of a role and precision in one row."""
    groups: dict[tuple[str, int, int], list[LayerSummary]] = defaultdict(list)
    for row in table.rows:
        kind = "embedding tables" if row.role == "embedding" else f"{row.role} linears" if row.role else row.name
        groups[kind, row.weight_bits, row.input_bits].append(row)
    lines = []
    for (name, weight_bits, input_bits), rows in groups.items():
        levels = " or ".join(sorted({row.levels for row in rows} - {""}, reverse=True))
        sizes = [sum(row.parameters for row in rows), sum(row.float_bytes for row in rows)]
        sizes.append(sum(row.packed_bytes for row in rows))
        layers = str(len(rows)) if rows[0].role else ""
        bits = [str(weight_bits), str(input_bits), levels and f"`{levels}`"]
        lines.append([name, layers, *bits, *map("{:,}".format, sizes)])
    totals = [table.parameters, table.float_bytes, table.packed_bytes]
    lines.append(["total", "", "", "", "", *map("{:,}".format, totals)])
    header = [
        "part",
        "layers",
        "weight bits",
        "input bits",
        "input levels",
        "parameters",
        "float32 bytes",
        "packed bytes",
    ]
    return _markdown(header, lines)


def _file_bytes(folder: Path | None, table: Summary, mode: str) -> int:
    if folder is not None:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return table.packed_bytes if mode == "packed" else table.float_bytes


def checksums(folder: Path | None) -> str:
    """A line, as `sha256sum` prints it, for each file that decides on what the model predicts."""
    found = {file for pattern in _DECIDING for file in (folder.glob(pattern) if folder else ())}
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))  # hidden: not pushed
    return "\n".join(f"{sha256(file)}  {file.name}" for file in files)


def sha256(path: Path) -> str:
    """The checksum of a file, which is read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _method(config: BinarizationConfig) -> str:
    """How the model is trained, in a sentence."""
    what = " and ".join(
        name for name, given in (("weights", config.weights), ("activations", config.activations)) if given
    )
    if config.never_freezes:
        return f"In training, {what} are clipped and never become binary (the clipped network, not StoMPP)."
    how = _METHODS.get(config.progression)
    if how is None:
        start = f", after {config.progression_start:.0%} of the steps" if config.progression_start else ""
        without = "without a gradient from then on, neither StoMPP nor the straight-through baseline"
        kind = "the straight-through baseline, not StoMPP" if config.surrogate == "ste" else without
        how = f"in all layers at once{start} ({kind})"
    return f"In training, clipped {what} are replaced by hard binary ones {how}."


def _example(repo_id: str, model_class: str, task: str, folder: Path | None, config: BinarizationConfig) -> str:
    """Loads and predicts, or packs a latent model, as it stands, from the Hub or a folder."""
    if config.never_freezes:  # which cannot be packed
        lines = ["import hf_stompp  # makes transformers clip", f"from transformers import {model_class}", ""]
        return "\n".join([*lines, f'model = {model_class}.from_pretrained("{repo_id}")'])
    if config.mode == "train":
        lines = ["import hf_stompp", f"from transformers import {model_class}", ""]
        lines += [f'model = {model_class}.from_pretrained("{repo_id}")', "packed = hf_stompp.pack(model)"]
        return "\n".join([*lines, 'packed.save_pretrained("packed")'])
    lines = ["import hf_stompp  # makes transformers read 1-bit checkpoints"]
    tokenizer = folder is None or (folder / "tokenizer_config.json").is_file()
    if tokenizer and task in ("text-classification", "token-classification", "feature-extraction"):
        lines += ["from transformers import pipeline", "", f'predict = pipeline("{task}", model="{repo_id}")']
        return "\n".join([*lines, 'print(predict("This is an example."))'])
    inputs = "**model.dummy_inputs"
    if task == "multiple-choice":  # each example is a list of texts
        inputs = "**{name: tensor.unsqueeze(0) for name, tensor in model.dummy_inputs.items()}"
    lines += [f"from transformers import {model_class}", "", f'model = {model_class}.from_pretrained("{repo_id}")']
    return "\n".join([*lines, f"print(model({inputs}))"])


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
