"""X-Codec, and Higgs Audio's tokenizer, which is built alike: DAC's networks with the features of a speech model beside them.

Paper: Ye et al., "Codec Does Matter: Exploring the Semantic Shortcoming of Codec for Audio Language Model", arXiv 2408.17175.
The networks are those of the library transformers, ``XcodecModel`` and ``HiggsAudioV2TokenizerModel``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, layer_numbers
from zoo.errors import ArgumentError, ItemError, KeysError, WeightsError
from zoo.nn.library import (
    Exact,
    ResidualConfig,
    built,
    folded,
    in_own_dtype,
    settings_of,
    without_captures,
    without_weight_norm,
)
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.stages import Chain, Each, Reach, Whole, Window, convolutions
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.stepped import ResidualAudioTokenizer
from zoo.tokens import Tokens

#: Seconds of the longest recording that is encoded: attention looks at all of it, and memory grows with its square.
LONGEST = 600
_KINDS = ("xcodec", "higgs_audio_v2_tokenizer")
# What a file holds and neither encoding nor decoding needs.
_DROPPED = ("decoder_semantic.", "fc1.")
_ENCODER = ("acoustic_encoder", "encoder_semantic", "semantic_model", "fc")


@dataclass(frozen=True)
class XcodecConfig(ResidualConfig):
    """Sizes of one model; ``model_type`` in ``library`` names the class, ``xcodec`` by default."""


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an X-Codec, or a Higgs, of transformers."""
    return {"quantizer.quantizers.0.codebook.embed", "encoder_semantic.conv.weight", "fc2.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> XcodecConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return XcodecConfig(settings_of(raw, *_KINDS))


def convert(state: Mapping[str, Tensor], config: XcodecConfig | None) -> tuple[XcodecConfig, dict[str, Tensor]]:
    """The library's tensors in our names, weight norm multiplied out; what training alone needs is dropped.

    Raises:
        KeysError: there is no configuration, or half of a weight norm is missing.
    """
    if config is None:
        raise KeysError("the tensors of X-Codec tell neither its sample rate nor its strides: pass config.json")
    named = {}
    for key, tensor in folded(state).items():
        part, _, rest = key.partition(".")
        if part == "quantizer":
            if not rest.endswith((".codebook.inited", ".codebook.cluster_size", ".codebook.embed_avg")):
                ours = rest.removeprefix("quantizers.").replace(".codebook.embed", ".codebook")
                ours = ours.replace("project_in", "in_proj").replace("project_out", "out_proj")
                named[f"quantizer.levels.{ours}"] = tensor
        elif part in _ENCODER:
            if "encoder" in config.parts:
                named[f"encoder.network.{key}"] = tensor
        elif part == "acoustic_decoder" or part == "fc2":
            if "decoder" in config.parts:
                named[f"decoder.{key}"] = tensor
        elif not key.startswith(_DROPPED):
            named[key] = tensor
    levels, sizes = len(layer_numbers(named, "quantizer.levels")), sizes_of(config)
    if levels != sizes.num_quantizers:
        raise KeysError(f"there are {levels} codebooks in the tensors and {sizes.num_quantizers} in the configuration")
    return config, named


def library_of(config: XcodecConfig) -> tuple[type[Any], type[Any]]:
    """The library's classes of the configuration and the model."""
    import transformers

    if config.library.get("model_type") == "higgs_audio_v2_tokenizer":
        return transformers.HiggsAudioV2TokenizerConfig, transformers.HiggsAudioV2TokenizerModel
    return transformers.XcodecConfig, transformers.XcodecModel


def sizes_of(config: XcodecConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one, or its decoder has other strides than its encoder.
    """
    try:
        sizes = library_of(config)[0].from_dict(dict(config.library))
        sizes.semantic_model_config._attn_implementation = "sdpa"
        acoustic = sizes.acoustic_model_config
        down, up = math.prod(acoustic.downsampling_ratios), math.prod(acoustic.upsampling_ratios)
    except Exception as error:
        raise WeightsError(f"the configuration of X-Codec cannot be used: {error}") from error
    if down != up:
        raise WeightsError(f"the encoder has {down} samples to a frame, the decoder {up}: name both lists of ratios")
    return sizes


class Xcodec(ResidualAudioTokenizer[XcodecConfig]):
    """The audio codec of arXiv 2408.17175: a frame has a code of each codebook, coarse to fine.

    Code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``. Audio of any sample rate and channel count is averaged to
    mono and resampled; an item is padded with zeros to whole frames. The speech model attends to all of an item: it goes
    through the encoder whole, and may not be longer than ten minutes. The decoder takes sequences of any length in pieces. The
    first codebooks decode alone (`zoo.Tokens.keep`). Encoding always runs in float32.
    """

    Config = XcodecConfig
    family = "xcodec"
    identity = ("quantizer.levels.0.codebook",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("codebooks", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1 << 17, 1 << 21), "decode": Budget(200, 8_000)}

    def __init__(self, config: XcodecConfig | None = None, *, name: str = "xcodec") -> None:
        super().__init__(config or XcodecConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: without_weight_norm(library_of(self.config)[1](sizes))))
        decoder = {"fc2": network.fc2, "acoustic_decoder": network.acoustic_decoder}
        for name_ in ("fc1", "fc2", "decoder_semantic", "acoustic_decoder", "quantizer"):
            delattr(network, name_)
        if "encoder" in self.config.parts:
            self.encoder = Exact(network)
        # Higgs searches each codebook in fewer dimensions; X-Codec in those of the latents.
        projected = sizes.hidden_size if sizes.model_type == "higgs_audio_v2_tokenizer" else None
        self.quantizer = ResidualQuantizer(sizes.num_quantizers, sizes.codebook_size, sizes.codebook_dim, projected)
        if "decoder" in self.config.parts:
            self.decoder = nn.ModuleDict(decoder)

    @property
    def spec(self) -> Spec:
        sizes = self.sizes
        return self.residual_spec(
            sizes.codebook_size, sizes.hidden_size, sample_rate=sizes.sample_rate, hop_length=sizes.hop_length, streaming=None
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if "encoder" in self._modules:
            state["_modules"] = self._modules | {"encoder": without_captures(self.encoder)}
        return state

    def encode_prepared(self, items: Sequence[Prepared], *, codebooks: int | None = None, progress: bool = False) -> Tokens:
        """Encode what `prepare` gave; errors as for `encode`, and `ItemError` for a recording of more than ten minutes."""
        for index, item in enumerate(items):
            if item.amount > LONGEST * self.sizes.sample_rate:
                seconds = item.amount / self.sizes.sample_rate
                raise ItemError(f"{seconds:.0f} s are too long: attention looks at all of an item, {LONGEST} s at most", index)
        return super().encode_prepared(items, codebooks=codebooks, progress=progress)

    def latents_of(self, waveforms: Float[Tensor, "batch 1 samples"]) -> Float[Tensor, "batch latent frames"]:
        """Latents for the quantizer, of whole items of one length, a whole number of frames."""
        network: Any = self.encoder.network
        semantic = network.encoder_semantic(network._extract_semantic_features(waveforms).transpose(1, 2))
        frames = waveforms.shape[2]
        for step in convolutions(network.acoustic_encoder):
            frames = (frames + 2 * step.left - step.dilation * (step.kernel - 1) - 1) // step.stride + 1
        padding = network.pad if frames != semantic.shape[2] else 0
        acoustic = network.acoustic_encoder(F.pad(waveforms, (padding, padding)))
        found: Tensor = network.fc(torch.cat([acoustic, semantic], dim=1).transpose(1, 2)).transpose(1, 2)
        return found

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        quantize = Each(lambda latents: self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2))
        return Chain([Whole(self.latents_of), quantize])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        decoder: Any = self.decoder["acoustic_decoder"]
        reach = Reach.of(convolutions(decoder), rows_out=self.hop_length)
        vectors = Each(lambda codes: in_own_dtype(self.decoder["fc2"], self.quantizer.vectors(codes.mT)).mT)
        return Chain([vectors, Window(lambda latents: in_own_dtype(decoder, latents), reach)])

    def stream_encoder(self, sample_rate: int | None = None) -> Any:
        """There is none: every code depends on the whole recording.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(f"{self.name} cannot encode a stream: every code depends on the whole recording")


TOKENIZER = Xcodec
