"""Cost of quantization to a model: floating point beside integers, nearest beside learned rounding.

    zoo study quantize wavtokenizer-tiny --calibrate eval/samples/speech-1.flac --data eval/samples/speech-3.flac

Files are encoded once by the model in float32, and what it makes of the ids is what the quantized models are compared with, as
arXiv 2408.06995 argues; the distance from the originals stands beside it. Of tokenizers of sound and images it is the decoder
that is measured, of byte tokenizers the classifier.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import zoo
from zoo import hub, media
from zoo.errors import InputError
from zoo.eval.modality.base import measures_of
from zoo.eval.options import Data, MaybeOut, Name, Threads
from zoo.eval.studies.quantized.base import Subject, subject_of
from zoo.machine import device_name
from zoo.media import write_json
from zoo.quantization.conversion import quantize
from zoo.quantization.layers import Granularity
from zoo.quantization.learned import LearningConfig
from zoo.quantization.packed import quantized_layers
from zoo.quantization.report import LayerReport
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens

NEAREST = ("fp8", "fp8-e4m3", "int8", "fp6", "fp6-e2m3", "int6", "fp4", "fp4-e2m1", "fp4-e3m0", "int4", "mxfp4", "nvfp4")
UNSEARCHED = ("fp8-e4m3", "int8", "fp4-e2m1", "int4")
CALIBRATED = ("fp8", "fp8-e4m3", "int8", "fp4", "fp4-e2m1", "int4")
LEARNED = ("fp4", "fp4-e2m1", "int4")


def run(
    name: str,
    files: Sequence[str | Path],
    calibration: Sequence[str | Path],
    *,
    skip: Sequence[str] = (),
    iterations: int = 300,
    progress: bool = False,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Quantize a model in every way and measure what changes.

    Args:
        name: a tokenizer of the catalogue, of media with a subject in `zoo.eval.studies.quantized`.
        files: what to measure on: paths, folders and patterns.
        calibration: other files, for scales of inputs and for learning to round.
        skip: names of layers to leave as they are, ``*`` standing for anything.
        iterations: steps of learning for each layer or block.
        progress: print every row when it is there.
        json_path: write the result there.

    Raises:
        InputError: the tokenizer is for other media, or there are no files to measure on or to calibrate with.
    """
    modality = zoo.info(name).modality
    kind, extensions = subject_of(modality), measures_of(modality).EXTENSIONS
    if not files or not calibration:
        raise InputError(f"there are no files to {'calibrate with' if files else 'measure on'}")
    measured, others = (media.expand_paths(given, extensions) for given in (files, calibration))
    subject = kind(zoo.load(name), measured)
    batches = subject.calibration(others)
    rows = [_row("float32", subject.tokenizer, subject, weights="float32")]
    for label, settings, weights_only_too in variants(subject, batches, iterations):
        reports: list[LayerReport] = []
        quantized = quantize(zoo.load(name), on_layer=reports.append, skip=skip, **settings)
        rows.append(_row(label, quantized, subject, **_described(settings, reports)))
        if weights_only_too:
            for layer in quantized_layers(quantized).values():
                layer.activations = None  # type: ignore[assignment]
            rows.append(_row(label, quantized, subject, **_described(settings, reports) | {"inputs": "float32"}))
        if progress:
            print(json.dumps(rows[-1]), flush=True)
    content = {
        "name": name,
        "files": [file.name for file in measured],
        "calibration": [file.name for file in others],
        "amount": subject.amount,
        "unit": subject.unit,
        "columns": {key: list(column) for key, column in subject.columns.items()},
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "skip": list(skip),
        "learning": asdict(LearningConfig(iterations=iterations)),
        "rows": rows,
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def variants(subject: Subject, batches: Sequence[Tokens], iterations: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """A name, the arguments of `zoo.quantize`, and whether to measure once more without rounding the inputs."""
    for method in NEAREST:
        yield method, {"method": method}, False
    for method in UNSEARCHED:
        yield method, {"method": method, "granularity": Granularity(clip="absmax")}, False
    calibrated = {"calibrate": batches, "run": subject.output}
    for method in CALIBRATED:
        yield method, {"method": method, "rounding": "nearest", **calibrated}, False
    for method in LEARNED:
        for blocks in (False, True):
            learning = LearningConfig(iterations=iterations, blocks=blocks)
            yield method, {"method": method, "rounding": "learned", "learning": learning, **calibrated}, True


def _described(settings: dict[str, Any], reports: Sequence[LayerReport]) -> dict[str, Any]:
    # Layers of a block share its error.
    learned = {report.block or report.name: report.output_error for report in reports if report.output_error is not None}
    inputs = {report.activations for report in reports if report.method is not None}
    granularity = settings.get("granularity", Granularity())
    in_blocks = "learning" in settings and settings["learning"].blocks
    return {
        "rounding": ("learned in blocks" if in_blocks else "learned") if learned else "nearest",
        "range": granularity.clip,
        "inputs": "float32" if inputs == {""} else "static 8 bits",
        "layers": sum(report.method is not None for report in reports),
        "layers_kept": sum(report.method is None for report in reports),
        "output_error_ratio": _ratio(list(learned.values())) if learned else None,
    }


def _ratio(errors: Sequence[tuple[float, float]]) -> float:
    """Sum of errors after learning over that before."""
    return sum(after for _, after in errors) / sum(before for before, _ in errors)


def _row(label: str, tokenizer: Tokenizer[Any], subject: Subject, **described: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        hub.write_saved_file(tokenizer, Path(scratch) / "model.safetensors")
        file_bytes = (Path(scratch) / "model.safetensors").stat().st_size
    layers = quantized_layers(tokenizer).values()
    packed = sum(buffer.numel() * buffer.element_size() for layer in layers for buffer in layer.buffers())
    plain = sum(4 * layer.weight.numel() for layer in layers)
    return {
        "method": label,
        **described,
        **subject.measure(tokenizer),
        "file_bytes": file_bytes,
        "packed_of_float32": packed / plain if plain else None,
    }


def print_table(content: dict[str, Any]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{content['name']}, {content['amount']:.0f} {content['unit']}, {content['device']}")
    described = ("method", "range", "rounding", "inputs")
    for column in described:
        table.add_column(column)
    for column in ("SNR dB", *(heading for heading, _ in content["columns"].values()), "file MB"):
        table.add_column(column, justify="right")
    for row in content["rows"]:
        figures = [(row[key], decimals) for key, (_, decimals) in content["columns"].items()]
        table.add_row(
            *(row.get(column, "") for column in described),
            f"{row['snr']:.1f}",
            *("" if figure is None else f"{figure:.{decimals}f}" for figure, decimals in figures),
            f"{row['file_bytes'] / 1e6:.2f}",
        )
    Console().print(table)


def main(
    name: Name,
    data: Data,
    calibrate: Annotated[list[str], typer.Option(help="other files; may be given several times")],
    skip: Annotated[list[str] | None, typer.Option(help="layers to leave as they are, * standing for anything")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="steps of learning for each layer or block")] = 300,
    threads: Threads = None,
    out: MaybeOut = None,
) -> None:
    """Measure what quantization costs a model, by every number format and way of rounding.

    Measured are decoders of sound and images, and classifiers of bytes: folders of the files are their classes.
    """
    if threads:
        torch.set_num_threads(threads)
    print_table(run(name, data, calibrate, skip=skip or (), iterations=iterations, progress=True, json_path=out))
