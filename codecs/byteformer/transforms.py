"""Bytes to other bytes: their order, obfuscation and the privacy camera (section 4.5 of the paper).

The original applies them in this order: shuffle, privacy camera, noise, exchange of values. Order and exchange can be undone,
and tokenizers trained with them do so when they decode; what the camera and the noise take away is gone.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from zoo.codecs.byteformer.config import RANDOM_SHUFFLES, SHUFFLES
from zoo.errors import InputError

Bytes = UInt8[np.ndarray, " length"]
Content = bytes | bytearray | memoryview | Bytes

#: The distance of ``stride`` and the length of the windows of ``window_shuffle``, unless they are told another one.
SPAN = 1024
# The original draws masks and its table with this seed.
_SEED = 2_147_483_647
# Byte v becomes EXCHANGED[v]: PyTorch's randperm(256) with that seed, kept here because a generator may change.
EXCHANGED = np.frombuffer(
    bytes.fromhex(
        "ef5a51af096428206fce6347d4a461c7a039e08579cfd03ebbb360edaef197c0e2ffe5ecac5c17d64dbc77e132f202dc23c5"
        "1f8b48dd0c387ca5450a332c3b8c26047aea2d6bc3a1bdd57eb8eea36a373087c118d7e9521c8d8a72534ee6aa01191b7342"
        "1555eb0311fc00f813709eb1f343d308149644624f0edf8627f5c97fbee89f2a0798a7a61ec4ab7b741d16fbb2a9b7064c8f"
        "836ccdcbf94b41de4622ccd89a5e76a8362b4ae4936e5f505bfd0d6d9c3ab6fa80e30f676681b4d210d9da2e7dc29b57d194"
        "31c8493d9d882189b97569bf90e7f605f424b5849559688e2f4058f0c6fe1a99b0ca928271f72934a2250b5d3f5435ad12db"
        "91655678ba3c"
    ),
    np.uint8,
)
_RESTORED = np.argsort(EXCHANGED).astype(np.uint8)


def shuffle(
    content: Content,
    mode: str,
    *,
    span: int | None = None,
    permutation: Int[Tensor, " _"] | None = None,
    generator: torch.Generator | None = None,
) -> Bytes:
    """Bytes in another order.

    Args:
        content: the bytes of a file.
        mode: ``reverse``; ``cyclic_half_length``: rolled to the right by half the length; ``stride``: every ``span``-th byte
            from the first, from the second, ...; ``window_shuffle``: one random permutation within each whole window of
            ``span`` bytes, the rest stays; ``random_shuffle``: one random permutation.
        span: 1024 by default, or the length of a permutation of windows.
        permutation: of the random modes, instead of a drawn one: byte i of the result, or of a window, is byte
            ``permutation[i]``.
        generator: draws it.

    Raises:
        InputError: there is no such mode, or the permutation has another length.
    """
    octets = _octets(content)
    return octets[_order(len(octets), mode, span, permutation, generator)]


def unshuffle(content: Content, mode: str, *, span: int | None = None, permutation: Int[Tensor, " _"] | None = None) -> Bytes:
    """The inverse of `shuffle`; random modes need the permutation.

    Raises:
        InputError: as `shuffle`, or the permutation is missing.
    """
    octets = _octets(content)
    if mode in RANDOM_SHUFFLES and permutation is None:
        raise InputError(f"{mode} can only be undone with its permutation")
    restored = np.empty_like(octets)
    restored[_order(len(octets), mode, span, permutation, None)] = octets
    return restored


def camera_positions(length: int, keep: float) -> Int[np.ndarray, " kept"]:
    """Positions in ascending order of the bytes that the privacy camera keeps: a fixed random share ``keep`` of them."""
    if not 0 < keep <= 1:
        raise InputError(f"the share of bytes to keep must lie in (0, 1], not {keep}")
    chosen = torch.randperm(length, generator=torch.Generator().manual_seed(_SEED), device="cpu", dtype=torch.int64)[
        : int(keep * length)
    ]
    return np.sort(chosen.numpy())


def keep_bytes(content: Content, keep: float) -> Bytes:
    """Record as the privacy camera does: a fixed random share of the bytes, in their order; the others are lost."""
    octets = _octets(content)
    return octets[camera_positions(len(octets), keep)]


def add_noise(
    content: Content,
    low: int,
    high: int,
    *,
    noise: Int[Tensor, " length"] | None = None,
    generator: torch.Generator | None = None,
) -> Bytes:
    """Bytes plus random whole numbers from ``low`` to ``high``, both included, modulo 256.

    Args:
        content: the bytes of a file.
        low, high: bounds of the numbers.
        noise: the numbers themselves instead of drawn ones.
        generator: draws them. The original leaves it unseeded, in evaluation too, so its accuracies vary.

    Raises:
        InputError: the bounds are the wrong way round, or the noise has another length.
    """
    octets = _octets(content)
    if low > high:
        raise InputError(f"noise from {low} to {high}")
    drawn = noise
    if drawn is None:
        device = generator.device if generator else "cpu"
        drawn = torch.randint(low, high + 1, octets.shape, generator=generator, device=device, dtype=torch.int64).cpu()
    if drawn.shape != octets.shape:
        raise InputError(f"noise of {len(drawn)} numbers for {len(octets)} bytes")
    return ((octets + drawn.to(torch.int64).numpy()) % 256).astype(np.uint8)


def exchange_values(content: Content) -> Bytes:
    """Every byte value replaced by another one, after the original's fixed table."""
    return EXCHANGED[_octets(content)]


def restore_values(content: Content) -> Bytes:
    """The inverse of `exchange_values`."""
    return _RESTORED[_octets(content)]


def _octets(content: Content) -> Bytes:
    return content if isinstance(content, np.ndarray) else np.frombuffer(content, np.uint8)


def _order(
    length: int,
    mode: str,
    span: int | None,
    permutation: Int[Tensor, " _"] | None,
    generator: torch.Generator | None,
) -> Shaped[np.ndarray, " length"]:
    """Where each byte of the shuffled file comes from."""
    if span is not None and span < 1:
        raise InputError(f"the span of an order of bytes must be at least 1, not {span}")
    distance = SPAN if span is None else span
    positions = np.arange(length)
    if mode == "reverse":
        return positions[::-1]
    if mode == "cyclic_half_length":
        return np.roll(positions, length // 2)
    if mode == "stride":
        return np.concatenate([positions[start::distance] for start in range(distance)])
    if mode not in SHUFFLES:
        raise InputError(f"the order of bytes must be one of {', '.join(SHUFFLES)}, not {mode!r}")
    if span is None and permutation is not None:
        distance = len(permutation)
    window = length if mode == "random_shuffle" else distance
    chosen = permutation
    if chosen is None:
        device = generator.device if generator else "cpu"
        chosen = torch.randperm(window, generator=generator, device=device, dtype=torch.int64).cpu()
    if len(chosen) != window:
        raise InputError(f"a permutation of {len(chosen)} bytes where {mode} needs one of {window}")
    # Without a generator's say about an empty file there is nothing to move.
    whole = length // window * window if window else 0
    windows = positions[:whole].reshape(-1, max(1, window))[:, chosen.numpy()]
    return np.concatenate([windows.reshape(-1), positions[whole:]])
