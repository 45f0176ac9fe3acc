"""The tokenizer: ragged batches of audio to tokens and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.wavtokenizer.checkpoint import CHECKPOINT
from zoo.codecs.wavtokenizer.config import WavTokenizerConfig
from zoo.codecs.wavtokenizer.decoder import Backbone, Head, Synthesis
from zoo.codecs.wavtokenizer.encoder import Codebook, Encoder, EncoderState
from zoo.codecs.wavtokenizer.graphs import DecoderGraph, EncoderGraph
from zoo.codecs.wavtokenizer.streaming import StreamDecoder, StreamEncoder
from zoo.errors import ArgumentError
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared, groups_of_similar_length
from zoo.tokenizer.audio import AudioTokenizer
from zoo.tokenizer.graphs import Graphs
from zoo.tokenizer.recordings import ForwardReader
from zoo.tokens import Tokens


class WavTokenizer(AudioTokenizer[WavTokenizerConfig, Tokens]):
    """The single-codebook audio tokenizer of arXiv 2408.16532.

    Audio of any sample rate and channel count is averaged to mono and resampled to 24 kHz; the tokens remember the original
    rate and length. ``ceil(samples / hop_length)`` ids come out per item, in time order. Encoding always runs in float32,
    whatever the dtype of the model, autocast or TF32 settings, because two thirds of the ids change in bfloat16. Long files are
    read while they are encoded, so that memory does not grow with them.
    """

    Config = WavTokenizerConfig
    family = "wavtokenizer"
    checkpoint = CHECKPOINT
    identity = ("codebook.embed",)
    streams = True

    # Samples in flight per encoding step and decoder frames per step: small enough for the caches of a CPU, large enough to
    # fill a GPU. They change memory and speed, never the numbers.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(128_000, 8_000_000), "decode": Budget(1_500, 60_000)}

    def __init__(self, config: WavTokenizerConfig | None = None, *, name: str = "wavtokenizer") -> None:
        super().__init__(config or WavTokenizerConfig(), name)
        self.encoder = Encoder(self.config)
        self.codebook = Codebook(self.config)
        self.backbone = Backbone(self.config)
        self.head = Head(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=self.config.codebook_size,
            dim=self.config.latent_dim,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            hop_length=self.config.hop_length,
            # The encoder's is exact.
            streaming="approximate",
        )

    # ---- encode

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> Tokens:
        ids = self._encode_waveforms([ForwardReader(item, index) for index, item in enumerate(items)], progress)
        return self.tokens(ids, [item.meta for item in items])

    def _encode_waveforms(self, waveforms: Sequence[ForwardReader], progress: bool) -> list[Int[Tensor, " _"]]:
        """Ids of every waveform, in lockstep chunk by chunk, each as if it were alone."""
        order = sorted(range(len(waveforms)), key=lambda i: -len(waveforms[i]))
        ids: list[list[Tensor]] = [[] for _ in waveforms]
        budget = self.budget("encode")
        hop = self.config.hop_length
        group_size = max(1, budget // (16 * hop))
        total = sum(-(-len(waveform) // hop) for waveform in waveforms)
        with exact_float32(self.device), progress_bar("encode", total, progress) as advance:
            for first in range(0, len(order), group_size):
                group = order[first : first + group_size]
                chunk = max(16, budget // (len(group) * hop))
                for item, found in self._encode_lockstep([waveforms[i] for i in group], chunk):
                    ids[group[item]].append(found)
                    advance(len(found))
        return [torch.cat(parts) for parts in ids]

    def _encode_lockstep(self, waveforms: Sequence[ForwardReader], chunk: int) -> Iterator[tuple[int, Int[Tensor, " frames"]]]:
        """Ids of waveforms sorted longest first, ``chunk`` frames at a time, as ``(item, ids)``."""
        hop, encoder = self.config.hop_length, self.encoder
        state: EncoderState | None = None
        active = len(waveforms)
        start = 0
        while active:
            need = (start + chunk) * hop + encoder.lookahead
            staying = sum(len(waveform) > need for waveform in waveforms[:active])
            following: EncoderState | None = None
            for items, new_frames in ((slice(0, staying), chunk), (slice(staying, active), None)):
                if items.start == items.stop:
                    continue
                kept_hops = encoder.context + (encoder.REFLECTED_HOPS if new_frames is None else 0)
                context = min(start, kept_hops)
                begin = (start - context) * hop
                end = need if new_frames is not None else None
                pieces = [waveform.part(begin, end)[0].to(self.device) for waveform in waveforms[items]]
                latents, advanced = encoder.advance(
                    nn.utils.rnn.pad_sequence(pieces, batch_first=True),
                    [len(piece) for piece in pieces],
                    None if state is None else state.rows(items),
                    context=context,
                    new_frames=new_frames,
                )
                found = self.codebook.nearest(latents)
                lag = 0 if start == 0 else encoder.HALO
                for row, item in enumerate(range(items.start, items.stop)):
                    if new_frames is None:
                        frames = -(-len(waveforms[item]) // hop) - start + lag
                        yield item, found[row, :frames]
                    else:
                        yield item, found[row]
                following = advanced if new_frames is not None else following
            state, active, start = following, staying, start + chunk

    def stream_encoder(self, sample_rate: int | None = None) -> StreamEncoder:
        """Encode audio as it arrives, with exactly the ids of the whole recording; see `StreamEncoder`."""
        own_rate = self.config.sample_rate
        return StreamEncoder(self.encoder, self.codebook, self.tokens, own_rate=own_rate, sample_rate=sample_rate or own_rate)

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        bandwidth_id: int = 0,
        trim: bool = True,
        sample_rate: int | Literal["original"] | None = None,
        window: int | None = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Tokens to audio: a list of float tensors ``[1, samples]``, nominally in [-1, 1], not clipped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``.
            bandwidth_id: row of the adaptive layer norms; all rows were trained alike.
            trim: cut to the length of the encoded audio; otherwise ``length * hop_length`` samples.
            sample_rate: resample the result; ``"original"`` gives back each item's own rate and number of samples.
            window: decode in windows of that many frames, cross-faded. An approximation: every frame of the exact result
                depends on the whole sequence. For hours of audio, and what `stream_decoder` does.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, or an item is empty.
        """
        tokens = self.check(tokens)
        if not 0 <= bandwidth_id < self.config.num_bandwidths:
            raise ArgumentError(f"bandwidth_id must lie in [0, {self.config.num_bandwidths}), not {bandwidth_id}")
        if window is not None:
            decoded = [self._decode_windowed(ids, bandwidth_id, window) for ids in tokens.unpadded()]
        else:
            decoded = self._decode_exact(tokens, bandwidth_id, progress)
        return self.restored([audio[None] for audio in decoded], tokens.meta, trim, sample_rate)

    @torch.no_grad()
    def _decode_exact(self, tokens: Tokens, bandwidth_id: int, progress: bool) -> list[Float[Tensor, " _"]]:
        lengths = tokens.lengths.tolist()
        decoded: dict[int, Tensor] = {}
        synthesis = self._synthesis()
        with exact_float32(self.device), progress_bar("decode", sum(lengths), progress) as advance:
            for group in groups_of_similar_length(lengths, budget=synthesis.budget):
                longest = max(lengths[i] for i in group)
                ids = tokens.ids[group, :longest].to(self.device)
                mask = None
                if min(lengths[i] for i in group) < longest:
                    mask = (ids >= 0)[..., None]
                total = synthesis.overlapped(self.codebook(ids.clamp(min=0)), mask, bandwidth_id)
                for row, item in enumerate(group):
                    decoded[item] = synthesis.finish(total[row : row + 1], lengths[item])[0].clone()
                    advance(lengths[item])
        return [decoded[i] for i in range(len(lengths))]

    def _synthesis(self) -> Synthesis:
        return Synthesis(self.backbone, self.head, self.budget("decode"))

    def decode_latents(
        self, latents: Float[Tensor, "batch frames latent"], bandwidth_id: int = 0
    ) -> Float[Tensor, "batch samples"]:
        """Latents to audio at once, differentiable: ``samples = frames * hop_length``. What training calls."""
        x, coefficients = self.backbone.mix(latents, None)
        return self.head.istft(self.head.spectrum(self.backbone.refine(x, coefficients, None, bandwidth_id), None))

    def _decode_windowed(self, ids: Int[Tensor, " frames"], bandwidth_id: int, window: int) -> Float[Tensor, " samples"]:
        with self.stream_decoder(window=window, bandwidth_id=bandwidth_id) as stream:
            return torch.cat([stream.push(ids), stream.finish()], dim=1)[0]

    def stream_decoder(self, *, window: int = 300, bandwidth_id: int = 0) -> StreamDecoder:
        """Decode ids as they arrive, approximately, in cross-faded windows; see `StreamDecoder`."""
        return StreamDecoder(self.codebook, self._synthesis(), self.check, window=window, bandwidth_id=bandwidth_id)

    # ---- embed

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codebook vectors of the ids, zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.codebook(ids.clamp(min=0)) * (ids >= 0)[..., None]

    # ---- graphs

    def graphs(self) -> Graphs:
        plain = copy.deepcopy(self).cpu().float()
        return self.graphs_of(
            EncoderGraph(plain.encoder, plain.codebook), DecoderGraph(plain.codebook, plain.backbone, plain.head)
        )

    # ---- speed

    def compile_modules(self) -> None:
        """Compile the decoder's blocks; the first calls are slow. The encoder writes into its buffers by hand instead."""
        for module in (*self.backbone.pos_net, *self.backbone.convnext):
            module.compile(dynamic=True)
