"""Mimi: a causal codec at 12.5 frames a second, whose first codebook carries the words; the codec of Moshi and of Sesame's CSM.

Paper: Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue", arXiv 2410.00037, section 3.3. The
network is the one of the library transformers, ``MimiModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import KeysError, WeightsError
from zoo.nn.library import Exact, ResidualConfig, built, present_names, settings_of, sizes_from
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.seanet import convolved, with_quick_elus
from zoo.nn.stages import Attention, Chain, Each
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.graphs import Graphs
from zoo.tokenizer.stepped import ResidualAudioTokenizer


@dataclass(frozen=True)
class MimiConfig(ResidualConfig):
    """Sizes of one model; ``library`` is a ``transformers.MimiConfig``."""


class SplitQuantizer(Float32Module):
    """Two residual quantizers of the same latents, whose vectors are added: one that carries words, and one for the sound."""

    def __init__(self, semantic: int, acoustic: int, size: int, dim: int, latent_dim: int) -> None:
        super().__init__()
        outer = latent_dim if latent_dim != dim else None
        self.semantic = ResidualQuantizer(semantic, size, dim, outer_dim=outer)
        self.acoustic = ResidualQuantizer(acoustic, size, dim, outer_dim=outer)

    def __len__(self) -> int:
        """Number of codebooks of both."""
        return len(self.semantic) + len(self.acoustic)

    def codes(self, latents: Float[Tensor, "batch frames latent"], count: int) -> Int[Tensor, "batch frames count"]:
        """Codes of the first ``count`` codebooks."""
        first = min(count, len(self.semantic.levels))
        parts = [self.semantic.codes(latents, first)]
        if count > first:
            parts.append(self.acoustic.codes(latents, count - first))
        return torch.cat(parts, dim=-1)

    def each(self, codes: Int[Tensor, "batch frames count"]) -> Float[Tensor, "batch frames count latent"]:
        """The vector of each code as it is added to its frame's latents."""
        first = len(self.semantic.levels)
        parts = [self.semantic.each(codes[..., :first])]
        if codes.shape[-1] > first:
            parts.append(self.acoustic.each(codes[..., first:]))
        return torch.cat(parts, dim=2)

    def vectors(self, codes: Int[Tensor, "batch frames count"]) -> Float[Tensor, "batch frames latent"]:
        """Latents that codes of the first few codebooks stand for."""
        first = len(self.semantic.levels)
        total = self.semantic.vectors(codes[..., :first])
        return total if codes.shape[-1] <= first else total + self.acoustic.vectors(codes[..., first:])


class WholeConv(nn.Module):
    """A causal convolution of the library over whole strides, which need no padding at the end."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.conv = convolution.conv
        self.left, self.mode = int(convolution.padding_total), convolution.pad_mode

    def forward(
        self, x: Float[Tensor, "batch channels time"], padding_cache: None = None
    ) -> Float[Tensor, "batch channels_out frames"]:
        found: Tensor = self.conv(F.pad(x, (self.left, 0), self.mode))
        return found


# ---- checkpoints of transformers

_QUANTIZERS = {"semantic_residual_vector_quantizer": "semantic", "acoustic_residual_vector_quantizer": "acoustic"}
#: Usage of a code below which the library divides by this, in ``MimiEuclideanCodebook``.
_LEAST_USAGE = 1e-5


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a Mimi of transformers."""
    return "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum" in keys


def upstream_config(raw: Mapping[str, Any]) -> MimiConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return MimiConfig(settings_of(raw, "mimi"))


def convert(state: Mapping[str, Tensor], config: MimiConfig | None) -> tuple[MimiConfig, dict[str, Tensor]]:
    """The library's tensors, of any release, in our names; codes are the sums that the file holds, divided by their counts.

    Raises:
        KeysError: there is no configuration, or tensors are missing, unexpected or of another shape.
    """
    from transformers import MimiModel

    if config is None:
        raise KeysError("the tensors of Mimi tell neither its sample rate nor its strides: pass config.json")
    named = {}
    present = present_names(MimiModel, sizes_of(config), state)
    for key, tensor in present.items():
        part, _, rest = key.partition(".")
        if part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
        if part == "quantizer":
            kind, _, rest = rest.partition(".")
            ours = f"quantizer.{_QUANTIZERS[kind]}."
            if rest.endswith("_proj.weight"):
                named[ours + rest.replace("_proj", "")] = tensor[:, :, 0]
            elif rest.endswith(".embed_sum"):
                usage = present[key.replace("embed_sum", "cluster_usage")].clamp(min=_LEAST_USAGE)
                named[ours + rest.replace("layers.", "levels.").replace(".embed_sum", "")] = tensor / usage[:, None]
    return config, named


def sizes_of(config: MimiConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one, or not of a causal codec.
    """
    from transformers import MimiConfig as TheirConfig

    sizes = sizes_from(TheirConfig.from_dict, config.library, "Mimi", attn_implementation="sdpa")
    if not sizes.use_causal_conv or sizes.pad_mode != "constant" or sizes.latent_stride != 2 or sizes.audio_channels != 1:
        raise WeightsError("this Mimi is not causal, or not mono, or does not halve its rate behind attention")
    return sizes


class Mimi(ResidualAudioTokenizer[MimiConfig]):
    """The audio codec of arXiv 2410.00037: a frame of 80 ms has a code of each codebook. The first one carries words.

    Code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``. Audio of any sample rate and channel count is averaged to
    mono and resampled; an item is padded with zeros to whole frames, as the original does. The first codebooks decode alone
    (`zoo.Tokens.keep`). Encoding always runs in float32.
    """

    Config = MimiConfig
    family = "mimi"
    identity = ("quantizer.semantic.levels.0.codebook",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("codebooks", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(96_000, 1 << 22), "decode": Budget(50, 4_000)}

    def __init__(self, config: MimiConfig | None = None, *, name: str = "mimi") -> None:
        from transformers import MimiModel

        super().__init__(config or MimiConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: with_quick_elus(MimiModel(sizes))))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        self.quantizer = SplitQuantizer(
            sizes.num_semantic_quantizers,
            sizes.num_quantizers - sizes.num_semantic_quantizers,
            sizes.codebook_size,
            sizes.codebook_dim,
            sizes.hidden_size,
        )
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        sizes = self.sizes
        return self.residual_spec(
            sizes.codebook_size, sizes.hidden_size, sample_rate=sizes.sampling_rate, hop_length=sizes.frame_size
        )

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network: Any = self.encoder.network
        return Chain(
            [
                convolved(network.encoder_seanet.layers, rows_in=self.hop_length // 2, reflected=0),
                Attention(network.encoder_transformer, self.sizes),
                convolved([network.downsample], rows_in=2, reflected=0),
                Each(lambda latents: self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2)),
            ]
        )

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        network = self.decoder
        return Chain(
            [
                Each(lambda codes: self.quantizer.vectors(codes.transpose(1, 2)).transpose(1, 2)),
                convolved([network.upsample], rows_out=2, reflected=0),
                Attention(network.decoder_transformer, self.sizes),
                convolved(network.decoder_seanet.layers, rows_out=self.hop_length // 2, reflected=0),
            ]
        )

    def graphs(self) -> Graphs:
        return self.plain_graphs()

    def plain_layers(self) -> Mimi:
        """See `ResidualAudioTokenizer`: the library's convolutions compute their padding by tensors."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "MimiConv1d":
                    setattr(module, name, WholeConv(child))
        return self


TOKENIZER = Mimi
