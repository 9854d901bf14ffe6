"""How much of each unit is frozen when: pure functions of the step, without torch modules or state."""

import math
from collections.abc import Sequence

import numpy as np

from hf_stompp.masks import keyed_generator

CURVES = {
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
    "cubic": lambda s: 1 - (1 - s) ** 3,
}
"""The rise of the frozen fraction inside a window; `cubic` starts fast and settles slowly (Zhu and Gupta, 2017)."""


def progress(step: int, max_steps: int, start: float, end: float) -> float:
    r"""Progress of the progression, \\(s = (\text{step}/\text{max\_steps} - \text{start}) / (\text{end} -
    \text{start})\\), held in [0, 1].

    `step` counts the optimizer steps including the one being taken, so the last step of training has
    `step == max_steps`. `start` and `end` are fractions of training; where they
    are equal, progress is a jump from 0 to 1.

    Example:

        >>> progress(60, 100, start=0.1, end=0.6)
        1.0
    """
    fraction = step / max_steps
    if fraction >= end:
        return 1.0
    if fraction <= start:
        return 0.0
    return (fraction - start) / (end - start)


def ranks(n: int, order: str, seed: int) -> list[int]:
    """When each of `n` units has its turn: `ranks[i]` is the place of unit `i`, from 0, in the given order."""
    if order == "forward":
        return list(range(n))
    if order == "reverse":
        return list(range(n - 1, -1, -1))
    # The raw stream of a keyed bit generator is stable across numpy versions; `Generator.permutation` is not.
    return [int(rank) for rank in np.argsort(np.argsort(keyed_generator(seed, "order").random_raw(n)))]


def window(rank: int, n: int, overlap: float) -> tuple[float, float]:
    """Start and width, in progress, of the window of the unit whose turn is `rank` of `n`.

    The width is `overlap / n` (at most 1); the starts are staggered evenly, so that the last window ends at 1.
    """
    width = min(1.0, overlap / n)
    start = rank * (1 - width) / (n - 1) if n > 1 else 0.0
    return start, width


def unit_fractions(
    s: float,
    n: int,
    *,
    progression: str,
    order: str = "forward",
    curve: str = "linear",
    overlap: float = 1.0,
    seed: int = 0,
) -> Sequence[float]:
    """The frozen fraction of each of `n` units, from the input on, at progress `s`.

    Exactly 0 at `s <= 0` (but for `progression="none"`) and exactly 1 at `s >= 1`.

    Args:
        s (`float`): Progress in [0, 1].
        n (`int`): Number of units.
        progression (`str`): `"layerwise"`: each unit rises from 0 to 1 along `curve` in its own window; `"global"`:
            all units have `curve(s)`; `"none"`: everything freezes at once, at the end of the progress.
        order, curve, overlap, seed: See [`BinarizationConfig`].

    Example:

        >>> unit_fractions(0.5, 4, progression="layerwise")
        [1.0, 1.0, 0.0, 0.0]
        >>> unit_fractions(0.5, 4, progression="global")
        [0.5, 0.5, 0.5, 0.5]

    Source: arXiv 2601.22660; the exact shape of the windows is this project's.
    """
    if s >= 1:
        return [1.0] * n
    if s <= 0 or progression == "none":
        return [0.0] * n
    if progression == "global":
        return [CURVES[curve](s)] * n
    windows = (window(rank, n, overlap) for rank in ranks(n, order, seed))
    return [CURVES[curve](min(1.0, max(0.0, (s - start) / width))) for start, width in windows]
