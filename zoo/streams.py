"""Parallel streams: how language models lay out several codes of a frame side by side, rather than one behind the other.

Codes ``[frames, codebooks]`` (`zoo.Tokens.codes` of one item) become as many streams, each late by steps of its own.
MusicGen (arXiv 2306.05284, figure 1) calls this the delay pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from zoo.errors import ArgumentError, InputError

#: Dia's nine codebooks of DAC.
DIA = (0, 8, 9, 10, 11, 12, 13, 14, 15)


def musicgen(codebooks: int) -> tuple[int, ...]:
    """Each codebook one step behind the one before: MusicGen, AudioGen, Parler-TTS.

    Raises:
        ArgumentError: there are no codebooks.

    >>> musicgen(4)
    (0, 1, 2, 3)
    """
    _require_counts(codebooks)
    return tuple(range(codebooks))


def moshi(codebooks: int) -> tuple[int, ...]:
    """The codebook of words first, all others one step behind: Moshi.

    Raises:
        ArgumentError: there are no codebooks.

    >>> moshi(8)
    (0, 1, 1, 1, 1, 1, 1, 1)
    """
    _require_counts(codebooks)
    return (0,) + (1,) * (codebooks - 1)


def delay(codes: Int[Tensor, "frames codebooks"], delays: Sequence[int], fill: int) -> Int[Tensor, "steps codebooks"]:
    """Codes in which codebook ``q`` is ``delays[q]`` steps late, with ``fill`` wherever there is no code.

    There are ``frames + max(delays)`` steps.

    Raises:
        ArgumentError: there is not one delay of at least 0 for each codebook.

    >>> delay(torch.tensor([[1, 2], [3, 4]]), (0, 1), 9).tolist()
    [[1, 9], [3, 2], [9, 4]]
    """
    _require_delays(codes, delays)
    frames = len(codes)
    streams = codes.new_full((frames + max(delays), codes.shape[1]), fill)
    for book, late in enumerate(delays):
        streams[late : late + frames, book] = codes[:, book]
    return streams


def undelay(streams: Int[Tensor, "steps codebooks"], delays: Sequence[int], fill: int) -> Int[Tensor, "frames codebooks"]:
    """The codes that `delay` made streams of.

    Raises:
        ArgumentError: there is not one delay of at least 0 for each codebook.
        InputError: the streams are too short, or ``fill`` stands where a code belongs.

    >>> undelay(torch.tensor([[1, 9], [3, 2], [9, 4]]), (0, 1), 9).tolist()
    [[1, 2], [3, 4]]
    """
    _require_delays(streams, delays)
    frames = len(streams) - max(delays)
    if frames < 1:
        raise InputError(f"{len(streams)} steps hold no frame, with delays of up to {max(delays)}")
    codes = torch.stack([streams[late : late + frames, book] for book, late in enumerate(delays)], dim=1)
    if (codes == fill).any():
        frame, book = (codes == fill).nonzero()[0].tolist()
        raise InputError(f"the filler {fill} stands where frame {frame} has its code of codebook {book}")
    return codes


def offsets(codebooks: int, codebook_size: int, special: int = 0) -> tuple[int, ...]:
    """The first id of each codebook in one table for all, where each has a few special ids of its own behind its codes.

    Raises:
        ArgumentError: there are no codebooks or no codes, or fewer than no special ids.

    >>> offsets(4, 2048, special=3)
    (0, 2051, 4102, 6153)
    """
    _require_counts(codebooks, codebook_size, special + 1)
    return tuple(book * (codebook_size + special) for book in range(codebooks))


def _require_counts(*counts: int) -> None:
    if min(counts) < 1:
        raise ArgumentError("there must be at least one codebook, one code in each, and no fewer than 0 special ids")


def _require_delays(codes: Tensor, delays: Sequence[int]) -> None:
    if len(delays) != codes.shape[1] or min(delays) < 0:
        raise ArgumentError(f"delays must be one number of at least 0 for each of {codes.shape[1]} codebooks, not {delays}")
