"""Tokenizers of audio whose networks take recordings piece by piece: bounded memory and streams, with one pass's numbers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo import media
from zoo.errors import ArgumentError, InputError
from zoo.latents import Latents
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Frame, Spec
from zoo.tokenizer.audio import AudioTokenizer, Rate, Waveform
from zoo.tokenizer.base import ConfigT, EncodedT, Prepared, groups_of_equals
from zoo.tokenizer.graphs import Graphs
from zoo.tokenizer.recordings import ForwardReader
from zoo.tokens import Meta, Tokens


@runtime_checkable
class Steps(Protocol):
    """A network in the middle of a sequence; see `zoo.nn.stages.Stage`."""

    @property
    def delay(self) -> int: ...
    def push(self, x: Tensor | None, last: bool) -> Tensor | None: ...
    @classmethod
    def push_all(cls, stages: Sequence[Any], pieces: Sequence[Tensor | None], last: Sequence[bool]) -> list[Tensor | None]: ...
    def whole(self, x: Tensor) -> Tensor: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Lane:
    """Items of one length on their way through a network.

    Attributes:
        group: their places in the batch.
        steps: the network.
        length: samples or frames that go in.
        piece: of these, how many go in at a time.
        take: gives the input from one place to another.
        start: what has gone in.
    """

    group: Sequence[int]
    steps: Steps
    length: int
    piece: int
    take: Callable[[int, int], Tensor]
    start: int = 0


def advanced(lanes: Iterable[Lane], most: int) -> Iterator[tuple[Lane, Tensor | None, int]]:
    """Move lanes through one network, several side by side, and give what comes out, and how much went in, piece by piece.

    Args:
        lanes: each is made when there is a place for it.
        most: items that are under way at a time, if no lane alone has more.
    """
    waiting, active = iter(lanes), list[Lane]()
    while True:
        while sum(len(lane.group) for lane in active) < most and (lane := next(waiting, None)):
            active.append(lane)
        if not active:
            return
        stops = [min(lane.start + lane.piece, lane.length) for lane in active]
        pieces = [lane.take(lane.start, stop) for lane, stop in zip(active, stops, strict=True)]
        ends = [stop == lane.length for lane, stop in zip(active, stops, strict=True)]
        given = type(active[0].steps).push_all([lane.steps for lane in active], pieces, ends)
        for lane, stop, own in zip(active, stops, given, strict=True):
            taken, lane.start = (stop - lane.start) * len(lane.group), stop
            yield lane, own, taken
        active = [lane for lane in active if lane.start < lane.length]


class Gathered:
    """Pieces ``[rows, frames]`` that come one by one, put into one tensor.

    They are not kept by themselves: small ones that stay, with large ones around them that go, leave memory in pieces that
    the system does not get back.

    Args:
        expected: frames of all of them; more are taken as well.
    """

    def __init__(self, expected: int) -> None:
        self._expected, self._count = expected, 0
        self._held: Tensor | None = None

    def append(self, piece: Float[Tensor, "rows _frames"] | Int[Tensor, "rows _frames"]) -> None:
        """Take the next frames."""
        end = self._count + piece.shape[1]
        if self._held is None:
            self._held = piece.new_empty(len(piece), max(end, self._expected))
        elif end > self._held.shape[1]:
            self._held = torch.cat([self._held[:, : self._count], piece.new_empty(len(piece), end)], dim=1)
        self._held[:, self._count : end] = piece
        self._count = end

    def whole(self) -> Tensor:
        """All frames."""
        assert self._held is not None, "nothing came out of the network"
        return self._held if self._count == self._held.shape[1] else self._held[:, : self._count].clone()


class SteppedAudioTokenizer(AudioTokenizer[ConfigT, EncodedT]):
    """A tokenizer of audio that gives its networks as steps, `encoder_steps` and `decoder_steps`.

    Items of equal length go through them side by side, so that nothing of one reaches another, and long ones in pieces, so that
    memory does not grow with them. Streams are the same steps, fed with what arrives.
    """

    streams = True
    #: Whether items are padded with zeros to whole frames before they are encoded. Otherwise the network sees where they end.
    whole_frames: ClassVar[bool] = True
    #: Items of any lengths that are under way at a time, for networks that are quicker then.
    beside: ClassVar[int] = 1

    @abstractmethod
    def encoder_steps(self, codebooks: int) -> Steps:
        """Encoding of one sequence: waveforms ``[batch, channels, samples]`` to codes ``[batch, codebooks, frames]``.

        Of a continuous tokenizer to latents ``[batch, dim, frames]``.
        """

    @abstractmethod
    def decoder_steps(self) -> Steps:
        """Decoding of one sequence, the other way; codes may be those of the first few codebooks."""

    # ---- families whose tokens remember more than their length

    def notes(self, steps: Steps, count: int) -> Sequence[Meta]:
        """Further meta of each of the ``count`` items that went through `encoder_steps` together; nothing by default."""
        return [{}] * count

    def decoder_steps_for(self, meta: Sequence[Meta]) -> Steps:
        """The same as `decoder_steps`, for items of one number of frames with this meta."""
        return self.decoder_steps()

    def samples_of(self, frames: int) -> int:
        """Samples that a number of frames decodes to."""
        return frames * self.hop_length

    # ---- codebooks

    @property
    def all_codebooks(self) -> int:
        """Codebooks that the checkpoint has; by default as many as the tokenizer gives."""
        return self.spec.codebooks

    def with_codebooks(self, codebooks: int) -> SteppedAudioTokenizer[ConfigT, EncodedT]:
        """The same tokenizer, with the same weights, that gives codes of that many codebooks.

        Raises:
            ArgumentError: the checkpoint has fewer, or there is but one.
        """
        self._require_codebooks(codebooks, self.all_codebooks)
        other = copy.copy(self)
        other.config = replace(self.config, codebooks=codebooks)
        return other

    def _require_codebooks(self, codebooks: int, most: int) -> None:
        if not 1 <= codebooks <= most:
            more = f"; with_codebooks({codebooks}) gives a tokenizer of more" if most < codebooks <= self.all_codebooks else ""
            raise ArgumentError(f"codebooks must lie in [1, {most}], not {codebooks}{more}")

    # ---- encode

    def encode(self, items: Any, *, codebooks: int | None = None, progress: bool = False) -> EncodedT:
        """Audio to tokens, or to the latents of a continuous tokenizer; see `AudioTokenizer.encode`.

        Args:
            items: as there.
            codebooks: codes of each frame, coarse to fine; as many as the tokenizer's ``spec`` says by default.
            progress: show a progress bar.
        """
        return self.encode_prepared(self.prepare(items), codebooks=codebooks, progress=progress)

    def encode_prepared(self, items: Sequence[Prepared], *, codebooks: int | None = None, progress: bool = False) -> EncodedT:
        """Encode what `prepare` gave, to tokens or latents; errors as for `encode`."""
        self.require("encoder", "encoding")
        spec = self.spec
        count = spec.codebooks if codebooks is None else codebooks
        self._require_codebooks(count, spec.codebooks)
        budget = self.budget("encode")
        lengths = [self.padded(item.amount) for item in items]
        found: dict[int, Tensor] = {}
        meta = [dict(item.meta) for item in items]
        with progress_bar("encode", sum(lengths), progress, unit="sample") as advance:
            gathered: dict[int, Gathered] = {}
            lanes = (self._encoder_lane(items, group, lengths[group[0]], count) for group in self._groups(lengths, budget))
            for lane, given, taken in advanced(lanes, self.beside):
                for index, own in zip(lane.group, () if given is None else given, strict=given is not None):
                    gathered.setdefault(index, Gathered(-(-lane.length // self.hop_length))).append(own)
                if lane.start == lane.length:
                    found |= {index: gathered.pop(index).whole() for index in lane.group}
                    for index, note in zip(lane.group, self.notes(lane.steps, len(lane.group)), strict=True):
                        meta[index] |= note
                advance(taken)
        wrapped = self.wrap_values([found[i] for i in range(len(items))], meta)
        return wrapped if count == spec.codebooks else wrapped.keep(count)  # type: ignore[union-attr, return-value]

    def _encoder_lane(self, items: Sequence[Prepared], group: Sequence[int], length: int, count: int) -> Lane:
        readers = [ForwardReader(items[i], i) for i in group]

        def take(start: int, stop: int) -> Float[Tensor, "items channels samples"]:
            waves = [reader.part(start, stop) for reader in readers]
            return torch.stack([F.pad(wave, (0, stop - start - wave.shape[1])) for wave in waves]).to(self.device)

        piece = max(1, self.budget("encode") // (len(group) * self.hop_length)) * self.hop_length
        return Lane(group, self.encoder_steps(count), length, piece, take)

    def _groups(self, lengths: Sequence[int], budget: int) -> Iterable[list[int]]:
        """Items that go side by side. Latents are to be those of the item alone to the last bit, and so go singly."""
        return [[index] for index in range(len(lengths))] if self.spec.continuous else groups_of_equals(lengths, budget)

    def padded(self, samples: int) -> int:
        """Samples of a recording with the zeros that are added behind it before it is encoded."""
        return -(-samples // self.hop_length) * self.hop_length if self.whole_frames else samples

    @property
    def hop_length(self) -> int:
        """Samples that go in for a frame."""
        hop = self.spec.hop_length
        assert hop is not None
        return hop

    def wrap_values(self, values: Sequence[Tensor], meta: Sequence[Meta]) -> EncodedT:
        """The result of `encode`, of what `encoder_steps` gave for each item."""
        spec = self.spec
        if spec.continuous:
            return self.wrap(values, meta)
        full = spec.ids_per_frame
        # Codebooks that were not asked for are filled in and dropped again.
        codes = [own.T if len(own) == full else F.pad(own.T, (0, full - len(own))) for own in values]
        return self.wrap(codes if full > 1 else [own[:, 0] for own in codes], meta)

    # ---- decode

    def decode(self, tokens: Any, *, trim: bool = True, sample_rate: Rate = None, progress: bool = False) -> list[Waveform]:
        """Tokens, or latents, to audio; see `AudioTokenizer.decode`."""
        self.require("decoder", "decoding")
        checked = self.check(tokens)
        values = self._values_of(checked)
        frames = [value.shape[-1] for value in values]
        meta = checked.meta or ({},) * len(values)
        waves: dict[int, Tensor] = {}
        done = [0] * len(values)
        with progress_bar("decode", sum(frames), progress, unit="frame") as advance:
            lanes = (self._decoder_lane(values, group, meta) for group in self._groups(frames, self.budget("decode")))
            for lane, given, taken in advanced(lanes, self.beside):
                for index, own in zip(lane.group, () if given is None else given, strict=given is not None):
                    if index not in waves:
                        # What transposed convolutions leave out at the end is silence.
                        shape = (self.channels, self.samples_of(lane.length))
                        waves[index] = torch.zeros(shape, dtype=torch.float32, device=self.device)
                    waves[index][:, done[index] : done[index] + own.shape[-1]] = own
                    done[index] += own.shape[-1]
                advance(taken)
        ready = [self.finished(waves[i], own) for i, own in enumerate(meta)]
        return self.restored(ready, checked.meta, trim, sample_rate)

    def _decoder_lane(self, values: Sequence[Tensor], group: Sequence[int], meta: Sequence[Meta]) -> Lane:
        stacked = torch.stack([values[i] for i in group])
        steps = self.decoder_steps_for([meta[i] for i in group])
        piece = max(1, self.budget("decode") // len(group))
        return Lane(group, steps, stacked.shape[-1], piece, lambda start, stop: stacked[..., start:stop].to(self.device))

    def finished(self, wave: Waveform, meta: Mapping[str, Any]) -> Waveform:
        """Decoded audio as it goes out; a family may undo here what it did on the way in."""
        return wave

    def _values_of(self, checked: Any) -> list[Tensor]:
        """What `decoder_steps` takes of each item."""
        if isinstance(checked, Latents):
            return list(checked.values)
        return [(own[:, None] if own.ndim == 1 else own).T for own in self._codes_of(checked)]

    # ---- streams

    def stream_encoder(self, sample_rate: int | None = None) -> StreamEncoder:
        """Encode audio as it arrives, with exactly the tokens of the whole recording; see `StreamEncoder`."""
        self.require("encoder", "encoding")
        rate = self.spec.sample_rate
        assert rate is not None
        return StreamEncoder(self, sample_rate or rate)

    def stream_decoder(self, meta: Meta | None = None) -> StreamDecoder:
        """Decode tokens as they arrive, with exactly the audio of the whole sequence; see `StreamDecoder`.

        Args:
            meta: of the tokens, where decoding needs what they remember.
        """
        self.require("decoder", "decoding")
        return StreamDecoder(self, meta)


class ResidualAudioTokenizer(SteppedAudioTokenizer[ConfigT, Tokens]):
    """A tokenizer of audio whose frames have a code of each codebook, coarse to fine; its config has ``codebooks``.

    A family makes its `spec` with `residual_spec` and sets ``quantizer``. The length of that is the number of codebooks.
    Its ``each`` gives the vectors ``[batch, frames, codebooks, dim]`` of codes.
    """

    quantizer: Any

    def residual_spec(
        self,
        codebook_size: int,
        dim: int,
        *,
        sample_rate: int,
        hop_length: int,
        streaming: Literal["exact", "approximate"] | None = "exact",
    ) -> Spec:
        """The promises: code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``."""
        count = self.config.codebooks or self.all_codebooks
        frame = Frame((codebook_size,) * count)
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=frame.vocab_size,
            dim=dim,
            fingerprint=self.fingerprint,
            sample_rate=sample_rate,
            hop_length=hop_length,
            frame=frame,
            residual=count > 1,
            parts=self.parts or (),
            streaming=streaming,
        )

    @property
    def all_codebooks(self) -> int:
        """Codebooks that the checkpoint has."""
        return len(self.quantizer)

    def exact_parts(self) -> tuple[str, ...]:
        return ("encoder", "quantizer")

    def code_offsets(self) -> Int[Tensor, " places"]:
        """Id of the first code of each place of a frame."""
        assert self.spec.frame is not None
        return torch.tensor(self.spec.frame.offsets, dtype=torch.int64)

    def plain_graphs(self) -> Graphs:
        """The halves in one pass each, from a copy on the CPU; for families whose layers are plain functions then."""
        plain = copy.deepcopy(self).cpu().float().plain_layers()
        absent = {
            part: f"the {part} of {self.name} is not loaded"
            for part in ("encoder", "decoder")
            if self.parts is not None and part not in self.parts
        }
        return self.graphs_of(absent.get("encoder", _EncoderGraph(plain)), absent.get("decoder", _DecoderGraph(plain)))

    def plain_layers(self) -> ResidualAudioTokenizer[ConfigT]:
        """This tokenizer, after layers that look at numbers to decide what to do were replaced in it by ones that do not."""
        return self

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The projected code of each id, zero where an item has ended. Those of a frame add up to what the decoder is fed."""
        codes = self.check(tokens).codes().to(self.device)
        found: Tensor = self.quantizer.each(codes.clamp(min=0)) * (codes >= 0)[..., None]
        return found.flatten(1, 2)


class _EncoderGraph(nn.Module):
    """Waveforms of any length to the ids of whole frames, in one pass."""

    def __init__(self, tokenizer: ResidualAudioTokenizer[Any]) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, waveform: Float[Tensor, "batch channels samples"]) -> Int[Tensor, "batch ids"]:
        tokenizer = self.tokenizer
        padded = F.pad(waveform, (0, -waveform.shape[-1] % tokenizer.hop_length))
        codes = tokenizer.encoder_steps(tokenizer.spec.codebooks).whole(padded).transpose(1, 2)
        return (codes + tokenizer.code_offsets()).flatten(1)


class _DecoderGraph(nn.Module):
    """Ids of whole frames to waveforms, in one pass."""

    def __init__(self, tokenizer: ResidualAudioTokenizer[Any]) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, ids: Int[Tensor, "batch ids"]) -> Float[Tensor, "batch channels samples"]:
        tokenizer = self.tokenizer
        offsets = tokenizer.code_offsets()
        codes = ids.unflatten(1, (-1, len(offsets))) - offsets
        waves = tokenizer.decoder_steps().whole(codes.transpose(1, 2))
        # What transposed convolutions leave out at the end is silence.
        return F.pad(waves, (0, codes.shape[1] * tokenizer.hop_length - waves.shape[-1]))


class _Stream:
    """A sequence that comes in pieces. Any number of them may be under way at once, each at its own place."""

    def __init__(self, tokenizer: SteppedAudioTokenizer[Any, Any], steps: Steps) -> None:
        self._tokenizer, self._steps = tokenizer, steps
        self._spec: Spec = tokenizer.spec
        self._finished = False

    @property
    def latency(self) -> float:
        """Seconds from the end of a frame to the end of the last one that it depends on."""
        assert self._spec.frame_rate is not None
        return self._steps.delay / self._spec.frame_rate

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise InputError("the stream has been finished; open another one")

    def _push(self, x: Tensor | None, last: bool) -> Tensor | None:
        device = self._tokenizer.device
        with torch.no_grad(), exact_float32(device):
            return self._steps.push(None if x is None else x.to(device), last)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()
        self._finished = True

    def finish(self) -> Tensor:
        """The sequence has ended: what remains."""
        raise NotImplementedError


class StreamEncoder(_Stream):
    """Encodes audio as it arrives; the tokens are exactly those of the whole recording, however it is cut.

    Use as a context manager, or call `finish` at the end::

        with tokenizer.stream_encoder() as stream:
            for chunk in microphone:
                ids = stream.push(chunk)
        tokens = stream.tokens

    `state` stores where it is; `restore` of a new stream of the same tokenizer goes on from there.
    """

    def __init__(self, tokenizer: SteppedAudioTokenizer[Any, Any], sample_rate: int, steps: Steps | None = None) -> None:
        super().__init__(tokenizer, steps or tokenizer.encoder_steps(tokenizer.spec.codebooks))
        self.sample_rate = sample_rate
        self._hop = tokenizer.hop_length
        self._resampler = media.Resampler(sample_rate, tokenizer.input_rate)
        self._pending = torch.zeros(tokenizer.channels, 0, dtype=torch.float32, device="cpu")
        self._samples = 0
        self._values: list[Tensor] = []

    @property
    def tokens(self) -> Any:
        """All that has been encoded so far, as tokens, or latents, of one item.

        Raises:
            InputError: nothing has.
        """
        if not self._values:
            raise InputError("no frame of the stream is settled yet")
        [note] = self._tokenizer.notes(self._steps, 1)
        meta = {"samples": self._samples, "sample_rate": self.sample_rate, **note}
        return self._tokenizer.wrap_values([torch.cat(self._values, dim=-1)], [meta])

    def push(self, chunk: Any) -> Tensor:
        """Take the next samples, ``[samples]`` or ``[channels, samples]``, and return the ids ``[ids]`` that they settle.

        Of a continuous tokenizer latents ``[dim, frames]``.

        Raises:
            InputError: the samples are not finite or not an array, or the stream has been finished.
        """
        self._refuse_if_finished()
        tokenizer = self._tokenizer
        audio = media.read_audio((chunk, self.sample_rate), mono=tokenizer.channels == 1)
        self._samples += audio.original_samples
        self._append(self._resampler.push(tokenizer.as_channels(audio.waveform)))
        whole = self._pending.shape[1] // self._hop * self._hop
        if not whole:
            return self._given(None)
        ready, self._pending = self._pending[:, :whole], self._pending[:, whole:].clone()
        return self._given(self._push(ready[None], False))

    def finish(self) -> Tensor:
        """The audio has ended: the remaining ids or latents."""
        self._refuse_if_finished()
        self._append(self._resampler.finish())
        self._finished = True
        if not self._samples:
            return self._given(None)
        # Whole frames have gone, so that the zeros to add depend on the rest alone.
        pending = self._pending.shape[1]
        rest = F.pad(self._pending, (0, self._tokenizer.padded(pending) - pending))
        return self._given(self._push(rest[None] if rest.shape[1] else None, True))

    def _append(self, waveform: Float[Tensor, "channels samples"]) -> None:
        if waveform.shape[1]:
            self._pending = torch.cat([self._pending, waveform], dim=1)

    def _given(self, values: Tensor | None) -> Tensor:
        if values is None:
            empty = (self._spec.dim, 0) if self._spec.continuous else (0,)
            dtype = torch.float32 if self._spec.continuous else torch.int64
            return torch.zeros(*empty, dtype=dtype, device=self._tokenizer.device)
        [own] = values
        self._values.append(own.cpu())
        if self._spec.continuous:
            return own
        offsets = (0,) if self._spec.frame is None else self._spec.frame.offsets
        return (own.T + torch.tensor(offsets, dtype=torch.int64, device=own.device)).reshape(-1)

    def state(self) -> dict[str, Any]:
        """The place of the stream, as tensors and plain values, for ``torch.save``."""
        return {
            "steps": self._steps.state(),
            "resampler": self._resampler.state(),
            "pending": self._pending,
            "samples": self._samples,
            "values": list(self._values),
            "finished": self._finished,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` of a stream of the same tokenizer and sample rate gave."""
        self._steps.restore(state["steps"])
        self._resampler.restore(state["resampler"])
        self._pending, self._samples, self._values = state["pending"], state["samples"], list(state["values"])
        self._finished = state["finished"]

    def __enter__(self) -> StreamEncoder:
        return self


class StreamDecoder(_Stream):
    """Decodes tokens as they arrive; the audio is exactly that of the whole sequence, however it is cut.

    Use as a context manager, or call `finish` at the end. Ids may come singly; a frame is taken when it is complete. `state`
    stores where it is; `restore` of a new stream of the same tokenizer goes on from there.
    """

    def __init__(
        self, tokenizer: SteppedAudioTokenizer[Any, Any], meta: Meta | None = None, steps: Steps | None = None
    ) -> None:
        super().__init__(tokenizer, steps or tokenizer.decoder_steps_for([meta or {}]))
        self._ids = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._frames = self._given_samples = 0

    def push(self, ids: Int[Tensor, " ids"] | Float[Tensor, "dim frames"]) -> Float[Tensor, "channels samples"]:
        """Take the next ids, flat as `encode` gives them, or the next latents, and return the audio that is ready.

        Raises:
            InputError: an id is out of range or at a wrong place, latents have another shape, or the stream has been finished.
        """
        self._refuse_if_finished()
        values = self._latents(ids) if self._spec.continuous else self._codes(torch.as_tensor(ids, dtype=torch.int64).cpu())
        if values is None:
            return self._audio(None)
        self._frames += values.shape[-1]
        return self._audio(self._push(values[None], False))

    def _latents(self, latents: Tensor) -> Tensor | None:
        if not latents.shape[-1]:
            return None
        [own] = self._tokenizer.check([latents]).values
        checked: Tensor = own
        return checked

    def _codes(self, ids: Int[Tensor, " ids"]) -> Tensor | None:
        places = self._spec.ids_per_frame
        pending = torch.cat([self._ids, ids])
        whole = len(pending) // places * places
        ready, self._ids = pending[:whole], pending[whole:].clone()
        return self._tokenizer.check([ready]).codes()[0].T if whole else None

    def finish(self) -> Float[Tensor, "channels samples"]:
        """The sequence has ended: the remaining audio.

        Raises:
            InputError: the last frame is not complete.
        """
        self._refuse_if_finished()
        self._finished = True
        if len(self._ids):
            raise InputError(f"the sequence ends within a frame, after {len(self._ids)} of its ids")
        rest = self._audio(self._push(None, True))
        # As in `decode`: silence where transposed convolutions leave samples out.
        missing = self._tokenizer.samples_of(self._frames) - self._given_samples if self._frames else 0
        return F.pad(rest, (0, missing))

    def _audio(self, batch: Tensor | None) -> Float[Tensor, "channels samples"]:
        if batch is None:
            return torch.zeros(self._tokenizer.channels, 0, dtype=torch.float32, device=self._tokenizer.device)
        self._given_samples += batch.shape[-1]
        return batch[0]

    def state(self) -> dict[str, Any]:
        """The place of the stream, as tensors and plain values, for ``torch.save``."""
        return {
            "steps": self._steps.state(),
            "ids": self._ids,
            "frames": self._frames,
            "given": self._given_samples,
            "finished": self._finished,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` of a stream of the same tokenizer gave."""
        self._steps.restore(state["steps"])
        self._ids = state["ids"]
        self._frames, self._given_samples, self._finished = state["frames"], state["given"], state["finished"]

    def __enter__(self) -> StreamDecoder:
        return self
