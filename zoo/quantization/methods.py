"""Quantization methods by name; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.errors import InputError
from zoo.moved import names_of

LOW_BIT_LAYER = "zoo.quantization.layers:LowBitLayer"
BINARY_LAYER = "zoo.quantization.binary:PackedBinary"

#: The class of a packed layer by the ``kind`` in its description.
KINDS = {"float": LOW_BIT_LAYER, "binary": BINARY_LAYER}

_BINARY = {
    "bnn": "plain signs",
    "xnor": "signs, scaled by the mean of absolute values",
    "xnor++": "signs, scaled by what training found",
    "dorefa": "signs, scaled by the mean of absolute weights",
    "bireal": "signs, a quadratic's gradient",
    "react": "signs behind learned thresholds",
    "recu": "signs of standardised weights",
    "fda": "signs, a Fourier series' gradient",
}


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a layer.

    Attributes:
        name: what `zoo.quantize` is called with.
        bits: bits stored per weight, scales aside.
        layer: ``module:Class`` of the packed layer that holds the result.
        description: one line for people.
        formats: names of the number formats to choose from by searching; one where the name fixes it; none if binary.
        block: weights along the contraction axis that share a scale; ``None`` where an output channel does.
        block_scale: ``"e8m0"`` or ``"e4m3"``, how block scales are stored.
        activations: names of the formats that 8-bit activations choose from.
    """

    name: str
    bits: int
    layer: str
    description: str
    formats: tuple[str, ...] = ()
    block: int | None = None
    block_scale: str | None = None
    activations: tuple[str, ...] = ("e4m3fn",)


_EIGHT_BITS = ("e5m2f", "e4m3f", "e3m4f", "e2m5f")


def _floating(name: str, bits: int, *formats: str, description: str, **settings: Any) -> Scheme:
    return Scheme(name, bits, LOW_BIT_LAYER, description, formats, **settings)


SCHEMES = {
    method.name: method
    for method in (
        _floating("fp8", 8, *_EIGHT_BITS, description="8 bits, the split searched for each layer", activations=_EIGHT_BITS),
        _floating("fp8-e4m3", 8, "e4m3fn", description="8 bits, OCP E4M3, what tensor cores multiply"),
        _floating("fp8-e5m2", 8, "e5m2", description="8 bits, OCP E5M2"),
        _floating("fp6", 6, "e3m2", "e2m3", description="6 bits, the split searched for each layer", activations=_EIGHT_BITS),
        _floating("fp6-e3m2", 6, "e3m2", description="6 bits, OCP E3M2"),
        _floating("fp6-e2m3", 6, "e2m3", description="6 bits, OCP E2M3"),
        _floating(
            "fp4", 4, "e2m1", "e1m2", "e3m0", description="4 bits, the split searched for each layer", activations=_EIGHT_BITS
        ),
        _floating("fp4-e2m1", 4, "e2m1", description="4 bits, OCP E2M1"),
        _floating("fp4-e1m2", 4, "e1m2", description="4 bits, uniform steps"),
        _floating("fp4-e3m0", 4, "e3m0", description="4 bits, powers of two"),
        _floating("mxfp8", 8, "e4m3fn", block=32, block_scale="e8m0", description="OCP MX: E4M3, a power of two per 32"),
        _floating("mxfp6", 6, "e2m3", block=32, block_scale="e8m0", description="OCP MX: E2M3, a power of two per 32"),
        _floating("mxfp4", 4, "e2m1", block=32, block_scale="e8m0", description="OCP MX: E2M1, a power of two per 32"),
        _floating(
            "nvfp4", 4, "e2m1", block=16, block_scale="e4m3", description="E2M1, an E4M3 scale per 16 and one per tensor"
        ),
        _floating("int8", 8, "int8", activations=("int8",), description="8 bits, uniform steps"),
        _floating("int6", 6, "int6", activations=("int8",), description="6 bits, uniform steps"),
        _floating("int4", 4, "int4", activations=("int8",), description="4 bits, uniform steps"),
        *(Scheme(f"binary-{name}", 1, BINARY_LAYER, f"1 bit: {text}") for name, text in _BINARY.items()),
    )
}

_GENERIC = re.compile(r"fp(\d)-e(\d)m(\d)")


def method_named(name: str) -> Scheme:
    """The method of that name; ``fpN-eXmY`` for any split of up to 8 bits.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if match := _GENERIC.fullmatch(name):
        bits, exponent, mantissa = map(int, match.groups())
        if bits == 1 + exponent + mantissa and 3 <= bits <= 8:
            return _floating(name, bits, f"e{exponent}m{mantissa}f", description=f"{bits} bits, every code a number")
    raise InputError(
        f"there is no quantization method {name!r}; known are {', '.join(SCHEMES)} and fpN-eXmY with N = 1 + X + Y"
    )


def names() -> Iterator[str]:
    """All names, coarsest last."""
    return iter(SCHEMES)


#: Former names, for one release.
__getattr__ = names_of(
    __name__,
    {
        "FLOAT_LAYER": "zoo.quantization.methods:LOW_BIT_LAYER",
        "METHODS": "zoo.quantization.methods:SCHEMES",
        "Method": "zoo.quantization.methods:Scheme",
    },
)
