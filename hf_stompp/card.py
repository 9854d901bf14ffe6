"""`model_card`: what a reader of the Hub must know of a binarized model, from the model itself and its results."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_stompp.checkpoint import check_kind, checksums, load_complete, weight_bytes
from hf_stompp.config import BinarizationConfig
from hf_stompp.report import LayerSummary, Summary, summary
from hf_stompp.results import (
    OWN,
    Scored,
    check_run,
    eval_results,
    hub_id,
    is_final,
    markdown_table,
    scored_row,
    scores_table,
    training_sentence,
)
from hf_stompp.tracing import example_inputs

UNNAMED = "your-name/your-model"
"""Stands for the repository in a card that is written before there is one; `push` puts the real id in its place."""

_PAPERS = ("2601.22660", "2606.27759")
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
}
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
    split: str | None = None,
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
        split (`str`, *optional*): What the results were scored on; by default what they say, else `"validation"`.
        command (`str`, *optional*): The training command.
        license (`str`, *optional*): A license id of the Hub; what the license of the base model allows.

    Returns:
        `huggingface_hub.ModelCard`: `card.save("folder/README.md")` writes it.

    Raises:
        TypeError: The model has adapters.
        ValueError: The model is not binarized; the results are of another config, task or kind of model; or there are
            results to compare with, and none to compare.

    Example:

        >>> card = model_card("out/sst2/packed", results=json.load(open("out/sst2/results.json")))  # doctest: +SKIP
        >>> card.save("out/sst2/packed/README.md")  # doctest: +SKIP
    """
    if hasattr(model_or_folder, "peft_config"):
        raise TypeError("model_card is for whole models; hf_stompp.peft.card.adapter_card(model) is for adapters.")
    if isinstance(model_or_folder, PreTrainedModel):
        model, folder = model_or_folder, None
        check_kind(getattr(model.config, "quantization_config", None), type(model).__name__, latent=True)
    else:
        model, folder = load_complete(model_or_folder, latent=True), Path(model_or_folder)
    if compared and results is None:
        raise ValueError(f"compared has {sorted(compared)}, but there are no results to compare: pass results too.")
    runs = {OWN: results, **(compared or {})} if results is not None else {}
    for name, run in runs.items():
        check_run(name, run, runs[OWN], model.config.quantization_config)
    recipe = (results or {}).get("recipe", {})
    part = recipe.get("task_name") or recipe.get("dataset_config")
    split = split or recipe.get("eval_split") or "validation"
    data = Scored(dataset or recipe.get("task_name"), part if dataset else None, split)
    return render(model, folder, runs, data, repo_id=repo_id, base_model=base_model, command=command, license=license)


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
    table, packed = summary(model), config.mode == "packed"
    own = runs.get(OWN)
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), "feature-extraction")
    final = own is not None and is_final(own, scored_row(own, config.mode))
    results = eval_results(own, config.mode, task, data) if own and final else []
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
        template_path=str(template("template.md")),
        repo_id=repo_id,
        packed=packed,
        model_class=type(model).__name__,
        bits=f"W{1 if config.weights else 32}A{1 if config.activations else 32}, {table.contract}",
        binary_inputs=config.activations,
        frozen=f"{math.floor(100 * table.frozen_fraction)}%",  # 100% is all
        clipped=config.never_freezes,
        attention=config.attention,
        embeddings=config.embeddings,
        folded=len(config.folded or ()),
        method=_method(config),
        file_bytes=weight_bytes(folder) if folder else table.packed_bytes if packed else table.float_bytes,
        float_bytes=table.float_bytes,
        checksums=checksums(folder) if folder and packed else "",
        example=_example(repo_id, model, task, folder),
        parts=_parts(table),
        split=data.split,
        data=str(data),
        eval_limit=own and own["recipe"].get("max_eval_samples"),
        scores=scores_table(runs, config.mode),
        final=final,
        training=training_sentence(own),
        command=command,
        config=json.dumps(config.settings(), indent=2),
    )


def template(name: str) -> Path:
    """A template of cards: in a wheel it lies beside this file, in the repository in `model_cards/`."""
    here = Path(__file__)
    packaged = here.with_name("model_cards") / name
    return packaged if packaged.is_file() else here.parents[1] / "model_cards" / name


_KINDS = {"embedding": "embedding tables", "attention": "tensors of attention"}
"""What layers of a role are called, if not by it."""


def _parts(table: Summary) -> str:
    """Bits and bytes, with the layers of a role and precision in one row."""
    groups: dict[tuple[str, int, int], list[LayerSummary]] = defaultdict(list)
    for row in table.rows:
        kind = _KINDS.get(row.role, f"{row.role} layers") if row.role else row.name
        groups[kind, row.weight_bits, row.input_bits].append(row)
    lines = []
    for (name, weight_bits, input_bits), rows in groups.items():
        levels = " or ".join(sorted({row.levels for row in rows} - {""}, reverse=True))
        sizes = [sum(row.parameters for row in rows), sum(row.float_bytes for row in rows)]
        sizes.append(sum(row.packed_bytes for row in rows))
        layers = str(len(rows)) if rows[0].role else ""
        bits = [str(weight_bits or ""), str(input_bits), levels and f"`{levels}`"]
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
    return markdown_table(header, lines)


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


def _example(repo_id: str, model: PreTrainedModel, task: str, folder: Path | None) -> str:
    """Loads and predicts, or packs a latent model, as it stands, from the Hub or a folder."""
    config, model_class = model.config.quantization_config, type(model).__name__
    if config.never_freezes:  # which cannot be packed
        lines = ["import hf_stompp  # makes transformers clip", f"from transformers import {model_class}", ""]
        return "\n".join([*lines, f'model = {model_class}.from_pretrained("{repo_id}")'])
    if config.mode == "train":
        lines = ["import hf_stompp", f"from transformers import {model_class}", ""]
        lines += [f'model = {model_class}.from_pretrained("{repo_id}")', "packed = hf_stompp.pack(model)"]
        return "\n".join([*lines, 'packed.save_pretrained("packed")'])
    lines = ["import hf_stompp  # makes transformers read 1-bit checkpoints"]
    if task == "image-classification" and (folder is None or (folder / "preprocessor_config.json").is_file()):
        lines += ["from transformers import pipeline", "", f'predict = pipeline("{task}", model="{repo_id}")']
        return "\n".join([*lines, 'print(predict("image.png"))'])
    tokenizer = folder is None or (folder / "tokenizer_config.json").is_file()
    if tokenizer and task in ("text-classification", "token-classification", "feature-extraction"):
        lines += ["from transformers import pipeline", "", f'predict = pipeline("{task}", model="{repo_id}")']
        return "\n".join([*lines, 'print(predict("This is an example."))'])
    inputs = "**model.dummy_inputs"
    if model.main_input_name == "pixel_values":
        lines.append("import torch")
        inputs = f"torch.rand{tuple(example_inputs(model)['pixel_values'].shape)}"
    if task == "multiple-choice":  # each example is a list of texts
        inputs = "**{name: tensor.unsqueeze(0) for name, tensor in model.dummy_inputs.items()}"
    lines += [f"from transformers import {model_class}", "", f'model = {model_class}.from_pretrained("{repo_id}")']
    return "\n".join([*lines, f"print(model({inputs}))"])
