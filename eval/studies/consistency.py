"""Whether a tokenizer that draws pictures anew draws the kind of scene that it was shown.

    python -m zoo.eval.studies.consistency seed-tiny --out eval/results/seed-tiny-consistency.json

The judge is another network that never saw the tokenizer: a linear probe (`zoo.eval.studies.probe`) over the mean features of
``tokenflow-tiny``'s semantic encoder, trained on originals. It sees originals and drawn pictures at 32 x 32 pixels, so that it
judges what is shown rather than how sharp it is. Pictures come from seeds that nothing was trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.eval.studies.probe import SCENES, TEST_SEED, TRAIN_SEED, LinearProbe, Rows, labelled_pictures, write_result

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
    """Shares of originals and of drawn pictures that the judge classifies right."""
    import zoo

    tokenizer, judge = zoo.load(name), zoo.load(JUDGE, parts="encoder")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.eval.studies.consistency", description="Are the same things drawn?")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1500, help="pictures that the judge learns from")
    parser.add_argument("--test", type=int, default=300, help="pictures that are encoded and drawn")
    options = parser.parse_args(arguments)
    command = ["python", "-m", "zoo.eval.studies.consistency", *(sys.argv[1:] if arguments is None else arguments)]
    write_result(run(options.name, options.train, options.test), options.out, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
