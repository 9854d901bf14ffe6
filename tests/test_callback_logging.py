"""What `StomppCallback` logs, refuses and warns of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_stompp import BinarizationConfig, StomppCallback
from hf_stompp.patching import frozen_fraction

MakeModel = Callable[..., PreTrainedModel]
MakeTrainer = Callable[..., Trainer]
MakeRecorder = Callable[..., Any]
Examples = list[dict[str, Any]]

METRICS = ["frozen_fraction", "front", "front_fraction", "flip_ratio"]
STEPS = 16
"""The Trainer's; the progression takes half of them, two steps for each of four units."""
SIZES = np.array([3 * 32 * 32, 32 * 32, 32 * 48, 48 * 32])
"""Weights of the four units."""


def test_metrics_reach_the_log_history_and_every_reporter(
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    make_recorder: MakeRecorder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder = make_recorder()
    trainer = make_trainer(make_model(), recorder, report_to=["tensorboard"], disable_tqdm=False)
    trainer.train()
    history = trainer.state.log_history[:-1]
    for step, log in enumerate(history, start=1):
        # Two steps a unit: after an odd one the front is half way through its unit.
        fractions = np.clip(step / 2 - np.arange(4), 0, 1)
        front = min(4, step // 2)
        assert log["step"] == step
        assert log["frozen_fraction"] == pytest.approx((fractions * SIZES).sum() / SIZES.sum())
        assert log["front"] == front
        assert log["front_fraction"] == (1.0 if front == 4 else step % 2 / 2)
    assert list(recorder.logs) == list(range(1, STEPS + 1))
    for log in history:
        assert {key: log[key] for key in METRICS}.items() <= recorder.logs[log["step"]].items()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events)).Reload()
    for key in METRICS:
        written = {event.step: event.value for event in reader.Scalars(f"train/{key}")}
        assert written == pytest.approx({log["step"]: log[key] for log in history})
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("'front_fraction'") == STEPS


def test_the_flip_ratio_is_the_share_of_signs_that_changed_since_the_last_log(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder
) -> None:
    recorder = make_recorder()
    trainer = make_trainer(make_model(), recorder, logging_steps=4, learning_rate=0.05)
    trainer.train()

    def signs(weights: dict[str, Tensor]) -> np.ndarray:
        return np.concatenate([weight.numpy().ravel() >= 0 for weight in weights.values()])

    at_logs = [signs(recorder.before[1])] + [signs(recorder.after[step]) for step in (4, 8, 12, 16)]
    expected = [(a != b).mean() for a, b in zip(at_logs, at_logs[1:], strict=False)]
    assert [log["flip_ratio"] for log in trainer.state.log_history[:-1]] == pytest.approx(expected)
    assert expected[0] > 0.01


def test_evaluation_logs_have_no_training_metrics(
    make_model: MakeModel, make_trainer: MakeTrainer, examples: Examples
) -> None:
    trainer = make_trainer(make_model(), trainer={"eval_dataset": examples[:4]}, eval_strategy="steps", eval_steps=8)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2
    assert not any(key in log for log in evaluations for key in METRICS)


def test_one_trainer_trains_twice(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(make_model(), callback=StomppCallback)
    for _ in range(2):
        trainer.train()
        assert [log["front"] for log in trainer.state.log_history[:-1]] == [min(4, s // 2) for s in range(1, 17)]
    assert sum(isinstance(callback, StomppCallback) for callback in trainer.callback_handler.callbacks) == 1


# --- what is refused, and what is warned of ------------------------------------------------------------------------


def test_a_model_that_is_not_binarized_is_refused(tiny_model: MakeModel, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"no binarized layer in this BertForSequenceClassification.*binarize\("):
        make_trainer(tiny_model("bert")).train()


def test_a_model_whose_config_was_changed_is_refused(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    model = make_model()
    model.config.quantization_config = BinarizationConfig.from_dict(
        model.config.quantization_config.to_dict() | {"curve": "cubic", "refresh": 0.0}
    )
    with pytest.raises(ValueError, match=r"differs from the config .* in \['curve', 'refresh'\]"):
        make_trainer(model).train()


@pytest.mark.parametrize(
    ("config", "max_steps", "message"),
    [
        ({}, 7, r"4 units have to freeze one by one.*max_steps=7 is 3 steps\. Train for 9 or"),
        ({"order": "reverse", "progression_start": 0.5, "progression_end": 0.75}, 14, "4 units.*for 17 or"),
        ({"progression": "global", "progression_end": 0.1}, 9, r"max_steps=9 leaves no step"),
        ({"progression": "none", "progression_start": 0.95}, 10, r"max_steps=10 comes after progression_start=0\.95"),
    ],
    ids=["forward", "reverse", "global", "none"],
)
def test_a_schedule_that_cannot_finish_is_refused(
    config: dict[str, Any], max_steps: int, message: str, make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=f"The schedule cannot finish.*{message}"):
        make_trainer(make_model(**config), max_steps=max_steps).train()


@pytest.mark.parametrize(
    ("config", "max_steps"),
    [
        ({}, 8),
        ({"progression": "global", "progression_end": 0.1}, 10),
        ({"progression": "none", "progression_start": 0.9}, 10),
    ],
    ids=["layerwise", "global", "none"],
)
def test_the_shortest_schedule_that_can_finish_does(
    config: dict[str, Any], max_steps: int, make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    model = make_model(**config)
    make_trainer(model, max_steps=max_steps).train()
    assert frozen_fraction(model) == 1.0


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_stompp")]


def test_a_run_that_ends_half_frozen_warns(
    make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: MakeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(make_model(progression="global"), make_recorder(stop_at=5)).train()
    (message,) = warnings_of(caplog)
    assert "step 5 of 16" in message
    assert "0.625" in message


def test_a_best_checkpoint_that_is_half_frozen_warns(
    make_model: MakeModel, make_trainer: MakeTrainer, examples: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    scores = iter([1.0, 0.5])  # the first evaluation is the best
    trainer = make_trainer(
        make_model(progression="global", progression_end=1.0),
        trainer={"eval_dataset": examples[:4], "compute_metrics": lambda _: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    assert frozen_fraction(trainer.model) == 0.5
    (message,) = warnings_of(caplog)
    assert "0.500" in message


def test_a_clipped_network_ends_without_a_warning(
    make_model: MakeModel, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(progression="none", progression_start=1.0)
    make_trainer(model).train()
    assert frozen_fraction(model) == 0.0
    assert warnings_of(caplog) == []
