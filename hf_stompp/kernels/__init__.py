"""Kernels in numba (extra `fast`), each of which does in one pass over memory what takes torch several.

Without numba, on other devices and for whatever they do not cover, the same is computed by plain torch, the reference.
`HF_STOMPP_KERNELS=reference` in the environment asks for that everywhere.
"""

import functools
import importlib
import importlib.util
import os

from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = ("cpu", "reference")


@functools.cache
def backend() -> str:
    """The backend for tensors on a CPU: `"cpu"` (numba) or `"reference"` (torch).

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is none of them.
        ImportError: It asks for `"cpu"`, and numba is not installed, or does not work.
    """
    asked = os.environ.get("HF_STOMPP_KERNELS")
    if asked not in (None, *BACKENDS):
        raise ValueError(
            f"HF_STOMPP_KERNELS is {asked!r}; allowed: {', '.join(BACKENDS)}. Unset it to choose by itself."
        )
    if asked == "reference" or (asked is None and importlib.util.find_spec("numba") is None):
        return "reference"
    try:
        importlib.import_module("hf_stompp.kernels.mixing")
    except Exception as error:  # numba for another numpy, no folder for what it compiles, …
        advice = "`pip install hf_stompp[fast]`; NUMBA_CACHE_DIR names a folder that it may write to"
        if asked == "cpu":
            raise ImportError(f"HF_STOMPP_KERNELS=cpu needs a numba that works ({error}): {advice}.") from error
        logger.warning(f"numba is installed, but does not work ({error}); torch does its part, slower. {advice}.")
        return "reference"
    return "cpu"
