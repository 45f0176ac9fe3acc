"""The tokenizer: ragged batches of audio to tokens and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.snac.checkpoint import CHECKPOINT
from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.decoder import Decoder
from zoo.codecs.snac.encoder import Encoder
from zoo.codecs.snac.noise import NoiseOption, NoiseSource, SeededNoise, noise_source
from zoo.codecs.snac.quantizer import Quantizer
from zoo.codecs.snac.streaming import StreamDecoder, StreamEncoder
from zoo.codecs.snac.windows import Masks, Window, lockstep
from zoo.errors import ArgumentError, ItemError
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.audio import AudioTokenizer
from zoo.tokenizer.recordings import ForwardReader
from zoo.tokens import Tokens


class SNAC(AudioTokenizer[SNACConfig, Tokens]):
    """The multi-scale audio tokenizer of arXiv 2410.14411.

    A frame has one code of the first level, two of the second, four of the third and so on, in the order of the time at which
    they begin: ``c0, c1, c2, c2, c1, c2, c2`` with three levels. The code at place ``p`` has the id
    ``p * codebook_size + code``. Language models that speak SNAC have this order and these offsets. A sequence decodes up to
    any whole frame, with attention any whole window of frames, and with the first levels alone (`zoo.Tokens.keep`).

    Audio of any sample rate and channel count is averaged to mono and resampled; the tokens remember the original rate and
    length. An item is padded with zeros to whole frames, and to whole windows of attention. Encoding always runs in float32,
    whatever the dtype of the model, autocast or TF32 settings, because a tenth of the ids change in bfloat16.
    """

    Config = SNACConfig
    family = "snac"
    checkpoint = CHECKPOINT
    identity = ("quantizer.levels.0.codebook",)
    streams = True

    # Samples in flight per encoding step, and latent frames per decoding step. They change memory and speed, never the numbers.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(260_000, 8_000_000), "decode": Budget(500, 16_000)}
    #: Items that a GPU takes side by side where it can, rather than longer windows of fewer.
    TOGETHER = 16

    def __init__(self, config: SNACConfig | None = None, *, name: str = "snac") -> None:
        super().__init__(config or SNACConfig(), name)
        self.encoder = Encoder(self.config)
        self.quantizer = Quantizer(self.config)
        self.decoder = Decoder(self.config)

    @property
    def spec(self) -> Spec:
        frame = self.config.frame
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=frame.vocab_size,
            dim=self.config.latent_dim,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            hop_length=self.config.coarse_hop,
            frame=frame,
            residual=len(frame.sizes) > 1,
            sampled=self.config.noise,
            streaming="exact",
        )

    def exact_parts(self) -> tuple[str, ...]:
        return ("encoder", "quantizer")

    # ---- encode

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> Tokens:
        config = self.config
        readers = [ForwardReader(item, index) for index, item in enumerate(items)]
        totals = [-(-len(reader) // (config.hop_length * config.unit)) * config.unit for reader in readers]
        budget = max(1, self.budget("encode") // config.hop_length)
        codes: list[list[Tensor]] = [[] for _ in items]
        with progress_bar("encode", sum(totals), progress, unit="frame") as advance:
            for window, group in lockstep(self.encoder.reach, totals, budget, self._together):
                begin, end = window.first * config.hop_length, window.last * config.hop_length
                waveforms = [readers[i].part(begin, end)[0] for i in group]
                found = self.encode_window(waveforms, window, [totals[i] for i in group], begin)
                for item, own in zip(group, found, strict=True):
                    codes[item].append(own)
                    advance(len(own) * config.vq_strides[0])
        return self.wrap([self.as_values(torch.cat(parts)) for parts in codes], [item.meta for item in items])

    @property
    def _together(self) -> int:
        return 1 if self.device.type == "cpu" else self.TOGETHER

    def encode_window(
        self, waveforms: Sequence[Float[Tensor, " _"]], window: Window, totals: Sequence[int], offset: int = 0
    ) -> list[Int[Tensor, "_ places"]]:
        """Codes of the frames of a window, for each item those before its end.

        Args:
            waveforms: from sample ``offset`` on.
            window: of the longest item.
            totals: latent frames of each item.
        """
        hop = self.config.hop_length
        begin, end = window.first * hop - offset, window.last * hop - offset
        pieces = [waveform[begin:end].to(self.device) for waveform in waveforms]
        batch = torch.stack([F.pad(piece, (0, end - begin - len(piece))) for piece in pieces])
        masks = Masks.of(totals, window.first, window.frames, self.device)
        codes = self.codes_of(self.encoder.through(batch, window, masks))
        coarse = self.config.vq_strides[0]
        kept = [(min(window.stop, total) - window.start) // coarse for total in totals]
        return [own[:count] for own, count in zip(codes, kept, strict=True)]

    def codes_of(self, latents: Float[Tensor, "batch frames latent"]) -> Int[Tensor, "batch coarse places"]:
        """Codes of latents, at their places in each coarse frame."""
        config = self.config
        by_level = [
            ids.unflatten(1, (-1, config.vq_strides[0] // stride))
            for ids, stride in zip(self.quantizer.ids(latents), config.vq_strides, strict=True)
        ]
        return torch.stack([by_level[level][..., index] for level, index in config.places], dim=-1)

    def as_values(self, codes: Int[Tensor, "coarse places"]) -> Int[Tensor, ...]:
        """Codes as `wrap` takes them: without places where there is one only."""
        return codes if codes.shape[-1] > 1 else codes[..., 0]

    def stream_encoder(self, sample_rate: int | None = None) -> StreamEncoder:
        """Encode audio as it arrives, with exactly the ids of the whole recording; see `StreamEncoder`."""
        return StreamEncoder(self, sample_rate or self.config.sample_rate)

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        noise: NoiseOption = "seeded",
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | None = None,
        complete: bool = False,
        trim: bool = True,
        sample_rate: int | Literal["original"] | None = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Tokens to audio: a list of float tensors ``[1, samples]`` in [-1, 1].

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``,
                or codes ``[batch, frames, places]``.
            noise: ``"seeded"`` draws for each item by ``seed``, the same alone, in a batch and in a stream; ``"zero"`` leaves
                the noise out; ``"official"`` draws as the original code does, from ``generator`` or PyTorch's own; a list of
                tensors ``[batch, 1, steps]`` holds the noise of each block.
            seed: of ``"seeded"``, for all items or for each.
            generator: of ``"official"``.
            complete: whether a model with attention repeats the last frame of an item until a window is complete, and cuts
                what these gave; otherwise an item must have whole windows.
            trim: cut to the length of the encoded audio; otherwise whole frames.
            sample_rate: resample the result; ``"original"`` gives back each item's own rate and number of samples.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range or at a wrong place, or an item is empty or has no whole windows.
            ArgumentError: the noise does not fit.
        """
        tokens = self.check(tokens)
        config = self.config
        coarse = config.vq_strides[0]
        codes = [own if own.ndim > 1 else own[:, None] for own in self._codes_of(tokens)]
        frames = [len(own) for own in codes]
        codes = [self._whole_windows(own, complete, index) for index, own in enumerate(codes)]
        totals = [len(own) * coarse for own in codes]
        source = noise_source(noise, self._seeds(seed, len(codes)), generator, config, totals, self.device)
        waves = [torch.empty(total * config.hop_length, dtype=torch.float32, device=self.device) for total in totals]
        with progress_bar("decode", sum(totals), progress, unit="frame") as advance:
            for window, group in lockstep(self.decoder.reach, totals, self.budget("decode"), self._together):
                found = self.decode_window([codes[i] for i in group], window, [totals[i] for i in group], source, group)
                for item, own in zip(group, found, strict=True):
                    start = window.start * config.hop_length
                    waves[item][start : start + len(own)] = own
                    advance(len(own) // config.hop_length)
        cut = [wave[None, : count * config.coarse_hop] for wave, count in zip(waves, frames, strict=True)]
        return self.restored(cut, tokens.meta, trim, sample_rate)

    def _whole_windows(self, codes: Int[Tensor, "coarse places"], complete: bool, index: int) -> Int[Tensor, "_ places"]:
        """Codes of a whole number of windows of attention."""
        multiple = self.config.unit // self.config.vq_strides[0]
        missing = -len(codes) % multiple
        if missing and not complete:
            raise ItemError(
                f"{len(codes)} frames are no whole windows of attention, of {multiple} frames each: cut them to such a "
                "multiple, or decode with complete=True",
                index,
            )
        return torch.cat([codes, codes[-1:].expand(missing, -1)]) if missing else codes

    @staticmethod
    def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
        if len(seeds) != count:
            raise ArgumentError(f"{len(seeds)} seeds do not fit {count} items")
        return seeds

    def decode_window(
        self,
        codes: Sequence[Int[Tensor, "_ places"]],
        window: Window,
        totals: Sequence[int],
        noise: NoiseSource | None,
        items: Sequence[int],
        offset: int = 0,
    ) -> list[Float[Tensor, " _"]]:
        """Samples of the frames of a window, for each item those before its end.

        Args:
            codes: from coarse frame ``offset`` on, of all levels or the first few.
            window: of the longest item.
            totals: latent frames of each item.
            noise: of the batch.
            items: which of its items these are.
        """
        coarse, hop = self.config.vq_strides[0], self.config.hop_length
        begin, end = window.first // coarse - offset, -(-window.last // coarse) - offset
        pieces = [own[begin:end].to(self.device) for own in codes]
        latents = self.vectors_of(nn.utils.rnn.pad_sequence(pieces, batch_first=True))
        inside = window.first - (begin + offset) * coarse
        latents = latents[:, inside : inside + window.frames]
        masks = Masks.of(totals, window.first, window.frames, self.device)
        drawn = None if noise is None else noise.window(items, window.seen, window.seen_end)
        blocks = None if drawn is None else [block.to(self.device) for block in drawn]
        samples = self.decoder.through(latents, window, blocks, masks)
        kept = [(min(window.stop, total) - window.start) * hop for total in totals]
        return [own[:count] for own, count in zip(samples, kept, strict=True)]

    def vectors_of(self, codes: Int[Tensor, "batch coarse places"]) -> Float[Tensor, "batch frames latent"]:
        """Latents that codes stand for, of all levels or of the first few."""
        return self.quantizer.vectors([codes[..., places].flatten(1) for places in self._level_places(codes.shape[-1])])

    def _level_places(self, places: int) -> list[list[int]]:
        """The places of each level in frames of ``places`` places."""
        config = self.config
        counts = [len(config.places_of(level)) for level in range(len(config.vq_strides))]
        levels = next(levels for levels in range(1, len(counts) + 1) if sum(counts[:levels]) == places)
        return [config.places_of(level, levels) for level in range(levels)]

    def stream_decoder(self, *, noise: str = "seeded", seed: int = 0) -> StreamDecoder:
        """Decode ids as they arrive, with exactly the audio of the whole sequence; see `StreamDecoder`.

        Raises:
            ArgumentError: ``noise`` is neither ``"seeded"`` nor ``"zero"``.
        """
        if noise not in ("seeded", "zero"):
            raise ArgumentError(f"the noise of a stream must be seeded or zero, not {noise!r}")
        source = SeededNoise([seed], self.config) if noise == "seeded" and self.config.noise else None
        return StreamDecoder(self, source)

    # ---- embed

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The projected code of each id, zero where an item has ended. Those of a frame's levels add up to its latents."""
        checked = self.check(tokens)
        codes = checked.codes().to(self.device)
        order = (0,) if checked.frame is None else checked.frame.order
        vectors = [self.quantizer.level(level).vectors(codes[..., place].clamp(min=0)) for place, level in enumerate(order)]
        return (torch.stack(vectors, dim=2) * (codes >= 0)[..., None]).flatten(1, 2)

    # ---- speed

    def compile_modules(self) -> None:
        """Compile the decoder's stages; the first calls are slow."""
        for module in self.decoder.stages:
            module.compile(dynamic=True)
