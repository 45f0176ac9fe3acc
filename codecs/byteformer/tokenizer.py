"""The tokenizer: files to byte ids and back without loss, and what the network makes of them."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from zoo.codecs.byteformer import encodings, transforms
from zoo.codecs.byteformer.checkpoint import CHECKPOINT
from zoo.codecs.byteformer.config import BYTE_VALUES, FIXED_SHUFFLES, IMAGE_FILES, RANDOM_SHUFFLES, ByteFormerConfig
from zoo.codecs.byteformer.embedding import ByteEmbedding
from zoo.codecs.byteformer.transformer import FeedForward, Transformer, needs_axis_rule
from zoo.errors import ArgumentError, InputError
from zoo.media.bytes import regular_file
from zoo.nn.linear import Linear
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.bytes import FileTokenizer
from zoo.tokens import Tokens

_log = logging.getLogger("zoo")

#: Largest file that `ByteFormer.encode` takes by default; ids need eight times as much memory.

Ids = Int[Tensor, " _"] | UInt8[Tensor, " _"]
AnyTokens = Tokens | Tensor | Sequence[Tensor]


class Features(NamedTuple):
    """Features of files, made by the transformer.

    Attributes:
        tokens: behind the last norm, for every file ``[tokens, dim]``.
        pooled: their means, the classifier's input.
    """

    tokens: list[Float[Tensor, "_ dim"]]
    pooled: Float[Tensor, "batch dim"]


class ByteFormer(FileTokenizer[ByteFormerConfig]):
    """The byte tokenizer and file classifier of arXiv 2306.00238.

    Any file gives one id per byte, 0 to 255, the empty file none at all, and decodes to itself. The last id of the vocabulary
    is the original's padding: the network takes it, `decode` refuses it. `embed`, `features` and `classify` give every file of
    a batch what it gives alone, without padding; ``compat="padded"`` gives what the original does, which pads files to the
    longest of the batch and never masks the padding.
    """

    Config = ByteFormerConfig
    family = "byteformer"
    checkpoint = CHECKPOINT
    identity = ("embedding.bytes", "embedding.reduction")

    # Tokens behind the convolution that go through the transformer at a time, unless one file has more. Memory and speed only.
    at_once: ClassVar[Mapping[str, Budget]] = {"features": Budget(8_192, 400_000)}

    def __init__(self, config: ByteFormerConfig | None = None, *, name: str = "byteformer") -> None:
        super().__init__(config or ByteFormerConfig(), name)
        self.embedding = ByteEmbedding(self.config)
        self.transformer = Transformer(self.config)
        self.classifier = Linear(self.config.dim, self.config.classes)
        torch.nn.init.xavier_uniform_(self.classifier.weight)
        torch.nn.init.zeros_(self.classifier.bias)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="bytes",
            vocab_size=self.config.vocab_size,
            dim=self.config.dim,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    # ---- files to ids and back

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " length"]:
        """One id for each byte, in the order in which the model reads them."""
        read = octets.numpy()
        if self.config.shuffle in FIXED_SHUFFLES:
            read = transforms.shuffle(read, self.config.shuffle, span=self.config.shuffle_span)
        return torch.from_numpy(self._exchange(read).astype(np.int64))

    def encode_chunks(self, source: str | os.PathLike[str], chunk_bytes: int = 1 << 20) -> Iterator[Tokens]:
        """The ids of a file of any size, ``chunk_bytes`` at a time, in bounded memory; `decode_chunks` takes them back.

        Raises:
            InputError: the file cannot be read, or the tokenizer reorders its bytes and must see the whole of it.
        """
        if self.config.shuffle in FIXED_SHUFFLES:
            raise InputError(f"{self.name} reads files in another order ({self.config.shuffle}), which needs the whole file")
        if chunk_bytes < 1:
            raise ArgumentError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
        path = regular_file(source)
        with path.open("rb") as file:
            while chunk := file.read(chunk_bytes):
                octets = self._exchange(np.frombuffer(chunk, np.uint8))
                yield self.tokens([torch.from_numpy(octets.astype(np.int64))])

    def decode_chunks(self, chunks: Iterable[Tokens]) -> Iterator[bytes]:
        """The bytes of the chunks that `encode_chunks` gave, as they come.

        Raises:
            MismatchError, InputError: as `decode` does.
        """
        for chunk in chunks:
            yield from self.decode(chunk)

    def _exchange(self, octets: transforms.Bytes) -> transforms.Bytes:
        return transforms.exchange_values(octets) if self.config.permuted else octets

    def octets(self, ids: Int[Tensor, " length"]) -> transforms.Bytes:
        """The bytes of ids: what `ids` undoes.

        Raises:
            InputError: an id stands for no byte.
        """
        if len(ids) and int(ids.max()) >= BYTE_VALUES:
            raise InputError(f"id {int(ids.max())} stands for padding, not for a byte")
        octets = ids.to("cpu", torch.uint8).numpy()
        if self.config.permuted:
            octets = transforms.restore_values(octets)
        if self.config.shuffle not in FIXED_SHUFFLES:
            return octets
        return transforms.unshuffle(octets, self.config.shuffle, span=self.config.shuffle_span)

    # ---- the files that a checkpoint was trained on

    def evaluation_file(self, source: Any, *, generator: torch.Generator | None = None) -> bytes:
        """The file that the original's evaluation feeds to this model: crop or clip, file encoding, and what cannot be undone.

        That is a random order of the bytes, the camera and the noise. A fixed order and the exchange of values, which decoding
        undoes, are part of `encode`.

        Args:
            source: an image or audio; see `encodings.evaluation_crop` and `encodings.evaluation_clip`.
            generator: draws the order and the noise of models that were trained with them.

        Raises:
            InputError: the source cannot be read, or nothing is known about the training data of this model.
        """
        config = self.config
        if not config.file:
            raise InputError(f"{self.name} does not say which files it was trained on: pass files to encode as they are")
        if config.file in IMAGE_FILES:
            pixels = encodings.evaluation_crop(
                source, resized=config.resized, cropped=config.cropped, interpolation=config.interpolation
            )
            content = encodings.image_file(pixels, config.file, quality=config.quality)
        else:
            content = encodings.audio_file(encodings.evaluation_clip(source), config.file, sample_type=config.sample_type)
        if config.shuffle in RANDOM_SHUFFLES:
            span = config.shuffle_span
            content = transforms.shuffle(content, config.shuffle, span=span, generator=generator).tobytes()
        if config.keep < 1:
            content = transforms.keep_bytes(content, config.keep).tobytes()
        if config.noise:
            content = transforms.add_noise(content, *config.noise, generator=generator).tobytes()
        return content

    # ---- ids to vectors and classes

    @torch.no_grad()
    def embed(
        self, tokens: AnyTokens, *, positions: bool = False, compat: str | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Embedded bytes behind the strided convolution, zero where an item has ended.

        Args:
            tokens: as in `decode`; ``config.reduced_length(n)`` vectors come of n ids.
            positions: add those of the transformer.
            compat: ``"padded"``: of files padded to the longest of the batch, as the original does.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, an item is shorter than the convolution's kernel, or longer than the positions.
        """
        sequences = self._sequences(tokens, compat, limited=positions)
        with exact_float32(self.device):
            rows = [self.embedding([ids], positions) for ids in sequences]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def embed_chunks(self, chunks: Iterable[Tokens]) -> Iterator[Float[Tensor, "_ dim"]]:
        """Embed a file that comes in chunks: for each chunk the vectors that it completes, in bounded memory.

        Raises:
            MismatchError, InputError: as `decode` does.
        """
        kernel, stride = self.config.kernel, self.config.stride
        pending = torch.zeros(0, dtype=torch.int64)
        for chunk in chunks:
            pending = torch.cat([pending, *self.check(chunk).unpadded()])
            if len(pending) >= kernel:
                with torch.no_grad(), exact_float32(self.device):
                    vectors = self.embedding([pending], positions=False)
                yield vectors
                pending = pending[len(vectors) * stride :]

    @torch.no_grad()
    def features(
        self,
        tokens: AnyTokens,
        *,
        compat: str | None = None,
        layernorm_axis_rule: bool | None = None,
        progress: bool = False,
    ) -> Features:
        """The transformer's features of every file, and their means.

        Args:
            tokens: as in `decode`; ``config.final_length(n)`` features come of n ids.
            compat: ``"padded"``: every file is padded to the longest of the batch, and the padding is read like bytes, as the
                original does. Results then depend on the other files.
            layernorm_axis_rule: overrides the configuration's.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, or an item is shorter than the convolution's kernel or longer than the positions.
        """
        sequences = self._sequences(tokens, compat, limited=True)
        rule = self.config.layernorm_axis_rule if layernorm_axis_rule is None else layernorm_axis_rule
        counts = [self.config.reduced_length(len(ids)) for ids in sequences]
        if rule and (found := needs_axis_rule(tuple(counts), self.config)):
            _warn_axis_rule(self.name, len(sequences[found[0]]))
        features: list[Tensor] = []
        with exact_float32(self.device), progress_bar("features", len(sequences), progress, unit="file") as advance:
            for pack in self._packs(counts):
                x, lengths = self.transformer(self.embedding(sequences[pack]), counts[pack], rule)
                features += x.split(list(lengths))
                advance(len(lengths))
        return Features(features, torch.stack([vectors.mean(0) for vectors in features]))

    @torch.no_grad()
    def classify(
        self,
        tokens: AnyTokens,
        *,
        compat: str | None = None,
        layernorm_axis_rule: bool | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "batch classes"]:
        """Logits of every file; arguments and errors as those of `features`."""
        pooled = self.features(tokens, compat=compat, layernorm_axis_rule=layernorm_axis_rule, progress=progress).pooled
        with exact_float32(self.device):
            logits: Tensor = self.classifier(pooled)
        return logits.float()

    def forward(self, sequences: Sequence[Ids]) -> Float[Tensor, "batch classes"]:
        """Logits of sequences of ids, all of them in one pack and differentiable; for training."""
        counts = [self.config.reduced_length(len(ids)) for ids in sequences]
        x, lengths = self.transformer(self.embedding(sequences), counts)
        logits: Tensor = self.classifier(torch.stack([vectors.mean(0) for vectors in x.split(list(lengths))]))
        return logits.float()

    def _sequences(self, tokens: AnyTokens, compat: str | None, limited: bool) -> list[Int[Tensor, " _"]]:
        """The ids of each item, long enough for the convolution and short enough for the positions."""
        if compat not in (None, "padded"):
            raise ArgumentError(f"compat must be None or 'padded', not {compat!r}")
        config = self.config
        sequences = self.check(tokens).unpadded()
        if compat == "padded":
            longest = max(map(len, sequences))
            sequences = [F.pad(ids, (0, longest - len(ids)), value=config.vocab_size - 1) for ids in sequences]
        for index, ids in enumerate(sequences):
            if len(ids) < config.kernel:
                raise InputError(
                    f"{len(ids)} bytes are fewer than the {config.kernel} that the convolution reads at once", index
                )
            if limited and len(ids) > config.longest_file:
                raise InputError(
                    f"{len(ids)} bytes give more tokens than the {config.max_tokens} positions: at most {config.longest_file} "
                    "bytes; cut the file, or train a model with more positions",
                    index,
                )
        return sequences

    def _packs(self, counts: Sequence[int]) -> Iterator[slice]:
        """Consecutive files that go through the transformer together."""
        budget = self.budget("features")
        first = total = 0
        for index, count in enumerate(counts):
            if index > first and total + count > budget:
                yield slice(first, index)
                first, total = index, 0
            total += count
        yield slice(first, len(counts))

    # ---- speed

    def compile_modules(self) -> None:
        """Compile the feed-forward layers; the first calls are slow. Attention works on windows of changing number."""
        for module in self.transformer.modules():
            if isinstance(module, FeedForward):
                module.compile(dynamic=True)


@functools.cache
def _warn_axis_rule(name: str, length: int) -> None:
    """Cached, so that each model and length is mentioned once."""
    _log.warning(
        "%s: a file of %d bytes has as many tokens as there are channels at some norm, which then goes over tokens, as in the "
        "original; pass layernorm_axis_rule=False to normalise channels as everywhere else",
        name,
        length,
    )
