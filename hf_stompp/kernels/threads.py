"""Blocks of work on as many threads as torch has, and on the same ones where these are OpenMP's of GNU: threads of
another kind would compete with torch's, which wait for their next work without rest.
"""

import ctypes
import functools
import os
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from hf_stompp.kernels.vectors import called, increased, pointer

KERNEL = "void(intp, intp, intp)"
"""What [`in_blocks`] calls, as a `numba.cfunc`: with the address of its operands, int64, and the start and the stop of
a block."""
_HEAD = 4
"""Entries before the operands: the number of the next block, of all blocks, their length together, the kernel."""


def in_blocks(kernel: Any, operands: tuple[int, ...], length: int, most: int) -> None:
    """Calls a kernel for blocks that make up `range(length)`, at most `most` of them, one a thread."""
    threads = 1 if most <= 1 or length <= 1 else min(torch.get_num_threads(), length, most)
    memory = array("q", (0, threads, length, kernel.address, *operands))
    at, _ = memory.buffer_info()
    parallel = _openmp() if threads > 1 and not _forked.is_set() else None
    if threads == 1:
        kernel.ctypes(at + 8 * _HEAD, 0, length)
    elif parallel is not None:
        parallel(_blocks.address, at, threads, 0)
    else:
        in_threads(lambda start, stop: kernel.ctypes(at + 8 * _HEAD, start, stop), length, threads)


@numba.cfunc("void(intp)", nogil=True, cache=True)
def _blocks(at):  # type: ignore[no-untyped-def]
    """What each thread of OpenMP does: blocks, until all are taken."""
    head = numba.carray(pointer(at), _HEAD, np.int64)
    while True:
        block = increased(at)
        if block >= head[1]:
            return
        start, stop = head[2] * block // head[1], head[2] * (block + 1) // head[1]
        called(head[3], at + 8 * _HEAD, start, stop)


@functools.cache
def _openmp() -> Any | None:
    """`GOMP_parallel(function, data, threads, flags)` of the library that torch's threads are from, if it is known."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = {Path(line.split(maxsplit=5)[-1]) for line in lines if "libgomp" in line}
        own = [path for path in mapped if Path(torch.__file__).parent in path.parents] or list(mapped)
        parallel = ctypes.CDLL(str(own[0])).GOMP_parallel if len(own) == 1 else None
    except (OSError, AttributeError):
        return None
    if parallel is not None:
        parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())  # they are started as they are needed


_forked = threading.Event()


def _after_fork() -> None:
    """A child process has none of its parent's threads, and OpenMP would wait for them."""
    _pool.cache_clear()
    _forked.set()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def in_threads(work: Callable[[int, int], Any], length: int, most: int) -> None:
    """Calls `work(start, stop)`, which lets go of Python's lock, for blocks as [`in_blocks`] does."""
    blocks = max(1, min(torch.get_num_threads(), length, most))
    if blocks == 1:
        work(0, length)
        return
    ends = [length * i // blocks for i in range(blocks + 1)]
    futures: list[Future[Any]] = []
    try:
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            futures.append(_pool().submit(work, start, stop))
    finally:
        _wait(futures)
    for future in futures:
        future.result()


def _wait(futures: list[Future[Any]]) -> None:
    """For all of them, also if one fails, or Ctrl-C is pressed: they work on memory of the caller's."""
    interrupted = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
