"""The README's SST-2 table: every method by `recipes/run_glue.py`, the same steps and batches, several seeds.

    python benchmarks/sst2.py --model_name_or_path MODEL [--dataset_dir GLUE] [--jobs 2]

Each run is one command, printed as it starts; a run that is done is not repeated, and one that was interrupted goes on
from its last checkpoint. Writes `benchmarks/results/sst2.json` and prints the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "full precision": ("fp", [0]),
    "StoMPP, weights only (W1A32)": ("weights_only", [0]),
    "STE baseline (W1A1)": ("ste", [0, 1, 2]),
    "StoMPP, STE-free (W1A1)": ("stompp", [0]),
    "StoMPP + STE (W1A1)": ("stompp_ste", [0, 1, 2]),
}


def run(config: str, seed: int, flags: list[str], output: Path) -> dict[str, Any]:
    """One run of the recipe, or what it wrote when it ran before."""
    folder = output / f"{config}-{seed}"
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, "recipes/run_glue.py", f"recipes/configs/sst2_minilm_{config}.yaml"]
        command += ["--seed", str(seed), "--output_dir", str(folder), *flags]
        print(" ".join(command), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log", "w") as log:
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(results.read_text())


def row(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of the last row of each run's table: the packed, reloaded model where there is one."""
    scores = [100 * run["rows"][-1]["accuracy"] for run in runs]
    return {
        "method": method,
        "learning_rate": runs[0]["learning_rate"],
        "steps": runs[0]["steps"],
        "batch_size": runs[0]["batch_size"],
        "seeds": [run["seed"] for run in runs],
        "accuracy": scores,
        "latent_accuracy": [100 * run["rows"][0]["accuracy"] for run in runs],
        "bytes": runs[0]["rows"][-1]["bytes"],
        "train_seconds": [run["train_seconds"] for run in runs],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | learning rate | accuracy | each seed | file |", "|---|---|---|---|---|"]
    for row in rows:
        scores = row["accuracy"]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(
            f"| {row['method']} | {row['learning_rate']:g} | {statistics.mean(scores):.1f}{spread} | {each} "
            f"| {row['bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "sst2")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sst2.json")
    args, flags = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    # One seed of every method first: a table can be read off early.
    tasks = sorted(((seed, config) for config, seeds in METHODS.values() for seed in seeds), key=lambda task: task[0])
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(tasks, pool.map(lambda t: run(t[1], t[0], flags, args.work_dir), tasks), strict=True))
    rows = [row(method, [done[seed, config] for seed in seeds]) for method, (config, seeds) in METHODS.items()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
