"""Write kernels as LLVM IR: loops, vectors, and the numbers of codes and scales.

Vectors have 16 numbers on every processor; LLVM takes one, two or four registers for
them. Every function here appends instructions to the kernel that is being written and
returns their value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from schemes._kernels.cpu.llvm import host

#: Numbers in a vector.
WIDTH = 16

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
#: 2**8: float16 has the bits of e4m3 with an exponent bias that differs by 8.
E4M3_BOOST = 256.0
#: The least number that is not subnormal in float32 and bfloat16: 2**-126.
SMALLEST_NORMAL_BITS = 0x00800000
INFINITY_BITS = 0x7F800000


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


BF16 = _BFloat()


def vector(kind: ir.Type, width: int = WIDTH) -> ir.Type:
    """The type of a vector; of one number, the type of the number."""
    return ir.VectorType(kind, width) if width > 1 else kind


def width_of(value: ir.Value) -> int:
    """How many numbers a value has."""
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


class Loop:
    """A counted loop with values that are carried from one turn to the next.

    Attributes:
        index: the counter.
        carried: the values at the start of this turn; after the loop, the last ones.
        following: what the next turn gets; to be set in the body.
    """

    def __init__(self, index: ir.Value, carried: Sequence[ir.Value]) -> None:
        self.index = index
        self.carried = list(carried)
        self.following: list[ir.Value] = []


class Function:
    """A kernel that is being written, as `llvm.Kernel` describes it.

    Args:
        name: of the kernel.
        integers: names of the arguments that are int64 (addresses too), in order.
        floats: names of those that are float32, after the others.
        head: names of the three arguments before all of them.
    """

    def __init__(
        self,
        name: str,
        integers: str,
        floats: str = "",
        head: str = "first last scratch",
    ) -> None:
        self.name = name
        self.kinds = "i" * len(integers.split()) + "f" * len(floats.split())
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), [I64])
        function = ir.Function(self.module, kind, name)
        self.block = function.args[0]
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        names = f"{head} {integers} {floats}".split()
        self.args = {
            name: self.load(self.add(self.block, 8 * at), F32 if kind == "f" else I64)
            for at, (name, kind) in enumerate(
                zip(names, "iii" + self.kinds, strict=True)
            )
        }

    def __getitem__(self, name: str) -> ir.Value:
        return self.args[name]

    # -- integers and control flow -----------------------------------------------------

    def integer(self, value: int | ir.Value) -> ir.Value:
        """An int64."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add(self, *terms: int | ir.Value) -> ir.Value:
        """The sum of int64."""
        total = self.integer(terms[0])
        for term in terms[1:]:
            total = self.b.add(total, self.integer(term))
        return total

    def mul(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        """The product of int64."""
        return self.b.mul(a, self.integer(b))

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The lesser of two int64."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    @contextmanager
    def loop(
        self,
        start: int | ir.Value,
        stop: ir.Value,
        step: int | ir.Value = 1,
        carried: Sequence[ir.Value] = (),
    ) -> Iterator[Loop]:
        """``for index in range(start, stop, step)``; the body is what is written."""
        b = self.b
        before = b.block
        head, body, after = (
            b.append_basic_block(name) for name in ("head", "body", "after")
        )
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        phis = [b.phi(value.type) for value in carried]
        b.cbranch(b.icmp_signed("<", index, self.integer(stop)), body, after)
        b.position_at_end(body)
        turn = Loop(index, phis)
        yield turn
        advanced = b.add(index, self.integer(step))
        index.add_incoming(self.integer(start), before)
        index.add_incoming(advanced, b.block)
        for phi, first, last in zip(phis, carried, turn.following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(last, b.block)
        b.branch(head)
        b.position_at_end(after)

    def if_else(
        self,
        condition: ir.Value,
        then: Callable[[], object],
        otherwise: Callable[[], object],
    ) -> None:
        """Run one of two."""
        with self.b.if_else(condition) as (yes, no):
            with yes:
                then()
            with no:
                otherwise()

    def leave_if(self, condition: ir.Value, value: int) -> None:
        """Return from the kernel at once."""
        with self.b.if_then(condition):
            self.done(value)

    def done(self, value: int = 0) -> Function:
        """Return from the kernel."""
        self.store(self.integer(value), self.block)
        self.b.ret_void()
        return self

    # -- memory ------------------------------------------------------------------------

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """What is at an address, which need not be aligned."""
        pointer = self.b.inttoptr(address, kind.as_pointer())
        return self.b.load(pointer, align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write to an address, which need not be aligned."""
        pointer = self.b.inttoptr(address, value.type.as_pointer())
        self.b.store(value, pointer, align=1)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for memory that is read soon; no address is wrong."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        numbers = [ir.Constant(I32, number) for number in (0, 3, 1)]  # read, keep, data
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *numbers)

    def copy(self, source: ir.Value, target: ir.Value, nbytes: ir.Value) -> None:
        """Copy a few bytes."""
        with self.loop(0, nbytes) as at:
            byte = self.load(self.add(source, at.index), I8)
            self.store(byte, self.add(target, at.index))

    # -- vectors -----------------------------------------------------------------------

    def constant(self, value: float, kind: ir.Type) -> ir.Constant:
        """A number, or a vector of equal numbers."""
        if isinstance(kind, ir.VectorType):
            return ir.Constant(kind, [value] * kind.count)
        return ir.Constant(kind, value)

    def splat(self, value: ir.Value, width: int = WIDTH) -> ir.Value:
        """A vector of equal numbers."""
        if width == 1:
            return value
        kind = vector(value.type, width)
        one = self.b.insert_element(
            ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.shuffle(one, one, [0] * width)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """The lanes of two vectors, those of the second after those of the first.

        A single lane is one of the first.
        """
        if len(lanes) == 1:
            return self.b.extract_element(a, ir.Constant(I32, lanes[0]))
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return self.b.shuffle_vector(a, b, mask)

    def part(self, value: ir.Value, start: int, width: int = WIDTH) -> ir.Value:
        """Some lanes of a vector."""
        if width_of(value) == width:
            return value
        return self.shuffle(value, value, range(start, start + width))

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        function = self.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [arg.type for arg in args])
            function = ir.Function(self.module, kind, name)
        return self.b.call(function, args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{width_of(a)}f32", a.type, a, b, c)

    def absolute(self, value: ir.Value) -> ir.Value:
        """Numbers without their signs."""
        bits = self.bits(value)
        return self.real(self.b.and_(bits, self.constant(0x7FFFFFFF, bits.type)))

    def reduce(
        self, value: ir.Value, op: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """Combine the lanes of a vector to one number."""
        width = width_of(value)
        while width > 1:
            width //= 2
            half = self.shuffle(value, value, range(width, 2 * width))
            value = op(self.shuffle(value, value, range(width)), half)
        return value

    def sum_sixteen(self, address: ir.Value) -> ir.Value:
        """The sums of 16 vectors at an address, as one vector."""
        values = [
            self.load(self.add(address, 4 * WIDTH * at), vector(F32))
            for at in range(WIDTH)
        ]
        # Of two vectors, lanes that are apart by half as much as before are added; the
        # sums of the first stay in the lower, those of the second in the upper lane.
        apart = 1
        while len(values) > 1:
            lower = [
                WIDTH + lane - apart if lane & apart else lane for lane in range(WIDTH)
            ]
            upper = [
                WIDTH + lane if lane & apart else lane + apart for lane in range(WIDTH)
            ]
            values = [
                self.b.fadd(self.shuffle(a, b, lower), self.shuffle(a, b, upper))
                for a, b in zip(values[::2], values[1::2], strict=True)
            ]
            apart *= 2
        return values[0]

    def bits(self, value: ir.Value) -> ir.Value:
        """The bits of float32 as int32."""
        return self.b.bitcast(value, vector(I32, width_of(value)))

    def real(self, bits: ir.Value) -> ir.Value:
        """The float32 of some bits."""
        return self.b.bitcast(bits, vector(F32, width_of(bits)))

    # -- numbers of codes and scales ---------------------------------------------------

    def widen(self, value: ir.Value, kind: str) -> ir.Value:
        """float32 of a vector as it is in memory; of e4m3, divided by `E4M3_BOOST`.

        Args:
            value: a vector of `memory_type`.
            kind: f32, bf16, f16, e8m0, e4m3, e5m2 or int8.
        """
        b, n = self.b, width_of(value)
        floats = vector(F32, n)
        if kind == "f32":
            return value
        if kind == "f16":
            return b.fpext(value, floats)
        if kind == "int8":
            return b.sitofp(b.sext(value, vector(I32, n)), floats)
        if kind == "bf16":
            wide = b.zext(value, vector(I32, n))
            return b.bitcast(b.shl(wide, self.constant(16, wide.type)), floats)
        if kind == "e8m0":
            wide = b.zext(value, vector(I32, n))
            exponent = b.shl(wide, self.constant(23, wide.type))
            zero = b.icmp_signed("==", wide, self.constant(0, wide.type))
            # its least number, 2**-127, is subnormal
            least = self.constant(1 << 22, wide.type)
            return b.bitcast(b.select(zero, least, exponent), floats)
        # The bits of FP8, shifted, are those of float16 with the same exponent or with
        # one that is 8 less; so are those of subnormal numbers.
        short = b.sext(value, vector(I16, n))
        shift, mask = (7, -0x8000 | 0x3F80) if kind == "e4m3" else (8, -0x100)
        short = b.shl(short, self.constant(shift, short.type))
        if kind == "e4m3":
            short = b.and_(short, self.constant(mask, short.type))
        return b.fpext(b.bitcast(short, vector(F16, n)), floats)

    def lookup(self, table: list[ir.Value], index: ir.Value) -> ir.Value:
        """Of 16 float32 those at an index, of which only four bits count.

        Args:
            table: from `load_table`.
            index: a vector of int32.
        """
        if host().permute16:
            name = "llvm.x86.avx512.permvar.sf.512"
            return self.call(name, vector(F32), table[0], index)
        if host().permute8:
            return self._lookup_twice(table, index)
        # no instruction: lane by lane
        value = ir.Constant(vector(F32), ir.Undefined)
        for lane in range(WIDTH):
            at = ir.Constant(I32, lane)
            one = self.b.and_(
                self.b.extract_element(index, at), ir.Constant(I32, WIDTH - 1)
            )
            number = self.b.extract_element(table[0], one)
            value = self.b.insert_element(value, number, at)
        return value

    def _lookup_twice(self, table: list[ir.Value], index: ir.Value) -> ir.Value:
        b, halves = self.b, []
        for start in (0, 8):
            part = self.part(index, start, 8)
            low, high = (
                self.call("llvm.x86.avx2.permps", vector(F32, 8), numbers, part)
                for numbers in table[1:]
            )
            eight = self.constant(8, part.type)
            upper = b.icmp_signed(
                "!=", b.and_(part, eight), self.constant(0, part.type)
            )
            halves.append(b.select(upper, high, low))
        return self.shuffle(halves[0], halves[1], range(WIDTH))

    def load_table(self, address: ir.Value) -> list[ir.Value]:
        """16 float32 for `lookup`: whole, and in halves."""
        whole = self.load(address, vector(F32))
        return [whole, self.part(whole, 0, 8), self.part(whole, 8, 8)]

    # -- rounding ----------------------------------------------------------------------

    def narrow(self, value: ir.Value, kind: str, exact: bool) -> ir.Value:
        """Round a vector of float32 to nearest even.

        Args:
            value: numbers that are not NaN; 16 unless ``exact``.
            kind: f32, bf16 or f16.
            exact: whether bfloat16 may be subnormal, which its instruction flushes.
        """
        b = self.b
        if kind == "f32":
            return value
        width = width_of(value)
        if kind == "f16":
            return b.fptrunc(value, vector(F16, width))
        if host().bf16 and not exact:
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            return b.bitcast(self.call(name, vector(BF16), value), vector(I16))
        bits = self.bits(value)
        wide = bits.type
        odd = b.and_(b.lshr(bits, self.constant(16, wide)), self.constant(1, wide))
        bits = b.add(b.add(bits, self.constant(0x7FFF, wide)), odd)
        return b.trunc(b.lshr(bits, self.constant(16, wide)), vector(I16, width))


def memory_type(kind: str, width: int) -> ir.Type:
    """The type of a vector in memory: bits for what LLVM has no numbers for."""
    types = {"f32": F32, "f16": F16, "bf16": I16}
    return vector(types.get(kind, I8), width)


#: Bytes of a number.
SIZES = {"f32": 4, "bf16": 2, "f16": 2, "e8m0": 1, "e4m3": 1, "e5m2": 1, "int8": 1}
