"""Trainings for processes that are killed, or are several: see `fork_worker.py`."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.modeling_utils
import transformers.trainer_utils
from safetensors.torch import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_stompp import BinarizationConfig, StomppCallback, binarize, last_checkpoint, pack
from hf_stompp.distillation import DistillationTrainer
from hf_stompp.patching import binary_layers

STEPS, GLOBAL_BATCH = 12, 8


def make_model(config: dict[str, Any], dropout: float, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    bert = BertConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = BertForSequenceClassification(bert).to(dtype)
    # Its loss is the mean of its batch; the Trainer takes it for a share of the mean of all batches of a step.
    model.accepts_loss_kwargs = False
    return binarize(model, BinarizationConfig(**config))


def make_teacher(student: Any) -> Any:
    torch.manual_seed(1)
    return BertForSequenceClassification(student.config).to(student.dtype)


def with_adapter(model: Any, base: str) -> Any:
    """A LoRA on the packed model; or on the latent one, which is trained with it."""
    from peft import LoraConfig, get_peft_model

    from hf_stompp.peft import train_base

    if base == "packed":
        for layer in binary_layers(model).values():
            layer.set_frozen(1.0, step=1)
        model = pack(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    return train_base(adapted) if base == "latent" else adapted


def make_data() -> list[dict[str, Any]]:
    ids = torch.randint(1, 50, (48, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": sentence, "labels": i % 2} for i, sentence in enumerate(ids)]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, masks too."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


class Recorder(TrainerCallback):
    """The masks of each step; and a byte for it in the file `steps`, which a run that is killed leaves behind."""

    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        masks = {
            f"{name}.{kind}": (layer, kind) for name, layer in binary_layers(model).items() for kind in layer.MASKS
        }
        self.masks.append({name: getattr(layer, f"{kind}_mask").clone() for name, (layer, kind) in masks.items()})
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / "steps", "ab") as file:
                file.write(b".")


def train(
    output_dir: str,
    *,
    config: dict[str, Any],
    double: bool = False,
    dropout: float = 0.0,
    adapter_on: str | None = None,
    taught: bool = False,
    resume: bool = False,
    fault: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """A run of the Trainer, or of the DistillationTrainer, which a fault may kill."""
    defaults: dict[str, Any] = dict(
        max_steps=STEPS, learning_rate=1e-2, weight_decay=0.1, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    model, recorder = make_model(config, dropout, torch.float64 if double else torch.float32), Recorder()
    if adapter_on:
        model = with_adapter(model, adapter_on)
    kind: Any = partial(DistillationTrainer, teacher=make_teacher(model), hidden_weight=1.0) if taught else Trainer
    trainer = kind(
        model,
        TrainingArguments(output_dir, **(defaults | arguments)),
        train_dataset=make_data(),
        eval_dataset=make_data()[:8],
        callbacks=[recorder] if adapter_on == "packed" else [StomppCallback(), recorder],
        compute_metrics=lambda output: {"sum": float(output.predictions.sum())},
    )
    if fault:
        moment, at = fault.rsplit(" ", 1)
        FAULTS[moment](trainer, int(at))
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir) if resume else None)
    wrapped = trainer.model_wrapped
    buffers = wrapped.modules_buffers if isinstance(wrapped, DistributedDataParallel) else []
    timed = ("runtime", "per_second", "train_loss")  # the Trainer means the loss since it was started
    return {
        "state": state_of(model),
        "masks": recorder.masks,
        "history": [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history],
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "sent": [tuple(buffer.shape) for buffer in buffers],
        "find_unused": getattr(wrapped, "find_unused_parameters", None),
    }


def drive(wrapping: str, config: dict[str, Any]) -> dict[str, Any]:
    """The callback without the Trainer, whose FSDP2 is for GPUs alone: `wrapping` is `"ddp"`, `"fsdp"` or `"none"`."""
    model, data, callback = make_model(config, dropout=0.0), make_data(), StomppCallback()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if wrapping != "none":
        dist.init_process_group("gloo")
    if wrapping == "fsdp":
        mesh = init_device_mesh("cpu", (processes,))
        for block in model.bert.encoder.layer:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    forward = DistributedDataParallel(model) if wrapping == "ddp" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    size = GLOBAL_BATCH // processes
    # What FiniteGuard and the order of callbacks need a Trainer for is not looked at here.
    args, state = TrainingArguments("unused", use_cpu=True), TrainerState(max_steps=STEPS)
    loader = DataLoader(data, batch_size=size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    events: Any = (args, state, TrainerControl())
    callback.on_train_begin(*events, model=model, train_dataloader=loader)
    losses, flips = [], []
    for step in range(STEPS):
        start = step * GLOBAL_BATCH % len(data) + rank * size
        batch = default_data_collator(data[start : start + size])
        callback.on_step_begin(*events, model=model)
        loss = forward(**batch).loss
        loss.backward()
        callback.on_pre_optimizer_step(*events, model=model)
        optimizer.step()
        callback.on_optimizer_step(*events, model=model)
        optimizer.zero_grad()
        state.global_step += 1
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
        flips.append(callback._probes.flips()[0])
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state_of(model).items()}
    shards = {name: tuple(layer.weight.to_local().shape) for name, layer in binary_layers(model).items()} if (
        wrapping == "fsdp"
    ) else {}  # fmt: skip
    return {"losses": losses, "state": whole, "shards": shards, "flips": flips}


# --- faults ---------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt(TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: die() if state.global_step == step else None)


def _half(content: bytes, path: Any) -> None:
    Path(path).write_bytes(content[: len(content) // 2])
    die()


def _weights(trainer: Trainer, step: int) -> None:
    whole = transformers.modeling_utils.safe_save_file

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        if trainer.state.global_step == step:
            _half(save(tensors, metadata), path)
        whole(tensors, path, metadata=metadata)

    transformers.modeling_utils.safe_save_file = save_file


def _optimizer(trainer: Trainer, step: int) -> None:
    whole = torch.save

    def save_half(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        whole(content, path, *args, **kwargs)
        if trainer.state.global_step == step and "optimizer" in str(path):
            _half(Path(path).read_bytes(), path)

    torch.save = save_half


def _state(trainer: Trainer, step: int) -> None:
    whole = TrainerState.save_to_json

    def save_half(self: TrainerState, path: str) -> None:
        whole(self, path)
        if self.global_step == step:
            _half(Path(path).read_bytes(), path)

    TrainerState.save_to_json = save_half  # type: ignore[method-assign]


def _rotation(trainer: Trainer, step: int) -> None:
    whole = shutil.rmtree

    def remove_one(path: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == step and "checkpoint-" in str(path):
            next(Path(path).glob("*.safetensors")).unlink()
            die()
        whole(path, *args, **kwargs)

    transformers.trainer_utils.shutil.rmtree = remove_one


class Spoils(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and os.environ["RANK"] == "1":
            model.classifier.bias.data[0] = torch.nan


FAULTS: dict[str, Any] = {
    "no number in the second process": lambda trainer, step: trainer.add_callback(Spoils(step)),
    "in a step": lambda trainer, step: trainer.add_callback(DiesAt("on_pre_optimizer_step", step)),
    "in an evaluation": lambda trainer, step: trainer.add_callback(DiesAt("on_prediction_step", step)),
    "while weights are written": _weights,
    "while the optimizer's state is written": _optimizer,
    "while the Trainer's state is written": _state,
    "while an old checkpoint is deleted": _rotation,
}
