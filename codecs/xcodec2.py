"""X-Codec 2, and NeuCodec, which is built alike: speech as one code of 65,536 every 20 ms, by finite scalar quantization.

Paper: Ye et al., "Llasa: Scaling Train-Time and Inference-Time Compute for Llama-based Speech Synthesis", arXiv 2502.04128,
section 3.1. The networks are those of the library transformers, ``Xcodec2Model`` and ``NeuCodecModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import ArgumentError, ItemError, KeysError, WeightsError
from zoo.nn.fsq import FSQ
from zoo.nn.library import Exact, LibraryConfig, built, folded, in_own_dtype, settings_of
from zoo.nn.stages import Chain, Reach, Run, Stage, Whole, Window
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.stepped import SteppedAudioTokenizer, StreamDecoder, StreamEncoder
from zoo.tokens import Meta, Tokens

#: Seconds of the longest recording that is encoded: attention looks at all of it, and memory grows with its square.
LONGEST = 120
_NEUCODEC = "neucodec"
_ENCODER = ("semantic_encoder", "semantic_adapter", "acoustic_encoder", "fc_encoder")


@dataclass(frozen=True)
class Xcodec2Config(LibraryConfig):
    """Sizes of one model; ``model_type`` in ``library`` names the class, ``xcodec2`` by default."""


class Quantizer(Float32Module):
    """Latents to a few components, each rounded to one of a few levels, and back; in float32 always."""

    def __init__(self, dim: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.fsq = FSQ(levels)
        self.project_in = nn.Linear(dim, len(levels))
        self.project_out = nn.Linear(len(levels), dim)

    def ids(self, latents: Float[Tensor, "batch frames latent"]) -> Int[Tensor, "batch frames"]:
        """Ids of the nearest codes. Components are squashed into their range twice, as they were in training."""
        return self.fsq.ids(self.fsq.bound(self.project_in(latents)))

    def vectors(self, ids: Int[Tensor, "batch frames"]) -> Float[Tensor, "batch frames latent"]:
        """The codes, projected back."""
        found: Tensor = self.project_out(self.fsq.codes(ids))
        return found


class Windows(Stage):
    """A network that sees all of a sequence, applied to windows of it, however the sequence is cut: an approximation.

    Args:
        run: the network, of whole frames.
        window: frames that it is given at a time. The middle half is kept, and a quarter on either side is context.
        rows_in, rows_out: steps of a frame in what goes in and in what comes out.
    """

    def __init__(self, run: Run, window: int, *, rows_in: int = 1, rows_out: int = 1) -> None:
        context = window // 4
        self._window = Window(run, Reach(context, context, rows_in, rows_out))
        self._rows = (window - 2 * context) * rows_in
        self.delay = window - context - 1
        self._held: Tensor | None = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is not None:
            self._held = x if self._held is None else torch.cat([self._held, x], dim=-1)
        held = self._held
        pieces: list[Tensor | None] = []
        if held is not None:
            whole = held.shape[-1] if last else held.shape[-1] // self._rows * self._rows
            pieces += held[..., :whole].split(self._rows, dim=-1) if whole else ()
            self._held = held[..., whole:].clone()
        if last and not pieces:
            pieces.append(None)
        given = [self._window.push(piece, last and place == len(pieces)) for place, piece in enumerate(pieces, 1)]
        found = [own for own in given if own is not None]
        return torch.cat(found, dim=-1) if found else None

    def state(self) -> dict[str, Any]:
        return {"held": self._held, "window": self._window.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._held = state["held"]
        self._window.restore(state["window"])


# ---- checkpoints of transformers


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an X-Codec 2, or a NeuCodec, of transformers."""
    return {"quantizer.project_in.weight", "fc_encoder.weight", "acoustic_decoder.head.linear.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> Xcodec2Config | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return Xcodec2Config(settings_of(raw, "xcodec2", _NEUCODEC))


def convert(state: Mapping[str, Tensor], config: Xcodec2Config | None) -> tuple[Xcodec2Config, dict[str, Tensor]]:
    """The library's tensors in our names.

    Raises:
        KeysError: there is no configuration.
    """
    if config is None:
        raise KeysError("the tensors of X-Codec 2 do not tell it from NeuCodec: pass config.json")
    named = {}
    for key, tensor in folded(state).items():
        part, _, rest = key.partition(".")
        if part in _ENCODER:
            if "encoder" in config.parts:
                named[f"encoder.network.{key}"] = tensor
        elif part == "acoustic_decoder":
            if "decoder" in config.parts:
                named[f"decoder.{rest}"] = tensor
        else:
            named[key] = tensor
    return config, named


def library_of(config: Xcodec2Config) -> tuple[type[Any], type[Any], type[Any]]:
    """The library's classes of the configuration, the model and what prepares its input."""
    import transformers

    if config.library.get("model_type") == _NEUCODEC:
        return transformers.NeuCodecConfig, transformers.NeuCodecModel, transformers.NeuCodecFeatureExtractor
    return transformers.Xcodec2Config, transformers.Xcodec2Model, transformers.Xcodec2FeatureExtractor


def sizes_of(config: Xcodec2Config) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one.
    """
    try:
        sizes = library_of(config)[0].from_dict(dict(config.library))
        sizes._attn_implementation = sizes.semantic_model_config._attn_implementation = "sdpa"
    except Exception as error:
        raise WeightsError(f"the configuration of X-Codec 2 cannot be used: {error}") from error
    return sizes


class Xcodec2(SteppedAudioTokenizer[Xcodec2Config, Tokens]):
    """The audio codec of arXiv 2502.04128: one code for a frame of 20 ms, of the grid that ``quantization_levels`` span.

    Audio of any sample rate and channel count is averaged to mono and resampled to 16 kHz. X-Codec 2 adds a zero behind an
    item, and pads it with zeros to whole frames. NeuCodec pads it to whole frames; it decodes to 24 kHz. Encoder and decoder
    attend to all of an item: it goes through whole, and may not be longer than two minutes. Streams are approximations, made of
    windows. Encoding always runs in float32.
    """

    Config = Xcodec2Config
    family = "xcodec2"
    identity = ("quantizer.project_in.weight", "quantizer.project_out.weight")
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("parts",))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1 << 17, 1 << 21), "decode": Budget(500, 6_000)}
    # An item is in memory anyway.
    streams = False

    def __init__(self, config: Xcodec2Config | None = None, *, name: str = "xcodec2") -> None:
        super().__init__(config or Xcodec2Config(), name)
        _, model, extractor = library_of(self.config)
        sizes = self.sizes = sizes_of(self.config)
        self.padded_behind = self.config.library.get("model_type") == _NEUCODEC
        self.extractor: Any = extractor(sampling_rate=self.input_rate, hop_length=self.hop_length)
        network = cast(Any, built(lambda: model(sizes)))
        decoder = network.acoustic_decoder
        for part in ("quantizer", "acoustic_decoder"):
            delattr(network, part)
        if "encoder" in self.config.parts:
            self.encoder = Exact(network)
        self.quantizer = Quantizer(sizes.quantization_dim, sizes.quantization_levels)
        if "decoder" in self.config.parts:
            self.decoder = decoder

    @property
    def spec(self) -> Spec:
        sizes = self.sizes
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=self.quantizer.fsq.vocab_size,
            dim=sizes.quantization_dim,
            fingerprint=self.fingerprint,
            sample_rate=sizes.output_sampling_rate if self.padded_behind else sizes.sampling_rate,
            hop_length=sizes.hop_length,
            parts=self.config.parts,
            streaming="approximate",
        )

    @property
    def input_rate(self) -> int:
        """Samples per second that the encoder takes."""
        rate: int = self.sizes.input_sampling_rate if self.padded_behind else self.sizes.sampling_rate
        return rate

    @property
    def hop_length(self) -> int:
        """Samples that go in for a frame; NeuCodec decodes to half as many again."""
        hop: int = self.sizes.encoder_hop_length if self.padded_behind else self.sizes.hop_length
        return hop

    def samples_of(self, frames: int) -> int:
        """See `SteppedAudioTokenizer`."""
        samples: int = frames * self.sizes.hop_length
        return samples

    def exact_parts(self) -> tuple[str, ...]:
        return ("encoder", "quantizer")

    def padded(self, samples: int) -> int:
        """See `SteppedAudioTokenizer`."""
        return super().padded(samples if self.padded_behind else samples + 1)

    def encode_prepared(self, items: Sequence[Prepared], *, codebooks: int | None = None, progress: bool = False) -> Tokens:
        """Encode what `prepare` gave; errors as for `encode`, and `ItemError` for a recording of more than two minutes."""
        for index, item in enumerate(items):
            if item.amount > LONGEST * self.input_rate:
                seconds = item.amount / self.input_rate
                reason = f"{seconds:.0f} s are too long: attention looks at all of an item, {LONGEST} s at most"
                raise ItemError(f"{reason}; stream_encoder takes more, approximately", index)
        return super().encode_prepared(items, codebooks=codebooks, progress=progress)

    def ids_of(self, waveforms: Float[Tensor, "batch 1 samples"]) -> Int[Tensor, "batch 1 frames"]:
        """Ids of whole items of one length, a whole number of frames."""
        network: Any = self.encoder.network
        # Where no frame is padded behind an item, the zero that the library adds is the last sample.
        items = waveforms if self.padded_behind else waveforms[..., :-1]
        made = self.extractor([own[0].cpu() for own in items], sampling_rate=self.input_rate, return_tensors="pt")
        features, samples = made["input_features"].to(self.device), made["input_values"].to(self.device)
        semantic = network.semantic_adapter(network.semantic_encoder(features).last_hidden_state.transpose(1, 2))
        acoustic = network.acoustic_encoder(samples)
        frames = min(semantic.shape[2], acoustic.shape[2])
        both = torch.cat([semantic[..., :frames], acoustic[..., :frames]], dim=1)
        return self.quantizer.ids(network.fc_encoder(both.transpose(1, 2)))[:, None]

    def audio_of(self, ids: Int[Tensor, "batch 1 frames"]) -> Float[Tensor, "batch 1 samples"]:
        """Audio of whole sequences of one length."""
        return in_own_dtype(self.decoder, self.quantizer.vectors(ids[:, 0]))

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        return Chain([Whole(self.ids_of)])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        return Chain([Whole(self.audio_of)])

    def stream_encoder(self, sample_rate: int | None = None, *, window: int = 500) -> StreamEncoder:
        """Encode audio as it arrives, approximately: see `zoo.tokenizer.stepped.StreamEncoder`.

        Args:
            sample_rate: of what arrives; the tokenizer's by default.
            window: frames that are encoded together; a quarter on either side is context. Each half a window of ids is that of
                such a window, however the audio is cut.

        Raises:
            ArgumentError: a window has less than four frames.
        """
        self.require("encoder", "encoding")
        steps = Windows(self.ids_of, _at_least_four(window), rows_in=self.hop_length)
        return StreamEncoder(self, sample_rate or cast(int, self.spec.sample_rate), steps)

    def stream_decoder(self, meta: Meta | None = None, *, window: int = 500) -> StreamDecoder:
        """Decode ids as they arrive, approximately: see `zoo.tokenizer.stepped.StreamDecoder`.

        Args:
            meta: not looked at.
            window: frames that are decoded together; as in `stream_encoder`.

        Raises:
            ArgumentError: a window has less than four frames.
        """
        self.require("decoder", "decoding")
        return StreamDecoder(self, steps=Windows(self.audio_of, _at_least_four(window), rows_out=self.sizes.hop_length))

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The projected code of each id, zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.quantizer.vectors(ids.clamp(min=0)) * (ids >= 0)[..., None]


def _at_least_four(window: int) -> int:
    if window < 4:
        raise ArgumentError(f"a window has at least four frames, not {window}")
    return window


TOKENIZER = Xcodec2
