"""Steps of programs that models spell with several calls, each a pattern of its result over ``Var("value")``.

They encode scales as powers of two, which are one byte for each block in the MX formats (e8m0: the exponent, 127 more).
``aiter_fusion/scale_program.py`` computes them, with the same calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from .fx_facts import Target, aten
from .language import Call, Const, OneOf, Pattern, Var, add, constant, convert, equals, heads, where

VALUE = Var("value")


def _bits(of: Pattern, to: torch.dtype) -> Call:
    """The bits of a value as those of another dtype."""
    return Call((aten.view.dtype,), (of, equals(to)))


def _clamped(of: Pattern, least: float, most: float) -> Pattern:
    apart = Call((aten.clamp_max.default,), (Call((aten.clamp_min.default,), (of, Const(least))), Const(most)))
    return OneOf((apart, Call((aten.clamp.default,), (of, Const(least), Const(most)))))


# torchao's MX formats: the exponent of the next power of two, a byte of its own for infinity and for NaN.
_EXPONENT = Call((aten.ceil.default,), (Call((aten.log2.default,), (VALUE,)),))
E8M0 = where(
    Call((aten.isnan.default,), (VALUE,)),
    constant(255),
    where(
        Call((aten.isinf.default,), (VALUE,)),
        constant(254),
        convert(add(_clamped(_EXPONENT, -127, 127), Const(127)), torch.uint8),
    ),
)


def _byte_is(number: int) -> Call:
    return Call((aten.eq.Scalar,), (E8M0, Const(number)))


# What torchao multiplies with: the power's reciprocal, 1 for the least byte.
_RECIPROCAL = Call((aten.exp2.default,), (Call((aten.sub.Tensor,), (Const(127), convert(E8M0, torch.float32))),))
E8M0_INVERSE = where(
    _byte_is(255), VALUE, where(_byte_is(254), constant(2.0**-127), where(_byte_is(0), constant(1.0), _RECIPROCAL))
)

# DeepGEMM: the next power of two as a float, by its bits.
_ABSOLUTE = _bits(Call((aten.abs.default,), (VALUE,)), torch.int32)
_ANY_FRACTION = convert(Call((aten.bitwise_and.Scalar,), (_ABSOLUTE, Const(0x7FFFFF))), torch.bool)
_BIASED = Call((aten.bitwise_and.Scalar,), (Call((aten.__rshift__.Scalar,), (_ABSOLUTE, Const(23))), Const(255)))
_ROUNDED_UP = _clamped(add(_BIASED, convert(_ANY_FRACTION, torch.int32)), 1, 254)
NEXT_POWER = _bits(Call((aten.__lshift__.Scalar,), (_ROUNDED_UP, Const(23))), torch.float32)

COMPOSED: Mapping[str, Pattern] = {"e8m0": E8M0, "e8m0_inverse": E8M0_INVERSE, "next_power": NEXT_POWER}


def _calls(pattern: Pattern) -> Iterator[Call]:
    """The calls that a pattern is made of."""
    match pattern:
        case Call():
            yield pattern
            for argument in pattern.args:
                yield from _calls(argument)
        case OneOf():
            for option in pattern.options:
                yield from _calls(option)


# By the call that they end in; those that read the value first; and all.
BY_HEAD: Mapping[Target, list[tuple[str, Pattern]]] = defaultdict(list)
for _name, _pattern in COMPOSED.items():
    for _head in heads(_pattern) or ():
        BY_HEAD[_head].append((_name, _pattern))
_CALLS = [call for pattern in COMPOSED.values() for call in _calls(pattern)]
FIRST = frozenset(target for call in _CALLS if VALUE in call.args for target in call.targets)
WITHIN = frozenset(target for call in _CALLS for target in call.targets)
