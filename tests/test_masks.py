"""The masks, as black boxes: statistics, refresh, purity, and a stream that must never change."""

import hashlib
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_stompp.masks import draw_mask, keyed_generator, refresh_position

SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
FRACTIONS = st.floats(0, 1)
SEEDS = st.integers(0, 2**63)
NAMES = st.text(max_size=30)
STEPS = st.integers(0, 10**7)
REFRESHES = st.floats(0, 1)
LARGE = (200, 500)
SIZE = math.prod(LARGE)


def within_binomial_bounds(count: float, trials: int, share: float) -> bool:
    """Six standard deviations, and a few more for shares so small that the distribution is skewed."""
    return abs(count - trials * share) <= 6 * math.sqrt(trials * share * (1 - share)) + 6


def levels(seed: int, step: int, refresh: float, n: int = 64) -> Tensor:
    """The priority of each entry in steps of 1/n, found out from masks of many fractions."""
    masks = [draw_mask(LARGE, k / n, seed=seed, name="w", step=step, refresh=refresh) for k in range(1, n)]
    assert all((small <= large).all() for small, large in pairwise(masks)), "masks of one step are nested"
    return sum(mask.long() for mask in masks)


@given(
    shape=SHAPES, fraction=FRACTIONS, seed=SEEDS, name=NAMES, step=STEPS, refresh=REFRESHES, interval=st.integers(1, 9)
)
def test_the_same_mask_on_every_call_and_no_global_generator_is_touched(
    shape: tuple[int, ...], fraction: float, seed: int, name: str, step: int, refresh: float, interval: int
) -> None:
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    first, second = (
        draw_mask(shape, fraction, seed=seed, name=name, step=step, refresh=refresh, refresh_interval=interval)
        for _ in range(2)
    )
    assert first.dtype == torch.bool
    assert first.shape == shape
    assert torch.equal(first, second)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True))
    assert before[2] == random.getstate()


@given(shape=SHAPES, seed=SEEDS, name=NAMES, step=STEPS, refresh=REFRESHES)
def test_exactly_none_at_zero_and_all_at_one(
    shape: tuple[int, ...], seed: int, name: str, step: int, refresh: float
) -> None:
    assert not draw_mask(shape, 0.0, seed=seed, name=name, step=step, refresh=refresh).any()
    assert draw_mask(shape, 1.0, seed=seed, name=name, step=step, refresh=refresh).all()


@given(fraction=FRACTIONS, seed=SEEDS, name=NAMES, step=STEPS, refresh=REFRESHES)
def test_the_count_is_within_binomial_bounds(fraction: float, seed: int, name: str, step: int, refresh: float) -> None:
    mask = draw_mask(LARGE, fraction, seed=seed, name=name, step=step, refresh=refresh)
    assert within_binomial_bounds(mask.sum().item(), SIZE, fraction)


@given(fraction=st.floats(0.2, 0.8), names=st.lists(NAMES, min_size=2, max_size=2, unique=True), seed=SEEDS)
def test_masks_of_different_names_are_independent(fraction: float, names: list[str], seed: int) -> None:
    a, b = (draw_mask((2000,), fraction, seed=seed, name=name) for name in names)
    assert within_binomial_bounds((a & b).sum().item(), 2000, fraction**2)


@given(fraction=st.floats(0.2, 0.8), seeds=st.lists(SEEDS, min_size=2, max_size=2, unique=True), name=NAMES)
def test_masks_of_different_seeds_are_independent(fraction: float, seeds: list[int], name: str) -> None:
    a, b = (draw_mask((2000,), fraction, seed=seed, name=name) for seed in seeds)
    assert within_binomial_bounds((a & b).sum().item(), 2000, fraction**2)


def test_neighbouring_entries_rows_and_columns_are_independent() -> None:
    mask = draw_mask(LARGE, 0.5, seed=3, name="w", step=5, refresh=0.5)
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask[:100], mask[100:])):
        assert within_binomial_bounds((a & b).sum().item(), a.numel(), 0.25)
    assert all(within_binomial_bounds(row.sum().item(), 500, 0.5) for row in mask)


@given(fractions=st.lists(FRACTIONS, min_size=2, max_size=5).map(sorted), seed=SEEDS, name=NAMES, data=st.data())
def test_without_refresh_the_frozen_set_only_grows(
    fractions: list[float], seed: int, name: str, data: st.DataObject
) -> None:
    steps = sorted(data.draw(st.lists(STEPS, min_size=len(fractions), max_size=len(fractions))))
    masks = [draw_mask((30, 30), f, seed=seed, name=name, step=s) for f, s in zip(fractions, steps, strict=True)]
    assert all((before <= after).all() for before, after in pairwise(masks))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("refresh", [0.0, 0.1, 0.25, 0.7, 1.0])
def test_a_refresh_flips_2f_1_minus_f_r_of_the_bits(refresh: float, fraction: float) -> None:
    masks = [draw_mask(LARGE, fraction, seed=0, name="w", step=step, refresh=refresh) for step in range(12)]
    expected = 2 * fraction * (1 - fraction) * refresh
    for before, after in pairwise(masks):
        assert within_binomial_bounds((before != after).sum().item(), SIZE, expected)
        # As many freeze as re-open.
        assert within_binomial_bounds((after & ~before).sum().item(), SIZE, expected / 2)


@pytest.mark.parametrize("refresh", [0.1, 0.25, 0.3])
def test_a_refresh_redraws_that_share_of_the_entries(refresh: float) -> None:
    series = [levels(0, step, refresh) for step in range(4)]
    for before, after in pairwise(series):
        # One redraw in 64 lands on the same level.
        assert within_binomial_bounds((before != after).sum().item(), SIZE, refresh * 63 / 64)


def test_each_entry_is_redrawn_once_while_the_position_grows_by_one() -> None:
    series = [levels(1, step, 0.25) for step in range(9)]
    changes = [(before != after).long() for before, after in pairwise(series)]
    for start in range(5):  # any four neighbouring refreshes of a quarter
        redrawn = sum(changes[start : start + 4])
        assert redrawn.max() == 1
        assert within_binomial_bounds((redrawn == 1).sum().item(), SIZE, 63 / 64)


def test_priorities_stay_uniform_under_refresh() -> None:
    for step in (0, 3, 10, 1000):
        counts = torch.bincount(levels(2, step, 0.3).flatten(), minlength=64)
        assert all(within_binomial_bounds(count.item(), SIZE, 1 / 64) for count in counts)


def test_full_refresh_gives_independent_masks() -> None:
    masks = [draw_mask(LARGE, 0.4, seed=0, name="w", step=step, refresh=1.0) for step in range(6)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert within_binomial_bounds((a & b).sum().item(), SIZE, 0.16)


@given(refresh=st.floats(0.05, 1), interval=st.integers(1, 50), step=STEPS, data=st.data())
def test_the_mask_changes_at_multiples_of_the_interval_only(
    refresh: float, interval: int, step: int, data: st.DataObject
) -> None:
    other = step + data.draw(st.integers(0, 2 * interval))
    a, b = (
        draw_mask((1000,), 0.5, seed=0, name="w", step=s, refresh=refresh, refresh_interval=interval)
        for s in (step, other)
    )
    # Of 1000 entries, about 25 flip even when the refresh is 5 %.
    assert torch.equal(a, b) == (step // interval == other // interval)


def test_the_interval_by_hand() -> None:
    def mask(step: int) -> Tensor:
        return draw_mask((1000,), 0.5, seed=0, name="w", step=step, refresh=1.0, refresh_interval=3)

    changed = [not torch.equal(mask(step - 1), mask(step)) for step in range(1, 10)]
    assert changed == [False, False, True] * 3
    assert [refresh_position(step, 0.5, 3) for step in range(8)] == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1]


def test_a_mask_of_an_odd_number_of_entries_and_of_none() -> None:
    assert draw_mask((7, 3), 0.5, seed=0, name="w").shape == (7, 3)
    assert draw_mask((0, 3), 0.5, seed=0, name="w").shape == (0, 3)


def digest(mask: Tensor) -> str:
    return hashlib.sha256(np.packbits(mask.numpy())).hexdigest()[:16]


def test_the_stream_is_stable_over_versions_and_machines() -> None:
    # Written down once. If this fails, resumed runs and loaded checkpoints change: do not adapt it.
    mask = draw_mask((64, 33), 0.3, seed=1, name="encoder.weight", step=7, refresh=0.3, refresh_interval=2)
    assert mask.sum().item() == 627
    assert digest(mask) == "4bc7077093494212"
    assert digest(draw_mask((64, 33), 0.3, seed=1, name="encoder.weight")) == "4442399e26ce3e1d"


def test_the_generator_is_keyed_by_everything() -> None:
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", "1"), (0, "a"), (0, "a1"), (0, "a", 1, 0)]
    assert len({keyed_generator(*key).random_raw() for key in keys}) == len(keys)
