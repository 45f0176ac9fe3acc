"""DAC, the Descript audio codec: convolutions with Snake activations around a residual quantizer of many small codebooks.

Paper: Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", arXiv 2306.06546. The network is the one of the
library transformers, ``DacModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, layer_numbers
from zoo.errors import KeysError
from zoo.nn.library import Exact, ResidualConfig, built, folded, in_own_dtype, settings_of, sizes_from
from zoo.nn.residual import ResidualQuantizer
from zoo.nn.stages import Chain, Each, Reach, Window, convolutions
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.graphs import Graphs
from zoo.tokenizer.stepped import ResidualAudioTokenizer


@dataclass(frozen=True)
class DACConfig(ResidualConfig):
    """Sizes of one model; ``library`` is a ``transformers.DacConfig``."""


class Snake(Float32Module):
    """``x + sin(a x)^2 / a`` with a rate ``a`` for each channel (arXiv 2006.08195), in one buffer; in float32 always."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        scale = 1 / (self.alpha + 1e-9)
        if torch.is_grad_enabled():
            return (x + scale * torch.sin(self.alpha * x).square()).to(x.dtype)
        wave = (x * self.alpha).sin_()
        return torch.addcmul(x, wave.square_(), scale, out=wave).to(x.dtype)


def with_quick_snakes(network: nn.Module) -> nn.Module:
    """A network of the library with its Snake activations replaced, under the same names."""
    for owner in list(network.modules()):
        for name, own in list(owner.named_children()):
            if type(own).__name__ == "Snake1d":
                alpha = own.get_parameter("alpha")
                setattr(owner, name, Snake(alpha.shape[1]).to(alpha.device))
    return network


# ---- checkpoints of transformers


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a DAC of transformers."""
    own = {"encoder.block.0.res_unit1.snake1.alpha", "quantizer.quantizers.0.codebook.weight"}
    return own <= set(keys) and not any(key.startswith(("semantic_model.", "acoustic_encoder.")) for key in keys)


def upstream_config(raw: Mapping[str, Any]) -> DACConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    return DACConfig(settings_of(raw, "dac"))


def convert(state: Mapping[str, Tensor], config: DACConfig | None) -> tuple[DACConfig, dict[str, Tensor]]:
    """The library's tensors in our names, weight norm multiplied out.

    Raises:
        KeysError: there is no configuration, or half of a weight norm is missing.
    """
    if config is None:
        raise KeysError("the tensors of DAC tell neither its sample rate nor its strides: pass config.json")
    named = {}
    for key, tensor in folded(state).items():
        part, _, rest = key.partition(".")
        if part == "quantizer":
            rest = rest.removeprefix("quantizers.").replace("codebook.weight", "codebook")
            named[f"quantizer.levels.{rest}"] = (
                tensor[:, :, 0] if rest.endswith("_proj.weight") and tensor.ndim == 3 else tensor
            )
        elif part not in ("encoder", "decoder") or part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
    levels, sizes = len(layer_numbers(named, "quantizer.levels")), sizes_of(config)
    if levels != sizes.n_codebooks:
        raise KeysError(f"there are {levels} codebooks in the tensors and {sizes.n_codebooks} in the configuration")
    return config, named


def sizes_of(config: DACConfig) -> Any:
    """The library's configuration.

    Raises:
        WeightsError: it is not a possible one.
    """
    from transformers import DacConfig

    return sizes_from(DacConfig.from_dict, config.library, "DAC")


class DAC(ResidualAudioTokenizer[DACConfig]):
    """The audio codec of arXiv 2306.06546: a frame has a code of each codebook, coarse to fine.

    Code ``c`` of codebook ``q`` has the id ``q * codebook_size + c``. Audio of any sample rate and channel count is averaged to
    mono and resampled; an item is padded with zeros to whole frames. The decoder of the models with an odd stride leaves out a
    few samples at the very end, which are silence here. The first codebooks decode alone (`zoo.Tokens.keep`). Encoding always
    runs in float32.
    """

    Config = DACConfig
    family = "dac"
    identity = ("quantizer.levels.0.codebook",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("codebooks", "parts"))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1 << 17, 1 << 22), "decode": Budget(100, 8_000)}

    def __init__(self, config: DACConfig | None = None, *, name: str = "dac") -> None:
        from transformers import DacModel

        super().__init__(config or DACConfig(), name)
        sizes = self.sizes = sizes_of(self.config)
        network = cast(Any, built(lambda: with_quick_snakes(DacModel(sizes))))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        self.quantizer = ResidualQuantizer(
            sizes.n_codebooks, sizes.codebook_size, sizes.codebook_dim, sizes.hidden_size, angles=True
        )
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
        reach = Reach.of(convolutions(self.encoder), rows_in=self.hop_length)
        quantize = Each(lambda latents: self.quantizer.codes(latents.transpose(1, 2), codebooks).transpose(1, 2))
        return Chain([Window(self.encoder, reach), quantize])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        reach = Reach.of(convolutions(self.decoder), rows_out=self.hop_length)
        vectors = Each(lambda codes: self.quantizer.vectors(codes.transpose(1, 2)).transpose(1, 2))
        return Chain([vectors, Window(lambda latents: in_own_dtype(self.decoder, latents), reach)])

    def graphs(self) -> Graphs:
        return self.plain_graphs()


TOKENIZER = DAC
