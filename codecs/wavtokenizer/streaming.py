"""Audio that arrives, or leaves, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.wavtokenizer.decoder import Synthesis
from zoo.codecs.wavtokenizer.encoder import Codebook, Encoder, EncoderState
from zoo.errors import InputError
from zoo.precision import exact_float32
from zoo.tokens import Tokens


class StreamEncoder:
    """Encodes audio as it arrives; the ids are exactly those of the whole recording, however it is cut.

    A frame's id is final ``latency`` seconds after the frame began. Use as a context manager, or call `finish` at the end::

        with tokenizer.stream_encoder() as stream:
            for chunk in microphone:
                ids = stream.push(chunk)
        tokens = stream.tokens

    Args:
        encoder, codebook: the networks.
        wrap: makes tokens of sequences of ids and their meta.
        own_rate: samples per second that the encoder takes.
        sample_rate: of the audio that arrives.
    """

    # The left reflection at the very start needs this many frames before it can be told.
    FIRST_FRAMES = Encoder.HALO + 1

    def __init__(
        self, encoder: Encoder, codebook: Codebook, wrap: Callable[..., Tokens], *, own_rate: int, sample_rate: int
    ) -> None:
        self.sample_rate = sample_rate
        self._encoder = encoder
        self._codebook = codebook
        self._wrap = wrap
        self._own_rate = own_rate
        self._resampler = media.Resampler(sample_rate, own_rate)
        self._pending = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._pending_start = 0
        self._frames = 0
        self._samples = 0
        self._state: EncoderState | None = None
        self._ids: list[Tensor] = []
        self._finished = False

    @property
    def latency(self) -> float:
        """Seconds from the beginning of a frame to the sample that settles its id (after the first few frames)."""
        encoder = self._encoder
        return ((encoder.HALO + 1) * encoder.hop_length + encoder.lookahead) / self._own_rate

    @property
    def tokens(self) -> Tokens:
        """All ids so far, as tokens of one item."""
        meta = {"samples": self._samples, "sample_rate": self.sample_rate}
        return self._wrap([torch.cat([*self._ids, torch.zeros(0, dtype=torch.int64)])], [meta])

    def push(self, chunk: Any) -> Int[Tensor, " frames"]:
        """Take the next samples, ``[samples]`` or ``[channels, samples]``, and return the ids that they settle.

        Raises:
            InputError: the samples are not finite or not an array, or the stream has been finished.
        """
        self._refuse_if_finished()
        audio = media.read_audio((chunk, self.sample_rate), mono=True)
        self._samples += audio.original_samples
        self._append(self._resampler.push(audio.waveform))
        encoder = self._encoder
        received = self._pending_start + len(self._pending)
        ready = (received - encoder.lookahead) // encoder.hop_length - self._frames
        if ready < (self.FIRST_FRAMES if self._state is None else 1):
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        return self._advance(ready)

    def finish(self) -> Int[Tensor, " frames"]:
        """The audio has ended: the remaining ids."""
        self._refuse_if_finished()
        self._append(self._resampler.finish())
        self._finished = True
        if not self._samples:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        return self._advance(None)

    @property
    def _device(self) -> torch.device:
        return self._codebook.embed.device

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise InputError("the stream has been finished; open another one")

    def _append(self, waveform: Float[Tensor, "1 samples"]) -> None:
        self._pending = torch.cat([self._pending, waveform[0]])

    @torch.no_grad()
    def _advance(self, new_frames: int | None) -> Int[Tensor, " frames"]:
        encoder, device = self._encoder, self._device
        hop = encoder.hop_length
        context = min(self._frames, encoder.context + (encoder.REFLECTED_HOPS if new_frames is None else 0))
        begin = (self._frames - context) * hop - self._pending_start
        end = None if new_frames is None else begin + (context + new_frames) * hop + encoder.lookahead
        piece = self._pending[begin:end].to(device)
        with exact_float32(device):
            latents, self._state = encoder.advance(
                piece[None], [len(piece)], self._state, context=context, new_frames=new_frames
            )
            ids = self._codebook.nearest(latents[0])
        self._ids.append(ids.cpu())
        self._frames += new_frames or 0
        outdated = max(0, self._frames - encoder.context - encoder.REFLECTED_HOPS) * hop - self._pending_start
        if outdated > 0:
            self._pending = self._pending[outdated:].clone()
            self._pending_start += outdated
        return ids

    def __enter__(self) -> StreamEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()


class StreamDecoder:
    """Decodes ids as they arrive, in windows with context on both sides and a linear cross-fade between them.

    An approximation: the exact decoder normalises and attends over the whole sequence, a window only over itself. Audio comes
    out ``window`` frames late, at most.

    Args:
        codebook, synthesis: the networks.
        check: makes tokens of sequences of ids, or refuses them.
        window: frames that are decoded together.
        bandwidth_id: row of the adaptive layer norms.
    """

    FADE_FRAMES = 8

    def __init__(
        self, codebook: Codebook, synthesis: Synthesis, check: Callable[..., Tokens], *, window: int, bandwidth_id: int
    ) -> None:
        self._context = synthesis.context
        smallest = 2 * self._context + 2 * self.FADE_FRAMES
        if window < smallest:
            raise InputError(f"a window of {window} frames is too short; use at least {smallest}")
        self._codebook = codebook
        self._synthesis = synthesis
        self._check = check
        self.window = window
        self.bandwidth_id = bandwidth_id
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._ids_start = 0
        self._done = 0
        self._fading: Tensor | None = None
        self._finished = False

    def push(self, ids: Int[Tensor, " frames"]) -> Float[Tensor, "1 samples"]:
        """Take the next ids and return the audio that is ready.

        Raises:
            InputError: an id is out of range, or the stream has been finished.
        """
        if self._finished:
            raise InputError("the stream has been finished; open another one")
        if len(ids):
            self._ids = torch.cat([self._ids, *self._check([ids.cpu()]).unpadded()])
        parts = []
        while len(self._ids) - self._window_start() >= self.window:
            start = self._window_start()
            parts.append(self._decode(start, start + self.window, final=False))
        return torch.cat([torch.zeros(1, 0, dtype=torch.float32, device=self._device), *parts], dim=1)

    def finish(self) -> Float[Tensor, "1 samples"]:
        """The sequence has ended: the remaining audio."""
        if self._finished:
            raise InputError("the stream has been finished; open another one")
        self._finished = True
        if len(self._ids) + self._ids_start == self._done:
            return torch.zeros(1, 0, dtype=torch.float32, device=self._device)
        start = max(0, min(self._window_start(), len(self._ids) - self.window))
        return self._decode(start, len(self._ids), final=True)

    @property
    def _device(self) -> torch.device:
        return self._codebook.embed.device

    def _window_start(self) -> int:
        """Where the next window begins within the kept ids."""
        return max(0, self._done - self._context - self._ids_start)

    @torch.no_grad()
    def _decode(self, start: int, stop: int, final: bool) -> Float[Tensor, "1 samples"]:
        hop = self._synthesis.hop_length
        ids = self._ids[start:stop].to(self._device)[None]
        with exact_float32(self._device):
            total = self._synthesis.overlapped(self._codebook(ids), None, self.bandwidth_id)
            audio = self._synthesis.finish(total, ids.shape[1])
        audio = audio[:, (self._done - self._ids_start - start) * hop :]
        if self._fading is not None:
            fade = self._fading.shape[1]
            rise = (torch.arange(fade, dtype=audio.dtype, device=audio.device) + 0.5) / fade
            head = self._fading + rise * (audio[:, :fade] - self._fading)
            audio = torch.cat([head, audio[:, fade:]], dim=1)
        if final:
            return audio
        kept_frames = stop - self._context - self.FADE_FRAMES - (self._done - self._ids_start)
        kept, fading_end = kept_frames * hop, (kept_frames + self.FADE_FRAMES) * hop
        self._fading = audio[:, kept:fading_end]
        self._done += kept_frames
        # The last window may reach back a full window from the end.
        outdated = self._done - self.window - self._ids_start
        if outdated > 0:
            self._ids = self._ids[outdated:]
            self._ids_start += outdated
        return audio[:, :kept]

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._finished = True
