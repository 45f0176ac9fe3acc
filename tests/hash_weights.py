"""Weights by formula: integer hashes of the state-dict key, so that full-size cases need no file.

The arithmetic is written down in ``golden/wavtokenizer/full320_hash/NOTES.md``.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN_RATIO = 0x9E3779B97F4A7C15


def unit_values(key: str, count: int, seed: int) -> np.ndarray:
    """``count`` float32 values in [-1, 1) for a key."""
    start = (zlib.crc32(key.encode()) + (seed << 32)) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN_RATIO)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return np.float32(2) * u - np.float32(1)


def hash_tensor(key: str, shape: tuple[int, ...], base: float, scale: float, weight_seed: int) -> Tensor:
    """The tensor of a key: ``base + scale * r`` in float32."""
    values = unit_values(key, int(np.prod(shape)), weight_seed)
    return torch.from_numpy((np.float32(base) + np.float32(scale) * values).reshape(shape))


def wavtokenizer_base_and_scale(key: str, shape: tuple[int, ...], codebook_scale: float) -> tuple[float, float]:
    """The first matching row of the table in the notes."""
    fan = int(np.prod(shape[1:]))

    def root(numerator: float) -> np.float32:
        return np.float32(np.sqrt(numerator))

    if key.endswith("weight_v"):
        return 0, 1
    if key.endswith("weight_g"):
        return (6, 1.8) if ".model.0." in key else (1, 0.3) if ".shortcut." in key else (1.5, 0.45)
    if ".lstm.weight" in key:
        return 0, np.float32(1.6 / np.sqrt(shape[1]))
    if ".lstm.bias" in key:
        return 0, 0.1
    if key.startswith("feature_extractor") and key.endswith("bias"):
        return 0, 0.2
    if key.endswith("inited"):
        return 1, 0
    if key.endswith("cluster_size"):
        return 5, 4
    if key.endswith((".embed", "embed_avg")):
        return 0, codebook_scale
    if key.endswith("scale.weight"):
        return 1, 0.4
    if key.endswith("shift.weight"):
        return 0, 0.4
    if key.endswith("gamma"):
        return 0.15, 0.25
    if key.endswith(("norm1.weight", "norm2.weight", "norm.weight")) or key == "backbone.pos_net.5.weight":
        return 1, 0.4
    if len(shape) == 1:
        return 0, 0.2
    if ".q." in key or ".k." in key:
        return 0, np.float32(1.8) * root(3 / fan)
    if key == "head.out.weight":
        return 0, np.float32(1.2) * root(3 / fan)
    return 0, root(3 / fan)


def wavtokenizer_state(shapes: dict[str, list[int]], weight_seed: int, codebook_scale: float = 3.0) -> dict[str, Tensor]:
    """The state dict of a full-size WavTokenizer case, in upstream's key names."""
    state = {}
    for key, shape in shapes.items():
        if key.startswith("feature_extractor.encodec.decoder.") or key == "head.istft.window":
            continue
        base, scale = wavtokenizer_base_and_scale(key, tuple(shape), codebook_scale)
        state[key] = hash_tensor(key, tuple(shape), base, scale, weight_seed)
        if ".lstm.bias_ih" in key:
            hidden = shape[0] // 4
            forget = unit_values(f"{key}#forget", hidden, weight_seed)
            state[key][hidden : 2 * hidden] += torch.from_numpy(np.float32(2.5) + np.float32(2.5) * forget)
    return state
