"""The acoustic tokenizer of VibeVoice: causal convolutions around continuous latents, 7.5 of them a second.

Paper: Peng et al., "VibeVoice Technical Report", arXiv 2508.19205, section 2.1. The network is the one of the library
transformers, ``VibeVoiceAcousticTokenizerModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import ArgumentError, KeysError, WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, LibraryConfig, built, present_names, settings_of, sizes_from
from zoo.nn.stages import Stage
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.audio import Rate
from zoo.tokenizer.stepped import SteppedAudioTokenizer

#: Loudness that the model is fed, in dB below full scale, and the numbers beside it in the library's feature extractor.
LOUDNESS, _TINY = -25.0, 1e-6


@dataclass(frozen=True)
class VibeVoiceConfig(LibraryConfig):
    """Sizes of one model; ``library`` is a ``transformers.VibeVoiceAcousticTokenizerConfig``.

    Attributes:
        sample_rate: samples per second, which the library's configuration does not hold.
    """

    sample_rate: int = 24_000


class Cached(Stage):
    """The encoder or the decoder, whose convolutions keep the ends of their inputs; ``[batch, channels, time]`` in and out."""

    def __init__(self, network: nn.Module) -> None:
        from transformers.models.vibevoice_acoustic_tokenizer import modeling_vibevoice_acoustic_tokenizer as library

        self._network, self._library = network, library
        self._cache: Any = library.VibeVoiceAcousticTokenizerConv1dPaddingCache()

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        given = self._network(x.to(next(self._network.parameters()).dtype), padding_cache=self._cache)
        found: Tensor = given.latents.transpose(1, 2) if hasattr(given, "latents") else given.audio
        return found.float()

    def state(self) -> dict[str, Any]:
        return {
            "layers": {
                key: {"cache": own.cache, "left_pad": own.left_pad, "in_channels": own.in_channels}
                for key, own in self._cache.layers.items()
            }
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cache = self._library.VibeVoiceAcousticTokenizerConv1dPaddingCache()
        for key, own in state["layers"].items():
            layer = self._library.VibeVoiceAcousticTokenizerConv1dCacheLayer()
            layer.cache, layer.left_pad, layer.in_channels = own["cache"], own["left_pad"], own["in_channels"]
            layer.is_initialized = True
            self._cache.layers[key] = layer


# ---- checkpoints of transformers


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of the acoustic tokenizer of VibeVoice in transformers."""
    return {"encoder.stem.conv.conv.weight", "decoder.stem.conv.conv.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> VibeVoiceConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return VibeVoiceConfig(settings_of(raw, "vibevoice_acoustic_tokenizer"))


def convert(state: Mapping[str, Tensor], config: VibeVoiceConfig | None) -> tuple[VibeVoiceConfig, dict[str, Tensor]]:
    """The library's tensors, of any release, in our names.

    Raises:
        KeysError: there is no configuration, or tensors are missing, unexpected or of another shape.
    """
    from transformers import VibeVoiceAcousticTokenizerModel

    if config is None:
        raise KeysError("the tensors of VibeVoice do not tell its strides: pass config.json")
    named = {}
    for key, tensor in present_names(VibeVoiceAcousticTokenizerModel, sizes_of(config), state).items():
        part, _, rest = key.partition(".")
        if part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
        if key == "encoder.head.conv.bias":
            named["mark"] = tensor.clone()
    return config, named


def sizes_of(config: VibeVoiceConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one, or not of mono sound.
    """
    from transformers import VibeVoiceAcousticTokenizerConfig

    sizes = sizes_from(VibeVoiceAcousticTokenizerConfig.from_dict, config.library, "VibeVoice")
    if sizes.channels != 1:
        raise WeightsError(f"this tokenizer has {sizes.channels} channels, and one is supported")
    return sizes


class VibeVoice(SteppedAudioTokenizer[VibeVoiceConfig, Latents]):
    """The acoustic tokenizer of arXiv 2508.19205, continuous: latents ``[channels, frames]``, without its noise.

    Audio of any sample rate and channel count is averaged to mono, resampled, and brought to 25 dB below full scale.
    The factor is in the latents' meta as ``gain``, and `decode` divides by it. An item is padded with zeros to whole frames.
    Encoding always runs in float32.
    """

    Config = VibeVoiceConfig
    family = "vibevoice"
    identity = ("mark",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("sample_rate", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(96_000, 1 << 22), "decode": Budget(30, 2_000)}
    latent_axes = ("frames",)
    # The loudness of a whole recording is needed before its first sample is encoded.
    streams = False

    def __init__(self, config: VibeVoiceConfig | None = None, *, name: str = "vibevoice") -> None:
        from transformers import VibeVoiceAcousticTokenizerModel

        super().__init__(config or VibeVoiceConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: VibeVoiceAcousticTokenizerModel(sizes)))
        # The encoder's last bias, which tells checkpoints apart, in either half.
        self.register_buffer("mark", torch.zeros(network.encoder.head.conv.bias.shape))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=0,
            dim=self.sizes.hidden_size,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            hop_length=self.sizes.hop_length,
            parts=self.config.parts,
            streaming="exact",
        )

    def encode_prepared(self, items: Sequence[Prepared], *, codebooks: int | None = None, progress: bool = False) -> Latents:
        """Encode what `prepare` gave; errors as for `encode`."""
        louder = []
        for item in items:
            waveform = item.tensors["waveform"]
            gain = gain_of(waveform)
            louder.append(replace(item, tensors={"waveform": waveform * gain}, meta={**item.meta, "gain": gain}))
        return super().encode_prepared(louder, codebooks=codebooks, progress=progress)

    def decode(
        self,
        tokens: Any,
        *,
        loudness: str = "original",
        trim: bool = True,
        sample_rate: Rate = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _samples"]]:
        """Latents to audio; see `zoo.tokenizer.audio.AudioTokenizer.decode`.

        Args:
            tokens: what `encode` returned, or latents ``[batch, dim, frames]`` or a list.
            loudness: that of the recording that was encoded, where its meta tells, or that which the model gives.
            trim, sample_rate, progress: as there.

        Raises:
            ArgumentError: there is no such loudness.
        """
        if loudness not in ("original", "model"):
            raise ArgumentError(f"loudness must be original or model, not {loudness!r}")
        checked: Latents = self.check(tokens)
        if loudness == "model" and checked.meta:
            kept = tuple({key: value for key, value in own.items() if key != "gain"} for own in checked.meta)
            checked = replace(checked, meta=kept)
        return super().decode(checked, trim=trim, sample_rate=sample_rate, progress=progress)

    def finished(self, wave: Float[Tensor, "1 samples"], meta: Mapping[str, Any]) -> Float[Tensor, "1 samples"]:
        return wave / meta.get("gain", 1.0)

    def encoder_steps(self, codebooks: int) -> Cached:
        """See `SteppedAudioTokenizer`."""
        return Cached(self.encoder.network)

    def decoder_steps(self) -> Cached:
        """See `SteppedAudioTokenizer`."""
        return Cached(self.decoder)

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The latents of each frame, zero where an item has ended."""
        checked: Latents = self.check(tokens)
        return nn.utils.rnn.pad_sequence([own.T.to(self.device) for own in checked.values], batch_first=True)


def gain_of(waveform: Float[Tensor, "1 samples"]) -> float:
    """The factor that the library's feature extractor brings a recording to its loudness by, and below full scale."""
    root_mean_square = waveform.double().square().mean().sqrt()
    gain = 10 ** (LOUDNESS / 20) / (root_mean_square + _TINY)
    peak = (waveform.abs().amax() * gain).item()
    factor = float(gain)
    return factor / (peak + _TINY) if peak > 1 else factor


TOKENIZER = VibeVoice
