"""Kernels for CPUs in numba (extra `fast`), each of which does in one pass over memory what takes torch several; and
one in Triton, for NVIDIA GPUs, where it is asked for.

Without them, on other devices and for whatever they do not cover, the same is computed by plain torch, the reference.
`HF_STOMPP_KERNELS=reference` in the environment asks for that everywhere, [`use`] for a part of a program.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from hf_stompp.kernels.compiling import announced, folder, loaded

logger = logging.get_logger(__name__)

BACKENDS = ("cpu", "triton", "reference")
"""What can be asked for; `"triton"` leaves CPUs as they are."""
_used: list[str] = []
"""What [`use`] asks for, the innermost last."""


def backend() -> str:
    """The backend for tensors on a CPU: `"cpu"` (numba) or `"reference"` (torch).

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is no backend.
        ImportError: It asks for `"cpu"`, and numba is not installed, or does not work.
    """
    return next((name for name in reversed(_used) if name != "triton"), None) or _found()


def expected() -> str:
    """[`backend`], without compiling anything; of kernels that were not used yet, what is to be expected.

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is no backend.
    """
    used = next((name for name in reversed(_used) if name != "triton"), None)
    if used or _found.cache_info().currsize:
        return used or _found()
    return "cpu" if _asked() != "reference" and not _lack_of_numba() else "reference"


def on_gpu(index: int) -> bool:
    """Whether tensors on this GPU are for the kernel in Triton, which is asked for.

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is no backend.
        RuntimeError: It is asked for, and does not work on this GPU.
    """
    if (_used[-1] if _used else _asked()) != "triton":
        return False
    if lack := _lack_of_gpu(index):
        raise RuntimeError(f'The backend "triton" cannot run on cuda:{index}: {lack}. Ask for "reference".')
    return True


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within it, kernels are of this backend, in every thread.

    Args:
        name (`str`): `"cpu"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: It is none of them.
        ImportError: It is `"cpu"`, and numba is not installed, or does not work; or `"triton"`, and that is not
            installed.

    Example:

        >>> from hf_stompp import kernels
        >>> with kernels.use("reference"):
        ...     print(kernels.backend())
        reference
    """
    _check(name, "the backend")
    if name == "cpu":
        _load('kernels.use("cpu")')
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError('kernels.use("triton") needs triton, which comes with torch for CUDA: `pip install triton`.')
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
    try:
        active = backend()
    except (ValueError, ImportError) as error:
        active = f"none: {error}"
    lines = {"backend": active, "threads": str(torch.get_num_threads())}
    if lack := _lack_of_numba():
        lines["numba"] = f"{lack}: `pip install numba` makes packed models fast on a CPU"
    else:
        numba = importlib.import_module("numba")
        lines["numba"] = numba.__version__
        if active == "cpu":
            processor = loaded("processor")
            lines["1-bit weights and inputs"] = f"cpu, population count {processor.popcount_of_processor()}"
            at_once = processor.features_of_lookup()
            lookup = f"cpu, {at_once} weights to a look-up" if at_once else "reference: the processor has no AVX2"
            lines["1-bit weights alone"] = lookup
            lines["compiled kernels in"] = str(folder())
    for index in range(torch.cuda.device_count()):
        try:
            how = "triton" if on_gpu(index) else "reference; `HF_STOMPP_KERNELS=triton` asks for a kernel"
        except (ValueError, RuntimeError) as error:
            how = str(error)
        lines[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {how}"
    if asked := os.environ.get("HF_STOMPP_KERNELS"):
        idle = asked == "triton" and torch.cuda.device_count() == 0
        lines["HF_STOMPP_KERNELS"] = asked + (": there is no GPU here, so it changes nothing" if idle else "")
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _check(name: str, field: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{field} is {name!r}; allowed: {', '.join(BACKENDS)}.")


def _asked() -> str | None:
    asked = os.environ.get("HF_STOMPP_KERNELS") or None
    if asked is not None:
        _check(asked, "HF_STOMPP_KERNELS")
    return asked


def _lack_of_numba() -> str | None:
    """What keeps numba from being imported, if something does."""
    if importlib.util.find_spec("numba") is None:
        return "not installed"
    try:
        loaded("processor")
    except Exception as error:  # it is for another numpy, …
        return f"installed, but does not work ({error})"
    return None


@functools.cache
def _lack_of_gpu(index: int) -> str | None:
    """What keeps the kernel in Triton from this GPU, if something does."""
    if torch.version.cuda is None:
        return "not an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):  # Triton has no products of int8 for it
        return f"its compute capability is {capability[0]}.{capability[1]}, below 8.0"
    try:
        loaded("gpu").try_out(torch.device("cuda", index))
    except Exception as error:  # no compiler for what starts it, another driver, …
        return f"triton is installed, but does not work ({error})"
    return None


@functools.cache
def _found() -> str:
    asked = _asked()
    if asked == "reference" or (asked != "cpu" and importlib.util.find_spec("numba") is None):
        return "reference"
    return "cpu" if _load("HF_STOMPP_KERNELS=cpu" if asked == "cpu" else None) else "reference"


@functools.cache
def _load(asked_by: str | None) -> bool:
    """Imports the kernels; whether they work.

    Raises:
        ImportError: They do not, and were asked for.
    """
    try:
        with announced():
            lookup = ("weights",) if loaded("processor").features_of_lookup() else ()
            for name in ("mixing", "binary", "convolution", "normalization", "dense", *lookup):
                loaded(name)
    except Exception as error:  # numba for another numpy, no folder for what it compiles, …
        advice = "`pip install numba`; NUMBA_CACHE_DIR names a folder that it may write to"
        if asked_by:
            raise ImportError(f"{asked_by} needs a numba that works ({error}): {advice}.") from error
        logger.warning(f"numba is installed, but does not work ({error}); torch does its part, slower. {advice}.")
        return False
    return True
