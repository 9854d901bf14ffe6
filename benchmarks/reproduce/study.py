"""`Study`: what a YAML file says of the runs to make, and what they are compared by."""

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recipes.recipe_flags import as_flags

ROOT = Path(__file__).resolve().parents[2]
STUDIES = Path(__file__).parent / "studies"
_SHOWN = ("baseline", "plot", "needed", "dips", "ends", "facts", "curves")
_NEEDED = ("about", "recipe", "axes", "table")
_KEYS = {*_NEEDED, "config", "flags", "grids", "seeds", *_SHOWN}


@dataclass(frozen=True)
class Run:
    """One command: a recipe, its flags, and where it stands in the grid.

    Attributes:
        study (`str`): Name of the study.
        recipe (`str`): Name of the script in recipes/.
        config (`str`, *optional*): The recipe's YAML file, in recipes/configs.
        flags (`dict`): What goes over the file; the seed is among them.
        labels (`dict`): Axis → place on it.
    """

    study: str
    recipe: str
    config: str | None
    flags: dict[str, Any]
    labels: dict[str, str]

    @property
    def key(self) -> str:
        """Of all settings that the study gives: a run with others is another run.

        Labels are none, so that a row may be renamed; what the defaults are says the commit in the line of a run.
        """
        settings = [self.recipe, _content(self.config), self.flags]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def argv(self) -> list[str]:
        """The command line after the script's name, without its `--output_dir`."""
        words = [] if self.config is None else [f"recipes/configs/{self.config}.yaml"]
        for name, value in self.flags.items():
            words += as_flags(name, value)
        return words


def _content(config: str | None) -> Any:
    if config is None:
        return None
    path = ROOT / "recipes" / "configs" / f"{config}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"config: received {config!r}; allowed: the name of a file in recipes/configs.")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Study:
    """The runs of a YAML file.

    ```yaml
    about: One sentence.
    recipe: run_image_classification
    config: digits                      # of recipes/configs; also among the flags of a place
    flags: {max_steps: 600}             # of all runs
    axes:                               # axis → place → flags; the grid is their product
      depth: {4: {…}, 8: {…}}
      method: {STE: {progression: none}, StoMPP: {}}
    seeds: [0, 1, 2]
    grids: [{}, {depth: [8], seeds: [3], flags: {overlap: 2}}]   # optional: several, each of some of the places
    table: [method, depth]              # rows, columns
    baseline: {method: STE}             # optional: a second table, of the differences to it
    plot: {x: depth, lines: method}     # optional: a picture; `panels: AXIS` for one beside the other
    needed: {x: steps, of: 90}          # optional: the x at which that score, in percent, is reached
    facts: [adapter_bytes]              # optional: a table for each, of what else is in the lines
    dips: eval_accuracy                 # optional: a table of how far that fell, on the way, below what it had been
    ends: loss                          # optional: a table of what it was over the last sixth of the way
    curves: {y: loss, lines: method, panels: depth}     # optional: a picture of what was logged on the way
    ```

    Attributes:
        name, about (`str`): Of the study.
        runs (`tuple[Run, ...]`): All of them, those of the first seed first.
        axes (`dict[str, list[str]]`): Axis → its places.
        table, baseline, plot, needed, dips, ends, facts, curves: As in the file.
    """

    name: str
    about: str
    runs: tuple[Run, ...]
    axes: dict[str, list[str]]
    table: list[str]
    baseline: dict[str, str] | None
    plot: dict[str, Any] | None
    needed: dict[str, Any] | None
    dips: str | None
    ends: str | None
    facts: list[str] | None
    curves: dict[str, str] | None

    @classmethod
    def read(cls, name: str) -> "Study":
        """Reads `studies/NAME.yaml`, or the file `name`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: A key, an axis, or a place of one, is unknown; or two grids contradict each other.
        """
        path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in STUDIES.glob("*.yaml")))
            raise FileNotFoundError(f"study: received {name!r}; allowed: {known}, or the path of a YAML file.")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: it is no YAML ({' '.join(str(error).split())}).") from error
        missing = [key for key in _NEEDED if key not in (content or {})]
        if missing:
            raise ValueError(f"{path}: the key {missing[0]!r} is missing; a study has {', '.join(_NEEDED)}.")
        if not (ROOT / "recipes" / f"{content['recipe']}.py").is_file():
            known = ", ".join(sorted(each.stem for each in (ROOT / "recipes").glob("run_*.py")))
            raise ValueError(f"{path}: recipe is {content['recipe']!r}; allowed: {known}.")
        unknown = sorted(set(content) - _KEYS)
        if unknown:
            raise ValueError(f"{path}: received the key {unknown[0]!r}; allowed: {', '.join(sorted(_KEYS))}.")
        axes = {
            axis: {str(place): flags or {} for place, flags in each.items()} for axis, each in content["axes"].items()
        }
        runs = {}
        for grid in content.get("grids", [{}]):
            for run in _runs(path.stem, content, axes, dict(grid)):
                place = (*run.labels.values(), run.flags["seed"])
                if runs.setdefault(place, run).key != run.key:  # grids may overlap, but not contradict each other
                    raise ValueError(f"{path}: two grids have other flags for {run.labels}, seed {run.flags['seed']}.")
        ordered = sorted(runs.values(), key=lambda run: run.flags["seed"])
        places = {axis: list(each) for axis, each in axes.items()}
        optional = {key: content.get(key) for key in _SHOWN}
        _check_axes(path, content, axes)
        return cls(path.stem, content["about"], tuple(ordered), places, content["table"], **optional)


def _runs(name: str, content: dict[str, Any], axes: dict[str, dict[str, Any]], grid: dict[str, Any]) -> list[Run]:
    seeds, more = grid.pop("seeds", content.get("seeds", [0])), grid.pop("flags", {})
    chosen = {axis: [str(place) for place in grid.pop(axis, places)] for axis, places in axes.items()}
    if grid:
        known = ", ".join([*axes, "flags", "seeds"])
        raise ValueError(f"study {name}: a grid has the axis {next(iter(grid))!r}; allowed: {known}.")
    runs = []
    for places in product(*chosen.values(), seeds):
        labels, seed = dict(zip(chosen, places, strict=False)), places[-1]
        flags = dict(content.get("flags", {}))
        for axis, place in labels.items():
            if place not in axes[axis]:
                raise ValueError(
                    f"study {name}: the axis {axis!r} has no {place!r}; allowed: {', '.join(axes[axis])}."
                )
            flags.update(axes[axis][place])
        flags.update(more)
        config = flags.pop("config", content.get("config"))
        flags["seed"] = seed
        if flags.get("order") == "random":  # each seed has an order of its own
            flags["mask_seed"] = seed
        runs.append(Run(name, content["recipe"], config, flags, labels))
    return runs


def _check_axes(path: Path, content: dict[str, Any], axes: dict[str, Any]) -> None:
    """Before hours of runs, of which no report could be made."""
    named = {"table": content["table"], "baseline": content.get("baseline", {})}
    for part, keys in {"plot": ("x", "lines", "panels"), "curves": ("lines", "panels"), "needed": ("x",)}.items():
        named[part] = [content[part][key] for key in keys if key in content.get(part, {})]
    for part, names in named.items():
        for name in names:
            if name not in axes:
                raise ValueError(f"{path}: {part} names the axis {name!r}; allowed: {', '.join(axes)}.")
    for axis, place in content.get("baseline", {}).items():
        if place not in axes[axis]:
            raise ValueError(f"{path}: baseline is {axis} {place!r}; allowed: {', '.join(axes[axis])}.")
    if set(content["table"]) != set(axes):
        raise ValueError(f"{path}: table is {content['table']}; allowed: all axes, {', '.join(axes)}, in any order.")
