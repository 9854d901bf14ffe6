r"""Train a model on several GLUE tasks with several seeds, and write a table of means and a card for each task.

    python recipes/glue_suite.py recipes/suites/glue_minilm_w1a1.yaml \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --output_dir out/glue

The suite is a YAML file:

    flags: {…}                          # of run_glue.py, for all runs
    seeds: [0, 1, 2]
    teacher: {learning_rate: 1e-4}      # optional: over them, for a run of each task in full precision, which all
                                        # others start from and learn from
    tasks:
      sst2: {flags: {max_steps: 600}, teacher: {max_steps: 1800}}      # over those, for this task

What stands behind the file on the command line is for `run_glue.py` too, and wins; but `--tasks` and `--seeds`, which
make some of the suite's runs. Each run has a folder, `OUTPUT_DIR/TASK/seed-N`, with `recipe.yaml`, by which
`run_glue.py` makes it again. The same command again goes on where it was: what is finished is not made again, what was
killed goes on from its last checkpoint. Scores are those of final checkpoints, of packed models where they are binary.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from glue_tasks import HUB_ID, get_task
from hf_stompp import model_card
from hf_stompp.checkpoint import write_json
from hf_stompp.results import COLLAPSED, hub_id, markdown_table
from recipe_flags import given_flags, parse_recipe
from recipe_utils import publishable
from run_glue import main as run_glue
from suite_plan import TEACHER, TYPES, Run, check_choice, check_recipe, plan, read_suite, write_recipe


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the runs that are missing; returns what it writes to `OUTPUT_DIR/results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    asked, more = parse(argv)
    suite = read_suite(asked.suite)
    check_choice(suite, asked.tasks, asked.seeds)
    folder = Path(asked.output_dir)
    runs = plan(suite, folder, more)
    chosen = [run for run in runs if run.task in (asked.tasks or suite["tasks"]) and run.of(asked.seeds)]
    for run in runs:
        check_recipe(run)
    writes = os.environ.get("RANK", "0") == "0"  # of several processes one does
    results: dict[str, Any] = {}
    for run in logging.tqdm(chosen, desc="Runs", disable=not writes):
        if run.results is None:
            print(f"{run.task}, {run.name}: {run.folder}")
            if writes:
                write_recipe(run)
            run_glue(run.argv)
        if writes:
            results = report(runs, folder)
    if writes:
        for task in suite["tasks"]:
            write_card([run for run in runs if run.task == task and run.results is not None], asked.cards)
        print((folder / "table.md").read_text(encoding="utf-8"))
    return results


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The suite's own flags, and what is for all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="a YAML file, as those in recipes/suites")
    parser.add_argument("--output_dir", required=True, help="where the runs, the table and the results go")
    parser.add_argument("--tasks", nargs="+", help="some of the suite's tasks")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the suite's seeds")
    parser.add_argument("--cards", help="a folder for a model card of each task")
    asked, words = parser.parse_known_args(argv)
    parse_recipe(words, TYPES)  # refuses what is no flag
    return asked, given_flags(words, TYPES)


def report(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Writes `results.json` and `table.md` of the runs that have ended; returns what is in the former."""
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.results is not None:
            row = run.results["rows"][-1]
            scores.setdefault(run.task, {})[run.name] = {
                "score": score_of(run.task, row),
                "collapsed": row["model"].endswith(COLLAPSED),
                "bytes": row["bytes"],
                "steps": run.results["steps"],
            }
    tasks = {task: summarized(task, ended) for task, ended in scores.items()}
    results = {"tasks": tasks, "runs": scores, "of": len(runs)}
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(as_table(results), encoding="utf-8")
    return results


def score_of(task: str, row: dict[str, Any]) -> float:
    """What a task is quoted by, of MNLI the mean over its two splits."""
    return statistics.fmean(value for key, value in row.items() if key.endswith(get_task(task).metric))


def summarized(task: str, ended: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds that have ended."""
    seeds = [one for name, one in ended.items() if name != TEACHER]
    scores = [one["score"] for one in seeds]
    teacher = ended.get(TEACHER, {"score": None, "collapsed": False})
    return {
        "metric": get_task(task).metric,
        "full_precision": teacher["score"],
        "full_precision_collapsed": teacher["collapsed"],
        "mean": statistics.fmean(scores) if scores else None,
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": len(scores),
        "collapsed": sum(one["collapsed"] for one in seeds),
        "steps": seeds[0]["steps"] if seeds else None,
        "bytes": seeds[0]["bytes"] if seeds else None,
    }


def as_table(results: dict[str, Any]) -> str:
    """A row for each task, in percent; below it the mean of the tasks."""
    lines = []
    for task, one in results["tasks"].items():
        spread = "" if one["standard_deviation"] is None else f" ± {100 * one['standard_deviation']:.1f}"
        mean = "" if one["mean"] is None else f"{100 * one['mean']:.1f}{spread}"
        mean += f" ({one['collapsed']} of {one['seeds']} collapsed)" if one["collapsed"] else ""
        above = _percent(one["full_precision"]) + (COLLAPSED if one["full_precision_collapsed"] else "")
        size = "" if one["bytes"] is None else f"{one['bytes'] / 1e6:.1f}"
        lines.append([task, one["metric"], above, mean, str(one["seeds"]), f"{one['steps'] or ''}", size])
    means = [_mean([one[key] for one in results["tasks"].values()]) for key in ("full_precision", "mean")]
    lines.append(["mean", "", *map(_percent, means), "", "", ""])
    ended = sum(map(len, results["runs"].values()))
    header = ["task", "metric", "full precision", "mean ± standard deviation", "seeds", "steps", "MB"]
    table = markdown_table(header, lines)
    return table + ("\n" if ended == results["of"] else f"\n\n{ended} of {results['of']} runs have ended.\n")


def _mean(scores: Sequence[float | None]) -> float | None:
    """Of tasks, if all have a score."""
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known and len(known) == len(scores) else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def write_card(runs: Sequence[Run], cards: str | None) -> None:
    """The card of the packed model of the first seed, beside the teacher and the other seeds that have ended: in its
    folder, and as `CARDS/TASK.md`."""
    first = next((run for run in runs if run.name != TEACHER), None)
    packed = first and first.folder / "packed"
    if first is None or packed is None or not packed.is_dir():  # of full precision, or of weights that never freeze
        return
    named = {"full precision" if run.name == TEACHER else run.name.replace("-", " "): run for run in runs}
    compared = {name: run.results for name, run in named.items() if run is not first and run.results}
    card = model_card(
        packed,
        results=first.results,
        compared=compared,
        dataset=HUB_ID,
        base_model=hub_id(runs[0].flags.get("model_name_or_path")),
        command=publishable(["recipes/run_glue.py", *first.argv]),
    )
    card.save(packed / "README.md")
    if cards is not None:
        Path(cards).mkdir(parents=True, exist_ok=True)
        card.save(Path(cards) / f"{first.task}.md")


if __name__ == "__main__":
    main()
