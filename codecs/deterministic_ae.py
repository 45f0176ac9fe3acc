"""Autoencoders of images without a posterior: DC-AE with few cells of many pixels, and TAESD, small and quick.

An image has one grid of latents, nothing is drawn. The networks are diffusers' ``AutoencoderDC`` (arXiv 2410.10733) and
``AutoencoderTiny``, distilled from the autoencoders of Stable Diffusion and FLUX.1, whose scaled latents it gives and takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, renamed
from zoo.errors import WeightsError
from zoo.nn.library import built, full_settings, known_settings
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.image import Images, LatentImageTokenizer, whole_cells

#: Names of diffusers' classes, by ours for the networks.
NETWORKS = {"dc": "AutoencoderDC", "tiny": "AutoencoderTiny"}


@dataclass(frozen=True)
class DeterministicAEConfig:
    """Sizes and settings.

    Attributes:
        network: ``dc`` for diffusers' ``AutoencoderDC``, ``tiny`` for its ``AutoencoderTiny``.
        library: settings of that class; what is left out gets the library's default.

    Raises:
        WeightsError: the library has no such setting, or the network is none for images of three channels.
    """

    network: str = "tiny"
    library: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise WeightsError(f"network must be one of {', '.join(NETWORKS)}, not {self.network!r}")
        settings = full_settings(_model_class(self.network), self.library)
        object.__setattr__(self, "library", settings)
        encoder, decoder = (settings[f"{half}_block_out_channels"] for half in ("encoder", "decoder"))
        checks = {
            "in_channels and out_channels must be 3": settings["in_channels"] == settings.get("out_channels", 3) == 3,
            "the halves must have equally many levels": len(encoder) == len(decoder) > 0,
            "upsampling_scaling_factor must be 2": settings.get("upsampling_scaling_factor", 2) == 2,
            "scaling_factor must not be 0": settings["scaling_factor"] != 0,
        }
        if failed := [text for text, holds in checks.items() if not holds]:
            raise WeightsError("; ".join(failed))

    @property
    def factor(self) -> int:
        """Pixels of a cell, along each side."""
        return 1 << (len(self.library["encoder_block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it, to have about unit variance."""
        return float(self.library["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        """Subtracted from latents before that."""
        return float(self.library.get("shift_factor") or 0.0)


def _model_class(network: str) -> type[Any]:
    import diffusers

    found: type[Any] = getattr(diffusers, NETWORKS[network])
    return found


# ---------------------------------------------------------------------------------------------------------------- networks


class Encoder(Float32Module):
    """Images in [-1, 1] to latents as the network gives them; stays in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        latents: Tensor = self.network(images)
        return latents


class Decoder(nn.Module):
    """Latents to images in [-1, 1], nominally, in the precision of the weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Float[Tensor, "batch channels rows columns"]) -> Images:
        # The first tensor of both networks is that of a convolution, which is not among the layers that are packed.
        images: Tensor = self.network(latents.to(next(self.parameters()).dtype))
        return images.float()


# ------------------------------------------------------------------------------------------------- checkpoints of diffusers


_MARKS = (
    {"encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.norm_out.weight"},
    {"encoder.layers.0.weight", "decoder.layers.0.weight"},
)


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of diffusers' ``AutoencoderDC`` or ``AutoencoderTiny``."""
    deep, tiny = (marks.issubset(keys) for marks in _MARKS)
    return tiny or (deep and any(key.startswith("encoder.down_blocks.") for key in keys))


def upstream_config(raw: Mapping[str, Any]) -> DeterministicAEConfig | None:
    """Read diffusers' ``config.json``.

    Raises:
        WeightsError: a setting is impossible.
    """
    network = next((ours for ours, theirs in NETWORKS.items() if raw.get("_class_name") == theirs), None)
    return DeterministicAEConfig(network, known_settings(_model_class(network), raw)) if network else None


def our_key(key: str) -> str | None:
    """Our name for an entry of a checkpoint; ``None`` if there is none."""
    half, _, rest = key.partition(".")
    return f"{half}.network.{rest}" if half in ("encoder", "decoder") else None


def convert(
    state: Mapping[str, Tensor], config: DeterministicAEConfig | None
) -> tuple[DeterministicAEConfig, dict[str, Tensor]]:
    """The tensors in our names.

    Raises:
        KeysError: there is no name for one.
        WeightsError: there is no configuration, which alone tells the kinds of layers.
    """
    if config is None:
        raise WeightsError("the sizes of this network do not follow from its tensors: it needs its config.json beside it")
    return config, renamed(state, our_key, NETWORKS[config.network])


class DeterministicAE(LatentImageTokenizer[DeterministicAEConfig]):
    """Images of any size to grids of latents, one for every 8, 32 or 64 pixels along each side, and back to their size.

    Right and lower edges are continued up to a whole number of cells, and cut off again when decoding. DC-AE's attention sees
    the whole image: images are batched where their sizes are equal.
    """

    Config = DeterministicAEConfig
    family = "deterministic_ae"
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 8), "decode": Budget(1, 8)}
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)
    identity = ()

    def __init__(self, config: DeterministicAEConfig | None = None, *, name: str = "deterministic_ae") -> None:
        super().__init__(config or DeterministicAEConfig(), name)
        cls = _model_class(self.config.network)
        model: Any = built(lambda: cls(**self.config.library))
        self.encoder, self.decoder = Encoder(model.encoder), Decoder(model.decoder)

    def identity_keys(self) -> tuple[str, ...]:
        """The last convolution of the encoder."""
        layers = getattr(self.encoder.network, "layers", ())
        last = f"layers.{len(layers) - 1}" if layers else "conv_out"
        return (f"encoder.network.{last}.weight", f"encoder.network.{last}.bias")

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=0,
            dim=self.config.library["latent_channels"],
            fingerprint=self.fingerprint,
        )

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Float[Tensor, "channels rows columns"]]:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            latents = self.encoder(whole_cells(images, self.config.factor))
        return list((latents.float() - self.config.shift_factor) * self.config.scaling_factor)

    def decode_images(self, values: Float[Tensor, "batch channels rows columns"]) -> Images:
        images: Tensor = self.decoder(values.float() / self.config.scaling_factor + self.config.shift_factor)
        return images

    def compile_modules(self) -> None:
        """Compile both halves; the first calls, and those at a new size, are slow."""
        self.encoder.compile(dynamic=True)
        self.decoder.compile(dynamic=True)


TOKENIZER = DeterministicAE
