"""Answers of shapes to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.media.shape import SHAPE_EXTENSIONS, write_shape
from zoo.spec import Spec

if TYPE_CHECKING:
    import trimesh

EXTENSIONS = SHAPE_EXTENSIONS


def write(path: str | os.PathLike[str], decoded: trimesh.Trimesh, sample_rate: int | None) -> Path:
    """Write what a tokenizer of shapes decoded."""
    return write_shape(path, decoded)


def trial() -> trimesh.Trimesh:
    """A little mesh, to try a format with."""
    import trimesh

    return trimesh.creation.box()


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bits of an encoded shape."""
    return {}, {"bits": bits}
