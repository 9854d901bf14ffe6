r"""Fine-tune a BERT on a GLUE task, in 1 bit with `--binarize`, and report the trained model and its packed copy.

A minute on a CPU, nothing to download (a synthetic task and a tiny BERT, written by code):

    python recipes/run_glue.py recipes/configs/demo.yaml

SST-2 from the Hub, W1A1 by StoMPP; every YAML key is a flag, and a flag overrides the file:

    python recipes/run_glue.py recipes/configs/sst2_minilm_stompp.yaml \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2

An adapter on the packed model that this leaves:

    python recipes/run_glue.py recipes/configs/sst2_minilm_lora.yaml --model_name_or_path out/sst2/packed
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import synthetic
from adapters import AdapterArguments, add_adapter, score_adapter, write_card
from augmentation import join_texts, replace_words
from glue_tasks import HUB_ID, Task, get_task, load_task
from hf_stompp import BinarizationConfig, StomppCallback, summary
from hf_stompp.distillation import DistillationTrainer, loaded_teacher, with_teacher_logits
from hf_stompp.patching import binary_layers, is_packed
from hf_stompp.preflight import check_schedule
from hf_stompp.scoring import decide
from recipe_flags import parse_recipe
from recipe_utils import (
    CommonArguments,
    bucket_by_length,
    describe,
    metrics_of,
    publishable,
    refuse_best_checkpoint,
    report,
    score,
    train,
)

OF_TRAINER = ("temperature", "logits_weight", "hidden_weight", "labels_weight")
"""Flags that the trainer takes beside a teacher."""
OF_TEACHING = (*OF_TRAINER, "cache_teacher", "join_texts", "replace_words", "text_copies")
"""Flags of a teacher, which a run without one does not take."""


@dataclass
class RecipeArguments(AdapterArguments, CommonArguments):
    task_name: str | None = field(default=None, metadata={"help": "A GLUE task, as sst2, or synthetic, the demo."})
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of parquet files; without it nyu-mll/glue from the Hub."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model; synthetic makes a tiny BERT without one."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut; padding is per batch."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first test rows only."})
    dropout: float | None = field(
        default=None, metadata={"help": "Hidden and attention dropout; without it the model's own."}
    )
    bucket_by_length: bool = field(
        default=False, metadata={"help": "Batches of texts of like length, in one random order for all epochs."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, …; on a CPU eager is faster for short texts."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Distil from this model, a Hub id or folder, fine-tuned for the task."}
    )
    cache_teacher: bool = field(
        default=False, metadata={"help": "Ask it once of each row, for logits alone; pays from the second epoch on."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the logits of teacher and student."})
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's logits in the loss."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of its hidden states."})
    labels_weight: float = field(default=0.0, metadata={"help": "Weight of the labels, beside a teacher."})
    join_texts: int = field(
        default=1,
        metadata={"help": "N: each training text with up to N-1 random others behind it, for a teacher to judge."},
    )
    replace_words: float = field(
        default=0.0,
        metadata={"help": "P, a probability: replace words that are one token by near ones, for a teacher to judge."},
    )
    text_copies: int = field(
        default=1,
        metadata={"help": "N copies of the training set, each with its own draws of join_texts or replace_words."},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what it writes to `results.json`."""
    argv = sys.argv[1:] if argv is None else argv
    recipe, config, args = parse_recipe(argv, (RecipeArguments, BinarizationConfig, TrainingArguments))
    check(recipe, args)
    set_seed(args.seed)
    prepared = prepare(recipe, args)
    task, data, max_length = prepared.task, prepared.data, prepared.max_length
    trainer = make_trainer(recipe, args, prepared, make_model(prepared, recipe, config))
    if (recipe.binarize or recipe.adapter) and trainer.is_world_process_zero():
        print(summary(trainer.model))
    training = train(trainer, recipe.matmul_precision)
    # Grouping by length also reorders what is evaluated: from here on rows keep the order of the data set.
    args.train_sampling_strategy = "sequential"
    binarization = config if recipe.binarize else None
    folder = Path(args.output_dir)
    if recipe.adapter:
        scores = score_adapter(trainer, lambda base: load_model(base, task, recipe), prepared.source)
    else:
        rows, folder = score(trainer, binarization, AutoModelForSequenceClassification)
        scores = {"rows": rows}
    if args.do_predict:
        for split in task.test:
            write_predictions(trainer, data[split], task, Path(args.output_dir) / f"predictions_{split}.tsv")
    # What `hf_stompp.verify` needs to score the model again.
    scoring = {"columns": list(task.columns), "max_length": max_length, "metric_config": metric_config(recipe)}
    description = describe(recipe, binarization, args)
    results = {**description, **scoring, **training, **scores}
    if trainer.is_world_process_zero():
        dataset = None if recipe.task_name == "synthetic" else HUB_ID
        command = ["recipes/run_glue.py", *argv]
        report(results, Path(args.output_dir), dataset, command)
        if recipe.adapter:
            write_card(trainer, results, dataset, publishable(command))
        elif recipe.task_name == "synthetic":
            print(synthetic.EXAMPLE, pipeline("text-classification", model=str(folder))(synthetic.EXAMPLE))
    return results


class Prepared(NamedTuple):
    """What a run trains on: a pretrained model's folder or Hub id, and tokenized data."""

    source: str
    task: Task
    data: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def prepare(recipe: RecipeArguments, args: TrainingArguments) -> Prepared:
    """Load and tokenize the data, one process of a machine after the other."""
    with args.main_process_first(desc="data"):
        task, data = load_data(recipe, args)
        source = recipe.model_name_or_path or str(Path(args.output_dir) / "initial")
        if recipe.model_name_or_path is None and args.local_process_index == 0:  # others would write while it reads
            synthetic.save_tiny_bert(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        max_length = min(recipe.max_seq_length, tokenizer.model_max_length)
        data["train"] = augment(recipe, data["train"], task, source, tokenizer, args.seed)
        data = tokenize(data, task, tokenizer, max_length)
    if recipe.bucket_by_length:
        data["train"] = bucket_by_length(data["train"], args.per_device_train_batch_size, args.seed)
        args.train_sampling_strategy = "sequential"
    return Prepared(source, task, data, tokenizer, max_length)


def augment(
    recipe: RecipeArguments, rows: Dataset, task: Task, source: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Dataset:
    """Other texts in the place of those of the training set, if they are asked for."""
    rows = concatenate_datasets([rows] * recipe.text_copies)
    if recipe.join_texts > 1:
        rows = join_texts(rows, task.columns[0], recipe.join_texts, seed)
    if recipe.replace_words > 0:
        embeddings = load_model(source, task, recipe).get_input_embeddings()
        rows = replace_words(rows, task.columns, tokenizer, embeddings, recipe.replace_words, seed)
    return rows


def make_model(prepared: Prepared, recipe: RecipeArguments, config: BinarizationConfig) -> Any:
    """What is trained: the pretrained model, binarized with `--binarize`, with an adapter with `--adapter`."""
    model = load_model(prepared.source, prepared.task, recipe, config if recipe.binarize else None)
    if recipe.binarize and is_packed(model):
        raise ValueError(
            f"binarize: {prepared.source} is packed. Drop the flag to train an adapter on it (--adapter); to train "
            "its bits on, save hf_stompp.unpack(model), and take that."
        )
    if is_packed(model) and not recipe.adapter:
        raise ValueError(
            f"model_name_or_path: {prepared.source} is packed, and bits are not trained. Train an adapter on it, with "
            "--adapter lora, or save hf_stompp.unpack(model), and take that."
        )
    if recipe.adapter and not recipe.binarize and binary_layers(model):
        raise ValueError(
            f"model_name_or_path: {prepared.source} is latent. Take its packed folder to train an adapter on bits, or "
            "pass --binarize to train both."
        )
    return add_adapter(model, recipe, "SEQ_CLS") if recipe.adapter else model


def make_trainer(
    recipe: RecipeArguments,
    args: TrainingArguments,
    prepared: Prepared,
    model: PreTrainedModel | None = None,
    model_init: Callable[..., PreTrainedModel] | None = None,
) -> Trainer:
    """The Trainer of a model, or of those that `model_init` makes."""
    if model is not None and recipe.binarize and args.do_train and args.max_steps > 0:
        check_schedule(model, args.max_steps)  # before a teacher is asked of all rows
    kind: Any = Trainer
    if recipe.teacher:
        weights = {name: getattr(recipe, name) for name in OF_TRAINER}
        kind = partial(DistillationTrainer, teacher=load_teacher(recipe), **weights)
    trainer: Trainer = kind(
        model,
        args,
        model_init=model_init,
        train_dataset=taught(recipe, args, prepared) if recipe.cache_teacher else prepared.data["train"],
        eval_dataset=evaluation_data(prepared.data, prepared.task),
        processing_class=prepared.tokenizer,
        compute_metrics=metrics_of(recipe, "glue", metric_config(recipe)),
        callbacks=[StomppCallback()] if recipe.binarize else None,
    )
    return trainer


def load_teacher(recipe: RecipeArguments) -> PreTrainedModel:
    """It attends as the student does, which for short texts on a CPU is a tenth of a step."""
    given = recipe.attn_implementation
    return loaded_teacher(recipe.teacher, **({} if given is None else {"attn_implementation": given}))


def taught(recipe: RecipeArguments, args: TrainingArguments, prepared: Prepared) -> Any:
    """The training set with what the teacher says of it; one process of a machine asks it."""
    teacher = load_teacher(recipe).to(args.device)
    with args.main_process_first(desc="the teacher"):
        return with_teacher_logits(prepared.data["train"], teacher, DataCollatorWithPadding(prepared.tokenizer))


def check(recipe: RecipeArguments, args: TrainingArguments) -> None:
    """Refuse what contradicts itself before anything is loaded."""
    if recipe.task_name == "synthetic":
        for flag, given in (("dataset_dir", recipe.dataset_dir), ("do_predict", args.do_predict)):
            if given:
                raise ValueError(f"{flag}: received {given!r}; synthetic has no files and no test split. Drop it.")
    elif get_task(recipe.task_name, ["synthetic"]) and recipe.model_name_or_path is None:
        raise ValueError(
            f"model_name_or_path: received None; {recipe.task_name} needs a Hub id or a folder of a pretrained model, "
            "as in --model_name_or_path google-bert/bert-base-uncased. Only synthetic makes its own."
        )
    check_augmentation(recipe)
    for name in OF_TEACHING if recipe.teacher is None else ():
        if getattr(recipe, name) != getattr(RecipeArguments, name):
            raise ValueError(
                f"{name}: received {getattr(recipe, name)} without a teacher. Pass --teacher with it, or drop it."
            )
    if recipe.cache_teacher and recipe.hidden_weight > 0:
        raise ValueError(
            f"cache_teacher: received True with teacher={recipe.teacher!r} and hidden_weight={recipe.hidden_weight}; "
            "allowed: with a teacher whose logits alone are asked for. Drop it, or set hidden_weight to 0."
        )
    refuse_best_checkpoint(args)


def check_augmentation(recipe: RecipeArguments) -> None:
    """Refuse wrong values of what makes other texts, and any of it beside labels, which other texts have not."""
    joined, replaced = (f"{name}: received {getattr(recipe, name)}" for name in ("join_texts", "replace_words"))
    if recipe.join_texts < 1:
        raise ValueError(f"{joined}; allowed: 1, which joins none, or more, as 3.")
    if not 0 <= recipe.replace_words <= 1:
        raise ValueError(f"{replaced}; allowed: a probability, from 0, which replaces none, to 1, as 0.3.")
    copies = f"text_copies: received {recipe.text_copies}"
    if recipe.text_copies < 1:
        raise ValueError(f"{copies}; allowed: 1, the training set itself, or more, as 10.")
    if recipe.text_copies > 1 and recipe.join_texts == 1 and recipe.replace_words == 0:
        raise ValueError(
            f"{copies} without join_texts or replace_words, so that all are the same. Pass one of them, or drop it: "
            "max_steps and num_train_epochs say how often the training set is gone through."
        )
    columns = () if recipe.task_name == "synthetic" else get_task(recipe.task_name).columns
    if recipe.join_texts > 1 and len(columns) > 1:
        raise ValueError(
            f"{joined} for {recipe.task_name}, which has two texts; allowed: a task of one text. Drop it; in a suite "
            "it belongs under the `flags` of such tasks."
        )
    for received, given in ((joined, recipe.join_texts > 1), (replaced, recipe.replace_words > 0)):
        if given and recipe.labels_weight > 0:
            raise ValueError(
                f"{received} with labels_weight={recipe.labels_weight}, but a label is that of the text as it was. "
                "Drop one of the two."
            )


def load_data(recipe: RecipeArguments, args: TrainingArguments) -> tuple[Task, DatasetDict]:
    name, train, evaluation = recipe.task_name, recipe.max_train_samples, recipe.max_eval_samples
    if name == "synthetic":
        return synthetic.TASK, synthetic.load_synthetic(train, evaluation)
    data = load_task(name, recipe.dataset_dir, args.do_predict, train, evaluation, recipe.max_predict_samples)
    return get_task(name), data


def tokenize(data: DatasetDict, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    def encode(rows: dict[str, list[str]]) -> Any:
        texts = [rows[column] for column in task.columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    return data.map(encode, batched=True, remove_columns=list(task.columns), desc="Tokenizing")


def load_model(
    source: str, task: Task, recipe: RecipeArguments, binarization: BinarizationConfig | None = None
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source, num_labels=task.num_labels)
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: code for code, label in enumerate(task.labels)}
    if recipe.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not hasattr(config, name):
                raise ValueError(
                    f"dropout: received {recipe.dropout}, but a {config.model_type} has no {name}. Drop --dropout."
                )
            setattr(config, name, recipe.dropout)
    options: dict[str, Any] = {} if binarization is None else {"quantization_config": binarization}
    recorded = getattr(config, "quantization_config", None)
    if binarization is not None and recorded and recorded.get("mode") == "train":
        del config.quantization_config  # of a stage before, whose rules transformers would take instead of these
    if recipe.attn_implementation is not None:
        options["attn_implementation"] = recipe.attn_implementation
    return AutoModelForSequenceClassification.from_pretrained(source, config=config, **options)


def evaluation_data(data: DatasetDict, task: Task) -> Any:
    """One split as it is; several by what follows `validation_`, which the Trainer puts before their metrics."""
    if len(task.evaluation) == 1:
        return data[task.evaluation[0]]
    return {split.removeprefix("validation_"): data[split] for split in task.evaluation}


def metric_config(recipe: RecipeArguments) -> str | None:
    return "sst2" if recipe.task_name == "synthetic" else recipe.task_name  # plain accuracy, as SST-2's


def write_predictions(trainer: Trainer, rows: Any, task: Task, path: Path) -> None:
    decided = decide(trainer.predict(rows).predictions)
    if trainer.is_world_process_zero():
        values = [f"{value:.3f}" if task.is_regression else task.labels[value] for value in decided]
        path.write_text("index\tprediction\n" + "".join(f"{i}\t{value}\n" for i, value in enumerate(values)))


if __name__ == "__main__":
    main()
