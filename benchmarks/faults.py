"""Runs that are killed at every kind of moment, and resumed: what of them is lost.

    python benchmarks/faults.py --times 12

A tiny BERT is trained by the Trainer for 12 steps with an evaluation and a checkpoint after every fourth, of which one
is kept. A run is killed by SIGKILL, at a moment that is looked for or at any, and its command is given again until it
comes to its end. Then its weights, masks and log history are compared with those of a run that was left alone, bit for
bit. Prints a table, and writes `benchmarks/results/faults.json`.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import training_jobs  # noqa: E402

CONFIG = {"surrogate": "none", "refresh": 0.3, "progression_end": 1.0}
ARGUMENTS: dict[str, Any] = dict(
    config=CONFIG, dropout=0.1, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=4,
    save_strategy="steps", save_steps=4, save_total_limit=1,
)  # fmt: skip
STEPS = {
    "in a step": range(training_jobs.STEPS),
    "in an evaluation": (4, 8, 12),
    "while weights are written": (4, 8, 12),
    "while the optimizer's state is written": (4, 8, 12),
    "while the Trainer's state is written": (4, 8, 12),
    "while an old checkpoint is deleted": (8, 12),
}
ANY = "at any time, up to three times a run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=12, help="runs of each kind")
    times = parser.parse_args().times
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # threads would not survive the fork
    draw, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = uninterrupted(Path(folder))
        for fault in (*STEPS, ANY):
            outcomes = []
            for i in range(times):
                print(f"\r\033[K{fault}: {i + 1} of {times}", end="", file=sys.stderr, flush=True)
                outcomes.append(killed(Path(folder) / f"{fault}-{i}", fault, draw, seconds, whole))
            kills, again, equal = (sum(column) for column in zip(*outcomes, strict=True))
            rows.append({"fault": fault, "runs": times, "kills": kills, "steps_again": again, "equal": equal})
    print("\r\033[K| killed | runs | kills | steps made again, of each kill | ended as if not killed |")
    print("|---|---|---|---|---|")
    for row in rows:
        mean = row["steps_again"] / max(1, row["kills"])
        print(f"| {row['fault']} | {row['runs']} | {row['kills']} | {mean:.1f} | {row['equal']} of {row['runs']} |")
    results = {"torch": torch.__version__, "steps": training_jobs.STEPS, "rows": rows}
    path = Path(__file__).with_name("results") / "faults.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


def start(folder: Path, fault: str | None) -> int:
    """A process that trains, resumes what is in the folder, and leaves `result` there."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        result = training_jobs.train(str(folder), resume=True, fault=fault, **ARGUMENTS)
        torch.save(result, folder / "result.part")
        os.replace(folder / "result.part", folder / "result")
        os._exit(0)
    return child


def end(child: int, after: float | None = None) -> bool:
    """Whether it came to its end; it is killed `after` so many seconds."""
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"\nA run failed, which is none of the faults: {status}")
    return status == 0


def uninterrupted(folder: Path) -> tuple[dict[str, Any], float]:
    """What a run comes to that is left alone, and how many seconds it takes."""
    begin = time.perf_counter()
    end(start(folder / "whole", None))
    return torch.load(folder / "whole" / "result", weights_only=False), time.perf_counter() - begin


def killed(
    folder: Path, fault: str, draw: random.Random, seconds: float, whole: dict[str, Any]
) -> tuple[int, int, bool]:
    """How often a run was killed, how many steps it made again, and whether it ended as one that was left alone."""
    times = 0
    if fault == ANY:
        while times < 3 and not (folder / "result").exists():
            times += not end(start(folder, None), after=draw.uniform(0, seconds))
    else:
        times += not end(start(folder, f"{fault} {draw.choice(STEPS[fault])}"))
    if not (folder / "result").exists():
        end(start(folder, None))
    result = torch.load(folder / "result", weights_only=False)
    same = result["history"] == whole["history"] and result["state"].keys() == whole["state"].keys()
    same = same and all(torch.equal(tensor, whole["state"][name]) for name, tensor in result["state"].items())
    return times, (folder / "steps").stat().st_size - training_jobs.STEPS, same


if __name__ == "__main__":
    main()
