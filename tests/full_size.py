"""Checkpoints of official size with random numbers, written without holding them in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK = 1 << 22


def write_random_safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, seed: int = 0) -> int:
    """A safetensors file of the given shapes; returns its size in bytes. One block of random numbers is used over and over."""
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)
    raw = block.view(torch.uint8).numpy().tobytes()
    header, end = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(end // len(raw)):
            file.write(raw)
        file.write(raw[: end % len(raw)])
    return path.stat().st_size
