"""Trainings that are killed and resumed, and trainings of two processes: in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")

Launch = Callable[..., list[dict[str, Any]]]
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    folder = Path(__file__).parent
    paths = [str(folder.parent), str(folder), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(folder / "fork_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


@pytest.fixture
def launch(worker: subprocess.Popen[str], tmp_path: Path) -> Launch:
    """Runs `training_jobs.CALL(**arguments)` in so many processes; what each of them returned. They end as expected:
    with 0, with an error, or killed: one at least, of which the others may take notice."""

    def run(
        call: str, processes: int = 1, killed: bool = False, failed: bool = False, **arguments: Any
    ) -> list[dict[str, Any]]:
        out = tmp_path / "out"
        job = {"call": call, "arguments": arguments, "processes": processes, "out": str(out)}
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        ended = json.loads(worker.stdout.readline())
        files = [out.with_name(f"out.{rank}") for rank in range(processes)]
        results = [torch.load(file, weights_only=False) if file.exists() else {} for file in files]
        for file in files:
            file.unlink(missing_ok=True)
        if killed:
            assert -signal.SIGKILL in ended and 0 not in ended, results
        else:
            assert ended == [int(failed)] * processes, results
        return results

    return run


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- several processes ----------------------------------------------------------------------------------------------


SPLITS: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 4},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "activation checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    "all parameters are used": {"per_device_train_batch_size": 4, "ddp_find_unused_parameters": False},
    "no buffers sent": {"per_device_train_batch_size": 4, "ddp_broadcast_buffers": False},
}


@pytest.mark.parametrize(
    "config",
    [
        {"surrogate": "ste", "refresh": 0.3},
        {"surrogate": "none", "progression": "global", "progression_end": 1.0},
        {"surrogate": "none", "activations": False, "progression_end": 1.0},
        {"surrogate": "ste", "attention": True, "embeddings": True, "pooler": True, "progression_end": 0.9},
    ],
    ids=["ste", "ste-free global", "weights only", "fully binary"],
)
def test_two_processes_train_as_one(config: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    def run(processes: int, **arguments: Any) -> list[dict[str, Any]]:
        return launch("train", processes, output_dir=str(tmp_path / "run"), config=config, double=True, **arguments)

    # Soft probabilities are small, and in float32, as all that is compared with a scale; Adam makes more of it.
    near = {"rtol": 1e-3, "atol": 1e-6} if config.get("attention") else {"rtol": 1e-6, "atol": 1e-8}
    (alone,) = run(1, per_device_train_batch_size=GLOBAL_BATCH)
    for split in SPLITS.values():
        first, second = run(2, **split)
        same(first["state"], second["state"], rtol=0, atol=0)
        same(alone["state"], first["state"], **near)
        for step, masks in enumerate(alone["masks"]):
            for one in (first, second):
                same(masks, one["masks"][step], rtol=0, atol=0)
        losses = [[log["loss"] for log in one["history"] if "loss" in log] for one in (alone, first)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        # Of buffers DDP sends the small ones at most: no masks.
        assert all(len(shape) == 0 or shape == (1, 512) for shape in first["sent"])
        checkpointed = "gradient_checkpointing" in split or not split.get("ddp_find_unused_parameters", True)
        assert first["find_unused"] is (not checkpointed)


def test_two_processes_are_taught_as_one(launch: Launch, tmp_path: Path) -> None:
    def run(processes: int, **arguments: Any) -> list[dict[str, Any]]:
        config, folder = {"surrogate": "ste", "refresh": 0.3}, str(tmp_path / "run")
        return launch("train", processes, output_dir=folder, config=config, double=True, taught=True, **arguments)

    (alone,) = run(1, per_device_train_batch_size=GLOBAL_BATCH)
    taught = [log["loss"] for log in alone["history"] if "loss" in log]
    assert taught[-1] < taught[0]
    for split in ("plain", "gradient accumulation", "activation checkpointing"):
        first, second = run(2, **SPLITS[split])
        same(first["state"], second["state"], rtol=0, atol=0)
        same(alone["state"], first["state"], rtol=1e-6, atol=1e-8)
        assert [log["loss"] for log in first["history"] if "loss" in log] == pytest.approx(taught, rel=1e-6)


@pytest.mark.parametrize("base", ["packed", "latent"])
def test_two_processes_train_an_adapter_as_one(base: str, launch: Launch, tmp_path: Path) -> None:
    pytest.importorskip("peft")

    def run(processes: int, **arguments: Any) -> list[dict[str, Any]]:
        folder, config = str(tmp_path / "run"), {"surrogate": "ste", "refresh": 0.3}
        return launch("train", processes, output_dir=folder, config=config, double=True, adapter_on=base, **arguments)

    (alone,) = run(1, per_device_train_batch_size=GLOBAL_BATCH)
    trained = [tensor for name, tensor in alone["state"].items() if "lora_B" in name]
    assert trained and all(tensor.any() for tensor in trained)  # which began as 0
    for split in ("plain", "activation checkpointing"):
        first, second = run(2, **SPLITS[split])
        same(first["state"], second["state"], rtol=0, atol=0)
        same(alone["state"], first["state"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("surrogate", ["ste", "none"])
def test_shards_of_fsdp_train_as_whole_copies(surrogate: str, launch: Launch) -> None:
    config = {"surrogate": surrogate, "refresh": 0.3, "progression_end": 1.0}
    (alone,) = launch("drive", wrapping="none", config=config)
    copies = launch("drive", 2, wrapping="ddp", config=config)
    shards = launch("drive", 2, wrapping="fsdp", config=config)
    for one in (*copies, *shards):
        assert one["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        same(alone["state"], one["state"], rtol=1e-4, atol=1e-6)
    assert shards[0]["shards"]["bert.encoder.layer.0.intermediate.dense"] == (16, 16)
    assert sum(shards[0]["flips"]) > 0


# --- faults ---------------------------------------------------------------------------------------------------------


FAULTS = {
    "in a step 6": 4,
    "in an evaluation 8": 4,
    "while weights are written 8": 4,
    "while the optimizer's state is written 8": 4,
    "while the Trainer's state is written 8": 4,
    "while an old checkpoint is deleted 8": 8,
}
SAVING: dict[str, Any] = {
    "config": {"surrogate": "none", "refresh": 0.3, "progression_end": 1.0},
    "dropout": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
}


@pytest.mark.parametrize("taught", [False, True])
def test_a_run_that_is_killed_is_resumed_to_the_same_end(taught: bool, launch: Launch, tmp_path: Path) -> None:
    arguments = SAVING | {"per_device_train_batch_size": GLOBAL_BATCH, "taught": taught}
    (whole,) = launch("train", output_dir=str(tmp_path / "whole"), **arguments)
    assert any("eval_sum" in log for log in whole["history"])
    for fault, resumed_from in FAULTS.items():
        folder = tmp_path / fault
        launch("train", killed=True, output_dir=str(folder), fault=fault, **arguments)
        assert any(folder.iterdir())
        (resumed,) = launch("train", output_dir=str(folder), resume=True, **arguments)
        assert len(resumed["masks"]) == 12 - resumed_from, fault
        same(whole["state"], resumed["state"], rtol=0, atol=0)
        for ours, theirs in zip(reversed(resumed["masks"]), reversed(whole["masks"]), strict=False):
            same(theirs, ours, rtol=0, atol=0)
        assert resumed["history"] == whole["history"], fault


@pytest.mark.parametrize("base", ["packed", "latent"])
def test_a_run_of_an_adapter_that_is_killed_is_resumed_to_the_same_end(
    base: str, launch: Launch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    arguments = SAVING | {"per_device_train_batch_size": GLOBAL_BATCH, "adapter_on": base}
    (whole,) = launch("train", output_dir=str(tmp_path / "whole"), **arguments)
    for fault, resumed_from in {"in a step 6": 4, "while the optimizer's state is written 8": 4}.items():
        folder = tmp_path / fault
        launch("train", killed=True, output_dir=str(folder), fault=fault, **arguments)
        (resumed,) = launch("train", output_dir=str(folder), resume=True, **arguments)
        assert len(resumed["masks"]) == 12 - resumed_from, fault
        same(whole["state"], resumed["state"], rtol=0, atol=0)
        assert resumed["history"] == whole["history"], fault


def test_the_best_checkpoint_of_a_run_that_is_killed(launch: Launch, tmp_path: Path) -> None:
    best, found = {"load_best_model_at_end": True, "metric_for_best_model": "sum"}, set()
    for order in (True, False):
        arguments = SAVING | best | {"per_device_train_batch_size": GLOBAL_BATCH, "greater_is_better": order}
        (whole,) = launch("train", output_dir=str(tmp_path / f"whole-{order}"), **arguments)
        found.add(whole["best"])
        for fault, made_again in {"in a step 9": 4, "while weights are written 8": 8}.items():
            folder = str(tmp_path / f"{fault}-{order}")
            launch("train", killed=True, output_dir=folder, fault=fault, **arguments)
            (resumed,) = launch("train", output_dir=folder, resume=True, **arguments)
            assert (resumed["best"], len(resumed["masks"])) == (whole["best"], made_again)
            same(whole["state"], resumed["state"], rtol=0, atol=0)
            assert resumed["history"] == whole["history"]
    assert len(found) == 2  # so that one of them is not the last


def test_the_first_log_of_a_resumed_run_is_of_the_steps_since_its_checkpoint(launch: Launch, tmp_path: Path) -> None:
    arguments = SAVING | {"per_device_train_batch_size": GLOBAL_BATCH, "logging_steps": 5}
    (whole,) = launch("train", output_dir=str(tmp_path / "whole"), **arguments)
    launch("train", killed=True, output_dir=str(tmp_path / "cut"), fault="in a step 6", **arguments)
    (resumed,) = launch("train", output_dir=str(tmp_path / "cut"), resume=True, **arguments)
    same(whole["state"], resumed["state"], rtol=0, atol=0)
    differing = {
        (ours["step"], key)
        for ours, theirs in zip(resumed["history"], whole["history"], strict=True)
        for key in ours | theirs
        if ours[key] != theirs[key]
    }
    assert differing == {(5, "loss"), (5, "flip_ratio"), (5, "unit_flips")}


def test_two_processes_that_are_killed_are_resumed_to_the_same_losses(launch: Launch, tmp_path: Path) -> None:
    arguments = SAVING | {"per_device_train_batch_size": GLOBAL_BATCH // 2}
    whole = launch("train", 2, output_dir=str(tmp_path / "whole"), **arguments)
    # In both of them; or in the one that writes.
    for fault in (
        "in a step 6",
        "in an evaluation 8",
        "while weights are written 8",
        "while the Trainer's state is written 8",
    ):
        folder = str(tmp_path / fault)
        launch("train", 2, killed=True, output_dir=folder, fault=fault, **arguments)
        resumed = launch("train", 2, output_dir=folder, resume=True, **arguments)
        for ours, theirs in zip(resumed, whole, strict=True):
            assert len(ours["masks"]) == 8, fault
            same(theirs["state"], ours["state"], rtol=0, atol=0)
        assert resumed[0]["history"] == whole[0]["history"], fault


def test_a_loss_that_is_no_number_in_one_process_ends_both(launch: Launch, tmp_path: Path) -> None:
    arguments = SAVING | {"per_device_train_batch_size": GLOBAL_BATCH // 2}
    fault = "no number in the second process 6"
    results = launch("train", 2, failed=True, output_dir=str(tmp_path / "run"), fault=fault, **arguments)
    for result, loss in zip(results, (r"\d\.\d+", "nan"), strict=True):
        assert re.search(
            rf"The loss is {loss} at step 7 of 12, .* good checkpoint is .*checkpoint-4\.", result["error"]
        )
