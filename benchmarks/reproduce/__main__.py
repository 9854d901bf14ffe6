"""Runs studies, and prints what came of them.

    python -m benchmarks.reproduce run depth weights_only --jobs 2
    python -m benchmarks.reproduce report depth
    python -m benchmarks.reproduce list

What is done is not done again: a study that was stopped goes on when its command is given again. Flags that are not
the runner's go to the recipe, as `--dataset_dir path/to/glue`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.reproduce.reporter import report
from benchmarks.reproduce.runner import RESULTS, run_study
from benchmarks.reproduce.study import ROOT, STUDIES, Study


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report", "list"])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="of benchmarks/reproduce/studies, or a YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's threads")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "reproduce", help="what the runs write to")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "list" or not arguments.studies:
        for path in sorted(STUDIES.glob("*.yaml")):
            study = Study.read(path.stem)
            print(f"{study.name:20} {len(study.runs):4} runs  {study.about.strip()}")
        return
    studies = [Study.read(name) for name in arguments.studies]
    for study in studies:
        results = arguments.results / f"{study.name}.jsonl"
        if arguments.command == "run":
            run_study(study, results, arguments.work_dir, arguments.jobs, _flags(rest))
        print(report(study, results))


def _flags(words: list[str]) -> dict[str, Any]:
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        sys.exit(f"error: received {' '.join(words)!r}; allowed: flags of the recipe as --name value.")
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


if __name__ == "__main__":
    main()
