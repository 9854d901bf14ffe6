"""The studies of benchmarks/reproduce: what their files say, that each run is made once, and what is said of it."""

import dataclasses
import functools
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from benchmarks.reproduce import reporter, runner
from benchmarks.reproduce.plain import PlainConfig, PlainForImageClassification
from benchmarks.reproduce.study import ROOT, STUDIES, Study
from hf_stompp import BinarizationConfig, binarize, calibrate, kernels, pack, summary
from hf_stompp.checkpoint import load_complete
from hf_stompp.patching import binary_layers

GRID = {
    "about": "A test.",
    "recipe": "run_image_classification",
    "config": "reproduce_plain",
    "flags": {"max_steps": 20, "warmup_steps": 2},
    "axes": {
        "depth": {2: {"config_overrides": {"depth": 2}}, 4: {"config_overrides": {"depth": 4}}},
        "method": {"STE": {"progression": "none"}, "StoMPP": {"surrogate": "none"}},
    },
    "seeds": [0, 1],
    "table": ["method", "depth"],
}


BINARIZATION = {field.name for field in dataclasses.fields(BinarizationConfig)}


def study(tmp_path: Path, **changes: Any) -> Study:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return Study.read(str(path))


def test_the_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    tiny = study(tmp_path)
    assert [(run.labels["depth"], run.labels["method"], run.flags["seed"]) for run in tiny.runs] == [
        (depth, method, seed) for seed in (0, 1) for depth in ("2", "4") for method in ("STE", "StoMPP")
    ]
    assert tiny.runs[0].argv == [
        "recipes/configs/reproduce_plain.yaml",
        "--max_steps=20",
        "--warmup_steps=2",
        '--config_overrides={"depth": 2}',
        "--progression=none",
        "--seed=0",
    ]


def test_grids_may_overlap(tmp_path: Path) -> None:
    grids = [{"depth": [2]}, {"depth": [2, 4], "method": ["STE"], "seeds": [0, 7]}]
    tiny = study(tmp_path, grids=grids)
    places = {(run.labels["depth"], run.labels["method"], run.flags["seed"]) for run in tiny.runs}
    first = {("2", method, seed) for method in ("STE", "StoMPP") for seed in (0, 1)}
    second = {(depth, "STE", seed) for depth in ("2", "4") for seed in (0, 7)}
    assert places == first | second and len(tiny.runs) == len(places) == 7


def test_a_random_order_is_another_one_for_each_seed(tmp_path: Path) -> None:
    tiny = study(tmp_path, axes={"order": {"forward": {}, "random": {"order": "random"}}}, table=["order"])
    seeds = [(run.flags["seed"], run.flags.get("mask_seed")) for run in tiny.runs]
    assert seeds == [(0, None), (0, 0), (1, None), (1, 1)]


def test_a_grid_may_have_flags_of_its_own(tmp_path: Path) -> None:
    tiny = study(tmp_path, grids=[{"depth": [2]}, {"depth": [4], "flags": {"overlap": 2}}], seeds=[0])
    assert [run.flags.get("overlap") for run in tiny.runs] == [None, None, 2, 2]


def test_a_key_is_of_the_settings_alone(tmp_path: Path) -> None:
    tiny = study(tmp_path)
    assert len({run.key for run in tiny.runs}) == len(tiny.runs)
    renamed = {"method": {"baseline": {"progression": "none"}, "StoMPP": {"surrogate": "none"}}}
    again = study(tmp_path, axes={**GRID["axes"], **renamed})
    assert [run.key for run in again.runs] == [run.key for run in tiny.runs]
    other = study(tmp_path, flags={"max_steps": 21, "warmup_steps": 2})
    assert not {run.key for run in other.runs} & {run.key for run in tiny.runs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "received the key 'colour'; allowed: about, axes"),
        ({"grids": [{"depth": [3]}]}, "the axis 'depth' has no '3'; allowed: 2, 4"),
        ({"grids": [{}, {"depth": [4], "flags": {"clip": 1}}]}, "two grids have other flags for .*'depth': '4'"),
        ({"table": ["method"]}, "table is .*; allowed: all axes, depth, method"),
        ({"plot": {"x": "steps", "lines": "method"}}, "plot names the axis 'steps'; allowed: depth, method"),
        ({"grids": [{"width": [3]}]}, "a grid has the axis 'width'; allowed: depth, method, flags, seeds"),
    ],
)
def test_mistakes_in_a_file_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **changes)


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="study: received 'depht'; allowed: .*depth_plain"):
        Study.read("depht")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_run(path: Path) -> None:
    shipped = Study.read(str(path))
    recipe = importlib.import_module(shipped.runs[0].recipe)
    types = (recipe.RecipeArguments, BinarizationConfig, TrainingArguments)
    known = {field.name for kind in types for field in dataclasses.fields(kind)}
    for run in shipped.runs:
        assert run.flags.keys() <= known
        BinarizationConfig(**{key: value for key, value in run.flags.items() if key in BINARIZATION})


def test_half_a_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    runner._append(path, {"key": "a"})
    with open(path, "a") as file:
        file.write('{"key": "b", "sco')  # and the runner is killed
    assert runner.read(path) == [{"key": "a"}]
    runner._append(path, {"key": "c"})
    assert runner.read(path) == [{"key": "a"}, {"key": "c"}]


def written(tiny: Study, path: Path, score: Any) -> list[dict[str, Any]]:
    """Results as the runner writes them, with a score of our own for each run."""
    common = {"error": None, "curve": []}
    lines = [{"key": run.key, "identity": run.key, "score": score(run), **common} for run in tiny.runs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_the_table(tmp_path: Path) -> None:
    tiny = study(tmp_path, baseline={"method": "STE"})
    made = {run.key: 0.5 + 0.01 * i + 0.002 * i * i for i, run in enumerate(tiny.runs)}
    written(tiny, tmp_path / "r.jsonl", lambda run: made[run.key])
    text = reporter.report(tiny, tmp_path / "r.jsonl")

    def of(depth: str, method: str) -> list[float]:
        return [100 * made[r.key] for r in tiny.runs if r.labels == {"depth": depth, "method": method}]

    def cell(values: list[float], sign: str = "") -> str:
        return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"

    assert f"| STE | {cell(of('2', 'STE'))} | {cell(of('4', 'STE'))} |" in text
    gains = [[a - b for a, b in zip(of(d, "StoMPP"), of(d, "STE"), strict=True)] for d in ("2", "4")]
    assert f"| StoMPP | {cell(gains[0], '+')} | {cell(gains[1], '+')} |" in text
    assert "8 of 8 runs" in text


def test_errors_are_counted_and_the_last_line_of_a_run_counts(tmp_path: Path) -> None:
    tiny, path = study(tmp_path), tmp_path / "r.jsonl"
    lines = written(tiny, path, lambda run: 0.5)
    path.write_text("")
    runner._append(path, {**lines[0], "score": None, "error": "FloatingPointError: The loss is nan"})
    runner._append(path, {**lines[1], "score": None, "error": "OSError: full"})
    runner._append(path, {**lines[1], "score": 0.25})
    text = reporter.report(tiny, path)
    assert "25.0 (1 of 2)" in text
    assert "1 of 8 runs" in text and "1 runs ended with an error, as: FloatingPointError" in text and "25.0" in text


def test_steps_that_are_needed() -> None:
    points = [(100.0, 20.0), (400.0, 60.0), (1600.0, 90.0)]
    assert reporter.reached(points, 40) == pytest.approx(200)  # halfway in the logarithm
    assert reporter.reached(points, 75) == pytest.approx(800)
    assert reporter.reached(points, 10) == 100 and reporter.reached(points, 95) == math.inf


def test_steps_that_are_needed_are_of_each_seed(tmp_path: Path) -> None:
    tiny = study(tmp_path, needed={"x": "depth", "of": 60})
    end = {("STE", 0): 0.8, ("STE", 1): 1.0, ("StoMPP", 0): 0.8, ("StoMPP", 1): 0.5}

    def score(run: Any) -> float:
        return 0.4 if run.labels["depth"] == "2" else end[run.labels["method"], run.flags["seed"]]

    written(tiny, tmp_path / "r.jsonl", score)
    text = reporter.report(tiny, tmp_path / "r.jsonl")
    crossings = [2 * 2 ** (20 / 40), 2 * 2 ** (20 / 60)]
    assert f"| STE | {statistics.mean(crossings):.0f} ± {statistics.stdev(crossings):.0f} |" in text
    assert "| StoMPP | > 4 (1 of 2) |" in text


def test_what_was_logged_at_the_end(tmp_path: Path) -> None:
    tiny, path = study(tmp_path, ends="loss"), tmp_path / "r.jsonl"
    lines = written(tiny, path, lambda run: 0.5)
    losses = {
        line["key"]: [9.0] * 10 + [0.1 * i, 0.2 + 0.1 * i] for i, line in enumerate(lines)
    }  # two of twelve count
    for line in lines:
        curve: list[dict[str, Any]] = [{"step": i, "loss": loss} for i, loss in enumerate(losses[line["key"]])]
        runner._append(path, {**line, "curve": [*curve, {"step": 12, "eval_accuracy": 0.5}]})
    of = [0.1 + 0.1 * i for i, run in enumerate(tiny.runs) if run.labels == {"depth": "2", "method": "STE"}]
    cell = f"{statistics.mean(of):.3f} ± {statistics.stdev(of):.3f}"
    assert f"| STE | {cell} |" in reporter.report(tiny, path).split("Loss, the mean of the last sixth")[1]
    other = study(tmp_path, ends="lr", dips="eval_loss")  # what no run has logged
    assert "| STE |  |  |" in reporter.report(other, path).split("Lr, the mean of the last sixth")[1]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = {"lines": "method", "panels": "depth"}
    tiny = study(tmp_path, plot={"x": "depth", "lines": "method"}, curves={"y": "loss", **parts})
    lines = written(tiny, tmp_path / "r.jsonl", lambda run: 0.1 * int(run.labels["depth"]))
    curve = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line | {"curve": curve}) + "\n" for line in lines))
    reporter.draw_all(tiny, tmp_path / "r.jsonl")
    assert "<svg" in (tmp_path / "r.svg").read_text() and "<svg" in (tmp_path / "r_curves.svg").read_text()


SHORT: dict[str, Any] = {"seeds": [0], "flags": {"max_steps": 30, "warmup_steps": 2}}


def command(folder: Path, *more: str) -> list[str]:
    study(folder, **SHORT)
    places = ["--work_dir", str(folder / "work"), "--results", str(folder / "results")]
    return [sys.executable, "-m", "benchmarks.reproduce", "run", str(folder / "tiny.yaml"), *places, *more]


def test_runs_are_made_once_and_survive_a_kill(tmp_path: Path) -> None:
    """The runner is killed when it has one run, and started again: each run has one line, of the same outcome."""
    path = tmp_path / "results" / "tiny.jsonl"
    killed = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not runner.read(path) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)  # ends when the workers, which have its pipe, have ended too
    first = runner.read(path)
    assert 1 <= len(first) < 4
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = runner.read(path)
    (tmp_path / "whole").mkdir()
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True, timeout=600)
    whole = {line["key"]: line for line in runner.read(tmp_path / "whole" / "results" / "tiny.jsonl")}
    for line in lines:  # what a runner that was not killed gets
        assert [line[part] for part in ("score", "curve")] == [whole[line["key"]][part] for part in ("score", "curve")]
    assert lines[: len(first)] == first and len({line["key"] for line in lines}) == len(lines) == 4
    for line in lines:
        assert line["error"] is None and 0 < line["score"] == line["latent_score"] <= 1
        assert line["hardware"] and line["versions"]["torch"] and line["flags"]["max_steps"] == 30
        assert [entry["step"] for entry in line["curve"] if "eval_accuracy" in entry][-1] == 30
        assert line["curve"][-1].keys() >= {"step"} and any("frozen_fraction" in entry for entry in line["curve"])
    again = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "of which 0 are to be made" in again.stdout and runner.read(path) == lines


def test_an_interrupt_ends_the_runs_too(tmp_path: Path) -> None:
    """Ctrl-C, which goes to the workers as well."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    started = subprocess.Popen(command(tmp_path), cwd=ROOT, start_new_session=True, preexec_fn=heed, **pipes)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "work").glob("*/log")) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=60)  # ends when the workers, which have its pipes, have ended too
    assert started.returncode == 1 and "the same command goes on" in errors and "Traceback" not in errors
    assert len(list((tmp_path / "work").glob("*/log"))) == 1


def test_a_run_that_fails_has_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    places = {"too short": {"max_steps": 2}, "wrong": {"surrogate": "foo"}, "right": {}}
    study(tmp_path, seeds=[0], axes={"method": places}, table=["method"])
    words = [sys.executable, "-m", "benchmarks.reproduce", "run", str(tmp_path / "tiny.yaml")]
    words += ["--work_dir", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = {line["labels"]["method"]: line["error"] for line in runner.read(tmp_path / "results" / "tiny.jsonl")}
    assert "The schedule cannot finish" in errors["too short"] and "SystemExit" in errors["wrong"]
    assert errors["right"] is None and "1 of 3 runs" in done.stdout


def test_other_flags_make_another_run(tmp_path: Path) -> None:
    (run, *_) = study(tmp_path).runs
    of_models = {runner.identity(run, {"model_name_or_path": name, "dataset_dir": "x"}) for name in "ab"}
    assert len(of_models | {run.key}) == 3
    assert runner.identity(run, {"dataset_dir": "here"}) == runner.identity(run, {"dataset_dir": "there"}) == run.key


def test_a_model_that_transformers_does_not_have_is_packed_and_found_again(tmp_path: Path) -> None:
    """The chain of the studies has no class in transformers: what is defined in the running program is found."""
    images = {"pixel_values": torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    model = binarize(PlainForImageClassification(PlainConfig(depth=3, hidden_size=16)), BinarizationConfig())
    assert [row.role for row in summary(model).rows[:5]] == ["stem", "encoder", "encoder", "encoder", "head"]
    calibrate(model, images)
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    pack(model).save_pretrained(tmp_path)
    with kernels.use("reference"):
        packed = load_complete(tmp_path)
        assert type(packed) is PlainForImageClassification
        assert torch.equal(packed(**images).logits, model.eval()(**images).logits)
