"""Fuzz targets: files of models, whatever is in them. Each lets errors of the zoo pass and nothing else.

Seeds of a target lie in ``corpus/<target>/``.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import zoo
from zoo import registry
from zoo.state_dict import read_state


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A folder to write in; an error of the zoo is fine if it names something in there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except zoo.ZooError as error:
            if folder not in str(error):
                raise AssertionError(f"the error does not name the file: {error!r}") from error


def latents(data: bytes) -> None:
    """A file of latents."""
    with _place() as folder:
        (folder / "latents.safetensors").write_bytes(data)
        loaded = zoo.Latents.load(folder / "latents.safetensors")
        assert zoo.Latents.from_bytes(loaded.to_bytes()).meta == loaded.meta


def saved_config(data: bytes) -> None:
    """The ``config.json`` of a saved tokenizer."""
    with _place() as folder:
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "config.json").write_bytes(data)
        zoo.load(f"local-dir:{folder}")


def safetensors_metadata(data: bytes) -> None:
    """A tokenizer in one file, its configuration in the metadata."""
    with _place() as folder:
        (folder / "model.safetensors").write_bytes(data)
        zoo.load(f"local-dir:{folder / 'model.safetensors'}")


def torch_archive(data: bytes) -> None:
    """A pickled state dict, in the format of today or in that before torch 1.6."""
    with _place() as folder:
        (folder / "model.pt").write_bytes(data)
        for tensor in read_state(folder / "model.pt").values():
            tensor.to(torch.float64)


def catalogue(data: bytes) -> None:
    """A user's catalogue."""
    with _place() as folder:
        path = folder / "catalogue.yaml"
        path.write_bytes(data)
        for entry in registry.read(path):
            # This error is of an entry by its name, wherever that stands.
            with contextlib.suppress(zoo.RegistryError):
                registry.check_config(entry)


def upstream_config(data: bytes) -> None:
    """An upstream configuration, in the terms of every family."""
    with _place() as folder:
        (folder / "config.yaml").write_bytes(data)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        for family in ("byteformer", "flextok", "seed", "tokenflow", "vat", "vectok", "wavtokenizer", "autoencoder_kl"):
            try:
                zoo.load_upstream(family, folder / "config.yaml", folder / "model.safetensors")
            except zoo.ZooError as error:
                assert str(folder) in str(error), error
