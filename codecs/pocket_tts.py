"""The audio tokenizer of Pocket TTS: Mimi's causal networks around continuous latents, 12.5 of them a second.

Paper: Rouard et al., "Continuous Audio Language Models", arXiv 2509.06926. The network is the one of the library transformers,
``PocketTTSAudioTokenizerModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import KeysError, WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, LibraryConfig, built, in_own_dtype, present_names, settings_of, sizes_from
from zoo.nn.seanet import convolved, with_quick_elus
from zoo.nn.stages import Attention, Chain, Each
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.stepped import SteppedAudioTokenizer


@dataclass(frozen=True)
class PocketTTSConfig(LibraryConfig):
    """Sizes of one model; ``library`` is a ``transformers.PocketTTSAudioTokenizerConfig``."""


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of the audio tokenizer of Pocket TTS in transformers."""
    return "latent_proj.weight" in keys and any(".encoder_transformer." in f".{key}" for key in keys)


def upstream_config(raw: Mapping[str, Any]) -> PocketTTSConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return PocketTTSConfig(settings_of(raw, "pocket_tts_audio_tokenizer"))


def convert(state: Mapping[str, Tensor], config: PocketTTSConfig | None) -> tuple[PocketTTSConfig, dict[str, Tensor]]:
    """The library's tensors, of any release, in our names.

    Raises:
        KeysError: there is no configuration, or tensors are missing, unexpected or of another shape.
    """
    from transformers import PocketTTSAudioTokenizerModel

    if config is None:
        raise KeysError("the tensors of Pocket TTS tell neither its sample rate nor its strides: pass config.json")
    named = {}
    for key, tensor in present_names(PocketTTSAudioTokenizerModel, sizes_of(config), state).items():
        part, _, rest = key.partition(".")
        if part not in ("encoder", "decoder") or part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
    return config, named


def sizes_of(config: PocketTTSConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one, or not of a causal codec.
    """
    from transformers import PocketTTSAudioTokenizerConfig

    sizes = sizes_from(PocketTTSAudioTokenizerConfig.from_dict, config.library, "Pocket TTS", attn_implementation="sdpa")
    if not sizes.use_causal_conv or sizes.pad_mode != "constant":
        raise WeightsError("this audio tokenizer is not causal, which is not supported")
    return sizes


class PocketTTS(SteppedAudioTokenizer[PocketTTSConfig, Latents]):
    """The audio tokenizer of arXiv 2509.06926, continuous: latents ``[channels, frames]``.

    Audio of any sample rate and channel count is averaged to mono and resampled; an item is padded with zeros to whole frames.
    Encoding always runs in float32.
    """

    Config = PocketTTSConfig
    family = "pocket_tts"
    identity = ("latent_proj.weight",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("parts",))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(96_000, 1 << 22), "decode": Budget(50, 4_000)}
    latent_axes = ("frames",)

    def __init__(self, config: PocketTTSConfig | None = None, *, name: str = "pocket-tts") -> None:
        from transformers import PocketTTSAudioTokenizerModel

        super().__init__(config or PocketTTSConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: with_quick_elus(PocketTTSAudioTokenizerModel(sizes))))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        self.latent_proj = network.latent_proj
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=0,
            dim=self.sizes.latent_dim,
            fingerprint=self.fingerprint,
            sample_rate=self.sizes.sampling_rate,
            hop_length=self.sizes.frame_size,
            parts=self.config.parts,
            streaming="exact",
        )

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network: Any = self.encoder.network
        stride = self.sizes.latent_stride
        return Chain(
            [
                convolved(network.encoder_seanet.layers, rows_in=self.hop_length // stride, reflected=0),
                Attention(network.encoder_transformer, self.sizes),
                convolved([network.downsample], rows_in=stride, reflected=0),
            ]
        )

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network, stride = self.decoder, self.sizes.latent_stride
        return Chain(
            [
                Each(lambda latents: in_own_dtype(self.latent_proj, latents)),
                convolved([network.upsample], rows_out=stride, reflected=0),
                Attention(network.decoder_transformer, self.sizes),
                convolved(network.decoder_seanet.layers, rows_out=self.hop_length // stride, reflected=0),
            ]
        )

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The latents of each frame, zero where an item has ended."""
        checked: Latents = self.check(tokens)
        return nn.utils.rnn.pad_sequence([own.T.to(self.device) for own in checked.values], batch_first=True)


TOKENIZER = PocketTTS
