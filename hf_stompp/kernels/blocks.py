"""`Block`: an LLVM builder with the operations that the inner loops are made of, in vectors of 16 lanes.

LLVM splits a vector where a processor has only shorter ones. All pointers are addresses (`array.ctypes.data`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
WIDTH = 64
"""Outputs of a panel."""

INT, LONG, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT, LANES), ir.VectorType(FLOAT, LANES)


class Block:
    """A builder with the few operations that the loops are made of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def long(self, value: int) -> Any:
        return ir.Constant(LONG, value)

    def pointer(self, address: Any, kind: Any, offset: Any) -> Any:
        """To `offset` entries of 4 bytes after the address."""
        moved = self.builder.add(address, self.builder.mul(offset, self.long(4)))
        return self.builder.inttoptr(moved, kind.as_pointer())

    def load(self, address: Any, kind: Any, offset: Any) -> Any:
        value = self.builder.load(self.pointer(address, kind, offset))
        value.align = 4
        return value

    def store(self, value: Any, address: Any, offset: Any) -> None:
        self.builder.store(value, self.pointer(address, value.type, offset)).align = 4

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        """A vector of so many times the value."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))

    def call(self, name: str, result: Any, *args: Any) -> Any:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def part(self, value: Any, lanes: Sequence[int]) -> Any:
        """The vector of these lanes of another one."""
        places = ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)

    def sums(
        self, zero: Any, rows: int, start: Any, stop: Any, step: Callable[[Any, list[list[Any]]], list[list[Any]]]
    ) -> list[list[Any]]:
        """`rows` times 64 numbers in vectors, from `zero` through `step(k, sums)` for each k of `start … stop`."""
        builder, before = self.builder, self.builder.block
        body, after = builder.append_basic_block("body"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", start, stop), body, after)
        builder.position_at_end(body)
        k = builder.phi(LONG)
        sums = [[builder.phi(zero.type) for _ in range(WIDTH // zero.type.count)] for _ in range(rows)]
        new = step(k, sums)
        following = builder.add(k, self.long(1))
        k.add_incoming(start, before)
        last = builder.block
        k.add_incoming(following, last)
        builder.cbranch(builder.icmp_signed("<", following, stop), body, after)
        builder.position_at_end(after)
        totals = [[builder.phi(zero.type) for _ in row] for row in sums]
        for phis in (sums, totals):
            for row, new_row in zip(phis, new, strict=True):
                for total, new_total in zip(row, new_row, strict=True):
                    total.add_incoming(zero, before)
                    total.add_incoming(new_total, last)
        return totals
