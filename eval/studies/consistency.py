"""Whether a tokenizer that draws pictures anew draws the kind of scene shown to it.

    zoo study consistency seed-tiny --out eval/results/seed-tiny-consistency.json

The judge is another network that never saw the tokenizer: a linear probe (`zoo.eval.studies.probe`) over the mean features of
``tokenflow-tiny``'s semantic encoder, trained on originals. It sees originals and drawn pictures at 32 x 32 pixels, so that it
judges what is shown rather than how sharp it is. Pictures come from seeds that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.eval.modality import image as images
from zoo.eval.modality.base import is_measured_by
from zoo.eval.options import Name, Out
from zoo.eval.studies.probe import SCENES, TEST_SEED, TRAIN_SEED, LinearProbe, Rows, labelled_pictures
from zoo.eval.studies.record import write_result

JUDGE = "tokenflow-tiny"
_SIDE = 32


@torch.inference_mode()
def descriptions(judge: Any, images: Sequence[Float[Tensor, "3 _ _"]]) -> Rows:
    """Mean features of images in [-1, 1] that were reduced to a few pixels."""
    side = judge.config.image_size
    found = []
    for image in images:
        small = F.interpolate(image[None], size=(_SIDE, _SIDE), mode="area").clamp(-1, 1)
        large = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False)
        found.append(judge.encoder.semantic(large).mean(dim=1))
    return torch.cat(found).clone()


def run(name: str, train: int, test: int) -> dict[str, Any]:
    """Shares of originals and of drawn pictures that the judge classifies right.

    Raises:
        InputError: it is no image tokenizer.
    """
    import zoo

    tokenizer: Any = zoo.load(name)
    if not is_measured_by(tokenizer.spec.modality, images):
        raise InputError(f"{name} is no image tokenizer")
    judge: Any = zoo.load(JUDGE, parts="encoder")
    pictures, labels = labelled_pictures(train, TRAIN_SEED)
    probe = LinearProbe(descriptions(judge, [picture / 127.5 - 1 for picture in pictures]), labels, len(SCENES))
    shown, names = labelled_pictures(test, TEST_SEED)
    drawn = tokenizer.decode(tokenizer.encode(shown))
    originals = probe(descriptions(judge, [picture / 127.5 - 1 for picture in shown]))
    found = probe(descriptions(judge, drawn))
    return {
        "tokenizer": name,
        "fingerprint": tokenizer.spec.fingerprint,
        "judge": f"linear probe over {JUDGE} ({judge.spec.fingerprint}), {_SIDE} pixels",
        "train": train,
        "test": test,
        "classes": list(SCENES),
        "originals right": float((originals == names).float().mean()),
        "drawn right": float((found == names).float().mean()),
        "drawn as the original": float((found == originals).float().mean()),
        "drawn as another original": float((found == originals.roll(1)).float().mean()),
    }


def main(
    name: Name,
    out: Out,
    train: Annotated[int, typer.Option(min=10, help="pictures that the judge learns from")] = 1500,
    test: Annotated[int, typer.Option(min=1, help="pictures that are encoded and drawn")] = 300,
) -> None:
    """Ask a judge whether decoded pictures show the kind of scene that went in."""
    write_result(run(name, train, test), out)
