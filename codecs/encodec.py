"""EnCodec: convolutions and LSTMs around a residual quantizer, as MusicGen and AudioGen use it.

Paper: Défossez et al., "High Fidelity Neural Audio Compression", arXiv 2210.13438. The network is the one of the library
transformers, ``EncodecModel``; models that encode chunks of a second (48 kHz stereo) are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers
from zoo.errors import KeysError, WeightsError
from zoo.nn.library import Exact, ResidualConfig, built, folded, settings_of, sizes_from, without_weight_norm
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.seanet import seanet, with_quick_elus
from zoo.nn.stages import Chain, Each
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.stepped import ResidualAudioTokenizer


@dataclass(frozen=True)
class EncodecConfig(ResidualConfig):
    """Sizes of one model; ``library`` is a ``transformers.EncodecConfig``."""


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
        WeightsError: it is not a possible one, or one of chunks.
    """
    from transformers import EncodecConfig as TheirConfig

    sizes = sizes_from(TheirConfig.from_dict, config.library, "EnCodec")
    if sizes.chunk_length_s is not None or sizes.normalize or sizes.norm_type != "weight_norm" or sizes.audio_channels != 1:
        raise WeightsError("this EnCodec encodes chunks of its own loudness, or is not mono, which is not supported")
    return sizes


class Encodec(ResidualAudioTokenizer[EncodecConfig]):
    """The audio codec of arXiv 2210.13438: a frame has a code of each codebook, coarse to fine.

    Code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``. Audio of any sample rate and channel count is averaged to
    mono and resampled; the networks reflect an item at its own ends. The first codebooks decode alone (`zoo.Tokens.keep`).
    Encoding always runs in float32.
    """

    Config = EncodecConfig
    family = "encodec"
    identity = ("quantizer.levels.0.codebook",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("codebooks", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(24_000, 1 << 22), "decode": Budget(75, 8_000)}
    whole_frames = False

    def __init__(self, config: EncodecConfig | None = None, *, name: str = "encodec") -> None:
        from transformers import EncodecModel

        super().__init__(config or EncodecConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: with_quick_elus(without_weight_norm(EncodecModel(sizes)))))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        self.quantizer = ResidualQuantizer(sizes.num_quantizers, sizes.codebook_size, sizes.codebook_dim)
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        sizes = self.sizes
        return self.residual_spec(
            sizes.codebook_size, sizes.hidden_size, sample_rate=sizes.sampling_rate, hop_length=sizes.hop_length
        )

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network: Any = self.encoder.network
        quantize = Each(lambda latents: self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2))
        return Chain([*seanet(network.layers, rows_in=self.hop_length).stages, quantize])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        vectors = Each(lambda codes: self.quantizer.vectors(codes.transpose(1, 2)).transpose(1, 2))
        return Chain([vectors, *seanet(self.decoder.layers, rows_out=self.hop_length).stages])


TOKENIZER = Encodec
