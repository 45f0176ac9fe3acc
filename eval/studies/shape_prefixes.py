"""Shapes decoded from more and more of their tokens, beside the grid of the same bits: the picture in the README.

zoo study shape-prefixes vat-tiny knot.ply chair.ply --out shapes.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import zoo
from zoo.errors import InputError
from zoo.eval.modality import shape as measures
from zoo.eval.modality.base import is_measured_by
from zoo.eval.modality.shape import coarse_grid, grid_side, read
from zoo.eval.modality.turntable import render
from zoo.eval.options import Name, Picture, Prefixes, token_counts
from zoo.media import replacing
from zoo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

LENGTHS = (5, 30, 104, 232)
_TOKENS = ",".join(map(str, LENGTHS))

_TILE, _LINE, _FONT_SIZE, _AZIMUTH = 170, 20, 14, 0.6
_INK, _SOFT = "#1c2024", "#667"


def picture(tokenizer: Tokenizer[Any], paths: Sequence[str | Path], *, lengths: Sequence[int] = LENGTHS) -> Image.Image:
    """A row for each shape: reconstructions from prefixes and from all tokens, the original, and the grid of all its bits.

    Args:
        tokenizer: an ordered shape tokenizer whose shapes all have as many tokens.
        paths: files of meshes.
        lengths: token counts.

    Raises:
        InputError: the tokenizer is for other media or its prefixes do not decode, or a file cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    spec = tokenizer.spec
    if not is_measured_by(spec.modality, measures) or not spec.ordered or spec.max_tokens is None:
        raise InputError(f"{spec.name} is no shape tokenizer whose prefixes decode")
    counts = [*sorted(count for count in lengths if count < spec.max_tokens), spec.max_tokens]
    sizes = [(f"{count} tokens", f"{-(-round(count * spec.bits_per_token) // 8)} bytes") for count in counts]
    bits = round(spec.max_tokens * spec.bits_per_token)
    labels = [*sizes, ("original", ""), (" x ".join([str(grid_side(bits))] * 3) + " cells", sizes[-1][1])]
    sheet = Image.new("RGB", (_TILE * len(labels), _TILE * len(paths) + 2 * _LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for row, path in enumerate(paths):
        original = read(str(path), spec, {})
        tokens = tokenizer.encode(original)
        decoded = tokenizer.decode(zoo.Tokens.cat([tokens.truncate(count) for count in counts]))
        meshes: list[Any] = [*decoded, original, coarse_grid(original, bits)]
        for column, mesh in enumerate(meshes):
            sheet.paste(Image.fromarray(render(mesh, _AZIMUTH, _TILE)), (column * _TILE, row * _TILE))
    for column, label in enumerate(labels):
        for line, (text, colour) in enumerate(zip(label, (_INK, _SOFT), strict=True)):
            place = (column * _TILE + _TILE // 2, _TILE * len(paths) + (line + 1) * _LINE - 4)
            draw.text(place, text, colour, font, anchor="ms")
    return sheet


def main(
    name: Name,
    shapes: Annotated[list[Path], typer.Argument(help="files of meshes")],
    out: Picture,
    tokens: Prefixes = _TOKENS,
) -> None:
    """Decode shapes from more and more of their tokens, beside the grid of the same bits."""
    sheet = picture(zoo.load(name), shapes, lengths=token_counts(tokens) or ())
    with replacing(out) as temporary:
        sheet.save(temporary, format="PNG")
    print(out)
