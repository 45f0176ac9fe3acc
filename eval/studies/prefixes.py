"""One photograph decoded from more and more of its tokens, side by side: the picture in the README.

zoo study prefixes flextok-tiny photograph.png --out prefixes.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor

import zoo
from zoo.errors import InputError
from zoo.eval.modality import image as images
from zoo.eval.modality.base import is_measured_by
from zoo.eval.modality.thumbnail import thumbnail
from zoo.eval.options import Device, Fit, Guidance, Name, Picture, Posterior, Prefixes, Seed, Steps, given, token_counts
from zoo.eval.plan import make_plan
from zoo.media import replacing
from zoo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LENGTHS = (1, 4, 16, 64)
_TOKENS = ",".join(map(str, LENGTHS))

_TILE, _GAP, _LINE, _FONT_SIZE = 256, 12, 22, 17
_INK, _SOFT = "#1c2024", "#667"


def picture(
    tokenizer: Tokenizer[Any],
    photograph: str | Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    encode: Mapping[str, Any] | None = None,
    decode: Mapping[str, Any] | None = None,
    baseline: bool = False,
) -> Image.Image:
    """A row of pictures: reconstructions from growing prefixes and from all tokens, and the original.

    Args:
        tokenizer: an ordered image tokenizer.
        photograph: an image file.
        lengths: token counts; those that an image does not have are left out.
        encode, decode: options of the tokenizer's methods.
        baseline: a second row, with thumbnails of the same bits.

    Raises:
        InputError: the tokenizer is for other media, its prefixes do not decode, or the photograph cannot be read.
    """
    spec = tokenizer.spec
    if not is_measured_by(spec.modality, images) or not spec.ordered:
        raise InputError(f"{spec.name} is no image tokenizer whose prefixes decode")
    plan = make_plan(tokenizer, metrics=(), networks={}, encode=encode or {}, decode=decode or {}, prefixes=lengths)
    original = plan.read(str(photograph))
    tokens = plan.encoded(original)
    whole = int(tokens.lengths[0])
    counts = [*plan.prefix_lengths(whole), whole]
    unit = [(image + 1) / 2 for image in (*plan.decoded(tokens, original, counts, plan.own_options(original)), original)]
    labels = [(_tokens(count, whole), f"{round(count * spec.bits_per_token)} bits") for count in counts]
    rows = [list(zip(unit, [*labels, ("original", f"{original.shape[2]} x {original.shape[1]} pixels")], strict=True))]
    if baseline:
        rivals = [thumbnail(unit[-1], round(count * spec.bits_per_token)) for count in counts]
        rows.append([(rival.image, (f"thumbnail, {rival.width} x {rival.height}", f"{rival.bits} bits")) for rival in rivals])
    return _sheet(rows)


def _tokens(count: int, whole: int) -> str:
    return f"{'all ' if count == whole else ''}{count} token{'s' if count != 1 else ''}"


def _sheet(rows: Sequence[Sequence[tuple[Float[Tensor, "3 _ _"], tuple[str, str]]]]) -> Image.Image:
    """Images in [0, 1] in rows, with two lines of text below each."""
    from PIL import Image, ImageDraw

    height, width = rows[0][0][0].shape[1:]
    tile = (_TILE, round(_TILE * height / width))
    step = (tile[0] + _GAP, tile[1] + 2 * _LINE + _GAP)
    sheet = Image.new("RGB", (step[0] * len(rows[0]) + _GAP, step[1] * len(rows) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, tiles in enumerate(rows):
        for column, (image, label) in enumerate(tiles):
            left, top = _GAP + column * step[0], _GAP + row * step[1]
            sheet.paste(_tile(image, tile), (left, top))
            _write_label(draw, (left + tile[0] // 2, top + tile[1]), label)
    return sheet


def _tile(image: Float[Tensor, "3 _ _"], size: tuple[int, int]) -> Image.Image:
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    resized: Image.Image = F.to_pil_image(levels).resize(size, Image.Resampling.BICUBIC)
    return resized


def _write_label(draw: ImageDraw.ImageDraw, place: tuple[int, int], label: tuple[str, str]) -> None:
    from PIL import ImageFont

    for line, (text, colour) in enumerate(zip(label, (_INK, _SOFT), strict=True)):
        baseline = (place[0], place[1] + (line + 1) * _LINE - 2)
        draw.text(baseline, text, colour, ImageFont.load_default(_FONT_SIZE), anchor="ms")


def main(
    name: Name,
    photograph: Annotated[Path, typer.Argument(help="an image file")],
    out: Picture,
    tokens: Prefixes = _TOKENS,
    baseline: Annotated[bool, typer.Option("--baseline", help="add a row of thumbnails of the same bits")] = False,
    fit: Fit = None,
    posterior: Posterior = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Decode a photograph from more and more of its tokens, side by side."""
    sheet = picture(
        zoo.load(name, device=device),
        photograph,
        lengths=token_counts(tokens) or (),
        baseline=baseline,
        encode=given(fit=fit, posterior=posterior),
        decode=given(steps=steps, guidance=guidance, seed=seed),
    )
    with replacing(out) as temporary:
        sheet.save(temporary, format="PNG")
    print(out)
