"""Texts as the byte ids of ByT5, which several families read: the value of a byte plus 3."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import InputError
from zoo.tokenizer.base import ConfigT
from zoo.tokenizer.text import TextTokenizer
from zoo.tokens import Meta

PAD, END, UNKNOWN = 0, 1, 2
#: Id of byte 0.
FIRST_BYTE = 3
#: Id of the first of the sentinels ``<extra_id_0>`` to ``<extra_id_124>``, which stand for spans that were cut out.
FIRST_SENTINEL, SENTINELS = FIRST_BYTE + 256, 125
VOCAB_SIZE = FIRST_SENTINEL + SENTINELS


class ByteTextTokenizer(TextTokenizer[ConfigT]):
    """Any bytes, one id each, and back without loss.

    Ids 0 (padding), 1 (end) and the sentinels from 259 on decode to nothing, and id 2 (unknown) is refused.
    """

    markers = ((), (END,))

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " length"]:
        """One id for each byte."""
        return octets.to(torch.int64) + FIRST_BYTE

    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The bytes of ids; those of markers, padding and sentinels are none.

        Raises:
            InputError: one is id 2, which stands for no text.
        """
        if (ids == UNKNOWN).any():
            raise InputError(f"id {UNKNOWN} is the unknown one, which stands for no text")
        values = ids[self.widths(ids, meta).bool()] - FIRST_BYTE
        return values.to(torch.uint8).numpy()

    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """1 for the id of a byte, 0 for any other."""
        return ((ids >= FIRST_BYTE) & (ids < FIRST_SENTINEL)).long()
