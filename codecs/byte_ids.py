"""Byte ids of ByT5, MonoByte and MrT5: a byte of UTF-8 is its value plus 3.

ByT5: Xue et al., "ByT5: Towards a token-free future with pre-trained byte-to-byte models" (arXiv 2105.13626), section 3.1.
MonoByte: Abonizio et al. (arXiv 2209.11035) train T5 models of one language each on the same ids. A checkpoint brings the
vectors of the ids, ``shared.weight`` ``[384, dim]``; without one there are ids alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.checkpoint import Checkpoint, renamed, require_agreement, shape_of
from zoo.errors import ArgumentError, InputError, naming_item
from zoo.media.bytes import MAX_BYTES
from zoo.spec import Spec
from zoo.tokenizer import Prepared
from zoo.tokenizer.byte_text import (
    END,
    FIRST_BYTE,
    FIRST_SENTINEL,
    PAD,
    SENTINELS,
    UNKNOWN,
    VOCAB_SIZE,
    ByteTextTokenizer,
)
from zoo.tokenizer.text import Errors, Specials
from zoo.tokens import Tokens

_NAMES = {PAD: b"<pad>", END: b"</s>", UNKNOWN: b"<unk>"} | {
    FIRST_SENTINEL + number: b"<extra_id_%d>" % number for number in range(SENTINELS)
}
_NUMBERS = {name: number for number, name in _NAMES.items()}
# transformers' ByT5Tokenizer takes white space beside the first three for part of them, but not beside sentinels.
_SPECIAL = re.compile(r"\s*(<pad>|</s>|<unk>)\s*|(<extra_id_(?:0|[1-9]\d?|1[01]\d|12[0-4])>)")


@dataclass(frozen=True)
class ByteIdsConfig:
    """Settings of a model.

    Attributes:
        dim: width of the checkpoint's vectors; 0 without a checkpoint.
    """

    dim: int = 0

    vocab_size = VOCAB_SIZE


class ByteIds(ByteTextTokenizer[ByteIdsConfig]):
    """Any bytes, one id each, and back without loss.

    Ids 0 (padding), 1 (end) and the sentinels from 259 on decode to nothing, and id 2 (unknown) is refused. Ids are the same in
    all models, so that tokens of one may be embedded by another.
    """

    Config = ByteIdsConfig
    family = "byte_ids"
    identity = ()

    def __init__(self, config: ByteIdsConfig | None = None, *, name: str = "byte-ids") -> None:
        super().__init__(config or ByteIdsConfig(), name)
        if self.config.dim:
            self.vectors = torch.nn.Parameter(torch.zeros(self.config.vocab_size, self.config.dim))

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=self.config.vocab_size,
            dim=self.config.dim,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    # ---- texts to ids

    def encode(
        self,
        items: Any,
        *,
        specials: Specials = "none",
        parse_specials: bool = False,
        max_bytes: int = MAX_BYTES,
        progress: bool = False,
    ) -> Tokens:
        """Texts to ids, as `zoo.tokenizer.text.TextTokenizer.encode`.

        Args:
            items: as there.
            specials: ``"upstream"`` appends the end marker, id 1.
            parse_specials: take ``<pad>``, ``</s>``, ``<unk>`` and ``<extra_id_0>`` to ``<extra_id_124>`` in a text for the ids
                that are called so, as transformers' ``ByT5Tokenizer`` does; such texts do not come back.
            max_bytes, progress: as there.

        Raises:
            ItemError: as there.
        """
        prepared = self.prepare(items, max_bytes=max_bytes)
        return self.encode_prepared(prepared, specials=specials, parse_specials=parse_specials, progress=progress)

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        specials: Specials = "none",
        parse_specials: bool = False,
        progress: bool = False,
    ) -> Tokens:
        """Encode what `prepare` gave, to ids."""
        if not parse_specials:
            return super().encode_prepared(items, specials=specials, progress=progress)
        _, behind = self.markers_of(specials)
        sequences = []
        for index, item in enumerate(items):
            with naming_item(index):
                ids = _parsed(item.tensors["octets"].numpy().tobytes())
            # transformers adds no second end marker.
            sequences.append(torch.tensor([*ids, *(behind if ids[-1:] != [END] else ())], dtype=torch.int64))
        return self.tokens(sequences, [item.meta for item in items])

    # ---- and back

    def decode(
        self,
        tokens: Any,
        *,
        as_text: bool | None = None,
        errors: Errors = "strict",
        keep_specials: bool = False,
        compat: Literal["upstream"] | None = None,
    ) -> list[str | bytes]:
        """The texts, as `zoo.tokenizer.text.TextTokenizer.decode`.

        Args:
            tokens, as_text, errors: as there.
            keep_specials: write the names of special ids, such as ``<extra_id_0>``, into the text instead of dropping them.
            compat: ``"upstream"`` gives the string of transformers' ``ByT5Tokenizer``, which drops bytes that are no UTF-8, and
                id 2.

        Raises:
            MismatchError, ItemError: as there; id 2 stands for no text.
        """
        if compat not in (None, "upstream"):
            raise ArgumentError(f'compat must be None or "upstream", not {compat!r}')
        if not keep_specials and compat is None:
            return super().decode(tokens, as_text=as_text, errors=errors)
        checked = self.check(tokens)
        texts: list[str | bytes] = []
        for index, ids in enumerate(checked.tolist()):
            wanted = checked.meta[index].get("text", 0) if as_text is None and checked.meta else as_text
            with naming_item(index):
                if compat is None and UNKNOWN in ids:
                    raise InputError(f"id {UNKNOWN} is the unknown one, which stands for no text")
                content = b"".join(
                    bytes([number - FIRST_BYTE]) if FIRST_BYTE <= number < FIRST_SENTINEL else _NAMES[number] * keep_specials
                    for number in ids
                )
                if compat is not None:
                    texts.append(content.decode(errors="ignore"))
                else:
                    texts.append(content.decode(errors=errors) if wanted else content)
        return texts

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The checkpoint's vector of each id; zero where an item has ended.

        Raises:
            ArgumentError: there is no checkpoint.
        """
        if not self.config.dim:
            return super().embed(tokens)
        ids = self.check(tokens).ids.to(self.device)
        return self.vectors.detach().float()[ids.clamp(min=0)] * (ids >= 0)[..., None]


def _parsed(content: bytes) -> list[int]:
    """Ids of a text in which the names of special ids stand for them."""
    # Bytes that are no UTF-8 go through as lone surrogates.
    text = content.decode(errors="surrogateescape")
    ids: list[int] = []
    position = 0
    for match in _SPECIAL.finditer(text):
        ids += [byte + FIRST_BYTE for byte in text[position : match.start()].encode(errors="surrogateescape")]
        ids.append(_NUMBERS[(match[1] or match[2]).encode()])
        position = match.end()
    return ids + [byte + FIRST_BYTE for byte in text[position:].encode(errors="surrogateescape")]


# ---- checkpoints of T5 models over bytes

_VECTORS = "shared.weight"


def _convert(state: Mapping[str, Tensor], config: ByteIdsConfig | None) -> tuple[ByteIdsConfig, dict[str, Tensor]]:
    found = ByteIdsConfig(shape_of(state, _VECTORS, rank=2)[1])
    # The catalogue does not know the width of every model.
    if config is not None and config.dim:
        require_agreement(found, config)
    return found, renamed(state, {_VECTORS: "vectors"}.get, "byte-level T5", CHECKPOINT.wanted)


#: Nothing in the keys of a byte-level T5 model tells it from one of pieces of words, so that none is recognised by them.
CHECKPOINT = Checkpoint(recognises=lambda keys: False, convert=_convert, wanted=lambda key: key == _VECTORS)
ByteIds.checkpoint = CHECKPOINT

TOKENIZER = ByteIds
