"""The inner loops, in LLVM's vectors of 16 lanes, as numba intrinsics.

numba does not find these loops by itself: it prefers vectors of half that length, and keeps no array in registers.

A *panel* holds the bits of 64 outputs, `uint32 [words, 64]`: entry `[k, n]` has the 32 weights `32·k …` of output n.
Where bits are counted by nibbles, as with AVX2, it is `uint8 [4·words, 64]`, with the 8 weights `8·k …` of output n in
entry `[k, n]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_stompp.kernels.blocks import FLOAT, FLOATS, INT, INTS, LANES, LONG, WIDTH, Block
from hf_stompp.kernels.nibbles import by_nibbles
from hf_stompp.kernels.processor import counts_nibbles, features_of_lookup

_VECTORS = WIDTH // LANES


def _by_words(block: Block, rows: int, x: Any, x_stride: Any, panel: Any, words: Any) -> list[list[Any]]:
    """popcount(x ⊕ w) of `rows` inputs and 64 outputs, by the processor's own count."""
    builder = block.builder

    def step(k: Any, sums: list[list[Any]]) -> list[list[Any]]:
        at = builder.mul(k, block.long(WIDTH))
        weights = [block.load(panel, INTS, builder.add(at, block.long(LANES * j))) for j in range(_VECTORS)]
        new = []
        for row, totals in enumerate(sums):
            place = builder.add(builder.mul(x_stride, block.long(row)), k)
            inputs = block.splat(block.load(x, INT, place))
            counts = [block.call("llvm.ctpop.v16i32", INTS, builder.xor(inputs, w)) for w in weights]
            new.append([builder.add(total, count) for total, count in zip(totals, counts, strict=True)])
        return new

    return block.sums(ir.Constant(INTS, [0] * LANES), rows, block.long(0), words, step)


@functools.cache
def popcount_tile(rows: int, bits: bool) -> Any:
    """`rows` inputs by 64 outputs: y = gain · (offset - factor · popcount(x ⊕ w)) + bias, the integer part exact; or,
    with `bits`, whether y is at or above a threshold.

    Arguments: address of the inputs' bits and words from one input to the next; address of the panel and its words;
    address of the inputs' addresses of offsets (int32, of all outputs); addresses of the gains and biases of the 64
    outputs, and of their thresholds; the factor (int32); address of the result, floats or two words of bits, and
    entries of 4 bytes from one row of it to the next; the first output.
    """

    @intrinsic
    def tile(context, x, x_stride, panel, words, offsets, gain, bias, above, factor, out, out_stride, column):  # type: ignore
        def generate(context, builder, signature, args):  # type: ignore
            x, x_stride, panel, words, offsets, gain, bias, above, factor, out, out_stride, column = args
            block = Block(builder)

            count = by_nibbles if counts_nibbles() else _by_words
            sums = count(block, rows, x, x_stride, panel, words)
            factors = block.splat(factor)
            for row in range(rows):
                place = builder.load(builder.inttoptr(builder.add(offsets, block.long(8 * row)), LONG.as_pointer()))
                for j in range(_VECTORS):
                    at = block.long(LANES * j)
                    offset = block.load(place, INTS, builder.add(column, at))
                    whole = builder.sub(offset, builder.mul(factors, sums[row][j]))
                    y = builder.fmul(builder.sitofp(whole, FLOATS), block.load(gain, FLOATS, at))
                    y = builder.fadd(y, block.load(bias, FLOATS, at))
                    start = builder.mul(out_stride, block.long(row))
                    if not bits:
                        block.store(y, out, builder.add(start, at))
                        continue
                    reached = builder.fcmp_ordered(">=", y, block.load(above, FLOATS, at))
                    half = builder.bitcast(reached, ir.IntType(LANES))
                    address = builder.add(out, builder.add(builder.mul(start, block.long(4)), block.long(2 * j)))
                    builder.store(half, builder.inttoptr(address, half.type.as_pointer()))
            return context.get_dummy_value()

        place = types.intp
        return types.void(*[place] * 8, types.int32, *[place] * 3), generate

    return tile


@functools.cache
def lookup_tile(rows: int) -> Any:
    """`rows` inputs by 64 outputs: y = gain · Σ ±x + bias, from tables of the sums of each n features, of which
    [`~processor.features_of_lookup`] tells; an entry of a panel has as many times n bits as it can hold.

    Arguments: address of the tables, `[rows, 32 // n · words, 2^n]`, and floats from one input's to the next; the
    others as in [`popcount_tile`].
    """
    n = features_of_lookup()
    lanes, groups = 1 << n, 32 // n
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT, lanes)

    def look_up(block: Block, table: Any, codes: Any) -> Any:
        # A look-up reads the lowest n bits of its index, and leaves the others alone.
        if n == 4:
            return block.call("llvm.x86.avx512.permvar.sf.512", floats, table, codes)
        return block.call("llvm.x86.avx2.permps", floats, table, codes)

    @intrinsic
    def tile(context, table, table_stride, panel, words, gain, bias, out, out_stride):  # type: ignore
        def generate(context, builder, signature, args):  # type: ignore
            table, table_stride, panel, words, gain, bias, out, out_stride = args
            block = Block(builder)

            def step(k: Any, sums: list[list[Any]]) -> list[list[Any]]:
                at = builder.mul(k, block.long(WIDTH))
                places = [builder.add(at, block.long(column)) for column in range(0, WIDTH, lanes)]
                weights = [block.load(panel, ints, place) for place in places]
                for group in range(groups):
                    codes = [builder.lshr(w, ir.Constant(ints, [n * group] * lanes)) for w in weights]
                    place = builder.add(builder.mul(k, block.long(groups * lanes)), block.long(lanes * group))
                    new = []
                    for row, totals in enumerate(sums):
                        start = builder.add(builder.mul(table_stride, block.long(row)), place)
                        values = block.load(table, floats, start)
                        found = [look_up(block, values, code) for code in codes]
                        new.append([builder.fadd(total, value) for total, value in zip(totals, found, strict=True)])
                    sums = new
                return sums

            sums = block.sums(ir.Constant(floats, [0.0] * lanes), rows, block.long(0), words, step)
            for row in range(rows):
                for j, total in enumerate(sums[row]):
                    at = block.long(lanes * j)
                    y = builder.fmul(total, block.load(gain, floats, at))
                    y = builder.fadd(y, block.load(bias, floats, at))
                    block.store(y, out, builder.add(builder.mul(out_stride, block.long(row)), at))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return tile


def ladder(tile: Callable[[int], Any], rows: int) -> Any:
    """Of the tiles of `rows`, two and one rows, the highest that fits into how many are left; returns how many."""
    highest, two, one = tile(rows), tile(2), tile(1)

    @numba.njit(nogil=True)
    def step(left, *args):  # type: ignore[no-untyped-def]
        if left >= rows:
            highest(*args)
            return rows
        if left >= 2:
            two(*args)
            return 2
        one(*args)
        return 1

    return step


@intrinsic
def sums_of_signs(context, x, table):  # type: ignore
    """Writes the 2^n sums ±x₀ ±x₁ … of the n floats at `x`: bit i of an index is the sign of xᵢ."""
    n = features_of_lookup()

    def generate(context, builder, signature, args):  # type: ignore
        x, table = args
        block = Block(builder)
        total = None
        for i in range(n):
            signs = [1.0 if index >> i & 1 else -1.0 for index in range(1 << n)]
            value = block.splat(block.load(x, FLOAT, block.long(i)), 1 << n)
            term = builder.fmul(value, ir.Constant(value.type, signs))
            total = term if total is None else builder.fadd(total, term)
        block.store(total, table, block.long(0))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def pointer(context, address):  # type: ignore
    """The address as a pointer, for `numba.carray`."""

    def generate(context, builder, signature, args):  # type: ignore
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def increased(context, address):  # type: ignore
    """The int64 at the address, which is one more afterwards; of several threads each gets another one."""

    def generate(context, builder, signature, args):  # type: ignore
        one = ir.Constant(LONG, 1)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], LONG.as_pointer()), one, "monotonic")

    return types.intp(types.intp), generate


@intrinsic
def called(context, function, operands, start, stop):  # type: ignore
    """Calls the function at an address, `void(intp, intp, intp)`."""

    def generate(context, builder, signature, args):  # type: ignore
        kind = ir.FunctionType(ir.VoidType(), [LONG] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _comparison(lanes: int) -> Any:
    """Bit i of the result: whether `x[at + i]` is at or above `threshold[at + i]`, for `lanes` of them; NaN is not.

    `x` is of float32, or of uint16, which stands for bfloat16: the upper half of a float32.
    """

    @intrinsic
    def compare(context, x, at, threshold):  # type: ignore
        halves = x.dtype == types.uint16

        def generate(context, builder, signature, args):  # type: ignore
            def load(kind: Any, place: int) -> Any:
                array = context.make_array(signature.args[place])(context, builder, args[place])
                vector = builder.bitcast(builder.gep(array.data, [args[1]]), ir.VectorType(kind, lanes).as_pointer())
                value = builder.load(vector)
                value.align = kind.width // 8 if isinstance(kind, ir.IntType) else 4
                return value

            if halves:
                ints = ir.VectorType(INT, lanes)
                bits = builder.zext(load(ir.IntType(16), 0), ints)
                values = builder.shl(bits, ir.Constant(ints, [16] * lanes))
                values = builder.bitcast(values, ir.VectorType(FLOAT, lanes))
            else:
                values = load(FLOAT, 0)
            above = builder.fcmp_ordered(">=", values, load(FLOAT, 2))
            return builder.zext(builder.bitcast(above, ir.IntType(lanes)), INT)

        return types.uint32(x, types.intp, threshold), generate

    return compare


sixteen_bits, one_bit = _comparison(LANES), _comparison(1)
