"""What quantization costs a tokenizer's decoder: floating point beside integers, nearest beside learned rounding.

python -m zoo.eval.quantize wavtokenizer-tiny --calibrate eval/samples/speech-1.flac --data eval/samples/speech-3.flac

Recordings are encoded once by the model in float32, and its own decoding is what the quantized decoders are compared with, as
arXiv 2408.06995 argues; the distance from the recordings stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo import hub, media
from zoo.bench import device_name
from zoo.errors import InputError
from zoo.eval.audio import log_mel_l1
from zoo.quantize.conversion import LayerReport, quantize
from zoo.quantize.layers import Granularity
from zoo.quantize.learned import LearningConfig
from zoo.quantize.packed import quantized_layers
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens

NEAREST = ("fp8", "fp8-e4m3", "int8", "fp6", "fp6-e2m3", "int6", "fp4", "fp4-e2m1", "fp4-e3m0", "int4", "mxfp4", "nvfp4")
UNSEARCHED = ("fp8-e4m3", "int8", "fp4-e2m1", "int4")
CALIBRATED = ("fp8-e4m3", "int8", "fp4-e2m1", "int4")
LEARNED = ("fp4-e2m1", "int4")


def run(
    name: str,
    recordings: Sequence[str],
    calibration: Sequence[str],
    *,
    iterations: int = 300,
    progress: bool = False,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Quantize the decoder of an audio tokenizer in every way and measure what changes.

    Args:
        name: an audio tokenizer of the catalogue.
        recordings: files to measure on.
        calibration: other files, for scales of inputs and for learning to round.
        iterations: steps of learning for each layer.
        progress: print every row when it is there.
        json_path: write the result there.

    Raises:
        InputError: the tokenizer is for other media, or there are no recordings.
    """
    if zoo.info(name).modality != "audio":
        raise InputError(f"{name} is no audio tokenizer")
    tokenizer = zoo.load(name)
    rate = tokenizer.spec.sample_rate
    assert rate is not None
    originals = [media.read_audio(file, sample_rate=rate, mono=True).waveform[0] for file in recordings]
    tokens = tokenizer.encode(originals)
    compare = _Comparison(tokens, originals, [audio[0] for audio in tokenizer.decode(tokens)], rate)
    rows = [_row("float32", tokenizer, compare, weights="float32")]
    for label, settings, weights_only_too in variants(calibration, iterations):
        reports: list[LayerReport] = []
        quantized = quantize(zoo.load(name), on_layer=reports.append, **settings)
        rows.append(_row(label, quantized, compare, **_described(settings, reports)))
        if weights_only_too:
            for layer in quantized_layers(quantized).values():
                layer.activations = None  # type: ignore[assignment]
            rows.append(_row(label, quantized, compare, **_described(settings, reports) | {"inputs": "float32"}))
        if progress:
            print(json.dumps(rows[-1]), flush=True)
    content = {
        "name": name,
        "recordings": [Path(file).name for file in recordings],
        "calibration": [Path(file).name for file in calibration],
        "seconds": sum(len(audio) for audio in originals) / rate,
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "learning": asdict(LearningConfig(iterations=iterations)),
        "rows": rows,
    }
    if json_path is not None:
        with media.replacing(json_path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def variants(calibration: Sequence[str], iterations: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """A name, the arguments of `zoo.quantize`, and whether to measure once more without rounding the inputs."""
    for method in NEAREST:
        yield method, {"method": method}, False
    for method in UNSEARCHED:
        yield method, {"method": method, "granularity": Granularity(clip="absmax")}, False
    calibrated = {"calibrate": [list(calibration)], "learning": LearningConfig(iterations=iterations)}
    for method in CALIBRATED:
        yield method, {"method": method, "rounding": "nearest", **calibrated}, False
    for method in LEARNED:
        yield method, {"method": method, "rounding": "learned", **calibrated}, True


def _described(settings: dict[str, Any], reports: Sequence[LayerReport]) -> dict[str, Any]:
    learned = [report.output_error for report in reports if report.output_error is not None]
    inputs = {report.activations for report in reports if report.method is not None}
    granularity = settings.get("granularity", Granularity())
    return {
        "rounding": "learned" if learned else "nearest",
        "range": granularity.clip,
        "inputs": "float32" if inputs == {""} else "static 8 bits",
        "layers": sum(report.method is not None for report in reports),
        "layers_kept": sum(report.method is None for report in reports),
        "output_error_ratio": sum(after for _, after in learned) / sum(before for before, _ in learned) if learned else None,
    }


class _Comparison:
    """How far a decoder is from the model in float32 and from the recordings."""

    def __init__(self, tokens: Tokens, originals: list[Tensor], decoded: list[Tensor], rate: int) -> None:
        self.tokens, self.originals, self.decoded, self.rate = tokens, originals, decoded, rate

    def __call__(self, decode: Callable[[Tokens], list[Tensor]]) -> dict[str, float]:
        started = time.process_time()
        audio = [item[0] for item in decode(self.tokens)]
        seconds = time.process_time() - started
        pairs = list(zip(audio, self.decoded, self.originals, strict=True))
        signal = sum(float(reference.square().sum()) for _, reference, _ in pairs)
        noise = sum(float((item - reference).square().sum()) for item, reference, _ in pairs)
        return {
            "snr": 10 * float(torch.tensor(signal / noise).log10()) if noise else float("inf"),
            "mel_from_float32": _mean(log_mel_l1(reference, item, self.rate) for item, reference, _ in pairs),
            "mel_from_recording": _mean(log_mel_l1(original, item, self.rate) for item, _, original in pairs),
            "decode_cpu_seconds": seconds,
        }


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _row(label: str, tokenizer: Tokenizer[Any], compare: _Comparison, **described: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        hub.write_saved_file(tokenizer, Path(scratch) / "model.safetensors")
        file_bytes = (Path(scratch) / "model.safetensors").stat().st_size
    layers = quantized_layers(tokenizer).values()
    packed = sum(buffer.numel() * buffer.element_size() for layer in layers for buffer in layer.buffers())
    plain = sum(4 * layer.weight.numel() for layer in layers)
    return {
        "method": label,
        **described,
        **compare(tokenizer.decode),
        "file_bytes": file_bytes,
        "packed_of_float32": packed / plain if plain else None,
    }


def print_table(content: dict[str, Any]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{content['name']}, {content['seconds']:.0f} s of audio, {content['device']}")
    for column in ("method", "range", "rounding", "inputs", "SNR dB", "mel", "mel from recording", "file MB"):
        table.add_column(column, justify="left" if column in ("method", "range", "rounding", "inputs") else "right")
    for row in content["rows"]:
        table.add_row(
            row["method"],
            row.get("range", ""),
            row.get("rounding", ""),
            row.get("inputs", ""),
            f"{row['snr']:.1f}",
            f"{row['mel_from_float32']:.3f}",
            f"{row['mel_from_recording']:.3f}",
            f"{row['file_bytes'] / 1e6:.2f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.eval.quantize", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("name", help="an audio tokenizer of the catalogue")
    parser.add_argument("--data", nargs="+", required=True, help="recordings to measure on")
    parser.add_argument("--calibrate", nargs="+", required=True, help="other recordings")
    parser.add_argument("--iterations", type=int, default=300, help="steps of learning for each layer")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--out", help="write the figures as JSON")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    content = run(given.name, given.data, given.calibrate, iterations=given.iterations, progress=True, json_path=given.out)
    print_table(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
