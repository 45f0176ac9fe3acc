"""Tokenizers as ONNX files, for programs that have no PyTorch; what was written is run and compared with the tokenizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import hub, media
from zoo.errors import ArgumentError, MissingExtraError, OutputError
from zoo.precision import exact_float32
from zoo.tokenizer import Tokenizer
from zoo.tokenizer.graphs import Graph, Port

DESCRIPTION_FILE = "export.json"
#: The largest difference of media that counts as none, for media that are at most 1; of louder ones in proportion.
MEDIA_TOLERANCE = 1e-4
#: A file of ONNX cannot be larger, in bytes.
_LARGEST = (1 << 31) - (1 << 24)
_NEEDED = ("onnx", "onnxscript")


def export(tokenizer: str | Tokenizer[Any, Any, Any], folder: str | Path, *, tolerate: bool = False) -> dict[str, Any]:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``export.json`` into a folder.

    The graphs take batches of any size and, of sound, any length, and compute in float32. An encoder gives the ids that
    `zoo.Tokens` hold, and a decoder takes them. What a half cannot do as a graph, ``export.json`` says. Each graph is run by
    onnxruntime, if that is installed, on items of several sizes before anything gets its name.

    Args:
        tokenizer: a loaded one, or the name of one for `zoo.load`.
        folder: is made if it is not there. Files of an earlier export are replaced.
        tolerate: write graphs that give some other ids as well. Ids near the border between two codes may flip.

    Returns:
        What ``export.json`` holds. ``checked`` of a graph is ``None`` where onnxruntime is not installed.

    Raises:
        ArgumentError: the family has no graphs, or a graph is too large for one file; says why.
        MissingExtraError: onnx or onnxscript is not installed.
        OutputError: the folder cannot be written, or a graph gives other ids or media than the tokenizer.
    """
    if isinstance(tokenizer, str):
        tokenizer = hub.load(tokenizer)
    graphs = tokenizer.graphs()
    if absent := [name for name in _NEEDED if find_spec(name) is None]:
        raise MissingExtraError(f'an export needs {" and ".join(absent)}: pip install "tokenizer-zoo[onnx]"')
    folder = Path(folder)
    media.require_writable(folder, folder=True)
    described: dict[str, Any] = {}
    with ExitStack() as finished:
        for half, graph in graphs.items():
            if isinstance(graph, str):
                described[half] = {"file": None, "reason": graph}
                continue
            temporary = finished.enter_context(media.replacing(folder / f"{half}.onnx"))
            with exact_float32(torch.device("cpu")):
                opset = _write(graph, temporary)
            described[half] = {
                "file": f"{half}.onnx",
                "opset": opset,
                "takes": _described(graph.takes, graph.trials[0]),
                "gives": _described(graph.gives, graph.answer(graph.trials[0])),
                "checked": _checked(f"{half} of {tokenizer.name}", graph, temporary, tolerate),
            }
        description = _description(tokenizer) | {"graphs": described}
        media.write_json(folder / DESCRIPTION_FILE, description)
    return description


def _description(tokenizer: Tokenizer[Any, Any, Any]) -> dict[str, Any]:
    """What a program has to know beside the graphs."""
    spec = tokenizer.spec
    frame = spec.frame
    return {
        "zoo_export": 1,
        "tokenizer": spec.name,
        "family": spec.family,
        "modality": spec.modality,
        "fingerprint": spec.fingerprint,
        "vocab_size": spec.vocab_size,
        "sample_rate": spec.sample_rate,
        "hop_length": spec.hop_length,
        "image_size": spec.image_size,
        "frame": None if frame is None else asdict(frame),
        "versions": {name: version(name) for name in ("torch", *_NEEDED)},
    }


def _described(port: Port, example: Tensor) -> dict[str, Any]:
    return {"name": port.name, "axes": list(port.axes), "dtype": str(example.dtype).removeprefix("torch.")}


def _write(graph: Graph, path: Path) -> int:
    """Write a graph as an ONNX file; returns the opset."""
    module = graph.module.eval().requires_grad_(False)
    if sum(tensor.numel() * tensor.itemsize for tensor in module.state_dict().values()) > _LARGEST:
        raise ArgumentError("the weights are too large for one file of ONNX, which holds 2 GiB")
    sizes = {axis: torch.export.Dim.DYNAMIC for axis, name in enumerate(graph.takes.axes) if isinstance(name, str)}
    # With gradients layers are plain functions; without, some write over what is needed no more.
    with _quiet(), torch.enable_grad():
        traced = torch.export.export(module, (graph.trials[0],), dynamic_shapes=(sizes,), strict=False)
        program = torch.onnx.export(traced, input_names=[graph.takes.name], output_names=[graph.gives.name], verbose=False)
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())
    return int(program.model.opset_imports[""])


def _checked(what: str, graph: Graph, path: Path, tolerate: bool) -> dict[str, Any] | None:
    """Compare a file with the tokenizer, on every trial."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compared = differing = 0
    largest = 0.0
    for trial in graph.trials:
        wanted = graph.answer(trial)
        found = torch.from_numpy(session.run(None, {graph.takes.name: trial.numpy()})[0])
        if found.shape != wanted.shape:
            raise OutputError(f"the {what} gives {list(found.shape)} for {list(trial.shape)}, not {list(wanted.shape)}")
        compared += wanted.numel()
        if wanted.is_floating_point():
            scale = max(1.0, float(wanted.abs().max()))
            largest = max(largest, float((found - wanted).abs().max()) / scale)
        else:
            differing += int((found != wanted).sum())
    result = {"items": sum(len(trial) for trial in graph.trials), "onnxruntime": onnxruntime.__version__}
    if wanted.is_floating_point():
        if not largest <= MEDIA_TOLERANCE:
            raise OutputError(f"the {what} is {largest:.1e} from the tokenizer, more than {MEDIA_TOLERANCE:g}")
        return result | {"largest_difference": largest}
    if differing and not tolerate:
        raise OutputError(f"{differing} of {compared} ids of the {what} differ from the tokenizer's; tolerate writes it anyway")
    return result | {"ids": compared, "differing_ids": differing}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch and onnxscript say about their own code while they translate."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def summary(description: Mapping[str, Any]) -> list[str]:
    """A line about each half of an export."""
    lines = []
    for half, graph in description["graphs"].items():
        if graph["file"] is None:
            lines.append(f"no {half}: {graph['reason']}")
        elif graph["checked"] is None:
            lines.append(f"{graph['file']}: not checked, as onnxruntime is not installed")
        elif "ids" in graph["checked"]:
            checked = graph["checked"]
            lines.append(f"{graph['file']}: {checked['differing_ids']} of {checked['ids']} ids differ")
        else:
            lines.append(f"{graph['file']}: within {graph['checked']['largest_difference']:.1e} of the tokenizer")
    return lines
