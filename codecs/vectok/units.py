"""Units and tokens: the nearest of K centroids for each vector, and byte-pair encoding of their sequence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.vectok.config import MOST_UNITS, UNIT_OFFSET, VecTokConfig
from zoo.errors import WeightsError
from zoo.kernels.codebook import CodebookSearch
from zoo.media import replacing
from zoo.precision import Float32Module


class BPE:
    """Byte-pair encoding of sequences of units, without loss: nothing is normalised, cut into words or unknown.

    Ids below ``num_units`` are the units; every pair that makes a new sequence is the next id. Encoding is Hugging Face's
    ``tokenizers``; decoding needs no library.

    Args:
        num_units: number of units.
        pairs: ids that are joined, first to last.
    """

    def __init__(self, num_units: int, pairs: Iterable[Sequence[int]] = ()) -> None:
        if not 0 < num_units <= MOST_UNITS:
            raise ValueError(f"there must be 1 to {MOST_UNITS} units, not {num_units}")
        self.num_units = num_units
        self.pairs = [(int(left), int(right)) for left, right in pairs]
        self._units: list[tuple[int, ...]] = [(unit,) for unit in range(num_units)]
        seen = {sequence: id for id, sequence in enumerate(self._units)}
        for rank, (left, right) in enumerate(self.pairs):
            if not 0 <= min(left, right) <= max(left, right) < len(self._units):
                raise WeightsError(f"pair {rank} joins {left} and {right}, but there are {len(self._units)} ids before it")
            joined = self._units[left] + self._units[right]
            if joined not in seen:
                seen[joined] = len(self._units)
                self._units.append(joined)
        self._encoder: Any = None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._units)

    def expansions(self) -> list[tuple[int, ...]]:
        """The units of each id."""
        return list(self._units)

    def encode(self, units: Int[Tensor, " frames"]) -> Int[Tensor, " length"]:
        """Units to ids, on the device of the units."""
        if self._encoder is None:
            self._encoder = self._build()
        text = "".join(map(chr, (units + UNIT_OFFSET).tolist()))
        return torch.tensor(self._encoder.encode(text).ids, dtype=torch.int64, device=units.device)

    def _build(self) -> Any:
        from tokenizers import Tokenizer, models

        words = [_text(sequence) for sequence in self._units]
        merges = [(words[left], words[right]) for left, right in self.pairs]
        return Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=merges))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_encoder": None}

    # ---- making one, and Hugging Face's files

    @classmethod
    def train(cls, sequences: Iterable[Sequence[int]], num_units: int, vocab_size: int, min_frequency: int = 2) -> BPE:
        """Learn the pairs of a corpus of unit sequences; a sequence counts as one word.

        Args:
            sequences: units of each recording.
            num_units: number of units, used or not.
            vocab_size: ids wanted; there are fewer once no pair is left with ``min_frequency`` times.
        """
        from tokenizers import Tokenizer, models, trainers

        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            initial_alphabet=[chr(UNIT_OFFSET + unit) for unit in range(num_units)],
            limit_alphabet=num_units,
            show_progress=False,
        )
        tokenizer.train_from_iterator((_text(sequence) for sequence in sequences), trainer)
        return cls.from_tokenizer_json(json.loads(tokenizer.to_str()))

    @classmethod
    def from_tokenizer_json(cls, content: dict[str, Any] | str | os.PathLike[str], unit_offset: int = UNIT_OFFSET) -> BPE:
        """Read Hugging Face's ``tokenizer.json``, parsed or as a path.

        Raises:
            WeightsError: it is no plain BPE over units, or its ids are not units and pairs in order.
        """
        parsed: Any = content
        if not isinstance(content, dict):
            try:
                parsed = json.loads(Path(content).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise WeightsError(f"{content} cannot be read as a tokenizer.json: {error}") from error
        try:
            model, vocab = parsed["model"], parsed["model"]["vocab"]
            changing = [key for key in ("normalizer", "pre_tokenizer", "post_processor") if parsed.get(key)]
            changing += [
                key for key in ("dropout", "unk_token", "continuing_subword_prefix", "byte_fallback") if model.get(key)
            ]
            changing += ["added_tokens"] if parsed.get("added_tokens") else []
            if model.get("type", "BPE") != "BPE" or changing:
                raise WeightsError(
                    f"this tokenizer is no plain byte-pair encoding of units: it has {', '.join(changing) or model['type']}"
                )
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            num_units = sum(len(word) == 1 for word in vocab)
            bpe = cls(num_units, [(vocab[left], vocab[right]) for left, right in pairs])
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"the tokenizer.json cannot be used: {error!r}") from error
        if vocab != {_text(sequence, unit_offset): id for id, sequence in enumerate(bpe._units)}:
            raise WeightsError("the ids of the tokenizer.json are not the units followed by the pairs in their order")
        return bpe

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write Hugging Face's ``tokenizer.json``, unit ``u`` as the character U+E000 + u."""
        with replacing(path) as temporary:
            temporary.write_text(self._build().to_str(pretty=True), encoding="utf-8")
        return Path(path)


def _text(units: Sequence[int], offset: int = UNIT_OFFSET) -> str:
    return "".join(chr(offset + int(unit)) for unit in units)


class Units(Float32Module):
    """Centroids, the vectors that stand for units, and the pairs that make tokens of them, always in full precision."""

    centroids: Tensor
    pairs: Tensor

    def __init__(self, config: VecTokConfig) -> None:
        super().__init__()
        self.context = config.context
        self.register_buffer("centroids", torch.zeros(config.num_units, config.vector_dim * config.context))
        # With one vector per unit the centroids are what stands for it.
        self.embedding = nn.Parameter(torch.zeros(config.num_units, config.vector_dim)) if config.context > 1 else None
        self.register_buffer("pairs", torch.zeros(config.merges, 2, dtype=torch.int64))
        self._search = CodebookSearch()
        self._bpe: tuple[Tensor, BPE, Tensor] | None = None

    @property
    def vectors(self) -> Float[Tensor, "units width"]:
        """The vector that stands for each unit, without the mean that was taken away."""
        return self.centroids if self.embedding is None else self.embedding

    @property
    def bpe(self) -> BPE:
        """The byte-pair encoding."""
        return self._tables()[0]

    def set_bpe(self, bpe: BPE) -> None:
        """Take other pairs."""
        self.pairs = torch.tensor(bpe.pairs, dtype=torch.int64, device=self.pairs.device).reshape(-1, 2)

    def _tables(self) -> tuple[BPE, Tensor]:
        """The encoding and the units of each id, padded with -1, made once for the pairs that are there."""
        if self._bpe is None or self._bpe[0] is not self.pairs:
            bpe = BPE(len(self.centroids), self.pairs.tolist())
            rows = [torch.tensor(sequence, dtype=torch.int64, device="cpu") for sequence in bpe.expansions()]
            table = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            self._bpe = self.pairs, bpe, table.to(self.pairs.device)
        return self._bpe[1:]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bpe": None}

    def nearest(self, centred: Float[Tensor, "frames width"]) -> Int[Tensor, " frames"]:
        """Unit of each vector, from vectors whose mean was taken away, and their neighbours where there is a context."""
        return self._search(with_context(centred, self.context), self.centroids)

    def expand(self, ids: Int[Tensor, " length"]) -> Int[Tensor, " frames"]:
        """The units of ids."""
        units = self._tables()[1][ids]
        return units[units >= 0]

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Mean of the vectors that stand for the units of each id."""
        units = self._tables()[1][ids]
        inside = (units >= 0)[..., None]
        return (F.embedding(units.clamp(min=0), self.vectors) * inside).sum(-2) / inside.sum(-2)


def with_context(vectors: Float[Tensor, "frames width"], context: int) -> Float[Tensor, "frames context_width"]:
    """Each vector between its neighbours; beyond the ends, the first and the last vector are repeated."""
    if context == 1:
        return vectors
    reach = context // 2
    padded = torch.cat([vectors[:1].expand(reach, -1), vectors, vectors[-1:].expand(reach, -1)])
    return padded.unfold(0, context, 1).transpose(1, 2).flatten(1)
