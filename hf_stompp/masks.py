"""Stochastic partial masks with soft refresh, as a pure function of (seed, name, step, fraction).

Nothing is saved and nothing touches a global generator: every rank, every resumed run and every recomputed forward
gets the same mask. The random numbers are raw outputs of numpy's counter-based Philox generator, a stream that numpy
keeps stable, keyed by a hash of (seed, name, draw number); so a mask does not depend on the device either.
"""

import hashlib
from math import prod

import numpy as np
import torch
from torch import Tensor

_RANGE = 1 << 32


def keyed_generator(seed: int, *key: object) -> np.random.Philox:
    """A Philox bit generator that depends on nothing but `seed` and `key`."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def _draw(size: int, seed: int, *key: object) -> np.ndarray:
    """`size` uniform numbers in [0, 2³²)."""
    return keyed_generator(seed, *key).random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]


def _priorities(size: int, position: float, seed: int, name: str) -> np.ndarray:
    """The priority of each entry at refresh position `position`, in [0, 2³²).

    Each entry has a fixed phase in [0, 1) and uses draw number ⌊position + phase⌋, so that while the position grows
    by `refresh`, a share `refresh` of the entries goes on to its next draw.
    """
    number, part = divmod(position, 1.0)
    draw = _draw(size, seed, name, int(number))
    if part == 0.0:
        return draw
    moves_on = _draw(size, seed, name, "phase") >= (1.0 - part) * _RANGE
    return np.where(moves_on, _draw(size, seed, name, int(number) + 1), draw)


def refresh_position(step: int, refresh: float, refresh_interval: int) -> float:
    """How many whole-mask redraws have happened by `step`: `refresh · ⌊step / refresh_interval⌋`."""
    return refresh * (step // refresh_interval)


def draw_mask(
    shape: tuple[int, ...],
    fraction: float,
    *,
    seed: int,
    name: str,
    step: int = 0,
    refresh: float = 0.0,
    refresh_interval: int = 1,
) -> Tensor:
    """The boolean mask, `True` where frozen, of the tensor `name` at `step`.

    An entry is frozen while its priority is below `fraction`. Every `refresh_interval` steps a share `refresh` of the
    entries gets a new priority: with `refresh=0` a growing fraction only ever adds frozen entries, with `refresh=1`
    each refresh draws the whole mask anew.

    Args:
        shape (`tuple[int, ...]`): Shape of the mask.
        fraction (`float`): Share of entries that is frozen, in expectation; exactly none at 0 and all at 1.
        seed (`int`), name (`str`), step (`int`): What the mask depends on, besides `fraction`.
        refresh (`float`, *optional*, defaults to 0): Share of entries redrawn at a refresh, in [0, 1].
        refresh_interval (`int`, *optional*, defaults to 1): Steps between two refreshes.

    Example:

        >>> mask = draw_mask((4, 1000), 0.25, seed=0, name="encoder.layer.0")
        >>> 0.2 < mask.float().mean().item() < 0.3
        True

    Source: arXiv 2601.22660 for stochastic masks and soft refresh; making them stateless is this project's.
    """
    if fraction <= 0.0 or fraction >= 1.0:
        return torch.full(shape, fraction >= 1.0)
    position = refresh_position(step, refresh, refresh_interval)
    frozen = _priorities(prod(shape), position, seed, name) < fraction * _RANGE
    return torch.from_numpy(frozen).view(shape)
