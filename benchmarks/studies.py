"""What the studies share: runs of a recipe, each made once, and the table of their scores."""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Method:
    """A row of the table: the recipe's file and flags, and the seeds."""

    name: str
    config: str
    flags: tuple[str, ...] = ()
    seeds: Sequence[int] = (0,)

    def folder(self, work_dir: Path, seed: int) -> Path:
        """What a run writes to."""
        return work_dir / f"{re.sub('[^a-z0-9]+', '_', self.name.lower()).strip('_')}-{seed}"


def study(name: str, description: str, recipe: str, methods: Sequence[Method]) -> None:
    """Runs every method for every seed, prints the table and writes `benchmarks/results/NAME.json`.

    Each run is one command, printed as it starts; a run that is done is not repeated, one that was interrupted goes
    on from its last checkpoint. Flags that are not the study's own go to the recipe.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's threads")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / name)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    args, flags = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    # One seed of every method first: a table can be read off early.
    tasks = sorted(((seed, method) for method in methods for seed in method.seeds), key=lambda task: task[0])
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(tasks, pool.map(lambda t: run(recipe, t[1], t[0], flags, args.work_dir), tasks), strict=True))
    rows = [_row(method, [done[seed, method] for seed in method.seeds]) for method in methods]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(_table(rows))


def run(recipe: str, method: Method, seed: int, flags: list[str], work_dir: Path) -> dict[str, Any]:
    """One run of the recipe, or what it wrote when it ran before."""
    folder = method.folder(work_dir, seed)
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, f"recipes/{recipe}.py", f"recipes/configs/{method.config}.yaml", *method.flags]
        command += ["--seed", str(seed), "--output_dir", str(folder), *flags]
        print(" ".join(command), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log", "w") as log:
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(results.read_text())


def _row(method: Method, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of the last row of each run's table: the packed, reloaded model where there is one."""
    return {
        "method": method.name,
        "learning_rate": runs[0]["learning_rate"],
        "steps": runs[0]["steps"],
        "batch_size": runs[0]["batch_size"],
        "seeds": [run["seed"] for run in runs],
        "accuracy": [100 * run["rows"][-1]["accuracy"] for run in runs],
        "latent_accuracy": [100 * run["rows"][0]["accuracy"] for run in runs],
        "bytes": runs[0]["rows"][-1]["bytes"],
        "train_seconds": [run["train_seconds"] for run in runs],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | learning rate | accuracy | each seed | file |", "|---|---|---|---|---|"]
    for row in rows:
        scores = row["accuracy"]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.1f}" for score in scores)
        size = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] > 1e6 else f"{row['bytes'] / 1e3:.0f} kB"
        lines.append(
            f"| {row['method']} | {row['learning_rate']:g} | {statistics.mean(scores):.1f}{spread} | {each} | {size} |"
        )
    return "\n".join(lines)
