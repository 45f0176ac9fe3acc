"""EnCodec: convolutions and LSTMs around a residual quantizer, as MusicGen and AudioGen use it.

Paper: Défossez et al., "High Fidelity Neural Audio Compression", arXiv 2210.13438. The network is the one of the library
transformers, ``EncodecModel``; models that encode chunks of a second (48 kHz stereo) are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers
from zoo.errors import KeysError, WeightsError
from zoo.nn.library import Exact, built, folded, plain_config, without_weight_norm
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.seanet import seanet, with_quick_elus
from zoo.nn.stages import Chain, Each
from zoo.spec import Frame, Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.stepped import SteppedAudioTokenizer
from zoo.tokens import Tokens


@dataclass(frozen=True)
class EncodecConfig:
    """Sizes of one model.

    Attributes:
        library: ``transformers.EncodecConfig`` as a mapping; what is left out has that class's defaults.
        codebooks: codes of a frame that `Encodec.encode` gives; all that the checkpoint has by default.
        parts: what is loaded.

    Raises:
        ValueError: there is no part.
    """

    library: Mapping[str, Any] = field(default_factory=dict)
    codebooks: int | None = None
    parts: tuple[str, ...] = ("encoder", "decoder")

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a model has an encoder, a decoder or both")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an EnCodec of transformers."""
    return {"quantizer.layers.0.codebook.embed", "encoder.layers.0.conv.bias", "decoder.layers.0.conv.bias"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> EncodecConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    if raw.get("model_type") != "encodec":
        raise WeightsError(f"this is the configuration of {raw.get('model_type')}, not of encodec")
    return EncodecConfig(plain_config(raw))


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
    from transformers import EncodecConfig as LibraryConfig

    try:
        sizes = LibraryConfig.from_dict(dict(config.library))
    except Exception as error:
        raise WeightsError(f"the configuration of EnCodec cannot be used: {error}") from error
    if sizes.chunk_length_s is not None or sizes.normalize or sizes.norm_type != "weight_norm" or sizes.audio_channels != 1:
        raise WeightsError("this EnCodec encodes chunks of its own loudness, or is not mono, which is not supported")
    return sizes


class Encodec(SteppedAudioTokenizer[EncodecConfig, Tokens]):
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
        count = self.config.codebooks or self.all_codebooks
        frame = Frame((self.sizes.codebook_size,) * count)
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=frame.vocab_size,
            dim=self.sizes.hidden_size,
            fingerprint=self.fingerprint,
            sample_rate=self.sizes.sampling_rate,
            hop_length=self.sizes.hop_length,
            frame=frame,
            residual=count > 1,
            parts=self.config.parts,
            streaming="exact",
        )

    @property
    def all_codebooks(self) -> int:
        """Codebooks that the checkpoint has."""
        return int(self.sizes.num_quantizers)

    def exact_parts(self) -> tuple[str, ...]:
        return ("encoder", "quantizer")

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network: Any = self.encoder.network
        quantize = Each(lambda latents: self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2))
        return Chain([*seanet(network.layers, rows_in=self.hop_length).stages, quantize])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        vectors = Each(lambda codes: self.quantizer.vectors(codes.transpose(1, 2)).transpose(1, 2))
        return Chain([vectors, *seanet(self.decoder.layers, rows_out=self.hop_length).stages])

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The code of each id, zero where an item has ended. Those of a frame add up to what the decoder is fed."""
        codes = self.check(tokens).codes().to(self.device)
        return (self.quantizer.each(codes.clamp(min=0)) * (codes >= 0)[..., None]).flatten(1, 2)


TOKENIZER = Encodec
