"""The finished layers of a quantization on disk: an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.errors import CorruptWeightsError, InputError
from zoo.media import replacing, write_json
from zoo.moved import names_of
from zoo.quantization.calibration import Observed
from zoo.quantization.methods import KINDS
from zoo.quantization.packed import QuantizedLayer
from zoo.quantization.report import LayerReport
from zoo.state_dict import opening_safetensors, read_state

SETTINGS_FILE = "quantization.json"
_VERSION = 1


class LayerJournal:
    """A folder with a file for each finished layer, and one that says what was being done.

    Raises:
        InputError: the folder belongs to the quantization of another model, with other settings or other calibration inputs.
        CorruptWeightsError: a file in it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Open a folder, or make one.

        Args:
            folder: where the files are.
            identity: what makes two quantizations the same one, by what it is called in a message; plain values.
        """
        self._folder = Path(folder)
        path = self._folder / SETTINGS_FILE
        wanted = json.loads(json.dumps({"journal version": _VERSION, **identity}))
        if path.exists():
            found = _read_settings(path)
            if differing := [key for key in wanted if found.get(key) != wanted[key]]:
                raise InputError(f"resume: {folder} is of a quantization with another {' and another '.join(differing)}")
            return
        write_json(path, wanted)

    def finished(self, name: str, layer: nn.Module) -> tuple[QuantizedLayer, LayerReport] | None:
        """The packed form of a layer and what became of it; ``None`` if it is not finished."""
        path = self._path(name)
        if not path.exists():
            return None
        with opening_safetensors(path) as file:
            metadata = file.metadata() or {}
        try:
            description, report = (json.loads(metadata[key]) for key in ("description", "report"))
            module, _, cls = KINDS[description["kind"]].partition(":")
            packed: QuantizedLayer = getattr(importlib.import_module(module), cls).from_description(layer, description)
            packed.load_state_dict(read_state(path))
            errors = report.pop("output_error")
            return packed, LayerReport(**report, output_error=None if errors is None else tuple(errors))
        except (KeyError, TypeError, ValueError, RuntimeError, InputError) as error:
            raise CorruptWeightsError(f"{path} is no finished layer: {error!r}") from error

    def store(self, name: str, packed: QuantizedLayer, report: LayerReport) -> None:
        """Keep a finished layer."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in packed.state_dict().items()}
        metadata = {"description": json.dumps(packed.description()), "report": json.dumps(asdict(report))}
        with replacing(self._path(name)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _path(self, name: str) -> Path:
        # Names can be longer than a file's, or empty.
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptWeightsError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CorruptWeightsError(f"{path} is damaged: it holds no settings")
    return found


def weights_digest(model: nn.Module) -> str:
    """A hash of all tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_octets(tensor))
    return digest.hexdigest()


def inputs_digest(observed: Mapping[str, Observed]) -> str:
    """A hash of what the layers of a model met while it was calibrated."""
    digest = hashlib.sha256()
    for name, seen in observed.items():
        digest.update(f"{name} {seen.largest!r}".encode())
        for sample in seen.samples:
            digest.update(_octets(sample))
    return digest.hexdigest()


def _octets(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


#: Former names, for one release.
__getattr__ = names_of(__name__, {"Journal": "zoo.quantization.journal:LayerJournal"})
