"""`StomppCallback` in the real Trainer."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, default_data_collator

from hf_stompp import BinarizationConfig, binarize, calibrate
from hf_stompp.layers import BinaryEmbedding
from hf_stompp.patching import binary_layers, frozen_fraction

MakeModel = Callable[..., PreTrainedModel]
MakeTrainer = Callable[..., Trainer]
MakeRecorder = Callable[..., Any]
Examples = list[dict[str, Any]]

METRICS = ["frozen_fraction", "front", "front_fraction", "flip_ratio"]
STEPS = 16
"""The Trainer's; the progression takes half of them, two steps for each of four units."""


def assert_same_state(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """All parameters and buffers bit for bit; the masks are buffers that are not saved."""
    tensors = [dict([*model.named_parameters(), *model.named_buffers()]) for model in (a, b)]
    assert list(tensors[0]) == list(tensors[1])
    assert any("weight_mask" in name for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


# --- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"order": "reverse", "overlap": 2.0, "curve": "cosine"},
        {"order": "random", "refresh": 0.0},
        {"progression": "global", "refresh": 0.2, "refresh_interval": 3, "curve": "cubic", "surrogate": "none"},
        {"progression": "none"},
        {"progression_end": 1.0, "activations": False},
        {"embeddings": True, "surrogate": "none"},
        {"progression_start": 0.3, "progression_end": 0.7, "weights": False},
    ],
    ids=str,
)
def test_at_the_end_every_entry_is_frozen(
    config: dict[str, Any], make_model: MakeModel, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(**config)
    trainer = make_trainer(model)
    with caplog.at_level(logging.WARNING, "hf_stompp"):
        trainer.train()
    assert frozen_fraction(model) == 1.0
    assert trainer.state.log_history[-2]["frozen_fraction"] == 1.0
    for layer in binary_layers(model).values():
        assert layer.weight_mask.all()
        if isinstance(layer, BinaryEmbedding):
            rows = layer(torch.arange(1, layer.num_embeddings))
            assert all(len(row.abs().unique()) == 1 for row in rows)
            continue
        assert layer.activation_mask.all()
        if layer.config.weights:
            values = [row.unique().numel() for row in layer.effective_weight()]
            assert values == [2] * layer.out_features
    assert not [record for record in caplog.records if record.name == "hf_stompp.callback"]


def test_the_masks_of_each_step_follow_the_schedule(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder
) -> None:
    model, recorder = make_model(), make_recorder()
    make_trainer(model, recorder).train()
    units = {name: layer.unit for name, layer in binary_layers(model).items()}
    for step in range(1, STEPS + 1):
        for name, mask in recorder.masks[step].items():
            # Unit u is half frozen in step 2u + 1 and frozen from step 2u + 2 on.
            expected = 0.0 if step <= 2 * units[name] else 0.5 if step == 2 * units[name] + 1 else 1.0
            assert mask.float().mean().item() == pytest.approx(expected, abs=0.1 if expected == 0.5 else 0)


def test_frozen_weights_do_not_move_in_the_step_in_which_they_are_frozen(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder
) -> None:
    recorder = make_recorder()
    make_trainer(make_model(surrogate="none", progression="global", refresh=0.5), recorder).train()
    partly = 0
    for step, masks in recorder.masks.items():
        for name, mask in masks.items():
            moved = recorder.before[step][name] != recorder.after[step][name]
            assert torch.equal(moved, ~mask), (step, name)
            partly += bool(mask.any() and not mask.all())
    assert partly == 7 * 6  # six layers in the seven steps before the end of the progression


def test_never_freezing_without_clip_trains_like_the_plain_model(
    tiny_model: MakeModel, make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    # Bit for bit, with dropout: the callback draws no random number and hides no gradient.
    plain = tiny_model("bert", num_hidden_layers=1)
    make_trainer(plain, callback=TrainerCallback()).train()
    model = make_model(progression="none", progression_start=1.0, clip=None, learn_activation_shift=False)
    trainer = make_trainer(model)
    trainer.train()
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert [log["front"] for log in trainer.state.log_history[:-1]] == [0] * STEPS


def test_gradient_accumulation_freezes_by_optimizer_steps(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder
) -> None:
    def mean_over_the_whole_batch(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        # The model's own loss is the mean over half a batch, of which the Trainer takes the sum.
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    recorders, models = [], []
    for accumulation in (1, 2):
        # Without dropout and Adam, two halves of a batch are the batch but for rounding.
        model = make_model(activations=False, surrogate="none", refresh=0.5)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        recorders.append(make_recorder())
        models.append(model)
        make_trainer(
            model,
            recorders[-1],
            trainer={"compute_loss_func": mean_over_the_whole_batch},
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        ).train()
    assert list(recorders[0].masks) == list(recorders[1].masks) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        for name, mask in recorders[0].masks[step].items():
            assert torch.equal(mask, recorders[1].masks[step][name])
            moved = recorders[1].before[step][name] != recorders[1].after[step][name]
            assert not (moved & mask).any()
    start = dict(recorders[0].start)
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    assert (models[0].classifier.weight - start["classifier.weight"]).abs().max() > 0.01


# --- resuming ------------------------------------------------------------------------------------------------------


# A window begins with step 7.
@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize(("surrogate", "progression"), [("none", "global"), ("ste", "layerwise")])
def test_a_resumed_run_equals_the_uninterrupted_one(
    surrogate: str,
    progression: str,
    step: int,
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    make_recorder: MakeRecorder,
    tmp_path: Path,
) -> None:
    config = {"surrogate": surrogate, "progression": progression, "refresh": 0.3, "refresh_interval": 2}
    models, recorders, logs = [], [], []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{step}")):
        models.append(make_model(**config))
        recorders.append(make_recorder())
        trainer = make_trainer(models[-1], recorders[-1], save_strategy="steps", save_steps=step)
        trainer.train(resume_from_checkpoint=checkpoint)
        logs.append([{k: log.get(k) for k in ("step", "loss", *METRICS)} for log in trainer.state.log_history[:-1]])
    assert_same_state(*models)
    assert list(recorders[1].masks) == list(range(step + 1, STEPS + 1))
    for at, masks in recorders[1].masks.items():
        assert all(torch.equal(mask, recorders[0].masks[at][name]) for name, mask in masks.items())
    assert (
        0 < sum(mask.sum() for mask in recorders[1].masks[step + 1].values()) < sum(m.numel() for m in masks.values())
    )
    assert logs[0] == logs[1]


def test_a_checkpoint_in_the_middle_has_the_masks_of_its_step(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder, tmp_path: Path
) -> None:
    model = make_model(progression="global")
    make_trainer(model, make_recorder(stop_at=5), save_strategy="steps", save_steps=5).train()
    reloaded = make_model(progression="global")
    reloaded.load_state_dict(load_file(tmp_path / "checkpoint-5" / "model.safetensors"))
    assert frozen_fraction(reloaded) == 0.625
    assert_same_state(model, reloaded)


# --- calibration ---------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.examples)


DATASETS: dict[str, Callable[[Examples], Any]] = {
    "list": lambda examples: examples,
    "dataset": lambda examples: datasets.Dataset.from_list([e | {"text": "not for the model"} for e in examples]),
}


@pytest.mark.parametrize("kind", DATASETS.values(), ids=list(DATASETS))
def test_the_scales_start_from_examples_of_the_whole_training_set(
    kind: Callable[[Examples], Any],
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    make_recorder: MakeRecorder,
    examples: Examples,
) -> None:
    model, recorder = make_model(), make_recorder(stop_at=1)
    twin = copy.deepcopy(model)
    trainer = make_trainer(model, data=kind(examples))
    trainer.add_callback(recorder)
    trainer.train()
    for layer in binary_layers(twin).values():
        layer.set_frozen(0.5 if layer.unit == 0 else 0.0, 1)  # the masks of the first step
    calibrate(twin, default_data_collator(examples[::6]))  # 4 of 24, evenly spaced
    for name, tensor in twin.state_dict().items():
        assert torch.equal(recorder.start[name], tensor), name
    assert all(recorder.start[f"{name}.activation_scale"].item() != 1.0 for name in binary_layers(twin))


class Snapshots(TrainerCallback):
    """Copies of the model at the end of one step, and at the start of the next, when its masks are set."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.models: list[PreTrainedModel] = []

    def _copy(self, state: Any, model: PreTrainedModel) -> None:
        if state.global_step == self.step:
            self.models.append(copy.deepcopy(model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._copy(state, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._copy(state, kwargs["model"])


def test_a_unit_is_calibrated_again_when_its_window_begins(
    make_model: MakeModel, make_trainer: MakeTrainer, examples: Examples
) -> None:
    # Four units in 8 of 16 steps: the window of the second begins at step 3.
    snapshots = Snapshots(step=2)
    make_trainer(make_model(), snapshots).train()
    before, after = snapshots.models
    expected = copy.deepcopy(before)
    for layer in binary_layers(expected).values():
        layer.set_frozen({0: 1.0, 1: 0.5}.get(layer.unit, 0.0), 3)
    calibrate(expected, default_data_collator(examples[::6]), units=[1])
    for name, layer in binary_layers(after).items():
        for tensor in ("activation_scale", "activation_shift", "bias"):
            value, old = getattr(layer, tensor), getattr(before.get_submodule(name), tensor)
            if value is not None:
                assert torch.equal(value, getattr(expected.get_submodule(name), tensor)), name
                assert torch.equal(value, old) == (layer.unit != 1), f"{name}.{tensor}"


def test_a_stream_is_not_robbed_of_its_first_examples(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder, examples: Examples
) -> None:
    model, recorder = make_model(), make_recorder(stop_at=1)
    with pytest.raises(ValueError, match=r"a stream.*calibrate\(model, batch\)"):
        make_trainer(model, data=Stream(examples)).train()
    calibrate(model, default_data_collator(examples[:4]))
    scales = {name: layer.activation_scale.item() for name, layer in binary_layers(model).items()}
    trainer = make_trainer(model, data=Stream(examples))
    trainer.add_callback(recorder)
    trainer.train()
    assert {name: recorder.start[f"{name}.activation_scale"].item() for name in scales} == scales


def test_a_resumed_run_refuses_another_max_steps(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(make_model(), max_steps=16, save_strategy="steps", save_steps=6).train()
    checkpoint = str(next(tmp_path.rglob("checkpoint-6")))
    with pytest.raises(ValueError, match=r"max_steps=24 the schedule has"):
        make_trainer(make_model(), max_steps=24).train(resume_from_checkpoint=checkpoint)


def test_trained_scales_survive_a_second_training(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder
) -> None:
    model, recorder = make_model(), make_recorder(stop_at=1)
    make_trainer(model).train()
    scales = {name: layer.activation_scale.item() for name, layer in binary_layers(model).items()}
    trainer = make_trainer(model)
    trainer.add_callback(recorder)
    trainer.train()
    assert {name: recorder.start[f"{name}.activation_scale"].item() for name in scales} == scales


# --- recomputed forwards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_activation_checkpointing_gives_the_same_gradients(
    surrogate: str, tiny_model: MakeModel, examples: Examples
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = binarize(tiny_model("bert"), BinarizationConfig(surrogate=surrogate)).train()
        if checkpointing:
            # It has the second name up to transformers 5.22.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        layers = binary_layers(model)
        for layer in layers.values():
            layer.set_frozen(0.5, 3)
        count: list[int] = []
        layers["bert.encoder.layer.1.output.dense"].register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(0)  # dropout
        batch = default_data_collator(examples[:4])
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2], "the forward is run again"
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_masks_stay_at_home_in_a_model_around_the_model(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    class Around(nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    model = Around(make_model())
    make_trainer(model)
    masks = {name for name, _ in model.named_buffers() if name.endswith("_mask")}
    assert len(masks) == 12 and masks <= set(model._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize("max_steps", [16, 12])
def test_a_finished_run_is_not_trained_on(
    max_steps: int, make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(make_model(), save_strategy="steps", save_steps=16).train()
    with pytest.raises(ValueError, match=f"nothing left to train: .* of step 16, and max_steps is {max_steps}"):
        make_trainer(make_model(), max_steps=max_steps).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
