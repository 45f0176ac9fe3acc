"""Tokenizers of text: a string or bytes in, the same string or the same bytes out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ArgumentError, InputError, naming_item
from zoo.media.bytes import MAX_BYTES
from zoo.media.text import read_text
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, Prepared, Tokenizer, as_items
from zoo.tokens import Meta, Tokens

#: Which markers `TextTokenizer.encode` adds: none, or those that the official file or recipe adds.
Specials = Literal["none", "upstream"]
#: What `TextTokenizer.decode` does with bytes that are no UTF-8 where a string is wanted.
Errors = Literal["strict", "replace", "ignore"]


class TextTokenizer(Tokenizer[ConfigT, Tokens, str | bytes]):
    """A tokenizer of texts, which may be empty.

    A family implements `ids`, `octets` and `widths`, all about the bytes of a text; what an item was, a string or bytes, this
    class remembers. A family that needs characters calls `zoo.media.text.characters`.
    """

    modality = "text"
    no_graphs = "its ids come from bytes, tables and searches of text, which no network makes"
    may_be_empty = True
    #: Ids that the official file or recipe puts before and behind a text.
    markers: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]] = ((), ())

    def encode(self, items: Any, *, specials: Specials = "none", max_bytes: int = MAX_BYTES, progress: bool = False) -> Tokens:
        """Texts to ids.

        A string is the text itself, never a path; `pathlib.Path` names a file.

        Args:
            items: one item or a list of them, each a string, bytes (UTF-8 or not), a `pathlib.Path`, an open file, or a mapping
                with ``"text"``, ``"bytes"`` or ``"path"``. Texts may be empty.
            specials: ``"upstream"`` adds the markers that the official file or recipe adds; `decode` drops them.
            max_bytes: refuse longer texts, counted in UTF-8.
            progress: show a progress bar.

        Raises:
            ItemError: an item cannot be read, is too large, is a string with a lone surrogate, or has no ids; names the item.

        >>> tok = zoo.load("byte-ids")
        >>> tokens = tok.encode(["zoo", b"\\xff", ""])
        >>> tokens.tolist(), tok.decode(tokens)
        ([[125, 114, 114], [258], []], ['zoo', b'\\xff', ''])
        """
        return self.encode_prepared(self.prepare(items, max_bytes=max_bytes), specials=specials, progress=progress)

    def prepare(self, items: Any, *, max_bytes: int = MAX_BYTES) -> list[Prepared]:
        """Texts as they are: ``octets`` ``[length]``; ``amount`` counts bytes. Arguments and errors as for `encode`."""
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=2)):
            with naming_item(index):
                octets, is_text = read_text(item, max_bytes)
                prepared.append(Prepared({"octets": torch.from_numpy(octets.copy())}, {"text": int(is_text)}, len(octets)))
        return prepared

    def encode_prepared(self, items: Sequence[Prepared], *, specials: Specials = "none", progress: bool = False) -> Tokens:
        """Encode what `prepare` gave, to ids."""
        before, behind = (torch.tensor(marker, dtype=torch.int64) for marker in self.markers_of(specials))
        sequences, meta = [], []
        with progress_bar("encode", len(items), progress, unit="text") as advance:
            for index, item in enumerate(items):
                with naming_item(index):
                    ids, more = self.encoded(item)
                sequences.append(torch.cat([before, ids, behind]))
                meta.append({**item.meta, **more})
                advance(1)
        return self.tokens(sequences, meta)

    def markers_of(self, specials: Specials) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and behind a text.

        Raises:
            ArgumentError: there is no such choice.
        """
        if specials not in ("none", "upstream"):
            raise ArgumentError(f'specials must be "none" or "upstream", not {specials!r}')
        return self.markers if specials == "upstream" else ((), ())

    def encoded(self, item: Prepared) -> tuple[Int[Tensor, " _"], Meta]:
        """The ids of a prepared text without markers, and what they remember besides what was prepared."""
        return self.ids(item.tensors["octets"]), {}

    @abstractmethod
    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " _"]:
        """The ids of a text.

        Raises:
            InputError: it has none.
        """

    def decode(self, tokens: Any, *, as_text: bool | None = None, errors: Errors = "strict") -> list[str | bytes]:
        """The texts: a string where a string was encoded, bytes where bytes or a file were.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``; an
                item without ids is the empty text. Markers are dropped.
            as_text: strings, or bytes, whatever went in. Bare ids decode to bytes without it.
            errors: ``"replace"`` or ``"ignore"`` for bytes that are no UTF-8 where a string is wanted, as `bytes.decode` does.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            ItemError: an id stands for no text, or the bytes are no UTF-8 and a string is wanted; names the item.
        """
        if errors not in ("strict", "replace", "ignore"):
            raise ArgumentError(f'errors must be "strict", "replace" or "ignore", not {errors!r}')
        checked = self.check(tokens)
        texts: list[str | bytes] = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                content = self.octets(ids.cpu(), meta).tobytes()
                wanted = bool(meta.get("text")) if as_text is None else as_text
                texts.append(_string(content, errors) if wanted else content)
        return texts

    @abstractmethod
    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The bytes of a text's ids, markers dropped.

        Raises:
            InputError: an id stands for no text.
        """

    def spans(self, tokens: Any) -> list[Int[Tensor, "_ 2"]]:
        """First byte and end of what each id stands for, by item ``[length, 2]``, as offsets in the item's bytes.

        Markers have none of the text's bytes: their first byte is their end.

        Raises:
            MismatchError, ItemError: as `decode`.

        >>> tok = zoo.load("byte-ids")
        >>> tok.spans(tok.encode("é"))[0].tolist()
        [[0, 1], [1, 2]]
        """
        checked = self.check(tokens)
        found = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                widths = self.widths(ids.cpu(), meta)
            ends = widths.cumsum(0)
            found.append(torch.stack([ends - widths, ends], dim=1))
        return found

    @abstractmethod
    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """Bytes of the text that each id stands for; 0 for markers."""

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The vectors that a language model would be fed; a family without a network has none.

        Raises:
            ArgumentError: there are none.
        """
        raise ArgumentError(f"{self.name} has no vectors (its spec.dim is 0): a language model learns those of its ids")

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU where there are none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def compile_modules(self) -> None:
        """Nothing, unless a family has a network."""

    def exact_parts(self) -> tuple[str, ...]:
        """None: ids depend on no layer."""
        return ()


def metas_of(tokens: Tokens) -> Sequence[Mapping[str, Any]]:
    """Memory of each item; empty for bare ids."""
    return tokens.meta or ({},) * len(tokens)


def _string(content: bytes, errors: Errors) -> str:
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise InputError(
            f"the byte 0x{content[error.start]:02x} at offset {error.start} does not belong to UTF-8: pass "
            'errors="replace", or as_text=False for the bytes'
        ) from error
