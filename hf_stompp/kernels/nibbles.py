"""Counting bits by look-ups of four at a time, for processors that have AVX2 and no instruction that counts."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from hf_stompp.kernels.blocks import INT, LANES, LONG, WIDTH, Block

_BYTE, _BYTES = ir.IntType(8), ir.VectorType(ir.IntType(8), 32)
_IN_BYTE, _IN_SHORT = 31, 31 * 264
"""Of how many bytes each counts the bits that differ."""


def by_nibbles(block: Block, rows: int, x: Any, x_stride: Any, panel: Any, words: Any) -> list[list[Any]]:
    """popcount(x ⊕ w) of `rows` inputs and 64 outputs: a byte of an input chooses two tables, of the counts for the 16
    values that a nibble of a weight has, of which 32 outputs look theirs up at once. Counts are bytes for a while, and
    then short integers."""
    builder = block.builder
    tables, zero = _tables(builder), ir.Constant(_BYTES, [0] * 32)
    low, four = ir.Constant(_BYTES, [15] * 32), ir.Constant(_BYTES, [4] * 32)

    def step(k: Any, sums: list[list[Any]]) -> list[list[Any]]:
        places = [builder.add(builder.mul(k, block.long(WIDTH // 4)), block.long(8 * j)) for j in range(WIDTH // 32)]
        weights = [block.load(panel, _BYTES, place) for place in places]
        halves = [builder.and_(w, low) for w in weights], [builder.lshr(w, four) for w in weights]
        new = []
        for row, totals in enumerate(sums):
            at = builder.add(x, builder.add(builder.mul(x_stride, block.long(4 * row)), k))
            byte = builder.zext(builder.load(builder.inttoptr(at, _BYTE.as_pointer())), LONG)
            table = builder.add(tables, builder.mul(byte, block.long(32)))
            for half, of_half in enumerate(halves):
                lookup = block.load(table, ir.VectorType(_BYTE, 16), block.long(4 * half))
                lookup = block.part(lookup, [*range(16)] * 2)
                counts = [block.call("llvm.x86.avx2.pshuf.b", _BYTES, lookup, w) for w in of_half]
                totals = [builder.add(total, count) for total, count in zip(totals, counts, strict=True)]
            new.append(totals)
        return new

    def in_bytes(start: Any, stop: Any) -> list[Any]:
        return [builder.shuffle_vector(*row, _PLACES) for row in block.sums(zero, rows, start, stop, step)]

    in_shorts = _wider(block, rows, 16, _IN_BYTE, in_bytes)
    totals = _wider(block, rows, 32, _IN_SHORT, in_shorts)(block.long(0), builder.mul(words, block.long(4)))
    return [[block.part(row, range(at, at + LANES)) for at in range(0, WIDTH, LANES)] for row in totals]


_Count = Callable[[Any, Any], list[Any]]
_PLACES = ir.Constant(ir.VectorType(INT, WIDTH), list(range(WIDTH)))


def _wider(block: Block, rows: int, bits: int, length: int, count: _Count) -> _Count:
    """What counts from a start to a stop, for `rows` inputs and 64 outputs, in integers of so many bits, by `count`,
    which may do so for `length` steps at a time."""
    builder, kind = block.builder, ir.VectorType(ir.IntType(bits), WIDTH)

    def counted(start: Any, stop: Any) -> list[Any]:
        sums = [cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * WIDTH)) for _ in range(rows)]
        with cgutils.for_range_slice(builder, start, stop, block.long(length), LONG) as (at, _):
            end = builder.add(at, block.long(length))
            end = builder.select(builder.icmp_signed("<", end, stop), end, stop)
            for place, new in zip(sums, count(at, end), strict=True):
                builder.store(builder.add(builder.load(place), builder.zext(new, kind)), place)
        return [builder.load(place) for place in sums]

    return counted


def _tables(builder: Any) -> Any:
    """The address of popcount(a ⊕ w), `uint8 [256, 2, 16]`, of the lower and the upper nibble a of a byte."""
    counts = [(nibble ^ w).bit_count() for byte in range(256) for nibble in (byte & 15, byte >> 4) for w in range(16)]
    constant = cgutils.global_constant(builder, "counts", ir.Constant(ir.ArrayType(_BYTE, len(counts)), counts))
    constant.align, constant.unnamed_addr = 64, True
    return builder.ptrtoint(constant, LONG)
