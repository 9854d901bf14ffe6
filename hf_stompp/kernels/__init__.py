"""Kernels in numba (extra `fast`), each of which does in one pass over memory what takes torch several.

Without numba, on other devices and for whatever they do not cover, the same is computed by plain torch, the reference.
`HF_STOMPP_KERNELS=reference` in the environment asks for that everywhere.
"""

import functools
import importlib.util
import os

BACKENDS = ("cpu", "reference")


@functools.cache
def backend() -> str:
    """The backend for tensors on a CPU: `"cpu"` (numba) or `"reference"` (torch).

    Raises:
        ValueError: `HF_STOMPP_KERNELS` is none of them.
        ImportError: It asks for `"cpu"`, and numba is not installed.
    """
    installed = importlib.util.find_spec("numba") is not None
    asked = os.environ.get("HF_STOMPP_KERNELS", "cpu" if installed else "reference")
    if asked not in BACKENDS:
        raise ValueError(
            f"HF_STOMPP_KERNELS is {asked!r}; allowed: {', '.join(BACKENDS)}. Unset it to choose by itself."
        )
    if asked == "cpu" and not installed:
        raise ImportError("HF_STOMPP_KERNELS=cpu needs numba: `pip install hf_stompp[fast]`, or unset the variable.")
    return asked
