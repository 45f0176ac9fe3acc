"""EnCodec: convolutions and LSTMs around a residual quantizer, as MusicGen and AudioGen use it.

Paper: Défossez et al., "High Fidelity Neural Audio Compression", arXiv 2210.13438. The network is the one of the library
transformers, ``EncodecModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers
from zoo.errors import InputError, KeysError, WeightsError, naming_item
from zoo.nn.library import (
    Exact,
    ResidualConfig,
    built,
    folded,
    in_own_dtype,
    settings_of,
    sizes_from,
    without_weight_norm,
)
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.seanet import seanet, with_quick_elus
from zoo.nn.stages import Chain, Each, Stage
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.stepped import ResidualAudioTokenizer, Steps
from zoo.tokens import Meta, Tokens


@dataclass(frozen=True)
class EncodecConfig(ResidualConfig):
    """Sizes of one model; ``library`` is a ``transformers.EncodecConfig``."""


# ---- chunks of a recording


@dataclass(frozen=True)
class Chunking:
    """A recording's chunks, each encoded by itself.

    A chunk begins every ``stride`` samples as long as there are samples left. Two neighbours have less than two frames in
    common, so that the number of frames tells where each chunk ends.

    Attributes:
        size: samples of a chunk, a whole number of frames; of the last two there may be fewer.
        stride: samples from the start of one to that of the next.
        hop: samples of a frame.
    """

    size: int
    stride: int
    hop: int

    @property
    def frames(self) -> int:
        """Frames of a chunk of full size."""
        return self.size // self.hop

    def split(self, frames: int) -> list[int]:
        """Frames of each chunk of a recording.

        >>> Chunking(48_000, 47_520, 320).split(299), Chunking(48_000, 47_520, 320).split(300)
        ([150, 149], [150, 149, 1])
        """
        before, last = (frames - 1) // self.frames, (frames - 1) % self.frames + 1
        full = [self.frames] * before
        # A last chunk is never longer than what follows the start of the one before it.
        return [*full, last - 1, 1] if last > -(-self.stride // self.hop) else [*full, last]

    def samples(self, frames: int) -> int:
        """Samples that the chunks of a recording cover, each of them whole frames."""
        return max(place * self.stride + own * self.hop for place, own in enumerate(self.split(frames)))


class ChunkEncoder(Stage):
    """Chunks of a recording, ``[batch, channels, samples]``, to their codes ``[batch, codebooks, frames]``.

    Args:
        encode: chunks ``[chunks, channels, samples]`` at a loudness of 1 to codes.
        chunking: where they begin and end.

    Attributes:
        scales: loudness that each chunk was divided by, ``[batch]`` of each.
    """

    def __init__(self, encode: Any, chunking: Chunking) -> None:
        self._encode, self._chunking = encode, chunking
        self.delay = chunking.frames - 1
        self.scales: list[Tensor] = []
        self._held: Tensor | None = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is not None:
            self._held = x if self._held is None else torch.cat([self._held, x], dim=-1)
        if self._held is None:
            return None
        size, stride = self._chunking.size, self._chunking.stride
        full = max(0, (self._held.shape[-1] - size) // stride + 1)
        found = [self._codes(self._held.unfold(-1, size, stride)[:, :, :full])] if full else []
        self._held = self._held[..., full * stride :].clone()
        if last:
            starts = range(0, self._held.shape[-1], stride)
            found += [self._codes(self._held[:, :, None, start : start + size]) for start in starts]
            self._held = None
        return torch.cat(found, dim=-1) if found else None

    def _codes(self, chunks: Float[Tensor, "batch channels chunks samples"]) -> Int[Tensor, "batch codebooks frames"]:
        batch, channels, count, _ = chunks.shape
        mono = chunks.sum(1, keepdim=True) / channels
        scales = mono.square().mean(-1, keepdim=True).sqrt() + 1e-8
        self.scales += scales[:, 0, :, 0].unbind(1)
        codes = self._encode((chunks / scales).transpose(1, 2).flatten(0, 1))
        found: Tensor = codes.unflatten(0, (batch, count)).transpose(1, 2).flatten(2)
        return found

    def state(self) -> dict[str, Any]:
        return {"held": self._held, "scales": list(self.scales)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._held, self.scales = state["held"], list(state["scales"])


class ChunkDecoder(Stage):
    """Codes ``[batch, codebooks, frames]`` of chunks to audio; neighbours are faded into one another.

    Args:
        decode: codes of chunks to audio ``[chunks, channels, samples]`` at a loudness of 1.
        chunking: where they begin and end.
        scales: loudness of each chunk, ``[batch, chunks]``; 1 for all by default.
    """

    def __init__(self, decode: Any, chunking: Chunking, scales: Float[Tensor, "batch chunks"] | None = None) -> None:
        self._decode, self._chunking, self._scales = decode, chunking, scales
        # What two chunks share is known when the second one is over, which takes a frame of the third.
        self.delay = 2 * chunking.frames - chunking.stride // chunking.hop
        self._held: Tensor | None = None
        self._done = 0
        # The end of the last chunk, weighted, and the weights.
        self._tail: tuple[Tensor, Tensor] | None = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is not None:
            self._held = x if self._held is None else torch.cat([self._held, x], dim=-1)
        if self._held is None:
            return None
        length, full = self._held.shape[-1], self._chunking.frames
        sizes = self._chunking.split(length) if last else [full] * ((length - 1) // full)
        if not sizes:
            return None
        whole = sizes.count(full)
        chunks = [*self._audio(self._held[..., : whole * full].unflatten(-1, (whole, full)))] if whole else []
        used = whole * full
        for size in sizes[whole:]:
            chunks += self._audio(self._held[..., None, used : used + size])
            used += size
        self._held = None if last else self._held[..., used:].clone()
        faded = [self._faded(chunk, last and place == len(chunks)) for place, chunk in enumerate(chunks, 1)]
        return torch.cat(faded, dim=-1)

    def _audio(self, codes: Int[Tensor, "batch codebooks chunks frames"]) -> Sequence[Float[Tensor, "batch channels samples"]]:
        batch, _, count, _ = codes.shape
        audio = self._decode(codes.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, count))
        if self._scales is not None:
            if self._scales.shape[1] < self._done + count:
                raise InputError(f"there are {self._scales.shape[1]} scales, and more chunks")
            audio = audio * self._scales[:, self._done : self._done + count, None, None]
        self._done += count
        found: Sequence[Tensor] = audio.unbind(1)
        return found

    def _faded(self, chunk: Float[Tensor, "batch channels samples"], last: bool) -> Float[Tensor, "batch channels ready"]:
        size = self._chunking.size
        time = torch.linspace(0, 1, size + 2, dtype=torch.float32, device=chunk.device)[1 : chunk.shape[-1] + 1]
        weights = 0.5 - (time - 0.5).abs()
        total = weights * chunk
        if self._tail is not None:
            before, weights_before = self._tail
            longest = max(chunk.shape[-1], before.shape[-1])
            total, weights = (F.pad(own, (0, longest - own.shape[-1])) for own in (total, weights))
            total[..., : before.shape[-1]] += before
            weights[: before.shape[-1]] += weights_before
        ready = total.shape[-1] if last else self._chunking.stride
        self._tail = total[..., ready:], weights[ready:]
        return total[..., :ready] / weights[:ready]

    def state(self) -> dict[str, Any]:
        tail = None if self._tail is None else list(self._tail)
        return {"held": self._held, "scales": self._scales, "done": self._done, "tail": tail}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._held, self._scales, self._done = state["held"], state["scales"], state["done"]
        self._tail = None if state["tail"] is None else tuple(state["tail"])


def scales_in(meta: Meta) -> Float[Tensor, " chunks"] | None:
    """Loudness of each chunk of an item, as its meta remembers it; ``None`` where it does not.

    Raises:
        InputError: they are no finite numbers.
    """
    if meta.get("scales") is None:
        return None
    try:
        scales = torch.from_numpy(np.frombuffer(meta["scales"], "<f4").astype(np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"the scales of an item are no numbers of 32 bits: {error}") from error
    if not scales.isfinite().all():
        raise InputError("the scales of an item are not finite")
    return scales


# ---- checkpoints of transformers


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an EnCodec of transformers."""
    return {"quantizer.layers.0.codebook.embed", "encoder.layers.0.conv.bias", "decoder.layers.0.conv.bias"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> EncodecConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return EncodecConfig(settings_of(raw, "encodec"))


def convert(state: Mapping[str, Tensor], config: EncodecConfig | None) -> tuple[EncodecConfig, dict[str, Tensor]]:
    """The library's tensors in our names, weight norm multiplied out; statistics of training are dropped.

    Raises:
        KeysError: there is no configuration, or half of a weight norm is missing.
    """
    if config is None:
        raise KeysError("the tensors of EnCodec tell neither its sample rate nor how it pads: pass config.json")
    named = {}
    for key, tensor in folded(state).items():
        part, _, rest = key.partition(".")
        if part == "quantizer":
            if rest.endswith((".codebook.inited", ".codebook.cluster_size", ".codebook.embed_avg")):
                continue
            named[f"quantizer.levels.{rest.removeprefix('layers.')}".replace(".codebook.embed", ".codebook")] = tensor
        elif part not in ("encoder", "decoder") or part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
    levels, sizes = len(layer_numbers(named, "quantizer.levels")), sizes_of(config)
    if levels != sizes.num_quantizers:
        raise KeysError(f"there are {levels} codebooks in the tensors and {sizes.num_quantizers} in the configuration")
    return config, named


def sizes_of(config: EncodecConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one, or neither one of mono recordings nor one of chunks of a loudness of their own.
    """
    from transformers import EncodecConfig as TheirConfig

    sizes = sizes_from(TheirConfig.from_dict, config.library, "EnCodec")
    if sizes.chunk_length_s is None:
        if sizes.normalize or sizes.norm_type != "weight_norm" or sizes.audio_channels != 1:
            raise WeightsError("this EnCodec of whole recordings is not mono, or has a norm or a loudness of all of one")
    elif not sizes.normalize or sizes.audio_channels not in (1, 2):
        raise WeightsError("this EnCodec encodes chunks without a loudness of their own, or of more than two channels")
    else:
        size, stride, hop = sizes.chunk_length, sizes.chunk_stride or 0, sizes.hop_length
        if size % hop or not size - 2 * hop < stride <= size:
            raise WeightsError(
                f"chunks of {size} samples every {stride} are not whole frames of {hop}, or overlap by two or more"
            )
    return sizes


class Encodec(ResidualAudioTokenizer[EncodecConfig]):
    """The audio codec of arXiv 2210.13438: a frame has a code of each codebook, coarse to fine.

    Code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``. Audio of any sample rate and channel count is averaged to
    mono and resampled; the networks reflect an item at its own ends. The first codebooks decode alone (`zoo.Tokens.keep`).
    Encoding always runs in float32.

    Models of chunks (48 kHz, stereo) encode each second by itself, at a loudness of its own. The meta of an item keeps these as
    ``scales``, a little-endian float32 for each chunk. Bare ids decode at a loudness of 1.
    """

    Config = EncodecConfig
    family = "encodec"
    no_graphs = "its convolutions reflect the ends of a recording, by another rule where it is short"
    identity = ("quantizer.levels.0.codebook",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("codebooks", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(32_000, 1 << 22), "decode": Budget(50, 8_000)}
    whole_frames = False
    # A step of the LSTMs for eight items takes twice the time of one.
    beside = 8

    def __init__(self, config: EncodecConfig | None = None, *, name: str = "encodec") -> None:
        from transformers import EncodecModel

        super().__init__(config or EncodecConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        self.channels = sizes.audio_channels
        self.chunking = None
        if sizes.chunk_length_s is not None:
            self.chunking = Chunking(sizes.chunk_length, sizes.chunk_stride, sizes.hop_length)
        network = cast(Any, built(lambda: with_quick_elus(without_weight_norm(EncodecModel(sizes)))))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        self.quantizer = ResidualQuantizer(sizes.num_quantizers, sizes.codebook_size, sizes.codebook_dim)
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        sizes = self.sizes
        spec = self.residual_spec(
            sizes.codebook_size, sizes.hidden_size, sample_rate=sizes.sampling_rate, hop_length=sizes.hop_length
        )
        return spec if self.chunking is None else replace(spec, chunk=(self.chunking.size, self.chunking.stride))

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network: Any = self.encoder.network

        def quantize(latents: Float[Tensor, "batch latent frames"]) -> Int[Tensor, "batch codebooks frames"]:
            return self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2)

        if self.chunking is not None:
            return Chain([ChunkEncoder(lambda chunks: quantize(network(chunks)), self.chunking)])
        return Chain([*seanet(network.layers, rows_in=self.hop_length).stages, Each(quantize)])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        return self.decoder_steps_for([])

    def decoder_steps_for(self, meta: Sequence[Meta]) -> Chain:
        """See `SteppedAudioTokenizer`; chunks have the loudness that the items remember, or 1."""

        def vectors(codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch latent frames"]:
            return self.quantizer.vectors(codes.transpose(1, 2)).transpose(1, 2)

        if self.chunking is not None:
            remembered = [scales_in(own) for own in meta]
            scales = None
            if any(own is not None for own in remembered):
                count = max(len(own) for own in remembered if own is not None)
                ones = torch.ones(count, dtype=torch.float32, device="cpu")
                each = [ones if own is None else F.pad(own, (0, count - len(own))) for own in remembered]
                scales = torch.stack(each).to(self.device)
            return Chain([ChunkDecoder(lambda codes: in_own_dtype(self.decoder, vectors(codes)), self.chunking, scales)])
        return Chain([Each(vectors), *seanet(self.decoder.layers, rows_out=self.hop_length).stages])

    def check(self, tokens: Any) -> Tokens:
        """See `zoo.Tokenizer.check`; an item that remembers the loudness of its chunks has that of each."""
        checked = super().check(tokens)
        if self.chunking is not None:
            frames = (checked.lengths // checked.ids_per_frame).tolist()
            for index, (own, count) in enumerate(zip(checked.meta, frames, strict=bool(checked.meta))):
                with naming_item(index):
                    scales, chunks = scales_in(own), len(self.chunking.split(count))
                    if scales is not None and len(scales) < chunks:
                        raise InputError(f"there are {len(scales)} scales for {chunks} chunks")
        return checked

    def notes(self, steps: Steps, count: int) -> Sequence[Meta]:
        """See `SteppedAudioTokenizer`: the loudness of each chunk."""
        if self.chunking is None:
            return super().notes(steps, count)
        scales = torch.stack(cast(Any, steps).stages[0].scales, dim=1)
        return [{"scales": own.cpu().numpy().astype("<f4").tobytes()} for own in scales]

    def samples_of(self, frames: int) -> int:
        """See `SteppedAudioTokenizer`."""
        return super().samples_of(frames) if self.chunking is None else self.chunking.samples(frames)


TOKENIZER = Encodec
