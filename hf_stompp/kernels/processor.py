"""What the processor can do for the kernels, or the one that `NUMBA_CPU_FEATURES` names."""

import functools

import llvmlite.binding
import numba


@functools.cache
def _features() -> frozenset[str]:
    """What the processor that numba compiles for can do."""
    asked: str | None = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES
    features = llvmlite.binding.get_host_cpu_features().flatten() if asked is None else asked
    x86 = llvmlite.binding.get_default_triple().startswith("x86_64")
    return frozenset(features.replace("+", "").split(",")) if x86 else frozenset()


@functools.cache
def features_of_lookup() -> int:
    """How many features of an input one look-up does, of tables of the 2^n sums of n features, which a vector of the
    processor holds: 4 (AVX-512) or 3 (AVX2); or 0, if it looks nothing up."""
    return 4 if "avx512f" in _features() else 3 if "avx2" in _features() else 0


@functools.cache
def counts_nibbles() -> bool:
    """Whether bits are counted by four, with a look-up for each of 32 outputs; else by 32, as a processor does that
    has an instruction for it."""
    return "avx2" in _features() and "avx512vpopcntdq" not in _features()


def inputs_of_tile() -> int:
    """How many inputs are multiplied at a time, so that their sums stay in registers; AVX2 has half as many."""
    return 4 if counts_nibbles() else 6


def popcount_of_processor() -> str:
    """How the processor counts bits, for `kernels.info`."""
    if counts_nibbles():
        return "AVX2 by tables"
    return "AVX-512 VPOPCNTDQ" if "avx512vpopcntdq" in _features() else "what LLVM makes of it"
