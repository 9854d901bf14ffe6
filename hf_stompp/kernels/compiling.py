"""Loading the kernels, which compiles them the first time: one thread and one process at a time, to a folder that
holds this version's code for this processor alone."""

import functools
import hashlib
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PATIENCE = 5.0
"""Seconds for which nothing is said."""
_LONGEST = 300.0
"""Seconds to wait for another process, which may have been stopped."""
_COMPILE_NOTHING = ("processor", "gpu")
_loading = threading.RLock()


@functools.cache
def loaded(name: str) -> Any:
    """One of the modules of kernels, which import numba; that takes a second, and is not done before they are used."""
    with nullcontext() if name in _COMPILE_NOTHING else _compiling():
        return importlib.import_module(f"hf_stompp.kernels.{name}")


@contextmanager
def _compiling() -> Iterator[None]:
    with _loading, announced(), _alone():
        yield


@contextmanager
def announced() -> Iterator[None]:
    """Says so, once, if what is within compiles for long."""
    message = "Compiling the bit kernels, once for this machine: half a minute."
    timer = threading.Timer(_PATIENCE, logger.warning_once, args=(message,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _alone() -> Iterator[None]:
    """Within it, numba looks for what it compiled, and keeps it, in [`folder`], and no other process does so.

    numba numbers the files of a function by what its index has, so that of two processes that add one at the same
    time, one may find the code of the other.
    """
    config, here = importlib.import_module("numba").config, folder()
    before, config.CACHE_DIR = config.CACHE_DIR, str(here)
    try:
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):  # it took too long; a file system without locks
                here.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(here / ".lock", timeout=_LONGEST))
            yield
    finally:
        config.CACHE_DIR = before


def folder() -> Path:
    """Where what is compiled of these files for this processor is kept; of others elsewhere. numba looks only at the
    file that a kernel is in, and it takes parts from others; and its index is not made for processes on several
    processors, as in a cluster with one home."""
    config, own = importlib.import_module("numba").config, Path(__file__).parent
    binding = importlib.import_module("llvmlite.binding")
    features = binding.get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
    processor = config.CPU_NAME or binding.get_host_cpu_name(), features
    files = b"".join(file.read_bytes() for file in sorted(own.glob("*.py")))
    digest = hashlib.sha256(files + repr(processor).encode()).hexdigest()[:16]
    of_user = importlib.import_module("numba.misc.appdirs").user_cache_dir("numba", appauthor=False)
    places = [*([Path(config.CACHE_DIR)] if config.CACHE_DIR else []), own / "__pycache__", Path(of_user)]
    place = next((each for each in places if _writable(each)), places[0])
    return place / f"hf_stompp-{digest}"


def _writable(place: Path) -> bool:
    """Whether it is a folder that may be written to, or can be made."""
    existing = next(each for each in (place, *place.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _after_fork() -> None:
    """Another thread of the parent may have been loading, and is not there any more."""
    global _loading
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
