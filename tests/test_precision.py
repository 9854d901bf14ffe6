"""Other dtypes, compiled graphs, recomputed activations, and numbers that are none, in the real Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, default_data_collator

from hf_stompp import BinarizationConfig, StomppCallback, binarize, calibrate, last_checkpoint, pack
from hf_stompp.patching import binary_layers, frozen_fraction

MakeModel = Callable[..., PreTrainedModel]
MakeTrainer = Callable[..., Trainer]

CONFIGS: list[dict[str, Any]] = [
    {"surrogate": "ste", "refresh": 0.3},
    {"surrogate": "none", "progression": "global", "refresh": 0.3},
]


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("config", CONFIGS, ids=["ste", "ste-free"])
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "bfloat16 model"])
def test_bfloat16(
    config: dict[str, Any], pure: bool, tiny_model: Callable[..., PreTrainedModel], make_trainer: MakeTrainer
) -> None:
    found = []
    for low in (False, True):
        model = tiny_model("bert", num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = binarize(model.bfloat16() if low and pure else model, BinarizationConfig(**config))
        trainer = make_trainer(model, learning_rate=1e-3, bf16=low and not pure)
        trainer.train()
        found.append(losses(trainer))
        assert {layer.weight.dtype for layer in binary_layers(model).values()} == {torch.float32}
        assert frozen_fraction(model) == 1.0
        assert len(pack(model).state_dict()) > 0
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] != found[1]


def test_a_scaler_that_skips_a_step_leaves_frozen_weights_alone(
    make_model: MakeModel, examples: list[dict[str, Any]]
) -> None:
    # accelerate has float16 for GPUs alone; this is what it does there.
    model = make_model(surrogate="none", progression="global")
    batch = default_data_collator(examples[:8])
    calibrate(model, {key: value for key, value in batch.items() if key != "labels"})
    layers = binary_layers(model).values()
    for layer in layers:
        layer.set_frozen(0.5, step=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    start = [layer.weight.detach().clone() for layer in layers]
    for overflow in (False, True, False):
        before = [layer.weight.detach().clone() for layer in layers]
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
        scaler.unscale_(optimizer)
        for layer in layers:
            layer.hold_frozen()
        scaler.step(optimizer)
        scaler.update()
        for layer in layers:
            layer.restore_frozen()
        optimizer.zero_grad()
        for layer, weight in zip(layers, before, strict=True):
            assert torch.equal(layer.weight, weight) is overflow
    for layer, weight in zip(layers, start, strict=True):
        assert torch.equal(layer.weight[layer.weight_mask], weight[layer.weight_mask])
        assert not torch.equal(layer.weight, weight)
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("config", CONFIGS, ids=["ste", "ste-free"])
def test_compiled_training_compiles_once(
    config: dict[str, Any], make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        # Each layer is all soft, partly frozen and all frozen in turn.
        model = make_model(**config)
        trainer = make_trainer(
            model, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None, max_steps=12
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer.train()
        found.append(losses(trainer))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def gradients(trainer: Trainer) -> list[dict[str, Tensor]]:
    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    seen: list[dict[str, Tensor]] = []
    trainer.add_callback(Recorder())
    trainer.train()
    return seen


@pytest.mark.parametrize("config", CONFIGS, ids=["ste", "ste-free"])
def test_recomputed_activations_give_the_same_gradients(
    config: dict[str, Any], make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    # With the dropout that a BERT has by default.
    plain, recomputed = (
        gradients(make_trainer(make_model(**config), gradient_checkpointing=on)) for on in (False, True)
    )
    assert len(plain) == 16
    for ours, theirs in zip(plain, recomputed, strict=True):
        assert list(ours) == list(theirs)
        for name, gradient in ours.items():
            assert torch.equal(gradient, theirs[name]), name


# --- no numbers ------------------------------------------------------------------------------------------------------


class Spoils(TrainerCallback):
    """Makes a weight no number before a step, or after it, when the loss is not looked at any more."""

    def __init__(self, step: int, event: str, value: float = torch.nan) -> None:
        def spoil(args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
            if state.global_step == step:
                model.classifier.bias.data[0] = value

        setattr(self, event, spoil)


# A logit of -inf gives a probability of 0, and its label a loss of inf.
@pytest.mark.parametrize(("weight", "loss"), [(torch.nan, "nan"), (-torch.inf, "inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_no_number_ends_the_run(
    filtered: bool, weight: float, loss: str, make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        make_model(),
        Spoils(9, "on_step_begin", weight),
        save_strategy="steps",
        save_steps=4,
        logging_nan_inf_filter=filtered,
    )
    with pytest.raises(
        FloatingPointError, match=rf"is {loss} at step 10 of 16, with all units frozen\. .*checkpoint-8\."
    ):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    resumed = make_trainer(make_model())
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert resumed.state.global_step == 16


def test_the_message_names_the_front(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(make_model(), Spoils(3, "on_step_begin"))
    front = r"with unit 2 \(bert\.encoder\.layer\.0\.intermediate\.dense\) at the front, frozen by 0\.00"
    with pytest.raises(FloatingPointError, match=rf"at step 4 of 16, {front}\. There is no checkpoint yet\. Lower"):
        trainer.train()


def test_weights_that_are_no_numbers_are_not_saved(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    # In the gradient of the step after which a checkpoint is made: its loss was finite.
    trainer = make_trainer(make_model(), Spoils(7, "on_optimizer_step"), save_strategy="steps", save_steps=4)
    with pytest.raises(FloatingPointError, match=r"classifier\.bias is no longer finite at step 8 of .*checkpoint-4"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]


def test_weights_that_are_no_numbers_are_not_saved_at_the_end(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(make_model(), Spoils(15, "on_optimizer_step"))
    trainer.train()
    with pytest.raises(FloatingPointError, match=r"classifier\.bias is no longer finite at step 16 of 16"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("order", "unit"), [("forward", 1), ("reverse", 2)])
def test_the_unit_at_the_front(order: str, unit: int, make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    # Of four units, each of which has four steps, the first is frozen and the second by 2 / 4 at step 6.
    trainer = make_trainer(make_model(order=order, progression_end=1.0), Spoils(5, "on_step_begin"))
    with pytest.raises(FloatingPointError, match=rf"step 6 of 16, with unit {unit} .* at the front, frozen by 0\.50"):
        trainer.train()


def test_an_evaluation_may_have_a_loss_that_is_none(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(make_model(), callback=StomppCallback(), max_steps=8)
    trainer.train()
    trainer.model.classifier.bias.data[0] = torch.nan
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] != trainer.evaluate(trainer.train_dataset)["eval_loss"]
