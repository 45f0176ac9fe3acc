"""Tokenizers of files: bytes in, the same bytes out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import naming_item
from zoo.media.bytes import MAX_BYTES, read_bytes
from zoo.precision import whole_numbers
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, Prepared, Tokenizer, as_items
from zoo.tokens import Tokens


class FileTokenizer(Tokenizer[ConfigT, Tokens, bytes]):
    """A tokenizer of files of any kind, which may be empty. A family implements `ids` and `octets`, in whole numbers."""

    modality = "bytes"
    no_graphs = "its ids are the bytes of a file as they are or a table of them, which no network makes"
    may_be_empty = True

    @whole_numbers
    def encode(self, items: Any, *, max_bytes: int = MAX_BYTES, progress: bool = False) -> Tokens:
        """Files to ids.

        Args:
            items: one item or a list of them, each a path, bytes, an open file, a mapping with ``"bytes"`` or ``"path"``, an
                array or tensor of bytes ``[length]``, or a list of numbers. A tensor ``[batch, length]`` is a list. Files may
                be empty and of any kind; they are not looked into.
            max_bytes: refuse larger ones.
            progress: show a progress bar.

        Raises:
            ItemError: an item cannot be read, is too large or is not made of bytes; names the item.

        >>> tok = zoo.load("byteformer-tiny")
        >>> tokens = tok.encode([b"zoo", b""])
        >>> tokens.tolist(), tok.decode(tokens)
        ([[122, 111, 111], []], [b'zoo', b''])
        """
        return self.encode_prepared(self.prepare(items, max_bytes=max_bytes), progress=progress)

    @whole_numbers
    def prepare(self, items: Any, *, max_bytes: int = MAX_BYTES) -> list[Prepared]:
        """Files as they are: ``octets`` ``[length]``; ``amount`` counts bytes. Arguments and errors as for `encode`."""
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=2)):
            with naming_item(index):
                octets = read_bytes(item, max_bytes)
                prepared.append(Prepared({"octets": torch.from_numpy(octets.copy())}, {}, len(octets)))
        return prepared

    @whole_numbers
    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> Tokens:
        """Encode what `prepare` gave, to ids."""
        ids = []
        with progress_bar("encode", len(items), progress, unit="file") as advance:
            for item in items:
                ids.append(self.ids(item.tensors["octets"]))
                advance(1)
        return self.wrap(ids, ())

    @abstractmethod
    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " _"]:
        """The ids of a file."""

    @whole_numbers
    def decode(self, tokens: Any) -> list[bytes]:
        """The files, byte for byte.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``; an
                item without ids is the empty file.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            ItemError: an id stands for no byte; names the item.
        """
        contents = []
        for index, ids in enumerate(self.check(tokens).unpadded()):
            with naming_item(index):
                contents.append(self.octets(ids).tobytes())
        return contents

    @abstractmethod
    def octets(self, ids: Int[Tensor, " length"]) -> NDArray[Any]:
        """The bytes of a file's ids."""
