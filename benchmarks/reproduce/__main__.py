"""Runs studies, and prints what came of them.

    python -m benchmarks.reproduce list
    python -m benchmarks.reproduce run weights_only_plain --jobs 2
    python -m benchmarks.reproduce report depth_plain

`report` shows the results that came with this repository, unless `--results` says otherwise. `run` makes runs of your
own: what is done is not done again, so that a study that was stopped goes on when its command is given again. Flags of
`run` that are not the runner's go to the recipe, as `--dataset_dir path/to/glue`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.reproduce.reporter import draw_all, report
from benchmarks.reproduce.runner import RESULTS, run_study
from benchmarks.reproduce.study import ROOT, STUDIES, Study


def main() -> None:
    try:
        _main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with what is missing")


def _main() -> None:
    arguments, rest = _parser().parse_known_args()
    if arguments.command == "list":
        for path in sorted(STUDIES.glob("*.yaml")):
            study = Study.read(path.stem)
            print(f"{study.name:20} {len(study.runs):4} runs  {study.about.strip()}")
        return
    flags = _flags(rest)
    if flags and arguments.command == "report":
        sys.exit(f"error: received --{next(iter(flags))}; allowed: --results alone.")
    for study in [Study.read(name) for name in arguments.studies]:
        results = arguments.results.resolve() / f"{study.name}.jsonl"
        if arguments.command == "run":
            run_study(study, results, arguments.work_dir.resolve(), arguments.jobs, flags)
        if not results.exists():
            raise FileNotFoundError(
                f"results: there is no {results}. `run {study.name}` makes one in out/reproduce, which `report "
                f"{study.name} --results out/reproduce` shows."
            )
        print(report(study, results))
        for picture in draw_all(study, results):
            print(picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the studies")
    run = commands.add_parser("run", help="make the runs that are missing, then report")
    show = commands.add_parser("report", help="tables, and pictures beside the results")
    out = ROOT / "out" / "reproduce"
    for command, results in ((run, out), (show, RESULTS)):
        command.add_argument("studies", nargs="+", metavar="STUDY", help="a name of `list`, or a YAML file")
        command.add_argument("--results", type=Path, default=results, help="folder of the JSON lines (%(default)s)")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's threads")
    run.add_argument("--work_dir", type=Path, default=out, help="what the runs write to (%(default)s)")
    return parser


def _flags(words: list[str]) -> dict[str, Any]:
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        sys.exit(f"error: received {' '.join(words)!r}; allowed: flags of the recipe as --name value.")
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    # Runs work in the root of the repository.
    return {name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in flags.items()}


if __name__ == "__main__":
    main()
