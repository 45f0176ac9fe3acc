"""Options that several commands share, and the values behind their texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from zoo.errors import ArgumentError


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite")
    return value


Name = Annotated[str, typer.Argument(help="a name in the catalogue, hf-hub:org/repo or local-dir:path")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16, for decoding")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
BatchSize = Annotated[int, typer.Option(min=1, help="items per batch")]
SkipErrors = Annotated[bool, typer.Option(help="go on past items that cannot be read; exit code 1 at the end")]
Fit = Annotated[str | None, typer.Option(help="images, video: crop, stretch, pad or none")]
Interpolation = Annotated[str | None, typer.Option(help="images: how they are resized; bilinear or bicubic")]
ValueRange = Annotated[
    str | None,
    typer.Option("--range", metavar="RANGE", help="floating-point images: unit, signed, or BLACK,WHITE; files are unit"),
]
Parts = Annotated[
    list[str] | None, typer.Option("--parts", help="load only these parts of a model: names between commas, or none")
]
Places = Annotated[
    list[str] | None,
    typer.Option("--file", metavar="NAME=PLACE", help="where a piece of a model is: a file, a folder or hf-hub:org/repo"),
]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="images and frames: refuse larger ones, read or restored")]
MaxFrames = Annotated[int | None, typer.Option(min=1, help="video: refuse longer clips")]
FrameRate = Annotated[
    str | None, typer.Option("--fps", help="video: frames per second to bring clips to, such as 12 or 30000/1001")
]
ModelSize = Annotated[
    str | None, typer.Option("--model-size", metavar="WIDTHxHEIGHT", help="video: size that --fit brings frames to")
]
Prefix = Annotated[int | None, typer.Option("--tokens", min=1, help="ordered tokenizers: keep the first N tokens of each item")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="any other option of encode, such as case=keep or max_bytes=1000"),
]
Size = Annotated[str, typer.Option(help="images: 'original' for each image's own size, 'model' for the model's")]
Steps = Annotated[int | None, typer.Option(min=1, help="steps of a decoder that samples")]
Guidance = Annotated[float | None, typer.Option(callback=_finite, help="guidance scale of a decoder that samples")]
Seed = Annotated[int | None, typer.Option(help="noise of a decoder that samples")]
Prompt = Annotated[
    str | None, typer.Option(help="speech: whose voice; a voice's name in the checkpoint, a saved voice or a recording")
]


def parts_of(given: Sequence[str] | None) -> list[str] | None:
    """Part names, repeated or comma-separated; ``none`` loads only the core."""
    if not given:
        return None
    names = [name for text in given for name in text.split(",")]
    return [] if names == ["none"] else names


def places_of(given: Sequence[str] | None) -> dict[str, str]:
    """Places of pieces of a model, by their names."""
    places = dict(text.partition("=")[::2] for text in given or ())
    if incomplete := [name for name, place in places.items() if not name or not place]:
        raise ArgumentError(f"--file must be NAME=PLACE, not {incomplete[0]!r}")
    return places


def options_of(given: Sequence[str] | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names: those of ``--option NAME=VALUE``, with values of JSON or else text, and known ones that are set.

    Raises:
        ArgumentError: one is not NAME=VALUE, or is given twice.
    """
    chosen = {name: value for name, value in known.items() if value is not None}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not name or not sign:
            raise ArgumentError(f"--option must be NAME=VALUE, not {text!r}")
        if name in chosen:
            raise ArgumentError(f"the option {name} is given twice")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen


def range_of(text: str | None) -> str | tuple[float, ...] | None:
    """Values of black and white in floating-point images: a name, or two numbers."""
    if text is None or "," not in text:
        return text
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"--range must be unit, signed or two numbers BLACK,WHITE, not {text!r}") from error


def sample_rate_of(text: str | None) -> int | str | None:
    """Samples per second, or ``"original"``."""
    if text is None or text == "original":
        return text
    if not text.isdecimal() or not int(text):
        raise ArgumentError(f"--sample-rate must be a number or 'original', not {text!r}")
    return int(text)


def frame_size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width of ``"320x240"``."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ArgumentError(f"--model-size must be WIDTHxHEIGHT, not {text!r}")
    return int(height), int(width)


def size_of(text: str) -> str | None:
    """The ``size`` of a decoder: ``"original"``, or ``None`` for the model's."""
    if text not in ("original", "model"):
        raise ArgumentError(f"--size must be 'original' or 'model', not {text!r}")
    return None if text == "model" else text


def accepted(method: Callable[..., Any], others: Sequence[str] | None = None, /, **given: Any) -> dict[str, Any]:
    """The options that were given, also those of ``--option``; a tokenizer's method must take all of them.

    Raises:
        ArgumentError: it does not, or a value has another type.
    """
    from zoo.tokenizer.options import names_of, require_values

    chosen = options_of(others, given)
    for name in chosen:
        if name not in names_of(method):
            raise ArgumentError(f"this tokenizer takes no --{name.replace('_', '-')} to {method.__name__}")
    more = chosen.keys() - {name for name, value in given.items() if value is not None}
    require_values(method, {name: chosen[name] for name in more})
    return chosen
