"""AMD's pseudocode of instructions, evaluated for one lane at a time: what the executor is tested against.

The text is AMD's, from the ISA documents, as tinygrad distributes it. It names some functions without defining them
(``fma``, ``isNAN``, ``f32_to_fp8``); those are below, on exact numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

from .formats import BF16, E4M3FN, E4M3FNUZ, F16, F32, F64, Format

FLOATS: dict[tuple[str, int], Format] = {("f", 64): F64, ("f", 32): F32, ("f", 16): F16, ("bf", 16): BF16}


@dataclass(frozen=True)
class Value:
    """Bits and how they are read: kind ``u``, ``i``, ``b`` (bits), ``f`` or ``bf``; or an exact number that has no
    width yet (``exact``)."""

    kind: str
    width: int
    bits: int = 0
    exact: Fraction | float | None = None

    @property
    def is_float(self) -> bool:
        return self.exact is not None or self.kind in ("f", "bf")

    @property
    def number(self) -> Fraction | float:
        """Its value: a fraction, or a float for -0, infinities and NaN."""
        if self.exact is not None:
            return self.exact
        if self.kind in ("f", "bf"):
            return FLOATS[self.kind, self.width].decode(self.bits)
        return Fraction(self.integer)

    @property
    def integer(self) -> int:
        signed = self.kind == "i" and self.bits >> (self.width - 1)
        return self.bits - (1 << self.width) if signed else self.bits


def integer(value: int, kind: str = "i", width: int = 64) -> Value:
    return Value(kind, width, value & ((1 << width) - 1))


def floating(value: Fraction | float, kind: str = "f", width: int = 32) -> Value:
    return Value(kind, width, FLOATS[kind, width].encode(value))


def flag(condition: bool) -> Value:
    return Value("u", 1, int(condition))


class UnsaidError(Exception):
    """The pseudocode does not say what this is."""


@dataclass
class Lane:
    """What an instruction sees.

    registers: bits by name: S0, S1, S2, D0, SCC, VCC, EXEC, SIMM16, SIMM32, OPSEL ...
    modes:     WAVE_MODE.IEEE and other state by name.
    vgprs:     [lane][register], for instructions that read other lanes.
    memory:    a byte for each address.
    lane:      its number.
    fp8:       the GPU's format; saturates: MODE.FP16_OVFL.
    """

    registers: dict[str, Any]
    modes: dict[str, int] = field(default_factory=lambda: {"WAVE_MODE.IEEE": 1})
    vgprs: list[list[int]] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)
    lane: int = 0
    fp8: Format = E4M3FNUZ
    saturates: bool = False


TOKEN = re.compile(
    r"""(?P<sized>\d+'(?:0x[0-9a-fA-F]+|\d+\.\d+|\d+)?(?:[UIFB]+)?)
    |(?P<number>0x[0-9a-fA-F]+|\d+\.\d+F?|\d+)(?P<tail>ULL|LL|U|F)?
    |(?P<name>[A-Za-z_]\w*(?:\.(?!(?:u|i|b|f|bf|fp|bf)\d+\b)[A-Za-z_]\w*)*)
    |(?P<suffix>\.(?:u|i|b|f|bf|fp)\d+)
    |(?P<op>\*\*|<<|>>|<>|==|!=|<=|>=|\+=|-=|\|\||&&|[-+*/%&|^~!?:=<>(){}\[\],;])
    |(?P<space>\s+)""",
    re.VERBOSE,
)
# What binds how strongly; all but ?: from the left.
BINDING = {
    op: strength
    for strength, ops in enumerate(
        ("||", "&&", "|", "^", "&", "== != <>", "< <= > >=", "<< >>", "+ -", "* / %", "**"), start=2
    )
    for op in ops.split()
}


@cache
def tokens(text: str) -> tuple[tuple[str, str], ...]:
    """(kind, text) of each token; statements end in ``;`` or, after ``then``, ``do`` and ``else``, need not."""
    text = re.sub(r"//[^\n]*", "", text)
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise UnsaidError(f"no token at {text[at : at + 30]!r}")
        kind = next(name for name in ("sized", "number", "name", "suffix", "op", "space") if match[name] is not None)
        if kind != "space":
            found.append((kind, match[0]))
        at = match.end()
    return tuple(found)


class ReturnedError(Exception):
    def __init__(self, value: Value) -> None:
        self.value = value


Expression = Callable[["Evaluation"], Value]
Statement = Callable[["Evaluation"], None]


class Parser:
    """Recursive descent to closures."""

    def __init__(self, found: tuple[tuple[str, str], ...]) -> None:
        self.tokens, self.at = found, 0

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at][1] if at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        text = self.peek()
        if not text or (expected and text != expected):
            raise UnsaidError(f"expected {expected or 'more'}, found {text!r}")
        self.at += 1
        return text

    def block(self, *ends: str) -> list[Statement]:
        found = []
        while self.peek() and self.peek() not in ends:
            if self.peek() == ";":
                self.take()
            else:
                found.append(self.statement())
        return found

    def statement(self) -> Statement:
        word = self.peek()
        if word == "if":
            return self.conditional()
        if word == "for":
            return self.loop()
        if word == "declare":
            return self.declaration()
        if word == "return":
            self.take()
            result = self.expression()

            def give(run: Evaluation) -> None:
                raise ReturnedError(result(run))

            return give
        if self.peek(1) == "=" and self.peek(2) == "lambda":
            return self.function()
        if word == "nop":
            self.expression()
            return lambda run: None
        return self.assignment()

    def conditional(self) -> Statement:
        branches: list[tuple[Expression | None, list[Statement]]] = []
        while self.peek() in ("if", "elsif", "else"):
            word = self.take()
            condition = None if word == "else" else self.expression()
            if word != "else":
                self.take("then")
            branches.append((condition, self.block("elsif", "else", "endif")))
        self.take("endif")

        def run_branch(run: Evaluation) -> None:
            for condition, body in branches:
                if condition is None or condition(run).bits:
                    for statement in body:
                        statement(run)
                    return

        return run_branch

    def loop(self) -> Statement:
        self.take("for")
        name = self.take()
        self.take("in")
        first = self.expression(1)
        self.take(":")
        last = self.expression(1)
        self.take("do")
        body = self.block("endfor")
        self.take("endfor")

        def run_loop(run: Evaluation) -> None:
            for i in range(first(run).integer, last(run).integer + 1):
                run.locals[name] = integer(i, "i", 32)
                for statement in body:
                    statement(run)

        return run_loop

    def declaration(self) -> Statement:
        self.take("declare")
        name = self.take()
        self.take(":")
        sized = self.take()
        count = 0
        if self.peek() == "[":
            self.take()
            count = int(self.take())
            self.take("]")
        width, kind = sized.split("'")

        def declare(run: Evaluation) -> None:
            if name not in run.lane.registers:
                value = Value(kind.lower(), int(width))
                run.locals[name] = [value] * count if count else value

        return declare

    def function(self) -> Statement:
        name = self.take()
        self.take("=")
        self.take("lambda")
        self.take("(")
        parameters = []
        while self.peek() != ")":
            parameters.append(self.take())
            if self.peek() == ",":
                self.take()
        self.take(")")
        self.take("(")
        body = self.block(")")
        self.take(")")

        def call(run: Evaluation, *arguments: Value) -> Value:
            inner = Evaluation(run.lane, dict(zip(parameters, arguments, strict=True)))
            try:
                for statement in body:
                    statement(inner)
            except ReturnedError as returned:
                return returned.value
            raise UnsaidError(f"{name} returns nothing")

        def define(run: Evaluation) -> None:
            run.functions[name] = call

        return define

    def assignment(self) -> Statement:
        if self.peek() == "{":  # the parts of one result
            self.take()
            parts = [self.place()]
            while self.peek() == ",":
                self.take()
                parts.append(self.place())
            self.take("}")
            self.take("=")
            whole = self.expression()

            def split(run: Evaluation) -> None:
                bits = whole(run).bits
                for store, _, width in reversed(parts):
                    store(run, Value("b", width, bits & ((1 << width) - 1)))
                    bits >>= width

            return split
        store, load, _ = self.place()
        operator = self.take()
        value = self.expression()
        if operator == "=":
            return lambda run: store(run, value(run))
        if operator in ("+=", "-="):
            return lambda run: store(run, arithmetic(operator[0], load(run), value(run)))
        raise UnsaidError(f"{operator} is no assignment")

    def accessors(self) -> list[Any]:
        """What follows a name: indices, slices and suffixes."""
        found: list[Any] = []
        while self.kind() == "suffix" or self.peek() == "[":
            if self.kind() == "suffix":
                kind, width = re.fullmatch(r"\.([a-z]+)(\d+)", self.take()).groups()  # type: ignore[union-attr]
                found.append(("suffix", "b" if kind == "fp" else kind, int(width)))
                continue
            self.take("[")
            first = self.expression()
            if self.peek() == ":":
                self.take()
                found.append(("slice", first, self.expression()))
            else:
                found.append(("index", first))
            self.take("]")
        return found

    def place(self) -> tuple[Callable[[Evaluation, Value], None], Expression, int]:
        """(store, load, width if a suffix says it) of what can be assigned to."""
        name = self.take()
        steps = self.accessors()
        width = next((step[2] for step in reversed(steps) if step[0] == "suffix"), 64)
        return (lambda run, value: run.store(name, steps, value)), (lambda run: run.load(name, steps)), width

    def expression(self, least: int = 0) -> Expression:
        left = self.unary()
        while True:
            operator = self.peek()
            if operator == "?" and least <= 1:
                self.take()
                yes = self.expression(1)
                self.take(":")
                no = self.expression(1)
                condition = left
                left = lambda run, c=condition, y=yes, n=no: y(run) if c(run).bits else n(run)  # noqa: E731
                continue
            strength = BINDING.get(operator)
            if strength is None or strength < max(least, 2):
                return left
            self.take()
            right = self.expression(strength + 1)
            left = lambda run, o=operator, a=left, b=right: operation(o, a, b, run)  # noqa: E731

    def unary(self) -> Expression:
        operator = self.peek()
        if operator in ("-", "+"):
            self.take()
            if self.kind() == "number" and "." in self.peek():  # a literal with a sign: ``-0.0`` is not ``+0.0``
                literal = self.literal()
                number = float(literal.number)
                signed = Value("f", 64, exact=-number if operator == "-" else number)
                return lambda run: signed
            value = self.expression(12)
            if operator == "+":
                return value
            return lambda run: negative(value(run))
        if operator in ("!", "~"):
            self.take()
            value = self.expression(12)
            if operator == "!":
                return lambda run: flag(not value(run).bits)

            def invert(run: Evaluation) -> Value:
                given = value(run)
                return Value(given.kind, given.width, ~given.bits & ((1 << given.width) - 1))

            return invert
        return self.primary()

    def literal(self) -> Value:
        text = self.take()
        if "." in text:
            return Value("f", 32 if text.endswith("F") else 64, exact=Fraction(text.rstrip("F")))
        kind = "u" if "U" in text else "i"
        return integer(int(re.sub(r"[ULF]+$", "", text) if not text.startswith("0x") else text.rstrip("UL"), 0), kind)

    def primary(self) -> Expression:
        kind, text = self.kind(), self.peek()
        if kind == "number":
            value = self.literal()
            return lambda run: value
        if kind == "sized":
            return self.sized()
        if text == "(":
            self.take()
            inner = self.expression()
            self.take(")")
            return self.read(inner)
        if text == "{":
            self.take()
            parts = [self.expression()]
            while self.peek() == ",":
                self.take()
                parts.append(self.expression())
            self.take("}")

            def joined(run: Evaluation) -> Value:
                bits = width = 0
                for value in (part(run) for part in parts):
                    bits, width = bits << value.width | value.bits, width + value.width
                return Value("b", width, bits)

            return joined
        if kind != "name":
            raise UnsaidError(f"{text!r} begins no expression")
        name = self.take()
        if self.peek() == "(":
            self.take()
            arguments = []
            while self.peek() != ")":
                arguments.append(self.expression())
                if self.peek() == ",":
                    self.take()
            self.take(")")
            return self.read(lambda run: run.call(name, [argument(run) for argument in arguments]))
        steps = self.accessors()
        return lambda run: run.load(name, steps)

    def read(self, inner: Expression) -> Expression:
        steps = self.accessors()
        return (lambda run: run.reach(inner(run), steps)) if steps else inner

    def sized(self) -> Expression:
        """``16'4`` and ``1'1U``, a literal of so many bits; ``32'F(x)``, a conversion."""
        width, rest = self.take().split("'")
        if rest in ("U", "I", "F", "B", "BF"):
            self.take("(")
            inner = self.expression()
            self.take(")")
            return self.read(lambda run: converted(inner(run), rest.lower(), int(width)))
        value = integer(int(rest.rstrip("UI"), 0), "u", int(width))
        return lambda run: value


def converted(value: Value, kind: str, width: int) -> Value:
    """A value as another type."""
    if kind in ("f", "bf"):
        if not value.is_float:  # bits: nothing converts integers in this way
            return Value(kind, width, value.bits & ((1 << width) - 1))
        if value.exact is None and _is_nan(value):  # with its sign and the first bits of its fraction
            old, new = FLOATS[value.kind, value.width], FLOATS[kind, width]
            sign, fraction = value.bits >> (old.width - 1), value.bits & ((1 << old.fraction) - 1)
            shift = new.fraction - old.fraction
            fraction = fraction << shift if shift >= 0 else fraction >> -shift
            return Value(kind, width, sign << (new.width - 1) | new.infinity | fraction)
        return floating(value.number, kind, width)
    if value.is_float and kind == "b":
        return Value(kind, width, value.bits)
    if value.is_float:
        raise UnsaidError("a conversion from floating point to integers")
    return integer(value.integer, kind, width)


def negative(value: Value) -> Value:
    if value.is_float:
        number = value.number
        exact = -float(number) if isinstance(number, float) or number == 0 else -number
        return (
            Value(value.kind, value.width, exact=exact)
            if value.exact is not None
            else floating(exact, value.kind, value.width)
        )
    return integer(-value.integer, value.kind, value.width)


def _float_of(a: Value, b: Value) -> tuple[str, int]:
    """The type of a floating-point result: that of the operand that has one, a literal's otherwise."""
    typed = [v for v in (a, b) if v.is_float and v.exact is None]
    widest = max(typed or [v for v in (a, b) if v.is_float], key=lambda v: v.width)
    return widest.kind, widest.width


def sign_of(x: Fraction | float) -> float:
    """1 or -1; that of a zero counts where it has one."""
    return math.copysign(1.0, x) if isinstance(x, float) else -1.0 if x < 0 else 1.0


def exact(operator: str, x: Fraction | float, y: Fraction | float) -> Fraction | float:
    """x operator y, exactly; by the rules of IEEE 754 for zeros, infinities and NaN."""
    special = isinstance(x, float) or isinstance(y, float)
    if operator in ("+", "-"):
        if special:
            big = [v for v in (x, y) if isinstance(v, float) and not math.isfinite(v)]
            zeros = all(v == 0 for v in (x, y))
            if big or zeros:
                finite = [v if isinstance(v, float) else 0.0 for v in (x, y)]
                return finite[0] + finite[1] if operator == "+" else finite[0] - finite[1]
        return Fraction(x) + Fraction(y) if operator == "+" else Fraction(x) - Fraction(y)
    signs = sign_of(x) * sign_of(y)
    if operator == "*":
        if any(isinstance(v, float) and not math.isfinite(v) for v in (x, y)):
            return _sign_or_zero(x) * _sign_or_zero(y)
        return Fraction(x) * Fraction(y) if x and y else math.copysign(0.0, signs)
    if any(isinstance(v, float) and math.isnan(v) for v in (x, y)):
        return math.nan
    infinite = [isinstance(v, float) and math.isinf(v) for v in (x, y)]
    if all(infinite) or (not x and not y):
        return math.nan
    if infinite[0] or not y:
        return math.copysign(math.inf, signs)
    return Fraction(x) / Fraction(y) if x and not infinite[1] else math.copysign(0.0, signs)


def _sign_or_zero(x: Fraction | float) -> float:
    """A factor that behaves like x beside an infinity or a NaN."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    return sign_of(x) if x else math.copysign(0.0, sign_of(x))


def arithmetic(operator: str, a: Value, b: Value) -> Value:
    if a.is_float or b.is_float:
        kind, width = _float_of(a, b)
        if operator == "**":
            power = min(max(b.integer, -2000), 2000)  # beyond, everything is 0 or infinite
            return Value("f", width, exact=Fraction(a.number) ** power)
        result = exact(operator, a.number, b.number)
        # beside a literal nothing is rounded before the result is stored: ``floor(x + 0.5F)`` would else be wrong
        literal = a.exact is not None or b.exact is not None
        return Value(kind, width, exact=result) if literal else floating(result, kind, width)
    x, y, width = a.integer, b.integer, max(a.width, b.width)
    kind = "u" if "u" in (a.kind, b.kind) else a.kind
    results = {
        "+": lambda: x + y,
        "-": lambda: x - y,
        "*": lambda: x * y,
        "/": lambda: x // y,
        "%": lambda: x % y,
    }
    return integer(results[operator](), kind, width)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
    "<>": lambda x, y: x < y or x > y,  # of numbers: not of NaN
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
}


def operation(operator: str, left: Expression, right: Expression, run: Evaluation) -> Value:
    a = left(run)
    if operator == "&&":
        return flag(bool(a.bits) and bool(right(run).bits))
    if operator == "||":
        return flag(bool(a.bits) or bool(right(run).bits))
    b = right(run)
    if operator in COMPARISONS:
        if b.kind == "denormal":
            form = FLOATS["f", a.width]
            number = a.number
            return flag(0 < abs(number) < Fraction(2) ** (1 - form.bias))
        if isinstance(b.exact, float) and b.exact == 0 and operator == "==":  # ``== -0.0``: its sign counts
            number = a.number
            return flag(number == 0 and sign_of(number) == sign_of(b.exact))
        x, y = (a.number, b.number) if a.is_float or b.is_float else (a.integer, b.integer)
        return flag(COMPARISONS[operator](x, y))
    if operator in ("<<", ">>"):
        shifted = a.integer << b.integer if operator == "<<" else a.integer >> b.integer
        return integer(shifted, a.kind, a.width)
    if operator in ("&", "|", "^"):
        x, y = a.bits, b.bits
        bits = x & y if operator == "&" else x | y if operator == "|" else x ^ y
        return Value(a.kind, max(a.width, b.width), bits)
    return arithmetic(operator, a, b)


class Evaluation:
    """One run of an instruction's pseudocode."""

    def __init__(self, lane: Lane, variables: dict[str, Any] | None = None) -> None:
        self.lane, self.locals = lane, variables or {}
        self.functions: dict[str, Callable[..., Value]] = {}

    # names that stand for a constant of the format
    CONSTANTS: Mapping[str, Value] = {
        "NAN": Value("b", 32, F32.nan),
        "DENORM": Value("denormal", 32),
        "ROUND_NEAREST_EVEN": integer(0),
        "INF": Value("f", 32, exact=math.inf),
        "UNDERFLOW_F32": Value("f", 32, exact=Fraction(0)),
        "OVERFLOW_F32": Value("f", 32, exact=math.inf),
    }

    def base(self, name: str) -> Value | list[Value]:
        if name in self.locals:
            return self.locals[name]
        if name in self.lane.registers:
            value = self.lane.registers[name]
            if isinstance(value, list):
                return [Value("b", 64, entry) for entry in value]
            return Value("b", 64, value)
        if name in self.lane.modes:
            return integer(self.lane.modes[name], "u", 32)
        if name in self.CONSTANTS:
            return self.CONSTANTS[name]
        if name == "laneId":
            return integer(self.lane.lane, "u", 32)
        if name == "D":
            return self.base("D0")
        return Value("b", 64)

    def load(self, name: str, steps: list[Any]) -> Value:
        if name == "MEM":
            (_, index), (_, kind, width) = steps
            address = index(self).bits
            data = [self.lane.memory[address + i] for i in range(width // 8)]
            return Value(kind, width, int.from_bytes(bytes(data), "little"))
        if name == "VGPR":
            (_, lane), (_, register) = steps[:2]
            return self.reach(Value("b", 32, self.lane.vgprs[lane(self).bits][register(self).bits]), steps[2:])
        base = self.base(name)
        if isinstance(base, list):
            return self.reach(base[steps[0][1](self).bits], steps[1:])
        return self.reach(base, steps)

    def reach(self, value: Value, steps: list[Any]) -> Value:
        for step in steps:
            if value.kind == "denormal":
                continue
            if step[0] == "suffix":
                _, kind, width = step
                if value.exact is not None:
                    value = floating(value.exact, kind, width)
                value = Value(kind, width, value.bits & ((1 << width) - 1))
            elif step[0] == "index":
                value = Value("u", 1, value.bits >> step[1](self).bits & 1)
            else:
                high, low = step[1](self).integer, step[2](self).integer
                width = abs(high - low) + 1
                bits = value.bits >> min(high, low) & ((1 << width) - 1)
                if high < low:  # the bits the other way round
                    bits = int(f"{bits:0{width}b}"[::-1], 2)
                value = Value("b", width, bits)
        return value

    def store(self, name: str, steps: list[Any], value: Value) -> None:
        if name == "MEM":
            (_, index), (_, kind, width) = steps
            address, bits = index(self).bits, self.as_bits(value, kind, width)
            self.lane.memory.update({address + i: bits >> 8 * i & 255 for i in range(width // 8)})
            return
        if name == "VGPR":
            (_, lane), (_, register) = steps[:2]
            row, column = self.lane.vgprs[lane(self).bits], register(self).bits
            row[column] = self.merged(row[column], 32, steps[2:], value)
            return
        name = "D0" if name == "D" else name
        known = self.lane.registers
        if name in known:
            if isinstance(known[name], list):
                known[name][steps[0][1](self).bits] = value.bits
            else:
                known[name] = self.merged(known[name], 64, steps, value)
        elif isinstance(self.locals.get(name), list):
            entries = list(self.locals[name])
            kind, width = entries[0].kind, entries[0].width
            entries[steps[0][1](self).bits] = Value(kind, width, self.as_bits(value, kind, width))
            self.locals[name] = entries
        elif not steps:
            declared = self.locals.get(name)
            if (
                isinstance(declared, Value)
                and declared.width == 32
                and declared.kind != value.kind
                and not value.is_float
            ):
                value = integer(value.integer, declared.kind, declared.width)
            self.locals[name] = value
        else:
            base = self.locals.get(name, Value("b", 64))
            self.locals[name] = Value("b", 64, self.merged(base.bits, 64, steps, value))

    def as_bits(self, value: Value, kind: str, width: int) -> int:
        if (
            kind in ("f", "bf")
            and value.is_float
            and (value.exact is not None or (value.kind, value.width) != (kind, width))
        ):
            return FLOATS[kind, width].encode(value.number)
        if value.exact is not None:
            return FLOATS["f", width].encode(value.exact)
        bits = value.integer if value.kind == "i" else value.bits
        return bits & ((1 << width) - 1)

    def merged(self, old: int, width: int, steps: list[Any], value: Value) -> int:
        """``old`` with the part that the steps name replaced."""
        at, kind = 0, "b"
        reverse = False
        for step in steps:
            if step[0] == "suffix":
                kind, width = step[1], min(width, step[2])
            elif step[0] == "index":
                at, width, kind = at + step[1](self).bits, 1, "b"
            else:
                high, low = step[1](self).integer, step[2](self).integer
                reverse = high < low
                at, width = at + min(high, low), abs(high - low) + 1
        bits = self.as_bits(value, kind, width)
        if reverse:
            bits = int(f"{bits:0{width}b}"[::-1], 2)
        mask = ((1 << width) - 1) << at
        # a whole 32-bit result replaces a register; there is nothing above it
        return (old & ~mask) | (bits << at & mask)

    def call(self, name: str, arguments: list[Value]) -> Value:
        if name in self.functions:
            return self.functions[name](self, *arguments)
        if name in FUNCTIONS:
            return FUNCTIONS[name](self.lane, *arguments)
        if name.startswith(("v_", "s_")):  # another instruction's result
            registers = {f"S{i}": value.bits for i, value in enumerate(arguments)} | {"D0": 0, "SCC": 0}
            inner = Lane(registers, self.lane.modes, fp8=self.lane.fp8, saturates=self.lane.saturates)
            run(text_of(name.upper()), inner)
            first = arguments[0]
            return Value(first.kind, first.width, registers["D0"] & ((1 << first.width) - 1))
        raise UnsaidError(f"{name} is not defined")


def _fma(lane: Lane, a: Value, b: Value, c: Value) -> Value:
    product = exact("*", a.number, b.number)
    return floating(exact("+", product, c.number), c.kind, c.width)


def _is_nan(value: Value) -> bool:
    number = value.number
    return isinstance(number, float) and math.isnan(number)


def _is_signalling(value: Value) -> bool:
    """Whether a NaN's first bit of fraction is clear. (A conversion to another width here keeps it: ``64'F`` of a NaN
    is only ever asked what kind of NaN it is.)"""
    form = FLOATS[value.kind, value.width]
    return _is_nan(value) and not value.bits >> (form.fraction - 1) & 1


def _exponent(lane: Lane, value: Value) -> Value:
    """The biased exponent, as it is stored."""
    form = FLOATS[value.kind, value.width]
    return integer(value.bits >> form.fraction & ((1 << form.exponent) - 1), "i", 32)


def _ldexp(lane: Lane, value: Value, by: Value) -> Value:
    number = value.number
    if not isinstance(number, float):
        number = Fraction(number) * Fraction(2) ** min(max(by.integer, -2000), 2000)
    return floating(number, value.kind, value.width)


def _pow(lane: Lane, base: Value, by: Value) -> Value:
    number = by.number
    if isinstance(number, float):
        return floating(math.nan if math.isnan(number) else 1.0 if number == 0 else math.inf if number > 0 else 0.0)
    if not -200 < number < 200:
        return floating(Fraction(2) ** (200 if number > 0 else -200))
    return floating(Fraction(2.0 ** float(number)))


def _log2(lane: Lane, value: Value) -> Value:
    number = value.number
    if _is_nan(value) or number < 0:
        return floating(math.nan)
    if number == 0:
        return floating(-math.inf)
    return floating(math.inf if isinstance(number, float) else Fraction(math.log2(number)))


def _sqrt(lane: Lane, value: Value) -> Value:
    number = value.number
    if isinstance(number, float):
        return value if number == 0 or number == math.inf else floating(math.nan)
    return floating(math.nan) if number < 0 else Value("f", 32, exact=Fraction(math.sqrt(number)))


def _maximum(lane: Lane, a: Value, b: Value, sign: int = 1) -> Value:
    """The maximum of IEEE 754-2019, which keeps NaN and orders -0 below +0."""
    if _is_nan(a) or _is_nan(b):
        return floating(math.nan, a.kind, a.width)

    def order(v: Value) -> tuple[Any, float]:
        return sign * v.number, sign * sign_of(v.number)

    return a if order(a) >= order(b) else b


def _rounded(how: Callable[[Fraction | int], int]) -> Callable[[Lane, Value], Value]:
    def apply(lane: Lane, value: Value) -> Value:
        number = value.number
        if isinstance(number, float):
            return value
        whole = how(number)
        exact_whole = Fraction(whole) if whole else math.copysign(0.0, sign_of(number))
        return (
            Value(value.kind, value.width, exact=exact_whole)
            if value.exact is not None
            else floating(exact_whole, value.kind, value.width)
        )

    return apply


def _fract(lane: Lane, value: Value) -> Value:
    number = value.number
    return value if isinstance(number, float) else Value("f", value.width, exact=number - math.floor(number))


def _signext_from_bit(lane: Lane, value: Value, width: Value) -> Value:
    top = 1 << max(width.bits - 1, 0)
    return integer((value.bits ^ top) - top if width.bits else 0, "i", 32)


def _to_integer(low: int, high: int, kind: str) -> Callable[[Lane, Value], Value]:
    """Towards zero, saturating; NaN becomes 0."""

    def apply(lane: Lane, value: Value) -> Value:
        number = value.number
        if _is_nan(value):
            return integer(0, kind, 32)
        if isinstance(number, float) and math.isinf(number):
            return integer(high if number > 0 else low, kind, 32)
        return integer(min(max(math.trunc(number), low), high), kind, 32)

    return apply


def _conversion(kind: str, width: int) -> Callable[[Lane, Value], Value]:
    def apply(lane: Lane, value: Value) -> Value:
        saturate = lane.saturates and (kind, width) == ("f", 16)
        return Value(kind, width, FLOATS[kind, width].encode(value.number, saturate))

    return apply


def _to_fp8(lane: Lane, value: Value) -> Value:
    return Value("b", 8, lane.fp8.encode(value.number, lane.saturates))


def _to_fp8_scaled(lane: Lane, value: Value, scale: Value) -> Value:
    number = value.number
    if not isinstance(number, float):
        number = number / Fraction(2) ** (scale.bits - 127)
    return Value("b", 8, E4M3FN.encode(number, lane.saturates))


def _quiet(lane: Lane, value: Value) -> Value:
    form = FLOATS[value.kind, value.width]
    return Value(value.kind, value.width, value.bits | 1 << (form.fraction - 1))


def _address(lane: Lane, address: Value, *rest: Value) -> Value:
    return integer(address.bits, "u", 64)


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "fma": _fma,
    "isNAN": lambda lane, v: flag(_is_nan(v)),
    "isSignalNAN": lambda lane, v: flag(_is_signalling(v)),
    "isQuietNAN": lambda lane, v: flag(_is_nan(v) and not _is_signalling(v)),
    "cvtToQuietNAN": _quiet,
    "exponent": _exponent,
    "sign": lambda lane, v: integer(v.bits >> (v.width - 1), "u", 1),
    "abs": lambda lane, v: Value(v.kind, v.width, v.bits & ((1 << (v.width - 1)) - 1)),
    "ldexp": _ldexp,
    "pow": _pow,
    "log2": _log2,
    "sqrt": _sqrt,
    "trunc": _rounded(math.trunc),
    "floor": _rounded(math.floor),
    "isEven": lambda lane, v: flag(math.isfinite(v.number) and v.number % 2 == 0),
    "fract": _fract,
    "signext_from_bit": _signext_from_bit,
    "v_maximum_f32": _maximum,
    "v_maximum3_f16": lambda lane, a, b, c: _maximum(lane, _maximum(lane, a, b), c),
    "v_minimum_f32": lambda lane, a, b: _maximum(lane, a, b, -1),
    "signext": lambda lane, v: integer(Value("i", v.width, v.bits).integer, "i", 64),
    "f32_to_fp8": _to_fp8,
    "f32_to_fp8_scale": _to_fp8_scaled,
    "f32_to_bf16": _conversion("bf", 16),
    "f32_to_f16": _conversion("f", 16),
    "f16_to_f32": _conversion("f", 32),
    "bf16_to_f32": _conversion("f", 32),
    "f64_to_f32": _conversion("f", 32),
    "f32_to_f64": _conversion("f", 64),
    "f32_to_i32": _to_integer(-(1 << 31), (1 << 31) - 1, "i"),
    "f32_to_u32": _to_integer(0, (1 << 32) - 1, "u"),
    "i32_to_f32": lambda lane, v: floating(Fraction(Value("i", 32, v.bits).integer)),
    "u32_to_f32": lambda lane, v: floating(Fraction(v.bits & 0xFFFFFFFF)),
    "s_ff1_i32_b64": lambda lane, v: integer((v.bits & -v.bits).bit_length() - 1, "i", 32),
    "HwRegWriteMask": lambda lane, *v: integer((1 << 32) - 1, "u", 32),
    "CalcDsAddr": _address,
    "CalcGlobalAddr": _address,
    "CalcBufferAddr": _address,
    "CalcScalarGlobalAddr": _address,
    "nop": lambda lane: flag(False),
}


@cache
def texts() -> Mapping[str, str]:
    """The pseudocode by the instruction's name, without the suffix of its encoding."""
    from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE

    return {re.sub(r"_(E32|E64)$", "", op.name): text for op, text in PCODE.items()}


def text_of(name: str) -> str:
    if name not in texts():
        raise UnsaidError(f"there is no pseudocode of {name}")
    return texts()[name]


@cache
def parsed(text: str) -> tuple[Statement, ...]:
    return tuple(Parser(tokens(text)).block())


def run(text: str, lane: Lane) -> None:
    """Evaluate pseudocode for a lane, whose state it changes."""
    evaluation = Evaluation(lane)
    for statement in parsed(text):
        statement(evaluation)
