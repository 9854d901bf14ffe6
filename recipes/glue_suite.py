r"""Train a model on several GLUE tasks with several seeds, and write a table of means and a card for each task.

    python recipes/glue_suite.py recipes/configs/glue_minilm_w1a1.yaml \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --output_dir out/glue

The suite is a YAML file:

    flags: {…}                          # of run_glue.py, for all runs
    seeds: [0, 1, 2]
    teacher: {binarize: false, …}       # optional: over them, for a run of each task that all others start from and
                                        # learn from
    tasks:
      sst2: {flags: {max_steps: 600}, teacher: {max_steps: 1800}}      # over those, for this task

What stands behind the file on the command line is for `run_glue.py` too, and wins; but `--tasks` and `--seeds`, which
make some of the suite's runs. Each run has a folder, `OUTPUT_DIR/TASK/seed-N`, with `recipe.yaml`, by which
`run_glue.py` makes it again. The same command again goes on where it was: what is finished is not made again, what was
killed goes on from its last checkpoint. Scores are those of final checkpoints, of packed models where they are binary.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import TrainingArguments
from transformers.utils import logging

from glue_tasks import HUB_ID, get_task
from hf_stompp import BinarizationConfig, model_card
from hf_stompp.checkpoint import write_json
from hf_stompp.results import COLLAPSED, hub_id, markdown_table
from recipe_flags import as_flags, check_keys, given_flags, parse_recipe
from recipe_utils import publishable
from run_glue import RecipeArguments, check
from run_glue import main as run_glue

TYPES = (RecipeArguments, BinarizationConfig, TrainingArguments)
APART = ("dataset_dir", "disable_tqdm", "report_to", "logging_steps", "save_steps", "save_total_limit", "output_dir")
"""Flags that no score depends on, and that may change while a suite goes on."""
TEACHER = "teacher"
OF_TEACHING = ("teacher", "cache_teacher", "temperature", "logits_weight", "hidden_weight", "labels_weight")
"""Flags that a run without a teacher does not take."""


class Run(NamedTuple):
    """A run of `run_glue.py`: its place in the table, its folder, and its flags."""

    task: str
    name: str
    folder: Path
    flags: dict[str, Any]

    @property
    def argv(self) -> list[str]:
        """What `run_glue.py` takes."""
        words = [word for name, value in self.flags.items() for word in as_flags(name, value)]
        return [*words, "--output_dir", str(self.folder)]

    def of(self, seeds: Sequence[int] | None) -> bool:
        """Whether it is one of these seeds, or a teacher; of any, if none are given."""
        return seeds is None or self.name == TEACHER or self.flags["seed"] in seeds

    @property
    def results(self) -> dict[str, Any] | None:
        """What it has written, if it has ended."""
        path = self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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
    parser.add_argument("suite", help="a YAML file, as those in recipes/configs that begin with glue_")
    parser.add_argument("--output_dir", required=True, help="where the runs, the table and the results go")
    parser.add_argument("--tasks", nargs="+", help="some of the suite's tasks")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the suite's seeds")
    parser.add_argument("--cards", help="a folder for a model card of each task")
    asked, words = parser.parse_known_args(argv)
    parse_recipe(words, TYPES)  # refuses what is no flag
    return asked, given_flags(words, TYPES)


def read_suite(path: str) -> dict[str, Any]:
    """The file's content, with nothing missing.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A key or a task is unknown, or a value is of the wrong kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"suite: there is no file {path!r}. Pass one of recipes/configs/glue_*.yaml.")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    content = _mapping(path, content, ("flags", "seeds", TEACHER, "tasks"))
    seeds: Any = content.get("seeds")
    tasks = _mapping(f"{path}, tasks", content.get("tasks"))
    numbers = isinstance(seeds, list) and len(seeds) > 0 and all(type(seed) is int for seed in seeds)
    if not numbers or len(set(seeds)) != len(seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; allowed: a list of different whole numbers, as [0, 1, 2].")
    if not tasks:
        raise ValueError(f"{path}: it has no tasks. Write them into it, as tasks: {{sst2: }}.")
    parts = {path: content}
    for task, own in tasks.items():
        get_task(task)
        parts[f"{path}, tasks.{task}"] = tasks[task] = _mapping(f"{path}, tasks.{task}", own, ("flags", TEACHER))
        if TEACHER in tasks[task] and TEACHER not in content:
            raise ValueError(f"{path}: tasks.{task} has a {TEACHER}, and the suite has none. Give it `{TEACHER}:`.")
    for where, part in parts.items():
        for key in ("flags", TEACHER):
            if key in part:
                part[key] = _mapping(f"{where}, {key}", part[key])
                check_keys(f"{where}, {key}", part[key], TYPES)
    return {"flags": {}, **content, "tasks": tasks}


def _mapping(where: str, value: Any, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    """A mapping, as it is; an empty one for nothing."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{where}: received {value!r}; allowed: a mapping.")
    for key in value or {}:
        if allowed is not None and key not in allowed:
            raise ValueError(f"{where}: received the key {key!r}; allowed: {', '.join(allowed)}.")
    return dict(value or {})


def check_choice(suite: dict[str, Any], tasks: Sequence[str] | None, seeds: Sequence[int] | None) -> None:
    """Refuses to make runs that the suite has not, and whose scores would be left out of its table."""
    for name, given, known in (("tasks", tasks, list(suite["tasks"])), ("seeds", seeds, suite["seeds"])):
        for value in given or []:
            if value not in known:
                raise ValueError(
                    f"{name}: received {value!r}; allowed: {', '.join(map(str, known))}, as in the suite."
                )


def plan(suite: dict[str, Any], folder: Path, more: dict[str, Any]) -> list[Run]:
    """The runs in order, each with all of its flags; refuses one that `run_glue.py` would."""
    runs = []
    for task, own in suite["tasks"].items():
        flags = {"do_train": True, **suite["flags"], **own.get("flags", {}), **more, "task_name": task}
        if TEACHER in suite:
            where = folder / task / TEACHER
            plain = {name: value for name, value in flags.items() if name not in OF_TEACHING}
            of_teacher = {"binarize": False, **suite[TEACHER], **own.get(TEACHER, {}), **more}
            runs.append(
                Run(task, TEACHER, where, plain | {k: v for k, v in of_teacher.items() if k not in OF_TEACHING})
            )
            flags |= {"model_name_or_path": str(where), "teacher": str(where)}
        runs += [Run(task, f"seed-{n}", folder / task / f"seed-{n}", flags | {"seed": n}) for n in suite["seeds"]]
    for run in runs:
        recipe, _, args = parse_recipe(run.argv, TYPES)
        check(recipe, args)
    return runs


def check_recipe(run: Run) -> None:
    """Refuses a folder that holds another run than is planned for it.

    Raises:
        ValueError: Its recipe has other settings.
    """
    path = run.folder / "recipe.yaml"
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else run.flags
    changed = sorted(k for k in {**before, **run.flags} if k not in APART and before.get(k) != run.flags.get(k))
    if changed:
        what = ", ".join(f"{key} was {before.get(key)!r}, and is {run.flags.get(key)!r}" for key in changed)
        raise ValueError(
            f"{run.folder} holds a run that was made otherwise (None where nothing was given): {what}. Give the same "
            "again, pass another --output_dir, or delete the folder to make it anew."
        )


def write_recipe(run: Run) -> None:
    """Into its folder, in one step: what `run_glue.py` makes it again by."""
    run.folder.mkdir(parents=True, exist_ok=True)
    draft = run.folder / "recipe.yaml.draft"
    draft.write_text(yaml.safe_dump(run.flags, sort_keys=False), encoding="utf-8")
    draft.replace(run.folder / "recipe.yaml")


def report(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Writes `results.json` and `table.md` of the runs that have ended; returns what is in the former."""
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.results is not None:
            row = run.results["rows"][-1]
            named = {"score": score_of(run.task, row), "collapsed": row["model"].endswith(COLLAPSED)}
            scores.setdefault(run.task, {})[run.name] = named | {"bytes": row["bytes"]}
    tasks = {task: summarized(task, ended) for task, ended in scores.items()}
    results = {"tasks": tasks, "runs": scores, "of": len(runs)}
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(as_table(results), encoding="utf-8")
    return results


def score_of(task: str, row: dict[str, Any]) -> float:
    """What a task is quoted by, of MNLI the mean over its two splits."""
    return statistics.fmean(value for key, value in row.items() if key.endswith(get_task(task).metric))


def summarized(task: str, ended: dict[str, dict[str, Any]]) -> dict[str, Any]:
    seeds = [one for name, one in ended.items() if name != TEACHER]
    scores = [one["score"] for one in seeds]
    return {
        "metric": get_task(task).metric,
        "full_precision": ended[TEACHER]["score"] if TEACHER in ended else None,
        "mean": statistics.fmean(scores) if scores else None,
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": len(scores),
        "collapsed": sum(one["collapsed"] for one in seeds),
    }


def as_table(results: dict[str, Any]) -> str:
    """A row for each task, in percent; below it the mean of the tasks."""
    lines = []
    for task, one in results["tasks"].items():
        spread = "" if one["standard_deviation"] is None else f" ± {100 * one['standard_deviation']:.1f}"
        mean = "" if one["mean"] is None else f"{100 * one['mean']:.1f}{spread}"
        mark = f"{COLLAPSED} {one['collapsed']} of {one['seeds']}" if one["collapsed"] else ""
        lines.append([task, one["metric"], _percent(one["full_precision"]), mean + mark, str(one["seeds"])])
    means = [_mean([one[key] for one in results["tasks"].values()]) for key in ("full_precision", "mean")]
    lines.append(["mean", "", *map(_percent, means), ""])
    ended = sum(map(len, results["runs"].values()))
    table = markdown_table(["task", "metric", "full precision", "mean ± standard deviation", "seeds"], lines)
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
