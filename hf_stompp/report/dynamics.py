"""`plot`: the dynamics of a training with `StomppCallback`, drawn from its log alone."""

import bisect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_stompp.config import BinarizationConfig
from hf_stompp.resuming import TRAINER_STATE, last_checkpoint

POINTS = 400
"""Steps at which the schedule is drawn, at most."""


@dataclass(frozen=True)
class TrainingLog:
    """What a training has logged.

    Example:

        >>> log = TrainingLog.read("out/sst2")  # doctest: +SKIP
        >>> steps, accuracies = log.series("eval_accuracy")  # doctest: +SKIP

    Attributes:
        config (`BinarizationConfig`): What it was trained with.
        max_steps (`int`): Optimizer steps of the whole run.
        units (`list[list[str]]`): Names of the layers of each unit.
        history (`list[dict]`): The Trainer's `log_history`.
    """

    config: BinarizationConfig
    max_steps: int
    units: list[list[str]]
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> "TrainingLog":
        """Reads a `trainer_state.json`, that of a checkpoint, or that of a Trainer's output folder.

        Args:
            source (`str` or `Path`): The file or folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not of a training with `StomppCallback`.
        """
        path = Path(source)
        if path.is_dir():
            folder = path if (path / TRAINER_STATE).exists() else Path(last_checkpoint(path) or path)
            path = folder / TRAINER_STATE
        if not path.is_file():
            raise FileNotFoundError(
                f"log: received {str(source)!r}; allowed: a {TRAINER_STATE}, a checkpoint, or a Trainer's output "
                "folder with either (call trainer.save_state() after training)."
            )
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"log: {path} is no JSON ({error}); allowed: what a Trainer has written.") from error
        return cls.of(state, str(path))

    @classmethod
    def of(cls, state: dict[str, Any], name: str = "the state") -> "TrainingLog":
        """The log in a Trainer's state, as its `trainer_state.json` has it.

        Raises:
            ValueError: It is not of a training with `StomppCallback`.
        """
        callbacks = state.get("stateful_callbacks", {}) if isinstance(state, dict) else {}
        saved = callbacks.get("StomppCallback", {})
        saved = saved[-1] if isinstance(saved, list) else saved
        attributes = saved.get("attributes", {})
        if "trained_with" not in attributes or "units" not in attributes:
            raise ValueError(
                f"log: {name} is not of a training with StomppCallback, or of one by an older version; allowed: the "
                "log of a training with this one."
            )
        config = BinarizationConfig.from_dict(attributes["trained_with"])
        return cls(config, state["max_steps"], attributes["units"], state["log_history"])

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        """The steps at which `key` was logged, and its values."""
        found = [(entry["step"], entry[key]) for entry in self.history if entry.get(key) not in (None, [])]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def scores(self) -> list[str]:
        """The keys of evaluation scores in [-1, 1], as `eval_accuracy`."""
        keys = dict.fromkeys(key for entry in self.history for key in entry if key.startswith("eval_"))
        timed = ("loss", "_runtime", "_per_second", "_preparation_time")
        return [key for key in keys if not key.endswith(timed) and all(map(_is_score, self.series(key)[1]))]

    @property
    def last_step(self) -> int:
        """The step of the last log: a run may have been stopped before `max_steps`."""
        return self.history[-1]["step"] if self.history else self.max_steps

    def fractions(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps up to the last log, and the frozen fraction of each unit at each of them, `[units, steps]`."""
        steps = np.unique(np.linspace(1, self.last_step, min(self.last_step, POINTS)).astype(int))
        return steps, np.array([self._at(int(step)) for step in steps]).T

    def windows(self) -> list[int]:
        """The steps up to the last log in which a unit was fully frozen."""
        steps = range(1, self.last_step + 1)
        ends = {bisect.bisect_left(steps, True, key=partial(self._is_frozen, unit)) for unit in range(len(self.units))}
        return sorted(steps[end] for end in ends if end < len(steps))

    def _is_frozen(self, unit: int, step: int) -> bool:
        return self._at(step)[unit] >= 1

    def _at(self, step: int) -> Sequence[float]:
        return self.config.unit_fractions(step, self.max_steps, len(self.units))


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= 1


def plot(log: TrainingLog | str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Any:
    """Draws, over the steps of a training: the frozen fraction of each unit (the front), the losses and scores with
    the ends of the windows, the gradient that reaches each unit (the blockade), and the share of signs that flip.

    Args:
        log (`TrainingLog` or path): See [`TrainingLog.read`].
        output (`str` or `Path`, *optional*): File to write; its ending says what: `.png`, `.svg`, `.pdf`.

    Returns:
        `matplotlib.figure.Figure`: The picture.

    Raises:
        ImportError: matplotlib, of the extra `plot`, is not installed.
        FileNotFoundError, ValueError: As of [`TrainingLog.read`].

    Example:

        >>> from hf_stompp.report import plot
        >>> plot("out/sst2", "dynamics.svg")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: `pip install "hf_stompp[plot]"`.') from error
    log = log if isinstance(log, TrainingLog) else TrainingLog.read(log)
    figure = Figure(figsize=(9, 11), layout="constrained")
    front, losses, gradients, flips = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 3, 2])
    _draw_front(front, log)
    _draw_losses(losses, log)
    _draw_gradients(gradients, log)
    _draw_flips(flips, log)
    front.set_xlim(0, log.max_steps)
    flips.set_xlabel("optimizer step")
    if output is not None:
        figure.savefig(output, dpi=120)
    return figure


def _draw_front(axes: Any, log: TrainingLog) -> None:
    steps, fractions = log.fractions()
    _draw_units(axes, log, steps, fractions, "frozen fraction", cmap="viridis", vmin=0, vmax=1)
    axes.set_title("Frozen fraction of each unit: the front", loc="left")


def _draw_units(axes: Any, log: TrainingLog, steps: Any, values: np.ndarray, label: str, **how: Any) -> None:
    """A row for each unit, the input on top; a column for each of `steps`, from the one before it."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    image = axes.pcolormesh([first, *steps], np.arange(len(log.units) + 1) - 0.5, values, **how)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.01)
    count = len(log.units)
    places = sorted({round(i * (count - 1) / max(1, min(count, 8) - 1)) for i in range(min(count, 8))})
    axes.set_yticks(places, [_short(log.units[place]) for place in places], fontsize=7)
    axes.invert_yaxis()


def _short(names: Sequence[str]) -> str:
    name = names[0] if len(names[0]) <= 34 else f"…{names[0][-33:]}"
    return name if len(names) == 1 else f"{name} +{len(names) - 1}"


def _draw_losses(axes: Any, log: TrainingLog) -> None:
    for number, step in enumerate(log.windows()):
        axes.axvline(step, color="0.85", linewidth=0.8, zorder=0, label="_" if number else "a unit is frozen")
    for key, label, style in (("loss", "training loss", ".-"), ("eval_loss", "evaluation loss", "o--")):
        steps, values = log.series(key)
        if steps:
            axes.plot(steps, values, style, label=label, markersize=3)
    axes.set_ylabel("loss")
    axes.set_title("Loss and score", loc="left")
    scores = axes.twinx()
    for key, colour in zip(log.scores, ("tab:green", "tab:red", "tab:purple", "tab:brown"), strict=False):
        scores.plot(*log.series(key), "s-", color=colour, label=key.removeprefix("eval_"), markersize=3)
    scores.set_ylabel("score")
    if not log.scores:
        scores.set_axis_off()
    lines = [*axes.get_lines(), *scores.get_lines()]
    named = [line for line in lines if not line.get_label().startswith("_")]
    # Beside the title, where no line is.
    axes.legend(handles=named, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)


def _draw_gradients(axes: Any, log: TrainingLog) -> None:
    axes.set_title("Gradient that reaches each unit (black: none is let through)", loc="left")
    steps, norms = log.series("unit_gradients")
    if not steps:
        axes.text(0.5, 0.5, "not logged (it is not under torch.compile)", transform=axes.transAxes, ha="center")
        return
    values = np.array(norms, dtype=float).T
    values = np.where(np.isfinite(values), values, np.nan)  # of a step that a gradient scaler has skipped
    top = math.ceil(np.log10(np.nanmax(values, initial=1e-12)))
    logarithms = np.log10(np.maximum(values, 1e-12))
    _draw_units(axes, log, steps, logarithms, "log10 of its norm", cmap="magma", vmin=top - 6, vmax=top)


def _draw_flips(axes: Any, log: TrainingLog) -> None:
    axes.plot(*log.series("flip_ratio"), ".-", label="all units", color="black")
    steps, flips = log.series("unit_flips")
    if steps:
        units = np.array(flips)
        for unit in sorted({0, len(log.units) // 2, len(log.units) - 1}):
            axes.plot(steps, units[:, unit], ".-", label=_short(log.units[unit]), linewidth=1, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("flip ratio")
    axes.set_title("Share of signs that changed since the last log", loc="left")
    axes.legend(fontsize=7, loc="upper right")
