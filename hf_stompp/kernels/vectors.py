"""The inner loops, in LLVM's vectors of 16 lanes, as numba intrinsics.

numba does not find these loops by itself: it prefers vectors of half that length, and keeps no array in registers.
LLVM splits a vector where a processor has only shorter ones. All pointers are addresses (`array.ctypes.data`).

A *panel* holds the bits of 64 outputs, `uint32 [words, 64]`: entry `[k, n]` has the 32 weights `32·k …` of output n.
Where bits are counted by nibbles, as with AVX2, it is `uint8 [4·words, 64]`, with the 8 weights `8·k …` of output n in
entry `[k, n]`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
WIDTH = 64
"""Outputs of a panel."""

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_VECTORS = WIDTH // LANES


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


class _Block:
    """A builder with the few operations that the loops are made of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def long(self, value: int) -> Any:
        return ir.Constant(_LONG, value)

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
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))

    def call(self, name: str, result: Any, *args: Any) -> Any:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def part(self, value: Any, lanes: Sequence[int]) -> Any:
        """The vector of these lanes of another one."""
        places = ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)

    def sums(
        self, zero: Any, rows: int, start: Any, stop: Any, step: Callable[[Any, list[list[Any]]], list[list[Any]]]
    ) -> list[list[Any]]:
        """`rows` times 64 numbers in vectors, from `zero` through `step(k, sums)` for each k of `start … stop`."""
        builder, before = self.builder, self.builder.block
        body, after = builder.append_basic_block("body"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", start, stop), body, after)
        builder.position_at_end(body)
        k = builder.phi(_LONG)
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


def _by_words(block: _Block, rows: int, x: Any, x_stride: Any, panel: Any, words: Any) -> list[list[Any]]:
    """popcount(x ⊕ w) of `rows` inputs and 64 outputs, by the processor's own count."""
    builder = block.builder

    def step(k: Any, sums: list[list[Any]]) -> list[list[Any]]:
        at = builder.mul(k, block.long(WIDTH))
        weights = [block.load(panel, _INTS, builder.add(at, block.long(LANES * j))) for j in range(_VECTORS)]
        new = []
        for row, totals in enumerate(sums):
            place = builder.add(builder.mul(x_stride, block.long(row)), k)
            inputs = block.splat(block.load(x, _INT, place))
            counts = [block.call("llvm.ctpop.v16i32", _INTS, builder.xor(inputs, w)) for w in weights]
            new.append([builder.add(total, count) for total, count in zip(totals, counts, strict=True)])
        return new

    return block.sums(ir.Constant(_INTS, [0] * LANES), rows, block.long(0), words, step)


_BYTE, _BYTES = ir.IntType(8), ir.VectorType(ir.IntType(8), 32)
_IN_BYTE, _IN_SHORT = 31, 31 * 264
"""Of how many bytes each counts the bits that differ."""


def _by_nibbles(block: _Block, rows: int, x: Any, x_stride: Any, panel: Any, words: Any) -> list[list[Any]]:
    """The same by look-ups: a byte of an input chooses two tables, popcount(a ⊕ w) for the 16 values w of each nibble,
    of which 32 outputs look their entries up. Counts are bytes for a while, and then short integers."""
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
            byte = builder.zext(builder.load(builder.inttoptr(at, _BYTE.as_pointer())), _LONG)
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
_PLACES = ir.Constant(ir.VectorType(_INT, WIDTH), list(range(WIDTH)))


def _wider(block: _Block, rows: int, bits: int, length: int, count: _Count) -> _Count:
    """What counts from a start to a stop, for `rows` inputs and 64 outputs, in integers of so many bits, by `count`,
    which may do so for `length` steps at a time."""
    builder, kind = block.builder, ir.VectorType(ir.IntType(bits), WIDTH)

    def counted(start: Any, stop: Any) -> list[Any]:
        sums = [cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * WIDTH)) for _ in range(rows)]
        with cgutils.for_range_slice(builder, start, stop, block.long(length), _LONG) as (at, _):
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
    return builder.ptrtoint(constant, _LONG)


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
            block = _Block(builder)

            count = _by_nibbles if counts_nibbles() else _by_words
            sums = count(block, rows, x, x_stride, panel, words)
            factors = block.splat(factor)
            for row in range(rows):
                place = builder.load(builder.inttoptr(builder.add(offsets, block.long(8 * row)), _LONG.as_pointer()))
                for j in range(_VECTORS):
                    at = block.long(LANES * j)
                    offset = block.load(place, _INTS, builder.add(column, at))
                    whole = builder.sub(offset, builder.mul(factors, sums[row][j]))
                    y = builder.fmul(builder.sitofp(whole, _FLOATS), block.load(gain, _FLOATS, at))
                    y = builder.fadd(y, block.load(bias, _FLOATS, at))
                    start = builder.mul(out_stride, block.long(row))
                    if not bits:
                        block.store(y, out, builder.add(start, at))
                        continue
                    reached = builder.fcmp_ordered(">=", y, block.load(above, _FLOATS, at))
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
    [`features_of_lookup`] tells; an entry of a panel has as many times n bits as it can hold.

    Arguments: address of the tables, `[rows, 32 // n · words, 2^n]`, and floats from one input's to the next; the
    others as in [`popcount_tile`].
    """
    n = features_of_lookup()
    lanes, groups = 1 << n, 32 // n
    floats, ints = ir.VectorType(_FLOAT, lanes), ir.VectorType(_INT, lanes)

    def look_up(block: _Block, table: Any, codes: Any) -> Any:
        # A look-up reads the lowest n bits of its index, and leaves the others alone.
        if n == 4:
            return block.call("llvm.x86.avx512.permvar.sf.512", floats, table, codes)
        return block.call("llvm.x86.avx2.permps", floats, table, codes)

    @intrinsic
    def tile(context, table, table_stride, panel, words, gain, bias, out, out_stride):  # type: ignore
        def generate(context, builder, signature, args):  # type: ignore
            table, table_stride, panel, words, gain, bias, out, out_stride = args
            block = _Block(builder)

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
        block = _Block(builder)
        total = None
        for i in range(n):
            signs = [1.0 if index >> i & 1 else -1.0 for index in range(1 << n)]
            value = block.splat(block.load(x, _FLOAT, block.long(i)), 1 << n)
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
        one = ir.Constant(_LONG, 1)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _LONG.as_pointer()), one, "monotonic")

    return types.intp(types.intp), generate


@intrinsic
def called(context, function, operands, start, stop):  # type: ignore
    """Calls the function at an address, `void(intp, intp, intp)`."""

    def generate(context, builder, signature, args):  # type: ignore
        kind = ir.FunctionType(ir.VoidType(), [_LONG] * 3)
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
                ints = ir.VectorType(_INT, lanes)
                bits = builder.zext(load(ir.IntType(16), 0), ints)
                values = builder.shl(bits, ir.Constant(ints, [16] * lanes))
                values = builder.bitcast(values, ir.VectorType(_FLOAT, lanes))
            else:
                values = load(_FLOAT, 0)
            above = builder.fcmp_ordered(">=", values, load(_FLOAT, 2))
            return builder.zext(builder.bitcast(above, ir.IntType(lanes)), _INT)

        return types.uint32(x, types.intp, threshold), generate

    return compare


sixteen_bits, one_bit = _comparison(LANES), _comparison(1)
