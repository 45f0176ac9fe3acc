"""Tokenizers of audio: reading, resampling, batching, trimming and resampling back, for all families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo import media
from zoo.errors import InputError, naming_item
from zoo.latents import Latents
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, EncodedT, Prepared, Tokenizer, as_items, groups_of_equals
from zoo.tokenizer.graphs import Graph, Graphs, Port
from zoo.tokenizer.recordings import MOST_HELD, RecordingInFile
from zoo.tokens import Tokens

Waveform = Float[Tensor, "_channels _samples"]
Rate = int | Literal["original"] | None


#: Frames of the recordings that an exported graph is tried with, and how many there are of each, beside one of one sample.
_TRIALS = ((2, 9), (1, 37), (3, 4), (1, 300))


class AudioTokenizer(Tokenizer[ConfigT, EncodedT, Waveform]):
    """A tokenizer of audio.

    A family implements `encode_waveforms` and `decode_values`, and lists in ``at_once`` how many samples and frames these take.
    Items are padded to whole hops and grouped by equal length, so that nothing of one reaches another. A family that
    encodes long recordings piece by piece overrides `encode_prepared` and `decode` instead.
    """

    modality = "audio"
    #: Channels that the network takes; others are averaged, or one is repeated.
    channels: int = 1
    #: Samples, at the model's rate, of the shortest recording that it takes.
    shortest: ClassVar[int] = 1
    #: Whether `encode_prepared` reads recordings from front to back, so that long files need not be held.
    streams: ClassVar[bool] = False

    # ---- encode

    def encode(self, items: Any, *, progress: bool = False) -> EncodedT:
        """Audio to tokens, or to the latents of a continuous tokenizer.

        Args:
            items: one item or a list of them, each a path, the bytes of an audio file, ``(array, sample_rate)`` or an array or
                tensor at the model's rate, ``[samples]`` or ``[channels, samples]``. Integer arrays are scaled to [-1, 1).
                A tensor ``[batch, channels, samples]`` is a list. Channels are averaged.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, unreadable, not finite or of the wrong kind; names the item.
            WeightsError: the encoder was not loaded.

        >>> tok = zoo.load("wavtokenizer-tiny")
        >>> tokens = tok.encode([(torch.zeros(8_000), 8_000), torch.zeros(2, 12_000)])
        >>> tokens.lengths.tolist(), tokens.meta[0]
        ([75, 38], {'samples': 8000, 'sample_rate': 8000})
        """
        return self.encode_prepared(self.prepare(items), progress=progress)

    def prepare(self, items: Any) -> list[Prepared]:
        """Audio as the network takes it: ``waveform`` ``[channels, samples]`` at its rate; ``amount`` counts samples.

        Arguments and errors as for `encode`. A family that ``streams`` leaves a file of minutes where it is: its samples are
        measured and checked, and decoded again when they are asked for or the item is pickled.
        """
        return self.read_items(items, self.as_channels, mono=self.channels == 1)

    def read_items(self, items: Any, as_channels: Callable[[Waveform], Waveform], *, mono: bool) -> list[Prepared]:
        """Prepare items as `prepare` does, with the channels that ``as_channels`` makes of an item's, or of their mean."""
        rate = self.input_rate
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=3)):
            with naming_item(index):
                stream = media.stream_audio(item, sample_rate=rate, mono=mono, default_sample_rate=self.spec.sample_rate)
                waveform = stream.read(MOST_HELD if self.streams and stream.file is not None else None)
                if stream.samples < self.shortest:
                    raise InputError(
                        f"{stream.samples} samples at {rate} Hz are too few: {self.name} takes {self.shortest} at least"
                    )
                if waveform is None:
                    tensors: Mapping[str, Tensor] = RecordingInFile(stream, as_channels, mono=mono)
                else:
                    tensors = {"waveform": as_channels(waveform)}
                meta = {"samples": stream.original_samples, "sample_rate": stream.original_rate}
                prepared.append(Prepared(tensors, meta, stream.samples))
        return prepared

    @property
    def input_rate(self) -> int:
        """Samples per second that go into the network; as many as come out, unless a family says otherwise."""
        rate = self.spec.sample_rate
        assert rate is not None
        return rate

    def as_channels(self, waveform: Waveform) -> Waveform:
        """A recording with as many channels as the network takes: one is repeated, others are averaged first."""
        if len(waveform) == self.channels:
            return waveform
        return waveform.mean(0, keepdim=True).repeat(self.channels, 1)

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> EncodedT:
        """Encode what `prepare` gave, to tokens or latents; errors as for `encode`."""
        self.require("encoder", "encoding")
        hop = self.spec.hop_length or 1
        lengths = [-(-item.amount // hop) * hop for item in items]
        found: dict[int, Tensor] = {}
        with progress_bar("encode", sum(lengths), progress, unit="sample") as advance:
            for group in groups_of_equals(lengths, self.budget("encode")):
                length = lengths[group[0]]
                waveforms = torch.stack([F.pad(items[i].tensors["waveform"], (0, length - items[i].amount)) for i in group])
                found |= zip(group, self.encode_waveforms(waveforms.to(self.device)), strict=True)
                advance(length * len(group))
        return self.wrap([found[i] for i in range(len(items))], [item.meta for item in items])

    def encode_waveforms(self, waveforms: Float[Tensor, "batch channels samples"]) -> Sequence[Tensor]:
        """Ids ``[frames]`` (codes ``[frames, places]`` of several codebooks), or latents ``[dim, frames]``, of each waveform.

        The waveforms have one length, a whole number of hops.

        Called without gradients and in exact float32 by `encode_prepared`, which a family may override instead.
        """
        raise NotImplementedError(f"{self.family} has its own way to encode")

    # ---- decode

    def decode(self, tokens: Any, *, trim: bool = True, sample_rate: Rate = None, progress: bool = False) -> list[Waveform]:
        """Tokens, or latents, to audio: float tensors ``[channels, samples]``, nominally in [-1, 1], not clipped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``; of
                a continuous tokenizer latents ``[batch, dim, frames]`` or a list.
            trim: cut to the length of the encoded audio; otherwise whole frames.
            sample_rate: resample the result; ``"original"`` gives back each item's own rate and number of samples.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, or an item is empty.
            WeightsError: the decoder was not loaded.

        >>> tok = zoo.load("wavtokenizer-tiny")
        >>> tokens = tok.encode((torch.zeros(8_000), 8_000))
        >>> [list(audio.shape) for audio in tok.decode(tokens) + tok.decode(tokens, sample_rate="original")]
        [[1, 24000], [1, 8000]]
        >>> tok.decode(torch.tensor([[5, 6, 7]]))[0].shape[1] / tok.spec.sample_rate
        0.04
        """
        self.require("decoder", "decoding")
        checked = self.check(tokens)
        values = checked.values if isinstance(checked, Latents) else self._codes_of(checked)
        frames = [value.shape[-1] if isinstance(checked, Latents) else len(value) for value in values]
        waves: dict[int, Tensor] = {}
        with progress_bar("decode", sum(frames), progress, unit="frame") as advance:
            for group in groups_of_equals(frames, self.budget("decode")):
                stacked = torch.stack([values[i] for i in group]).to(self.device)
                waves |= zip(group, self.decode_values(stacked), strict=True)
                advance(frames[group[0]] * len(group))
        return self.restored([waves[i] for i in range(len(values))], checked.meta, trim, sample_rate)

    def _codes_of(self, tokens: Tokens) -> list[Tensor]:
        """The ids of each item, or its codes ``[frames, places]`` where the model has several codebooks."""
        if self.spec.ids_per_frame == 1:
            return tokens.unpadded()
        frames = (tokens.lengths // tokens.ids_per_frame).tolist()
        return [codes[:count] for codes, count in zip(tokens.codes(), frames, strict=True)]

    def decode_values(self, values: Tensor) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of ids ``[batch, frames]``, or of latents ``[batch, dim, frames]``, of one length.

        Of several codebooks these are codes ``[batch, frames, places]``, of fewer places where codebooks were left out.

        Called by `decode`, which a family may override instead.
        """
        raise NotImplementedError(f"{self.family} has its own way to decode")

    def restored(
        self, waves: Sequence[Waveform], meta: Sequence[Mapping[str, Any]], trim: bool, sample_rate: Rate
    ) -> list[Waveform]:
        """Decoded audio at the length and the rate that are asked for."""
        rate = self.spec.sample_rate
        assert rate is not None
        return [
            media.restore_audio(wave, rate, own, trim=trim, sample_rate=sample_rate)
            for wave, own in zip(waves, meta or [{}] * len(waves), strict=True)
        ]

    # ---- graphs

    def graphs_of(self, encoder: nn.Module | str, decoder: nn.Module | str) -> Graphs:
        """See `Tokenizer.graphs`.

        Args:
            encoder: takes waveforms ``[batch, channels, samples]`` of any length and gives ids ``[batch, ids]`` as in `Tokens`;
                or why there is none.
            decoder: takes such ids and gives waveforms of whole frames; or why there is none.
        """
        spec = self.spec
        hop, generator = spec.hop_length or 1, torch.Generator().manual_seed(0)
        lengths = [*((batch, frames * hop - hop // 3) for batch, frames in _TRIALS), (1, 1)]
        waves = [_gliding(batch, self.channels, samples, generator) for batch, samples in lengths]
        sizes = spec.frame.placed_sizes if spec.frame else (spec.vocab_size,)
        offsets = spec.frame.offsets if spec.frame else (0,)
        ids = [
            torch.stack([_drawn(frames, sizes, offsets, generator) for _ in range(batch)])
            for batch, frames in (*_TRIALS, (1, 1))
        ]
        sound, tokens = Port("waveform", ("batch", self.channels, "samples")), Port("ids", ("batch", "ids"))

        def encoded(waveforms: Tensor) -> Tensor:
            return self.encode(list(waveforms)).ids  # type: ignore[union-attr]

        def decoded(ids: Tensor) -> Tensor:
            return torch.stack(self.decode(list(ids), trim=False)).cpu()

        return {
            "encoder": encoder if isinstance(encoder, str) else Graph(encoder, sound, tokens, waves, encoded),
            "decoder": decoder if isinstance(decoder, str) else Graph(decoder, tokens, sound, ids, decoded),
        }


def _gliding(batch: int, channels: int, samples: int, generator: torch.Generator) -> Float[Tensor, "batch channels samples"]:
    """Tones whose pitch and loudness glide, in noise that comes and goes."""

    def curve() -> Tensor:
        knots = torch.rand(batch, channels, samples // 2000 + 2, generator=generator)
        return F.interpolate(knots, samples, mode="linear")

    # From 15 to 960 Hz at a rate of 24 kHz.
    tone = (2 ** (6 * curve() - 8)).cumsum(-1).sin()
    noise = torch.randn(batch, channels, samples, generator=generator)
    return curve().square() * tone + 0.2 * curve().square() * noise


def _drawn(frames: int, sizes: Sequence[int], offsets: Sequence[int], generator: torch.Generator) -> Int[Tensor, " ids"]:
    """Ids of a number of frames, drawn from the codebook of each place."""
    codes = [torch.randint(size, (frames,), generator=generator) for size in sizes]
    return (torch.stack(codes, dim=1) + torch.tensor(offsets)).flatten()
