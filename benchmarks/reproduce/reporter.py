"""Tables and pictures of what the runs of a study came to."""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduce.runner import read
from benchmarks.reproduce.study import Study

Place = tuple[str, ...]
Lines = dict[Place, dict[int, Any]]
"""Place in the grid, in the order of the axes → seed → the line of the run."""
Scores = dict[Place, dict[int, float]]
"""The same, of scores times 100."""


def report(study: Study, results: Path) -> str:
    """The study's tables, in Markdown."""
    lines, failed = collect(study, results)
    scores = _scores(lines)
    made = f"{sum(map(len, scores.values()))} of {len(study.runs)} runs"
    head = f"## {study.name}\n\n{study.about.strip()} {made}; final checkpoints, times 100, ± deviation of seeds."
    parts = [head]
    parts += [f"{len(failed)} runs ended with an error, as: {failed[0]}"] if failed else []
    if scores:
        parts.append(table(study, scores, collapsed(lines)))
        parts += [differences(study, scores)] if study.baseline else []
        parts += [needed(study, scores)] if study.needed else []
        parts += [dips(study, lines)] if study.dips else []
        parts += [ends(study, lines)] if study.ends else []
        parts += [facts(study, lines, name) for name in study.facts or ()]
    return "\n\n".join(parts) + "\n"


def draw_all(study: Study, results: Path) -> list[Path]:
    """The study's pictures, beside the results."""
    lines, _ = collect(study, results)
    pictures = []
    if lines and study.plot:
        pictures.append(results.with_suffix(".svg"))
        draw(study, _scores(lines), pictures[-1])
    if lines and study.curves:
        pictures.append(results.with_name(f"{results.stem}_curves.svg"))
        draw_curves(study, lines, pictures[-1])
    return pictures


def _scores(lines: Lines) -> Scores:
    return {place: {seed: 100 * line["score"] for seed, line in runs.items()} for place, runs in lines.items()}


def collect(study: Study, results: Path) -> tuple[Lines, list[str]]:
    """The lines of the study's runs as its file has them now, and the errors of those that have no score."""
    found = {line["key"]: line for line in read(results)}  # the last line of a run that was made again
    lines: Lines = defaultdict(dict)
    failed = []
    for run in study.runs:
        line = found.get(run.key)
        if line is None:
            continue
        if line["error"] is None:
            lines[tuple(run.labels[axis] for axis in study.axes)][run.flags["seed"]] = line
        else:
            failed.append(line["error"])
    return lines, failed


def collapsed(lines: Lines) -> dict[Place, int]:
    """Of how many seeds the model says the same of everything."""
    return {place: sum(bool(line.get("collapsed")) for line in runs.values()) for place, runs in lines.items()}


def table(study: Study, scores: Scores, constant: Mapping[Place, int]) -> str:
    """Means and standard deviations; of how many seeds, where some have no score; and how many have collapsed."""
    seeds = Counter(tuple(run.labels[axis] for axis in study.axes) for run in study.runs)
    cells = {}
    for place, values in scores.items():
        missing = f" ({len(values)} of {seeds[place]})" if len(values) < seeds[place] else ""
        fallen = f" ({constant[place]} collapsed)" if constant[place] else ""
        cells[place] = _cell(list(values.values())) + missing + fallen
    return _grid(study, cells)


def differences(study: Study, scores: Scores) -> str:
    """What each method has more than the baseline, of the same seed."""
    axis, baseline = next(iter(study.baseline.items()))
    index, cells = list(study.axes).index(axis), {}
    for place, seeds in scores.items():
        other = scores.get((*place[:index], baseline, *place[index + 1 :]), {})
        paired = [score - other[seed] for seed, score in seeds.items() if seed in other]
        if paired and place[index] != baseline:
            cells[place] = _cell(paired, sign="+")
    return f"Minus {baseline}, of the same seeds:\n\n{_grid(study, cells)}"


def needed(study: Study, scores: Scores) -> str:
    """Where, between places of an axis of numbers, the score reaches a level: of each seed, then their mean."""
    axis, level = study.needed["x"], study.needed["of"]
    index = list(study.axes).index(axis)
    lines: dict[Place, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for place, seeds in scores.items():
        others = (*place[:index], "", *place[index + 1 :])
        for seed, score in seeds.items():
            lines[others][seed].append((float(place[index]), score))
    ends = sorted(float(place) for place in study.axes[axis])
    cells = {}
    for place, of_seeds in lines.items():
        if all(len(points) > 1 for points in of_seeds.values()):
            cells[place] = _reached_cell([reached(sorted(points), level) for points in of_seeds.values()], ends)
    return f"{axis.capitalize()} needed for {level} %:\n\n{_grid(study, cells, without=axis)}"


def reached(points: Sequence[tuple[float, float]], level: float) -> float:
    """The first x at which a line through `points`, over the logarithm of x, is at `level`; infinity if nowhere.

    Example:

        >>> round(reached([(100, 50.0), (400, 90.0)], 70))
        200
    """
    if points[0][1] >= level:
        return points[0][0]
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y >= level:
            return math.exp(math.log(x) + (level - y) / (next_y - y) * math.log(next_x / x))
    return math.inf


def _reached_cell(values: list[float], ends: list[float]) -> str:
    whole = [value for value in values if math.isfinite(value)]
    if len(whole) < len(values):
        return f"> {ends[-1]:g}" + (f" ({len(values) - len(whole)} of {len(values)})" if whole else "")
    if max(whole) <= ends[0]:
        return f"≤ {ends[0]:g}"
    return f"{statistics.mean(whole):.0f}" + (f" ± {statistics.stdev(whole):.0f}" if len(whole) > 1 else "")


def facts(study: Study, lines: Lines, name: str) -> str:
    """Of each place, the mean of something else than the score; nothing where no line has it."""
    cells = {}
    for place, runs in lines.items():
        values = [line[name] for line in runs.values() if line.get(name) is not None]
        if values:
            mean = statistics.mean(values)
            cells[place] = f"{100 * mean:.1f}" if name.endswith("score") else f"{mean:,.0f}"
    return f"{name.replace('_', ' ').capitalize()}:\n\n{_grid(study, cells)}"


def dips(study: Study, lines: Lines) -> str:
    """How far a score fell, on the way, below the best that it had been before."""
    cells = {
        place: _cell([dip(line["curve"] or [], study.dips) for line in runs.values()]) for place, runs in lines.items()
    }
    return f"The largest fall of {study.dips.removeprefix('eval_')} on the way:\n\n{_grid(study, cells)}"


def dip(curve: Sequence[Mapping[str, float]], key: str) -> float:
    """In percent.

    Example:

        >>> round(dip([{"a": 0.2}, {"a": 0.8}, {"loss": 1}, {"a": 0.5}, {"a": 0.9}], "a"))
        30
    """
    values = [entry[key] for entry in curve if key in entry]
    falls = (best - value for best, value in zip(itertools.accumulate(values, max), values, strict=True))
    return 100 * max(falls, default=math.nan)


def ends(study: Study, lines: Lines) -> str:
    """What was logged at the end: less a matter of chance than a score is, where many rows are behind it."""
    cells = {
        place: _cell([end(line["curve"] or [], study.ends) for line in runs.values()], digits=3)
        for place, runs in lines.items()
    }
    return f"{study.ends.capitalize()}, the mean of the last sixth of the steps:\n\n{_grid(study, cells)}"


def end(curve: Sequence[Mapping[str, float]], key: str) -> float:
    """The mean of the last sixth of what was logged.

    Example:

        >>> end([{"a": 9.0}] * 10 + [{"b": 1}, {"a": 2.0}, {"a": 4.0}], "a")
        3.0
    """
    values = [entry[key] for entry in curve if key in entry]
    return statistics.mean(values[-max(1, len(values) // 6) :]) if values else math.nan


def _cell(values: list[float], sign: str = "", digits: int = 1) -> str:
    """Mean and deviation of what there is: not every run logs everything."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{sign}.{digits}f}{spread}"


def _grid(study: Study, cells: Mapping[Place, str], without: str | None = None) -> str:
    """A Markdown table: a row for each place of the first axis of `study.table`, a column for those of the others."""
    row_axis, *column_axes = (axis for axis in study.table if axis != without)
    used = {tuple(run.labels[axis] for axis in column_axes) for run in study.runs}
    columns = [column for column in itertools.product(*(study.axes[axis] for axis in column_axes)) if column in used]
    rows: dict[str, dict[Place, str]] = {name: {} for name in study.axes[row_axis]}
    for place, cell in cells.items():
        labels = dict(zip(study.axes, place, strict=True))
        rows[labels[row_axis]][tuple(labels[axis] for axis in column_axes)] = cell
    names = [", ".join(f"{axis} {name}" for axis, name in zip(column_axes, column, strict=True)) for column in columns]
    lines = [["", *(names if column_axes else ["score"])], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items() if row]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(study: Study, scores: Scores, path: Path) -> None:
    """Mean scores over an axis of numbers, a line for each place of another, a panel for each of a third."""
    index = list(study.axes).index(study.plot["x"])
    figure, panels = _panels(study, study.plot, list(scores))
    for axes, chosen in panels:
        for number, (name, places) in chosen:
            points = sorted((float(place[index]), list(scores[place].values())) for place in places)
            means = [statistics.mean(values) for _, values in points]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar([x for x, _ in points], means, spread, label=name, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({float(place[index]) for place in scores})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(study.plot["x"])
    figure.axes[0].set_ylabel("score, %")
    _save(figure, path)


def draw_curves(study: Study, lines: Lines, path: Path) -> None:
    """What was logged over the steps of the runs, averaged over seeds."""
    key = study.curves["y"]
    figure, panels = _panels(study, study.curves, list(lines))
    for axes, chosen in panels:
        for number, (name, places) in chosen:
            logged: dict[int, list[float]] = defaultdict(list)
            for line in (line for place in places for line in lines[place].values()):
                for entry in line["curve"] or []:
                    if key in entry:
                        logged[entry["step"]].append(entry[key])
            means = [statistics.mean(values) for _, values in sorted(logged.items())]
            axes.plot(sorted(logged), means, label=name, color=f"C{number}", linewidth=1.2)
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel(key.replace("eval_", ""))
    _save(figure, path)


def _panels(study: Study, chosen: Mapping[str, str], places: Sequence[Place]) -> tuple[Any, list[Any]]:
    """A figure; and for each of its panels the axes, and the places of each line with its name and number."""
    from matplotlib.figure import Figure  # for those who want pictures alone

    line_axis = list(study.axes).index(chosen["lines"])
    panel_axis = list(study.axes).index(chosen["panels"]) if "panels" in chosen else None
    names = study.axes[chosen["lines"]]
    titles = [study.name] if panel_axis is None else list(dict.fromkeys(place[panel_axis] for place in places))
    figure = Figure(figsize=(3.2 * len(titles) + 1, 3.6), layout="constrained")
    panels = []
    for title, axes in zip(titles, figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], strict=True):
        here = [place for place in places if panel_axis is None or place[panel_axis] == title]
        lines = [(name, [place for place in here if place[line_axis] == name]) for name in names]
        panels.append((axes, [(number, line) for number, line in enumerate(lines) if line[1]]))
        axes.set_title(title if panel_axis is None else f"{chosen['panels']} {title}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    drawn = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    for axes in figure.axes[1:]:
        drawn |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with rc_context({"svg.hashsalt": path.name}):  # the same file of the same results
        figure.savefig(path, metadata={"Date": None})
