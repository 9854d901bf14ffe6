"""Blocks of work on as many threads as torch has.

The threads are Python's, and the kernels let go of its lock: numba's own share OpenMP's settings with torch, and would
change how many threads torch takes.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())  # they are started as they are needed


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads


def in_blocks(work: Callable[..., Any], operands: tuple[Any, ...], length: int, most: int) -> None:
    """Calls `work(*operands, start, stop)` for blocks of `range(length)`, at most `most` of them, one a thread."""
    if most <= 1 or length <= 1 or (threads := torch.get_num_threads()) == 1:
        work(*operands, 0, length)
        return
    blocks = min(threads, length, most)
    ends = [length * i // blocks for i in range(blocks + 1)]
    futures = [_pool().submit(work, *operands, *ends[i : i + 2]) for i in range(blocks)]
    wait(futures)  # all of them, also if one fails: they work on memory of the caller's
    for future in futures:
        future.result()
