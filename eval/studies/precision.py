"""What bfloat16 costs an image tokenizer: ids that change when it encodes, and PSNR when it decodes.

python -m zoo.eval.studies.precision flextok-tiny photographs/ --threads 1 --out flextok-tiny-precision.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo import media
from zoo.errors import InputError
from zoo.eval.studies.probe import write_result
from zoo.eval.studies.quantize_subjects import Pictures


def run(name: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """Share of ids that change in reduced precision, and mean PSNR from the originals in dB.

    Args:
        name: an image tokenizer whose ``encode`` takes ``encoder_precision=``.
        files: paths, folders and patterns of images.

    Raises:
        InputError: it is another tokenizer, or there are no images.
    """
    tokenizer: Any = zoo.load(name)
    if tokenizer.spec.modality != "image" or "encoder_precision" not in type(tokenizer).options("encode"):
        raise InputError(f"{name} is no image tokenizer that encodes in reduced precision")
    subject = Pictures(tokenizer, media.expand_paths(files, Pictures.extensions))
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.eval.studies.precision", description="What bfloat16 costs an image tokenizer."
    )
    parser.add_argument("name")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    command = ["python", "-m", "zoo.eval.studies.precision", *(sys.argv[1:] if arguments is None else arguments)]
    write_result(run(options.name, options.files), options.out, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
