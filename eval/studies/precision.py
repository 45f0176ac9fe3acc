"""Cost of bfloat16 to an image tokenizer: ids that change when it encodes, and PSNR when it decodes.

zoo study precision flextok-tiny photographs/ --threads 1 --out flextok-tiny-precision.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import zoo
from zoo import media
from zoo.errors import InputError
from zoo.eval.modality import image as images
from zoo.eval.modality.base import is_measured_by
from zoo.eval.options import Name, Out, Threads
from zoo.eval.studies.quantized.image import Pictures
from zoo.eval.studies.record import write_result


def run(name: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """Share of ids that change in reduced precision, and mean PSNR from the originals in dB.

    Args:
        name: an image tokenizer whose ``encode`` takes ``encoder_precision=``.
        files: paths, folders and patterns of images.

    Raises:
        InputError: it is another tokenizer, or there are no images.
    """
    tokenizer: Any = zoo.load(name)
    if not is_measured_by(tokenizer.spec.modality, images) or "encoder_precision" not in type(tokenizer).options("encode"):
        raise InputError(f"{name} is no image tokenizer that encodes in reduced precision")
    subject = Pictures(tokenizer, media.expand_paths(files, images.EXTENSIONS))
    changed = tokenizer.encode(subject.originals, encoder_precision="bf16")
    ids, others = (torch.cat(tokens.unpadded()) for tokens in (subject.tokens, changed))
    return {
        "name": name,
        "images": subject.amount,
        "ids": len(ids),
        "ids_changed": float((ids != others).float().mean()),
        "psnr": subject.compare(subject.wanted)["psnr_from_original"],
        "psnr_decoded_in_bf16": subject.measure(zoo.load(name, precision="bf16"))["psnr_from_original"],
        "psnr_encoded_in_bf16": subject.compare(subject.output(tokenizer, changed))["psnr_from_original"],
    }


def main(
    name: Name,
    files: Annotated[list[Path], typer.Argument(help="folders, files or glob patterns of images")],
    out: Out,
    threads: Threads = None,
) -> None:
    """Measure what bfloat16 costs an image tokenizer: ids that change, and PSNR."""
    if threads:
        torch.set_num_threads(threads)
    write_result(run(name, files), out)
