"""The tokenizer: texts to byte ids, the bytes that the gate keeps, and their vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.codecs.mrt5.checkpoint import CHECKPOINT
from zoo.codecs.mrt5.config import MrT5ModelConfig
from zoo.codecs.mrt5.decoder import START, Cache, Decoder, shifted
from zoo.errors import ArgumentError, InputError, naming_item
from zoo.media.bytes import MAX_BYTES
from zoo.nn.mrt5 import MrT5Encoder, MrT5Output, deletion_loss, deletion_rate
from zoo.precision import undisturbed
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Prepared
from zoo.tokenizer.byte_text import END, PAD, ByteTextTokenizer
from zoo.tokenizer.text import Specials, metas_of
from zoo.tokens import Meta, Tokens

#: Ids of an item that the network takes: attention's memory grows with the square.
LONGEST = 8192

Mask = Bool[Tensor, "batch length"]


class Kept(NamedTuple):
    """The bytes of an item that the gate keeps.

    Attributes:
        positions: int64 ``[kept]``, among the item's ids.
        ids: int64 ``[kept]``, of these.
    """

    positions: Int[Tensor, " kept"]
    ids: Int[Tensor, " kept"]


class NetworkOutput(NamedTuple):
    """Output of the whole network for a batch.

    Attributes:
        encoder: what the decoder saw.
        logits: of each label.
        loss: mean cross entropy of the labels other than -100.
        gate_loss: mean gate of what is no padding.
        deletion_rate: share of it that hard deletion removes.
    """

    encoder: MrT5Output
    logits: Float[Tensor, "batch labels vocabulary"]
    loss: Float[Tensor, ""]
    gate_loss: Float[Tensor, ""]
    deletion_rate: Float[Tensor, ""]


class MrT5(ByteTextTokenizer[MrT5ModelConfig]):
    """Byte ids, and a gate in the encoder that keeps some of them.

    Ids hold the whole text, with an end marker as the network was trained, so that it comes back without loss. The positions
    that are kept are remembered beside them; `embed` gives the encoder's states of these. Official checkpoints were trained to
    fill in spans that are cut out: they do not copy text, and `generate` is for models that were fine-tuned.
    """

    Config = MrT5ModelConfig
    family = "mrt5"
    checkpoint = CHECKPOINT
    identity = ("encoder.embedding.weight", "encoder.delete_gate.linear.weight", "encoder.delete_gate.linear.bias")

    def __init__(self, config: MrT5ModelConfig | None = None, *, name: str = "mrt5") -> None:
        super().__init__(config or MrT5ModelConfig(), name)
        self.encoder = MrT5Encoder(self.config)
        if "decoder" in self.config.parts:
            self.decoder = Decoder(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=self.config.vocab_size,
            dim=self.config.d_model,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    def exact_parts(self) -> tuple[str, ...]:
        """The encoder: the kept positions depend on it."""
        return ("encoder",)

    # ---- texts to ids

    def encode(
        self,
        items: Any,
        *,
        specials: Specials = "upstream",
        keep: float | None = None,
        positions: bool = True,
        max_bytes: int = MAX_BYTES,
        progress: bool = False,
    ) -> Tokens:
        """Texts to ids and the positions of those that are kept.

        Args:
            items: as `zoo.tokenizer.text.TextTokenizer.encode`.
            specials: ``"upstream"``, the end marker that the network was trained with, or ``"none"``.
            keep: share of each item's ids to keep, above 0 and at most 1, rounded up: those with the highest gates, the first
                of equals. By default those whose gate is above the configuration's threshold.
            positions: run the encoder up to its gate and remember what is kept; without it, ids are all that there is, of
                texts of any length.
            max_bytes: refuse longer texts.
            progress: show a progress bar.

        Raises:
            ItemError: as there; or an item is too long for the network.
            ArgumentError: ``keep`` is no share.
        """
        prepared = self.prepare(items, max_bytes=max_bytes)
        return self.encode_prepared(prepared, specials=specials, keep=keep, positions=positions, progress=progress)

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        specials: Specials = "upstream",
        keep: float | None = None,
        positions: bool = True,
        progress: bool = False,
    ) -> Tokens:
        """Encode what `prepare` gave, to ids and kept positions."""
        if keep is not None and not 0 < keep <= 1:
            raise ArgumentError(f"keep is a share above 0 and at most 1, not {keep}")
        tokens = super().encode_prepared(items, specials=specials)
        if not positions:
            return tokens
        meta: list[Meta] = []
        with progress_bar("gate", len(items), progress, unit="text") as advance:
            for index, (ids, known) in enumerate(zip(tokens.unpadded(), tokens.meta, strict=True)):
                with naming_item(index):
                    mask = self._gated(ids, keep)
                meta.append({**known, "kept": np.packbits(mask.cpu().numpy()).tobytes()})
                advance(1)
        return self.tokens(tokens.unpadded(), meta)

    def _gated(self, ids: Int[Tensor, " length"], keep: float | None = None) -> Bool[Tensor, " length"]:
        """Which ids of an item are kept."""
        if not len(ids):
            return torch.zeros(0, dtype=torch.bool)
        _require_length(len(ids))
        [gate] = self.encoder.gates(ids[None].to(self.device))
        if keep is None:
            mask = gate > self.config.threshold
            mask[0] |= ~mask.any()
            return mask
        chosen = gate.argsort(descending=True, stable=True)[: math.ceil(keep * len(ids))]
        return torch.zeros_like(gate, dtype=torch.bool).index_fill(0, chosen, True)

    # ---- what is kept

    @undisturbed
    def kept(self, tokens: Any) -> list[Kept]:
        """The positions and ids of each item that are kept: those that its tokens remember, or else those that the gate keeps.

        Raises:
            MismatchError, ItemError: as `decode`; or an item is too long for the network.
        """
        checked = self.check(tokens)
        found = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                positions = self._mask_of(ids, meta).nonzero().flatten().to(ids.device)
            found.append(Kept(positions, ids[positions]))
        return found

    def _mask_of(self, ids: Int[Tensor, " length"], meta: Meta) -> Bool[Tensor, " length"]:
        content = meta.get("kept")
        if content is None:
            return self._gated(ids)
        bits = np.unpackbits(np.frombuffer(content, np.uint8))[: len(ids)]
        # Those of a prefix are the first of those of the whole.
        if len(bits) < len(ids):
            raise InputError(f"{len(bits)} positions are remembered of {len(ids)} ids")
        mask = torch.from_numpy(bits.astype(bool))
        mask[:1] |= ~mask.any()
        return mask

    def embed(self, tokens: Any) -> Float[Tensor, "batch kept dim"]:
        """The encoder's states of the ids that are kept, behind its last norm; zero where an item has no more of them.

        Raises:
            MismatchError, ItemError: as `kept`.
        """
        checked = self.check(tokens)
        rows = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                rows.append(
                    self._encoded([ids], [meta]).hidden[0]
                    if len(ids)
                    else torch.zeros(0, self.config.d_model, dtype=torch.float32)
                )
        device = self.device
        return torch.nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)

    def _encoded(self, items: Sequence[Int[Tensor, " _"]], metas: Sequence[Meta]) -> MrT5Output:
        """The encoder's output for a batch, after hard deletion of what is not kept."""
        for ids in items:
            _require_length(len(ids))
        masks = [self._mask_of(ids, meta).to(self.device) for ids, meta in zip(items, metas, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = pad([ids.to(self.device) for ids in items], batch_first=True, padding_value=PAD)
        keep = pad(masks, batch_first=True, padding_value=False)
        real = torch.arange(batch.shape[1], device=self.device, dtype=torch.int64) < torch.tensor(
            [[len(ids)] for ids in items], device=self.device, dtype=torch.int64
        )
        output: MrT5Output = self.encoder(batch, real, "hard", keep)
        return output

    # ---- the whole network

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch labels"],
        mask: Mask | Int[Tensor, "batch length"] | None = None,
        deletion: str = "hard",
    ) -> NetworkOutput:
        """Logits and losses of labels for texts.

        Args:
            ids: of texts with their end markers, padded with 0.
            labels: of the texts to write, with their end markers, padded with -100.
            mask: which ids are tokens; all that are no padding if ``None``.
            deletion: as of `zoo.nn.mrt5.MrT5Encoder`: ``"soft"`` to train, ``"hard"`` to use. In training mode gates have
                noise.

        Raises:
            WeightsError: the decoder is not loaded.
            InputError: as of the encoder.
        """
        self.require("decoder", "writing text")
        encoded = self.encoder(ids, mask, deletion)
        logits = self.decoder(shifted(labels), self.encoder.embedding, encoded)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        real = ids != PAD if mask is None else mask.bool()
        return NetworkOutput(encoded, logits, loss, deletion_loss(encoded.gate, real), deletion_rate(encoded.keep, real))

    @undisturbed
    def generate(self, tokens: Any, *, max_new_tokens: int = 256, specials: bool = True) -> Tokens:
        """The text that the decoder writes for each item, byte by byte the most likely one.

        Args:
            tokens: what `encode` returned, or ids.
            max_new_tokens: ids to write at most; an item ends behind its end marker.
            specials: sentinels may be written, which stand for spans of the input.

        Returns:
            Tokens that `decode` takes.

        Raises:
            MismatchError, ItemError: as `kept`; or an item has no ids.
            WeightsError: the decoder is not loaded.
        """
        self.require("decoder", "writing text")
        checked = self.check(tokens)
        items, metas = checked.unpadded(), metas_of(checked)
        for index, ids in enumerate(items):
            with naming_item(index):
                if not len(ids):
                    raise InputError("there are no ids to write a text for")
        encoded, cache = self._encoded(items, metas), Cache()
        current = torch.full((len(items), 1), START, device=self.device, dtype=torch.int64)
        written: list[Tensor] = []
        done = torch.zeros(len(items), dtype=torch.bool, device=self.device)
        for _ in range(max_new_tokens):
            logits = self.decoder(current, self.encoder.embedding, encoded, cache)[:, -1]
            if not specials:
                logits[:, 259:] = -torch.inf
            current = logits.argmax(-1, keepdim=True)
            written.append(current[:, 0].masked_fill(done, -1))
            done |= current[:, 0] == END
            if done.all():
                break
        columns = torch.stack(written, dim=1) if written else torch.zeros(len(items), 0, dtype=torch.int64)
        return self.tokens([row[row >= 0].cpu() for row in columns], [{"text": meta.get("text", 0)} for meta in metas])


def _require_length(length: int) -> None:
    if length > LONGEST:
        raise InputError(
            f"{length} ids are more than the {LONGEST} that the network takes: cut the text, or encode it with positions=False"
        )
