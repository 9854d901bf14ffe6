"""What is logged of each unit, against hooks and signs of our own; and the pictures that are drawn of the log."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import TrainerCallback

from hf_stompp import StomppCallback
from hf_stompp.cli import main
from hf_stompp.patching import binary_layers
from hf_stompp.report import TrainingLog, plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

UNITS = 4


class Watcher(TrainerCallback):
    """The gradients of the outputs of all layers, by retaining them; and the signs of all weights at each step."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        self.norms: list[list[float]] = []
        self.signs = [self._signs(model)]
        self.layers = binary_layers(model)
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda module, args, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: torch.Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            output.retain_grad()
            self.outputs[name] = output

    @staticmethod
    def _signs(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: layer.weight.detach() >= 0 for name, layer in binary_layers(model).items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        squares = [0.0] * UNITS
        for name, output in self.outputs.items():
            if output.grad is not None:
                squares[self.layers[name].unit] += output.grad.double().square().sum().item()
        self.norms.append([math.sqrt(square) for square in squares])
        self.outputs = {}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.signs.append(self._signs(model))


def flips(watcher: Watcher, before: int, after: int) -> list[float]:
    """The share of signs of each unit that differ between two steps."""
    shares = []
    for unit in range(UNITS):
        names = [name for name, layer in watcher.layers.items() if layer.unit == unit]
        pairs = [(watcher.signs[before][name], watcher.signs[after][name]) for name in names]
        shares.append(sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs))
    return shares


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_what_is_logged_of_each_unit(surrogate: str, make_model: Callable, make_trainer: Callable) -> None:
    model = make_model(surrogate=surrogate)
    watcher = Watcher(model)
    trainer = make_trainer(model, watcher, logging_steps=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [4, 8, 12, 16]
    for log in logs:
        assert log["unit_gradients"] == pytest.approx(watcher.norms[log["step"] - 1], rel=1e-3, abs=1e-12)
        assert log["unit_flips"] == pytest.approx(flips(watcher, log["step"] - 4, log["step"]), rel=1e-3)
    blocked = [norm == 0 for norm in logs[-1]["unit_gradients"]]
    # STE-free, all is frozen at the end: nothing comes to what stands below binary inputs but by way of the residuals.
    assert not any(blocked) if surrogate == "ste" else blocked[2], logs[-1]


def test_micro_batches_are_added(make_model: Callable, make_trainer: Callable) -> None:
    model = make_model()
    trainer = make_trainer(model, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=16)
    trainer.train()
    log = trainer.state.log_history[0]
    assert len(log["unit_gradients"]) == UNITS and min(log["unit_gradients"]) > 0


def test_no_hook_is_left(make_model: Callable, make_trainer: Callable) -> None:
    model = make_model()
    make_trainer(model, logging_strategy="epoch").train()
    assert not any(layer._forward_hooks for layer in binary_layers(model).values())


@pytest.fixture
def trained(make_model: Callable, make_trainer: Callable, tmp_path: Path) -> Path:
    """The output folder of a training with evaluations, a state, and no checkpoint."""
    trainer = make_trainer(make_model(), trainer={"eval_dataset": None})
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 4
    trainer.train()
    trainer.save_state()
    return tmp_path


def test_the_log_is_all_that_a_picture_needs(trained: Path) -> None:
    log = TrainingLog.read(trained)
    assert log.max_steps == 16 and len(log.units) == UNITS
    steps, fractions = log.fractions()
    assert list(steps) == list(range(1, 17)) and fractions.shape == (UNITS, 16)
    # Windows of 2 of the first 8 steps, one unit after the other.
    assert [int(row.argmax()) for row in fractions >= 1] == [1, 3, 5, 7]
    assert log.windows() == [2, 4, 6, 8]
    for ending in ("png", "svg"):
        plot(trained, trained / f"picture.{ending}")
        assert (trained / f"picture.{ending}").stat().st_size > 10_000


def test_what_the_picture_shows(trained: Path) -> None:
    log = TrainingLog.read(trained)
    figure = plot(log)
    front, losses, gradients, flips = figure.axes[:4]
    (mesh,) = (child for child in front.get_children() if hasattr(child, "get_coordinates"))
    assert mesh.get_array().reshape(UNITS, 16).tolist() == log.fractions()[1].tolist()
    lines = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert lines["training loss"] == log.series("loss")[1]
    assert lines["evaluation loss"] == log.series("eval_loss")[1]
    names = [label.get_text() for label in front.get_yticklabels()]
    assert len(names) == UNITS and names[0].endswith("query +2")
    assert front.yaxis_inverted() and gradients.yaxis_inverted()
    assert list(flips.get_lines()[0].get_ydata()) == log.series("flip_ratio")[1]


def with_logs(state: dict[str, Any], **changes: Any) -> TrainingLog:
    """The log of a state with other values in the entries of training."""
    history = [entry | changes if "loss" in entry else entry for entry in state["log_history"]]
    return TrainingLog.of(state | {"log_history": history})


def test_windows_are_exact_in_long_runs(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    log = TrainingLog.of(state | {"max_steps": 20_000, "log_history": [{"step": 20_000, "loss": 1.0}]})
    assert log.windows() == [2500, 5000, 7500, 10_000]
    stopped = TrainingLog.of(state | {"max_steps": 20_000, "log_history": [{"step": 6000, "loss": 1.0}]})
    assert stopped.windows() == [2500, 5000] and stopped.fractions()[0][-1] == 6000


@pytest.mark.parametrize(
    "changes",
    [
        {"unit_gradients": [math.inf, math.nan, 1.0, 0.0]},
        {"unit_gradients": [0.0] * UNITS},
        {"unit_gradients": []},
        {"eval_f1": [0.5, 0.5], "eval_report": {"a": 1}, "eval_name": "x"},
        {"loss": math.nan},
    ],
    ids=str,
)
def test_pictures_of_odd_logs(changes: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    figure = plot(with_logs(state, **changes), tmp_path / "odd.png")
    assert "eval_f1" not in with_logs(state, **changes).scores and len(figure.axes) >= 5


def test_one_unit_and_one_log_have_an_area(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    state["stateful_callbacks"]["StomppCallback"]["attributes"]["units"] = [["a"]]
    log = TrainingLog.of(state | {"log_history": [{"step": 3, "loss": 1.0, "unit_gradients": [1.0]}]})
    for axes in (plot(log).axes[0], plot(log).axes[2]):
        (mesh,) = (child for child in axes.get_children() if hasattr(child, "get_coordinates"))
        corners = mesh.get_coordinates().reshape(-1, 2)
        assert (corners.max(axis=0) - corners.min(axis=0) > 0).all()


def test_a_training_that_ends_in_a_measured_step_leaves_no_hooks(make_model: Callable, make_trainer: Callable) -> None:
    class Interrupts(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = make_model()
    trainer = make_trainer(model)
    trainer.add_callback(Interrupts)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert any(layer._forward_hooks for layer in binary_layers(model).values())
    trainer.remove_callback(Interrupts)
    trainer.train()
    assert not any(layer._forward_hooks for layer in binary_layers(model).values())


def test_the_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(trained)]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "dynamics.png")
    assert (trained / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(trained / "trainer_state.json"), "--output", str(trained / "x.svg")]) == 0
    assert "<svg" in (trained / "x.svg").read_text()


def test_logs_of_others_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"log: received .*nowhere.*trainer_state.json"):
        TrainingLog.read(tmp_path / "nowhere")
    state = json.loads((trained / "trainer_state.json").read_text())
    state["stateful_callbacks"] = {}
    with pytest.raises(ValueError, match="not of a training with StomppCallback"):
        TrainingLog.of(state)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        TrainingLog.read(tmp_path / "broken.json")


def test_without_matplotlib(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_stompp\[plot\]"):
        plot(trained)


def test_tensorboard_has_the_picture(
    make_model: Callable, make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    make_trainer(make_model(), report_to=["tensorboard"]).train()
    images = []
    for file in (tmp_path / "runs").rglob("events*"):
        events = EventAccumulator(str(file)).Reload()
        images += [(tag, events.Images(tag)) for tag in events.Tags()["images"]]
    ((tag, (image,)),) = images
    assert tag == "stompp/dynamics" and image.step == 16 and image.width > 500


def test_the_state_of_a_callback_that_has_not_trained() -> None:
    assert StomppCallback().state() == {"args": {}, "attributes": {}}
