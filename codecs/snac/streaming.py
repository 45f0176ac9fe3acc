"""Audio that arrives, or leaves, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.decoder import Decoder
from zoo.codecs.snac.encoder import Encoder
from zoo.codecs.snac.noise import NoiseSource
from zoo.codecs.snac.windows import Reach, Window
from zoo.errors import InputError
from zoo.precision import exact_float32
from zoo.tokens import Meta, Tokens


@runtime_checkable
class Codec(Protocol):
    """Interface of the tokenizer to streams."""

    @property
    def config(self) -> SNACConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def encoder(self) -> Encoder: ...
    @property
    def decoder(self) -> Decoder: ...

    def wrap(self, values: Sequence[Tensor], meta: Sequence[Meta]) -> Tokens: ...
    def as_values(self, codes: Tensor) -> Tensor: ...
    def check(self, tokens: Any) -> Tokens: ...
    def budget(self, action: str) -> int: ...
    def encode_window(
        self, waveforms: Sequence[Tensor], window: Window, totals: Sequence[int], offset: int = 0
    ) -> list[Tensor]: ...
    def decode_window(
        self,
        codes: Sequence[Tensor],
        window: Window,
        totals: Sequence[int],
        noise: NoiseSource | None,
        items: Sequence[int],
        offset: int = 0,
    ) -> list[Tensor]: ...


# Frames of a sequence whose end is not known yet.
_ENDLESS = 1 << 60


class _Stream:
    """Frames that are settled one run after the other."""

    def __init__(self, codec: Codec, reach: Reach, most: int) -> None:
        self.codec = codec
        self.config = codec.config
        self._reach = reach
        unit = self.config.unit
        self._most = max(1, most // unit) * unit
        self._done = 0
        self._finished = False

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise InputError("the stream has been finished; open another one")

    def _windows(self, stop: int, total: int) -> list[Window]:
        """What has to be computed up to a frame, for as many frames at once as memory allows."""
        starts = range(self._done, stop, self._most)
        return [self._reach.window_for(start, min(start + self._most, stop), total) for start in starts]

    def _next_first(self) -> int:
        """The first latent frame that the next window needs."""
        return self._reach.window_for(self._done, self._done + 1, _ENDLESS).first


class StreamEncoder(_Stream):
    """Encodes audio as it arrives; the ids are exactly those of the whole recording, however it is cut.

    A frame's ids are final ``latency`` seconds after the frame ended. Use as a context manager, or call `finish` at the end::

        with tokenizer.stream_encoder() as stream:
            for chunk in microphone:
                ids = stream.push(chunk)
        tokens = stream.tokens
    """

    def __init__(self, codec: Codec, sample_rate: int) -> None:
        super().__init__(codec, codec.encoder.reach, codec.budget("encode") // codec.config.hop_length)
        self.sample_rate = sample_rate
        self._resampler = media.Resampler(sample_rate, self.config.sample_rate)
        self._pending = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._pending_start = 0
        self._samples = 0
        places = len(self.config.places)
        self._codes: list[Tensor] = [torch.zeros(0, places, dtype=torch.int64, device="cpu")]

    @property
    def latency(self) -> float:
        """Seconds from the end of a frame to the sample that settles its ids; with attention the longest such time."""
        reach, config = self._reach, self.config
        worst = max(
            reach.window_for(stop - 1, stop, _ENDLESS).seen_end - stop
            for stop in range(config.unit, 2 * config.unit + 1, config.vq_strides[0])
        )
        return (worst * config.hop_length + self.codec.encoder.lookahead) / config.sample_rate

    @property
    def tokens(self) -> Tokens:
        """All ids so far, as tokens of one item."""
        meta = {"samples": self._samples, "sample_rate": self.sample_rate}
        return self.codec.wrap([self.codec.as_values(torch.cat(self._codes))], [meta])

    def push(self, chunk: Any) -> Int[Tensor, " ids"]:
        """Take the next samples, ``[samples]`` or ``[channels, samples]``, and return the ids that they settle: whole frames.

        Raises:
            InputError: the samples are not finite or not an array, or the stream has been finished.
        """
        self._refuse_if_finished()
        audio = media.read_audio((chunk, self.sample_rate), mono=True)
        self._samples += audio.original_samples
        self._append(self._resampler.push(audio.waveform))
        hop, received = self.config.hop_length, self._pending_start + len(self._pending)
        return self._advance(self._reach.settled((received - self.codec.encoder.lookahead) // hop), _ENDLESS)

    def finish(self) -> Int[Tensor, " ids"]:
        """The audio has ended: the remaining ids."""
        self._refuse_if_finished()
        self._append(self._resampler.finish())
        self._finished = True
        config = self.config
        received = self._pending_start + len(self._pending)
        total = -(-received // (config.hop_length * config.unit)) * config.unit
        return self._advance(total, total)

    def _append(self, waveform: Float[Tensor, "1 samples"]) -> None:
        self._pending = torch.cat([self._pending, waveform[0]])

    @torch.no_grad()
    def _advance(self, stop: int, total: int) -> Int[Tensor, " ids"]:
        found = self._codes[0][:0].to(self.codec.device)
        for window in self._windows(stop, total):
            with exact_float32(self.codec.device):
                [codes] = self.codec.encode_window([self._pending], window, [total], self._pending_start)
            found = torch.cat([found, codes])
            self._codes.append(codes.cpu())
        self._done = max(self._done, stop)
        outdated = self._next_first() * self.config.hop_length - self._pending_start
        if outdated > 0:
            self._pending = self._pending[outdated:].clone()
            self._pending_start += outdated
        offsets = torch.tensor(self.config.frame.offsets, dtype=torch.int64, device=found.device)
        return (found + offsets).flatten()

    def __enter__(self) -> StreamEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()


class StreamDecoder(_Stream):
    """Decodes ids as they arrive; the audio is exactly that of the whole sequence, however it is cut.

    The audio of a frame comes ``latency`` seconds of ids after the frame. Use as a context manager, or call `finish` at
    the end. Ids may come singly; a frame is taken when it is complete.
    """

    def __init__(self, codec: Codec, noise: NoiseSource | None) -> None:
        super().__init__(codec, codec.decoder.reach, codec.budget("decode"))
        self._noise = noise
        self._ids = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._codes = torch.zeros(0, len(self.config.places), dtype=torch.int64, device="cpu")
        self._codes_start = 0

    @property
    def latency(self) -> float:
        """Seconds of ids behind a frame that its audio waits for; with attention the longest such time."""
        reach, config = self._reach, self.config
        coarse = config.vq_strides[0]
        worst = 0
        for stop in range(config.unit, 2 * config.unit + 1, coarse):
            last = reach.window_for(stop - 1, stop, _ENDLESS).last
            worst = max(worst, -(-last // coarse) * coarse - stop)
        return worst * config.hop_length / config.sample_rate

    def push(self, ids: Int[Tensor, " ids"]) -> Float[Tensor, "1 samples"]:
        """Take the next ids, flat as `encode` gives them, and return the audio that is ready.

        Raises:
            InputError: an id is out of range or at a wrong place, or the stream has been finished.
        """
        self._refuse_if_finished()
        places = len(self.config.places)
        pending = torch.cat([self._ids, torch.as_tensor(ids, dtype=torch.int64).cpu()])
        whole = len(pending) // places * places
        if whole:
            codes = self.codec.check([pending[:whole]]).codes()[0].cpu()
            self._codes = torch.cat([self._codes, codes])
        self._ids = pending[whole:]
        known = self._known
        return self._advance(self._reach.settled(known - self._reach.inner), _ENDLESS)

    def finish(self) -> Float[Tensor, "1 samples"]:
        """The sequence has ended: the remaining audio.

        Raises:
            InputError: the last frame is not complete, or with attention the last window.
        """
        self._refuse_if_finished()
        self._finished = True
        if len(self._ids):
            raise InputError(f"the sequence ends within a frame, after {len(self._ids)} of its ids")
        if self._known % self.config.unit:
            raise InputError(
                f"{self._known // self.config.vq_strides[0]} frames are no whole windows of attention, of "
                f"{self.config.unit // self.config.vq_strides[0]} frames each"
            )
        return self._advance(self._known, self._known)

    @property
    def _known(self) -> int:
        """Latent frames whose ids have come."""
        return (self._codes_start + len(self._codes)) * self.config.vq_strides[0]

    @torch.no_grad()
    def _advance(self, stop: int, total: int) -> Float[Tensor, "1 samples"]:
        parts = [torch.zeros(0, dtype=torch.float32, device=self.codec.device)]
        for window in self._windows(stop, total):
            with exact_float32(self.codec.device):
                parts += self.codec.decode_window([self._codes], window, [total], self._noise, [0], self._codes_start)
        self._done = max(self._done, stop)
        outdated = self._next_first() // self.config.vq_strides[0] - self._codes_start
        if outdated > 0:
            self._codes = self._codes[outdated:]
            self._codes_start += outdated
        return torch.cat(parts)[None]

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._finished = True
