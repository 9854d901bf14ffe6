"""Kernels in numba (extra `fast`), each of which does in one pass over memory what takes torch several.

Without numba, on other devices and for whatever they do not cover, the same is computed by plain torch, the reference.
`HF_STOMPP_KERNELS=reference` in the environment asks for that everywhere, [`use`] for a part of a program.
"""

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = ("cpu", "reference")
_used: list[str] = []
"""What [`use`] asks for, the innermost last."""


def backend() -> str:
    """The backend for tensors on a CPU: `"cpu"` (numba) or `"reference"` (torch).

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is none of them.
        ImportError: It asks for `"cpu"`, and numba is not installed, or does not work.
    """
    return _used[-1] if _used else _found()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within it, kernels are of this backend, in every thread.

    Args:
        name (`str`): `"cpu"` or `"reference"`.

    Raises:
        ValueError: It is neither.
        ImportError: It is `"cpu"`, and numba is not installed, or does not work.

    Example:

        >>> from hf_stompp import kernels
        >>> with kernels.use("reference"):
        ...     print(kernels.backend())
        reference
    """
    _check(name, "the backend")
    if name == "cpu":
        _load('kernels.use("cpu")')
    _used.append(name)
    try:
        yield
    finally:
        del _used[len(_used) - 1 - _used[::-1].index(name)]  # the last of them: another thread may have added its own


def info() -> str:
    """What runs packed layers here, and why: for a bug report, or to see whether it is fast.

    Example:

        >>> from hf_stompp import kernels
        >>> print(kernels.info())
        backend: ...
    """
    lines = {"backend": backend(), "threads": str(torch.get_num_threads())}
    if importlib.util.find_spec("numba") is None:
        lines["numba"] = "not installed: `pip install hf_stompp[fast]` makes packed models fast on a CPU"
    else:
        numba = importlib.import_module("numba")
        lines["numba"] = numba.__version__
        if backend() == "cpu":
            vectors = loaded("vectors")
            lines["1-bit weights and inputs"] = f"cpu, population count {vectors.popcount_of_processor()}"
            lookup = "cpu" if vectors.has_lookup() else "reference: the processor has no AVX-512"
            lines["1-bit weights alone"] = lookup
            lines["compiled kernels in"] = numba.config.CACHE_DIR or "__pycache__ beside the package"
    if "HF_STOMPP_KERNELS" in os.environ:
        lines["HF_STOMPP_KERNELS"] = os.environ["HF_STOMPP_KERNELS"]
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


@functools.cache
def loaded(name: str) -> Any:
    """One of the modules of kernels, which import numba; that takes a second, and is not done before they are used."""
    return importlib.import_module(f"hf_stompp.kernels.{name}")


@contextmanager
def _announced() -> Iterator[None]:
    """Says so if what is within takes long."""
    message = "Compiling the bit kernels, once for this machine: half a minute."
    timer = threading.Timer(5, logger.warning, args=(message,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(name: str, field: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{field} is {name!r}; allowed: {', '.join(BACKENDS)}.")


@functools.cache
def _found() -> str:
    asked = os.environ.get("HF_STOMPP_KERNELS")
    if asked is not None:
        _check(asked, "HF_STOMPP_KERNELS")
    if asked == "reference" or (asked is None and importlib.util.find_spec("numba") is None):
        return "reference"
    return "cpu" if _load("HF_STOMPP_KERNELS=cpu" if asked else None) else "reference"


@functools.cache
def _load(asked_by: str | None) -> bool:
    """Imports the kernels; whether they work.

    Raises:
        ImportError: They do not, and were asked for.
    """
    try:
        with _announced():
            for name in ("mixing", "binary", "convolution", "weights"):
                loaded(name)
    except Exception as error:  # numba for another numpy, no folder for what it compiles, …
        advice = "`pip install hf_stompp[fast]`; NUMBA_CACHE_DIR names a folder that it may write to"
        if asked_by:
            raise ImportError(f"{asked_by} needs a numba that works ({error}): {advice}.") from error
        logger.warning(f"numba is installed, but does not work ({error}); torch does its part, slower. {advice}.")
        return False
    return True
