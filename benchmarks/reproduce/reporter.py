"""Tables and pictures of what the runs of a study came to."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.reproduce.runner import read
from benchmarks.reproduce.study import Study

Place = tuple[str, ...]
Scores = dict[Place, dict[int, float]]
"""Place in the grid, in the order of the axes → seed → score in percent."""


def report(study: Study, results: Path) -> str:
    """The study's tables in Markdown; its picture is written beside the results."""
    scores, failed = collect(study, results)
    made = f"{sum(map(len, scores.values()))} of {len(study.runs)} runs"
    parts = [f"## {study.name}\n\n{study.about.strip()} {made}; final checkpoints, in percent."]
    parts += [f"{len(failed)} runs ended with an error, as: {failed[0]}"] if failed else []
    if scores:
        parts.append(table(study, scores))
        parts += [differences(study, scores)] if study.baseline else []
        parts += [needed(study, scores)] if study.needed else []
        if study.plot:
            draw(study, scores, results.with_suffix(".svg"))
    return "\n\n".join(parts) + "\n"


def collect(study: Study, results: Path) -> tuple[Scores, list[str]]:
    """The scores of the study's runs as its file has them now, and the errors of those that have none."""
    lines = {line["key"]: line for line in read(results)}  # the last line of a run that was made again
    scores: Scores = defaultdict(dict)
    failed = []
    for run in study.runs:
        line = lines.get(run.key)
        if line is None:
            continue
        if line["error"] is None:
            scores[tuple(run.labels[axis] for axis in study.axes)][run.flags["seed"]] = 100 * line["score"]
        else:
            failed.append(line["error"])
    return scores, failed


def table(study: Study, scores: Scores) -> str:
    """Means and standard deviations."""
    return _grid(study, {place: _cell(list(seeds.values())) for place, seeds in scores.items()})


def differences(study: Study, scores: Scores) -> str:
    """What each method has more than the baseline, of the same seed."""
    axis, baseline = next(iter(study.baseline.items()))
    index, cells = study.axes.index(axis), {}
    for place, seeds in scores.items():
        other = scores.get((*place[:index], baseline, *place[index + 1 :]), {})
        paired = [score - other[seed] for seed, score in seeds.items() if seed in other]
        if paired and place[index] != baseline:
            cells[place] = _cell(paired, sign="+")
    return f"Minus {baseline}, of the same seeds:\n\n{_grid(study, cells)}"


def needed(study: Study, scores: Scores) -> str:
    """Where, between places of an axis of numbers, the mean score reaches a level: interpolated over logarithms."""
    axis, level = study.needed["x"], study.needed["of"]
    index = study.axes.index(axis)
    lines: dict[Place, list[tuple[float, float]]] = defaultdict(list)
    for place, seeds in scores.items():
        others = (*place[:index], "", *place[index + 1 :])
        lines[others].append((float(place[index]), statistics.mean(seeds.values())))
    cells = {place: reached(sorted(points), level) for place, points in lines.items()}
    return f"{axis.capitalize()} needed for {level} %:\n\n{_grid(study, cells, without=axis)}"


def reached(points: Sequence[tuple[float, float]], level: float) -> str:
    """The first x at which a line through `points` is at `level`.

    Example:

        >>> reached([(100, 50.0), (400, 90.0)], 70)
        '200'
    """
    first, last = points[0], points[-1]
    if first[1] >= level:
        return f"< {first[0]:g}"
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y >= level:
            return f"{math.exp(math.log(x) + (level - y) / (next_y - y) * math.log(next_x / x)):.0f}"
    return f"> {last[0]:g}"


def _cell(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def _grid(study: Study, cells: Mapping[Place, str], without: str | None = None) -> str:
    """A Markdown table: a row for each place of the first axis of `study.table`, a column for those of the others."""
    row_axis, *column_axes = (axis for axis in study.table if axis != without)
    rows: dict[str, dict[Place, str]] = defaultdict(dict)
    columns: dict[Place, None] = {}
    for run in study.runs:  # in the order of the file
        columns.setdefault(tuple(run.labels[axis] for axis in column_axes))
        rows[run.labels[row_axis]]
    for place, cell in cells.items():
        labels = dict(zip(study.axes, place, strict=True))
        rows[labels[row_axis]][tuple(labels[axis] for axis in column_axes)] = cell
    names = [", ".join(f"{axis} {name}" for axis, name in zip(column_axes, column, strict=True)) for column in columns]
    lines = [["", *(names if column_axes else ["score"])], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items() if row]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(study: Study, scores: Scores, path: Path) -> None:
    """Mean scores over an axis of numbers, a line for each place of another, a panel for each of a third."""
    from matplotlib.figure import Figure  # for those who want pictures alone

    x_axis, line_axis, panel_axis = (study.plot.get(part) for part in ("x", "lines", "panels"))
    places = [dict(zip(study.axes, place, strict=True)) for place in scores]
    panels = list(dict.fromkeys(labels[panel_axis] for labels in places)) if panel_axis else [""]
    names = list(dict.fromkeys(run.labels[line_axis] for run in study.runs))
    figure = Figure(figsize=(3.2 * len(panels) + 1, 3.6), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        for number, name in enumerate(names):
            chosen = [
                (float(labels[x_axis]), list(seeds.values()))
                for labels, seeds in zip(places, scores.values(), strict=True)
                if labels[line_axis] == name and (not panel_axis or labels[panel_axis] == panel)
            ]
            if chosen:
                xs, values = zip(*sorted(chosen), strict=True)
                means = [statistics.mean(each) for each in values]
                spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                axes.errorbar(xs, means, spread, label=name, color=f"C{number}", marker="o", markersize=4, capsize=2)
        axes.set_xscale("log", base=2)
        ticks = sorted({float(labels[x_axis]) for labels in places})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(x_axis)
        axes.set_title(f"{panel_axis} {panel}" if panel_axis else study.name, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("score, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
