"""The runs of a suite: what its YAML file says, which runs that makes, and what is in their folders already."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import TrainingArguments

from glue_tasks import get_task
from hf_stompp import BinarizationConfig
from recipe_flags import as_flags, check_keys, hint, load_yaml, parse_recipe
from run_glue import OF_TEACHING, RecipeArguments, check

TYPES = (RecipeArguments, BinarizationConfig, TrainingArguments)
APART = ("dataset_dir", "disable_tqdm", "report_to", "logging_steps", "save_steps", "save_total_limit", "output_dir")
"""Flags that no score depends on, and that may change while a suite goes on."""
TEACHER = "teacher"


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


def read_suite(path: str) -> dict[str, Any]:
    """The file's content, with nothing missing.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A key or a task is unknown, or a value is of the wrong kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"suite: there is no file {path!r}. Pass one of recipes/suites/glue_*.yaml.")
    content = load_yaml(Path(path))
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
            raise ValueError(
                f"{where}: received the key {key!r}; allowed: {', '.join(allowed)}. {hint(str(key), allowed)} What is "
                "for all runs belongs under `flags:`."
            )
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
            if flags.get(TEACHER):
                raise ValueError(
                    f"{TEACHER}: received {flags[TEACHER]!r}, but the suite makes a teacher for each task. Drop the "
                    f"flag, or the suite's `{TEACHER}:`."
                )
            where = folder / task / TEACHER
            of_teacher = {**flags, **suite[TEACHER], **own.get(TEACHER, {}), **more, "binarize": False}
            of_teacher = {name: value for name, value in of_teacher.items() if name not in OF_TEACHING}
            runs.append(Run(task, TEACHER, where, of_teacher))
            flags |= {"model_name_or_path": str(where), TEACHER: str(where)}
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
