"""Binary floating-point formats, exactly: one number at a time, in Python's fractions.

This is what the pseudocode is evaluated with. The executor has its own, vectorised conversions, so that neither checks
itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary format: sign, ``exponent`` bits, ``fraction`` bits.

    bias:     of the exponent.
    special:  how it ends: "ieee" (the highest exponent is infinities and NaN), "fn" (one NaN of each sign, no
              infinity), "fnuz" (one NaN where -0 would be, no infinity).
    """

    exponent: int
    fraction: int
    bias: int
    special: str

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.fraction

    @property
    def top(self) -> Fraction:
        """The largest finite number."""
        highest = (1 << self.exponent) - (2 if self.special == "ieee" else 1)
        significand = (2 << self.fraction) - (2 if self.special == "fn" else 1)
        return Fraction(significand) * Fraction(2) ** (highest - self.bias - self.fraction)

    @property
    def nan(self) -> int:
        """The bits of a quiet NaN."""
        sign = 1 << (self.width - 1)
        if self.special == "fnuz":
            return sign
        top = (sign - 1) >> self.fraction << self.fraction
        return sign - 1 if self.special == "fn" else top | 1 << (self.fraction - 1)

    def decode(self, bits: int) -> Fraction | float:
        """The number with these bits: a fraction, or a float for -0, infinities and NaN."""
        sign, rest = bits >> (self.width - 1), bits & ((1 << (self.width - 1)) - 1)
        exponent, fraction = rest >> self.fraction, rest & ((1 << self.fraction) - 1)
        highest = exponent == (1 << self.exponent) - 1
        if self.special == "ieee" and highest:
            return math.nan if fraction else (-math.inf if sign else math.inf)
        if (self.special == "fn" and rest == (1 << (self.width - 1)) - 1) or (
            self.special == "fnuz" and sign and not rest
        ):
            return math.nan
        if not rest:
            return -0.0 if sign else Fraction(0)
        significand = fraction + ((1 << self.fraction) if exponent else 0)
        value = Fraction(significand) * Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction)
        return -value if sign else value

    def encode(self, value: Fraction | float, saturate: bool = False) -> int:
        """The bits of a number, rounded to nearest, ties to even. ``saturate``: a finite one that is too large becomes
        the largest; infinities are as ``FP16_OVFL`` has them: kept where the format has them, the largest otherwise."""
        negative = value < 0 or (isinstance(value, float) and math.copysign(1.0, value) < 0)
        sign = int(negative) << (self.width - 1)
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            if math.isinf(value):
                if self.special == "ieee":
                    return sign | self.infinity
                return sign | self._magnitude(self.top) if saturate else self._overflow(sign)
            value = Fraction(value)
        magnitude = abs(value)
        if magnitude:
            exponent = max(_floor_log2(magnitude), 1 - self.bias)
            step = Fraction(2) ** (exponent - self.fraction)
            magnitude = step * _round_half_even(magnitude / step)
        if magnitude > self.top:
            return sign | self._magnitude(self.top) if saturate else self._overflow(sign)
        if not magnitude and self.special == "fnuz":
            return 0
        return sign | self._magnitude(magnitude)

    @property
    def infinity(self) -> int:
        """The bits of infinity, where there is one."""
        return ((1 << self.exponent) - 1) << self.fraction

    def _overflow(self, sign: int) -> int:
        if self.special == "ieee":
            return sign | self.infinity
        return self.nan if self.special == "fnuz" else sign | self.nan

    def _magnitude(self, value: Fraction | int) -> int:
        if not value:
            return 0
        exponent = max(_floor_log2(value), 1 - self.bias)
        significand = int(value / Fraction(2) ** (exponent - self.fraction))
        return significand + ((exponent + self.bias - 1) << self.fraction)


def _floor_log2(value: Fraction | int) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def _round_half_even(value: Fraction) -> int:
    return round(value)


F64 = Format(11, 52, 1023, "ieee")
F32 = Format(8, 23, 127, "ieee")
F16 = Format(5, 10, 15, "ieee")
BF16 = Format(8, 7, 127, "ieee")
E4M3FN = Format(4, 3, 7, "fn")
E4M3FNUZ = Format(4, 3, 8, "fnuz")
