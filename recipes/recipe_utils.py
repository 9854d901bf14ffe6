"""What the recipes share: train, pack and reload, the result table and file."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EvalPrediction, Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_stompp import BinarizationConfig, last_checkpoint, model_card, pack
from hf_stompp.checkpoint import whole_folder, write_json
from hf_stompp.results import result_row, training_facts
from hf_stompp.scoring import decide

logger = logging.get_logger(__name__)


@dataclass
class CommonArguments:
    """The flags of every recipe."""

    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of the data; without it they come from the Hub."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the pretrained model."}
    )
    binarize: bool = field(default=False, metadata={"help": "Binarize the model; without it, full precision."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first rows only."})
    hub_metrics: bool = field(default=False, metadata={"help": "The Hub's metric module, not the one in metrics/."})
    matmul_precision: Literal["highest", "high", "medium"] = field(
        default="highest",
        metadata={"help": "torch.set_float32_matmul_precision while training; medium is faster on CPUs with AMX."},
    )


def bucket_by_length(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """Order tokenized rows, for sequential sampling, so that a batch holds texts of like length and needs no padding.

    Rows are shuffled; runs of 50 batches are sorted by length and cut; the batches are shuffled. The Trainer's own
    `group_by_length` leaves that last step out: each run goes from its longest texts to its shortest, and so does what
    the model has seen last.

    Example:

        >>> rows = Dataset.from_list([{"input_ids": [0] * n} for n in (1, 5, 1, 5)])
        >>> [len(ids) for ids in bucket_by_length(rows, batch_size=2, seed=0)["input_ids"]]
        [5, 5, 1, 1]
    """
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    run = 50 * batch_size
    runs = (order[i : i + run] for i in range(0, len(order), run))
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in runs])
    whole = len(order) // batch_size * batch_size  # what is left over comes last
    batches = order[:whole].reshape(-1, batch_size)
    generator.shuffle(batches)
    return rows.select(np.concatenate([batches.ravel(), order[whole:]]))


def refuse_best_checkpoint(args: TrainingArguments) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end: received True; allowed: False. The final checkpoint is reported: the best of "
            "many dev scores is biased, and one from before the end is not fully binary. Drop the flag."
        )


def metrics_of(
    recipe: CommonArguments, name: str, config: str | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """What the Trainer scores with: the `evaluate` module `name`, of those in metrics/ or of the Hub; and `collapsed`,
    where the model says the same of all rows, whose score is that of a constant."""
    module = name if recipe.hub_metrics else str(Path(__file__).parent / "metrics" / name)
    metric = evaluate.load(module, config, keep_in_memory=True)

    def compute(output: EvalPrediction) -> dict[str, float]:
        decided = decide(output.predictions)
        scores: dict[str, float] = metric.compute(predictions=decided, references=output.label_ids)
        if len(np.unique(decided)) == 1 < len(np.unique(output.label_ids)):
            logger.warning(
                f"The model gives the class {decided[0]} to each of the {len(decided)} rows: it has collapsed, and "
                "its score is that of a constant. In the middle of StoMPP it may recover; at the end, try a smaller "
                "learning rate, more steps, or a teacher."
            )
            scores["collapsed"] = 1.0
        return scores

    return compute


def train(trainer: Trainer, matmul_precision: str) -> dict[str, Any]:
    """Train, or go on training, with `--do_train`; save the model; return what of it belongs in `results.json`."""
    args = trainer.args
    checkpoint = checkpoint_to_resume(args) if args.do_train else None
    check_shared(args, gather_object([(checkpoint, files_of_checkpoints(args))]))
    scale_losses(trainer)
    torch.set_float32_matmul_precision(matmul_precision)
    metrics: dict[str, Any] = {}
    if checkpoint is not None and is_finished(checkpoint, steps_of(trainer)):
        take_up(trainer, checkpoint)
    elif args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    torch.set_float32_matmul_precision("highest")  # the scores are those that any user gets
    trainer.save_model()
    trainer.save_state()  # with its log, which `hf-stompp plot` draws
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_seconds": metrics.get("train_runtime"),
        "resumed_from": checkpoint,
    }


def files_of_checkpoints(args: TrainingArguments) -> list[str]:
    """Which files this process sees in the checkpoints of `output_dir`; none if it is told what to resume from."""
    if not args.do_train or (args.resume_from_checkpoint or "true").lower() != "true":
        return []
    folder = Path(args.output_dir)
    return sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoint-*/**/*") if path.is_file())


def check_shared(args: TrainingArguments, found: Sequence[tuple[str | None, list[str]]]) -> None:
    """Refuses to go on where processes would go on from different checkpoints, or anew because each machine has a
    folder of its own, with a part of each checkpoint.

    Args:
        args: Of the run.
        found: Of each process, the checkpoint that it would go on from, and the `files_of_checkpoints`.
    """
    checkpoints, files = {str(checkpoint) for checkpoint, _ in found}, {tuple(each) for _, each in found}
    if len(checkpoints) > 1 or len(files) > 1:
        apart = sorted(file for file in set().union(*files) if any(file not in each for each in files))
        more = f"; not all see {apart[0]}" if apart else ""
        raise ValueError(
            f"output_dir: {args.output_dir!r} is not the same folder for all processes, which find the checkpoints "
            f"{', '.join(sorted(checkpoints))}{more}. Pass a folder that all share, with the files of all machines in "
            "it, or --resume_from_checkpoint False to start anew."
        )


def scale_losses(trainer: Trainer) -> None:
    """Makes the gradient that of the mean over a step, whatever it is made of.

    The loss of classification heads is the mean of its batch. The Trainer takes it for a share of the mean over a
    step, and makes the gradient of several processes, and of accumulated batches, so many times as large.
    """
    trainer.model_accepts_loss_kwargs = False


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to train on from: the one asked for, else the last whole one in `output_dir`, else none.

    `--resume_from_checkpoint` takes a folder, `True` (the last in `output_dir`; an error without one) or `False`
    (start anew). Without it a run that was interrupted goes on when its command is given again, and one that was
    finished is left as it is.
    """
    asked = args.resume_from_checkpoint
    if asked is not None and asked.lower() == "false":
        return None
    if asked is not None and asked.lower() != "true":
        return asked
    last = last_checkpoint(args.output_dir)
    if last is None and asked:
        raise ValueError(
            f"resume_from_checkpoint: received {asked}, but output_dir {args.output_dir!r} has no whole checkpoint. "
            "Pass the folder of one, or drop the flag to start anew."
        )
    if last is not None and not asked:
        if (Path(args.output_dir) / "results.json").exists():
            _refuse_finished(args.output_dir, last)
        print(f"Resuming from {last}. To start anew: --resume_from_checkpoint False, or another --output_dir.")
    return last


def steps_of(trainer: Trainer) -> int:
    """Optimizer steps of a run."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    per_epoch = -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
    return math.ceil(per_epoch * trainer.args.num_train_epochs)


def is_finished(checkpoint: str, steps: int) -> bool:
    """Whether a run of so many steps has nothing left to train."""
    step = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
    if step > steps:
        raise ValueError(
            f"max_steps, num_train_epochs: received a run of {steps} steps, but {checkpoint} is of step {step} "
            "already. Pass more, or --resume_from_checkpoint False to start anew."
        )
    return step == steps


def take_up(trainer: Trainer, checkpoint: str) -> None:
    """Put the last checkpoint of a run, that was killed before its results were written, in the place of training:
    the Trainer would make one more step."""
    model: Any = trainer.model
    if hasattr(model, "peft_config"):
        model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
    else:
        trainer.model = trainer.model_wrapped = type(model).from_pretrained(checkpoint).to(trainer.args.device)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _refuse_finished(output_dir: str, checkpoint: str) -> None:
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step >= state.max_steps:
        whole = (Path(output_dir) / "config.json").is_file()  # not an adapter alone
        again = f" To score it again: --model_name_or_path {output_dir} --do_train False." if whole else ""
        raise ValueError(
            f"output_dir: {output_dir!r} holds a run that was finished at step {state.global_step}. To start anew: "
            "another --output_dir, or --resume_from_checkpoint False. To train on: --resume_from_checkpoint True "
            f"and a larger --max_steps.{again}"
        )


def score(trainer: Trainer, config: BinarizationConfig | None, auto_class: Any) -> tuple[list[dict[str, Any]], Path]:
    """The rows of the result table, and the folder of the last model in it: of a binarized one its packed copy."""
    folder = Path(trainer.args.output_dir)
    rows = [result_row("latent fp32" if config else "full precision", trainer.evaluate(), folder)]
    if config and config.weights and not config.never_freezes:
        folder = folder / "packed"
        pack_and_reload(trainer, folder, auto_class)
        rows.append(result_row("packed, reloaded", trainer.evaluate(), folder))
    return rows, folder


def pack_and_reload(trainer: Trainer, folder: Path, auto_class: Any) -> None:
    """Save the packed model in `folder`, and go on with it as any user will: `auto_class.from_pretrained(folder)`.

    The folder is there when it is whole, and not before: a full disk or a killed run leaves none, or the old one.
    """
    if trainer.is_world_process_zero():
        # Of a model in shards, what has been saved of it is whole.
        latent = auto_class.from_pretrained(folder.parent) if trainer.is_fsdp_enabled else trainer.model
        with whole_folder(folder) as draft:
            pack(latent).save_pretrained(draft)
            trainer.processing_class.save_pretrained(draft)
    trainer.accelerator.wait_for_everyone()
    # The constructor of Trainer takes no model that can only be evaluated.
    trainer.model = trainer.model_wrapped = auto_class.from_pretrained(folder).to(trainer.args.device)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, which share their keys, as a Markdown table."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines.insert(1, [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(
        " | ".join([f"| {name:{first}}", *map(str.rjust, values, others)]) + " |" for name, *values in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def describe(recipe: Any, config: BinarizationConfig | None, args: TrainingArguments) -> dict[str, Any]:
    """What a reader of `results.json` needs to run it again; all `TrainingArguments` are in `training_args.bin`."""
    return {"recipe": vars(recipe), **training_facts(args, config)}


def report(results: dict[str, Any], folder: Path, dataset: str | None, command: Sequence[str]) -> None:
    """Write `results.json`, print its rows, and write the model card of the packed model, if there is one.

    Args:
        results: What `python command …` came to.
        folder: Its `output_dir`.
        dataset: Hub id of the data.
        command: The script and its flags; local paths are left out of the card.
    """
    write_json(folder / "results.json", results)
    print(format_table(results["rows"]))
    packed = folder / "packed"
    if results["rows"][-1]["model"].startswith("packed"):
        source = results["recipe"]["model_name_or_path"]
        base_model = None if source is None or Path(source).exists() else source
        card = model_card(
            packed,
            results=results,
            dataset=dataset,
            base_model=base_model,
            command=publishable(command),
        )
        card.save(packed / "README.md")
        print(f"The packed model, with its card, is in {packed}: look at it with `hf-stompp summary {packed}`.")


def publishable(command: Sequence[str]) -> str:
    """The command line without what is nobody's business: absolute paths and tokens.

    Example:

        >>> publishable(["run.py", "--hub_token", "hf_x", "--output_dir=/home/me/out", "--seed", "1"])
        'python run.py --output_dir=path/to/out --seed 1'
    """
    words: list[str] = []
    flag = ""
    for word in command:
        name, equals, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        flag = name if word.startswith("--") and not equals else ""
        if "token" in name:
            continue
        masked = f"path/to/{Path(value).name}" if Path(value).is_absolute() else value
        words.append(f"{name}={masked}" if equals else word if word.startswith("--") else masked)
    return shlex.join(["python", *words])
