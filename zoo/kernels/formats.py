"""Small number formats: sign, exponent and mantissa of at most 8 bits, and the uniform grids beside them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError

Specials = Literal["finite", "fn", "ieee"]


@dataclass(frozen=True)
class FloatFormat:
    """A format whose code is sign | exponent field e | mantissa field m, most significant first.

    With e = 0 the value is ``m * 2**(1 - bias - mantissa_bits)`` (zero and the subnormals), otherwise
    ``(1 + m / 2**mantissa_bits) * 2**(e - bias)``. Without exponent bits it is a uniform grid.

    Attributes:
        exponent_bits, mantissa_bits: widths of the fields, at most 8 with the sign.
        bias: of the exponent.
        specials: codes that are no numbers: none (``"finite"``), all ones is NaN (``"fn"``, as in OCP E4M3), or the whole top
            exponent is infinity and NaN (``"ieee"``, as in OCP E5M2).
        signed: whether there is a sign bit.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "finite"
    signed: bool = True

    #: The code of the largest finite value, and that value.
    max_code: int = field(init=False, repr=False, compare=False)
    max: float = field(init=False, repr=False, compare=False)
    #: The smallest value with a full mantissa, where there is an exponent field.
    min_normal: float = field(init=False, repr=False, compare=False)
    #: Distance of the subnormal values.
    smallest_step: float = field(init=False, repr=False, compare=False)
    #: The code of NaN, where the format has one: all bits but the sign.
    nan_code: int = field(init=False, repr=False, compare=False)
    #: The bit of the sign, where there is one.
    sign_bit: int = field(init=False, repr=False, compare=False)
    #: Difference of the biases of float32 and of this format, in the place of float32's exponent field.
    exponent_offset: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or not 2 <= self.bits <= 8:
            raise InputError(f"no format has {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits")
        reserved = {"finite": 0, "fn": 1, "ieee": 1 << self.mantissa_bits}[self.specials]
        # Plain attributes, because a compiler that traces the rounding takes them as they are, and stumbles over shifts.
        set_once = functools.partial(object.__setattr__, self)
        set_once("max_code", (1 << (self.exponent_bits + self.mantissa_bits)) - 1 - reserved)
        set_once("min_normal", 2.0 ** (1 - self.bias))
        set_once("smallest_step", 2.0 ** (1 - self.bias - self.mantissa_bits))
        set_once("max", self.magnitude(self.max_code))
        set_once("nan_code", (1 << (self.exponent_bits + self.mantissa_bits)) - 1)
        set_once("sign_bit", 1 << (self.bits - 1))
        set_once("exponent_offset", (127 - self.bias) << 23)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def stored_bits(self) -> int:
        """Width of a code in packed storage: 4, 6 or 8."""
        return next(width for width in (4, 6, 8) if width >= self.bits)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest value, ``emax`` of the OCP block formats."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    def magnitude(self, code: int) -> float:
        """Value of a code without its sign."""
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if exponent == 0 or self.exponent_bits == 0:
            return code * self.smallest_step
        return (2**self.mantissa_bits + mantissa) * 2.0 ** (exponent - self.bias - self.mantissa_bits)

    @property
    def name(self) -> str:
        """``e4m3fn``, ``e2m1``, ``e3m4f`` or ``int4``; what `format_named` takes."""
        for name, known in _NAMED.items():
            if known == self:
                return name
        return f"e{self.exponent_bits}m{self.mantissa_bits}f" + ("" if self.signed else "u")


def finite(exponent_bits: int, mantissa_bits: int, signed: bool = True) -> FloatFormat:
    """The format of these widths in which every code is a number; its bias is ``2**(exponent_bits - 1) - 1``."""
    bias = 1 - mantissa_bits if exponent_bits == 0 else (1 << exponent_bits >> 1) - 1
    return FloatFormat(exponent_bits, mantissa_bits, bias, signed=signed)


def integer(bits: int) -> FloatFormat:
    """Sign and magnitude on a uniform grid: the integers of absolute value below ``2**(bits - 1)``."""
    return finite(0, bits - 1)


_NAMED = {
    "e2m1": finite(2, 1),
    "e1m2": finite(1, 2),
    "e3m0": finite(3, 0),
    "e2m3": finite(2, 3),
    "e3m2": finite(3, 2),
    "e4m3fn": FloatFormat(4, 3, 7, "fn"),
    "e5m2": FloatFormat(5, 2, 15, "ieee"),
    "int8": integer(8),
    "int6": integer(6),
    "int4": integer(4),
}

_FINITE = re.compile(r"e(\d)m(\d)f(u?)")


def format_named(name: str) -> FloatFormat:
    """The format of a name: of the OCP standard (``e4m3fn``), ``int4``, or ``eXmYf`` with every code a number.

    A trailing ``u`` leaves the sign out, ``e4m4fu`` say.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name in _NAMED:
        return _NAMED[name]
    if match := _FINITE.fullmatch(name):
        return finite(int(match[1]), int(match[2]), signed=not match[3])
    raise InputError(f"there is no number format {name!r}; known are {', '.join(_NAMED)} and eXmYf")


@functools.cache
def levels(format: FloatFormat) -> tuple[float, ...]:
    """The values from zero to the largest, in order of their codes.

    >>> levels(format_named("e2m1"))
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    return tuple(format.magnitude(code) for code in range(format.max_code + 1))


def values(format: FloatFormat, device: torch.device | str | None = None) -> Float[Tensor, " codes"]:
    """The value of every code, NaN and infinity where the format has them."""
    positive = list(levels(format))
    if format.specials == "fn":
        positive.append(torch.nan)
    if format.specials == "ieee":
        positive += [torch.inf] + [torch.nan] * ((1 << format.mantissa_bits) - 1)
    table = torch.tensor(positive, dtype=torch.float32, device=device)
    return torch.cat([table, -table]) if format.signed else table
