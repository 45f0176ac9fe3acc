"""The autoencoder of latent diffusion as a continuous tokenizer: images to `zoo.Latents` and back.

The KL-regularised convolutional autoencoder of arXiv 2112.10752 (section 3.1), as diffusers' ``AutoencoderKL`` and
``AutoencoderKLFlux2`` build it. Those of FlexTok, Stable Diffusion and FLUX come as catalogue entries; any other with the same
blocks loads with ``hf-hub:`` or ``local-dir:``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo import media
from zoo.checkpoint import Checkpoint, renamed, require_agreement
from zoo.errors import WeightsError, listing
from zoo.latents import Latents
from zoo.nn import vae
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared, precision_named
from zoo.tokenizer.image import Images, LatentImageTokenizer, whole_cells


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of one model; the defaults are Stable Diffusion's with 16 latent channels.

    Attributes:
        widths, layers_per_block, groups, latent_channels: see `zoo.nn.vae.VAESizes`.
        scaling_factor: latents are multiplied by it, to have about unit variance.
        shift_factor: subtracted from latents before that.
        quant_convs: see `zoo.nn.vae.VAESizes`.
        patch: rows and columns of latents that become the channels of one, 1 for none. Such latents are normalised by the
            statistics of each channel, as a batch norm that is not trained any more, and by no factors.
        patch_eps: added to the variances.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    latent_channels: int = 16
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    quant_convs: bool = True
    patch: int = 1
    patch_eps: float = 1e-4

    def __post_init__(self) -> None:
        if self.patch < 1 or self.patch_eps < 0:
            raise WeightsError(f"patch must be at least 1 and patch_eps not negative, not {self.patch} and {self.patch_eps}")

    @property
    def dim(self) -> int:
        """Channels of what `AutoencoderKL` encodes to."""
        return self.latent_channels * self.patch**2

    @property
    def factor(self) -> int:
        """Pixels of a cell, along each side."""
        return self.vae.factor * self.patch

    @property
    def vae(self) -> vae.VAESizes:
        """Sizes of the network."""
        return vae.VAESizes(self.widths, self.layers_per_block, self.groups, self.latent_channels, self.quant_convs)


# ---- checkpoints of diffusers

#: What diffusers assumes where a configuration names no scaling factor.
DIFFUSERS_SCALING_FACTOR = 0.18215


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of diffusers' ``AutoencoderKL``."""
    return set(keys) >= _MARKS and "quantize.embedding.weight" not in keys


_MARKS = {
    *("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.conv_norm_out.weight"),
    *("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.conv_norm_out.weight"),
}
# Of FLUX.2's patches; the last one counts batches of training.
_STATISTICS = {"bn.running_mean": "patch_norm.mean", "bn.running_var": "patch_norm.variance"}
_COUNTER = "bn.num_batches_tracked"


def upstream_config(raw: Mapping[str, Any]) -> AutoencoderKLConfig | None:
    """Read diffusers' ``config.json``, of ``AutoencoderKL`` or ``AutoencoderKLFlux2``.

    Raises:
        WeightsError: it describes another kind of autoencoder.
    """
    if raw.get("_class_name") not in ("AutoencoderKL", "AutoencoderKLFlux2"):
        return None
    patches = raw["_class_name"] == "AutoencoderKLFlux2"
    patch = raw.get("patch_size", (2, 2)) if patches else (1, 1)
    checks = {
        "down_block_types": set(raw.get("down_block_types", ())) <= {"DownEncoderBlock2D"},
        "up_block_types": set(raw.get("up_block_types", ())) <= {"UpDecoderBlock2D"},
        "act_fn": raw.get("act_fn", "silu") == "silu",
        "in_channels": raw.get("in_channels", 3) == raw.get("out_channels", 3) == 3,
        "use_post_quant_conv": raw.get("use_post_quant_conv", True) == raw.get("use_quant_conv", True),
        "decoder_block_out_channels": raw.get("decoder_block_out_channels") in (None, raw.get("block_out_channels")),
        "patch_size": len(set(patch)) == 1,
        "mid_block_add_attention": raw.get("mid_block_add_attention", True),
        "latents_mean": raw.get("latents_mean") is None and raw.get("latents_std") is None,
    }
    if wrong := [f"{name} {raw.get(name)}" for name, holds in checks.items() if not holds]:
        raise WeightsError(f"this AutoencoderKL has settings that are not supported: {listing(wrong)}")
    try:
        return AutoencoderKLConfig(
            widths=tuple(raw["block_out_channels"]),
            layers_per_block=raw["layers_per_block"],
            groups=raw.get("norm_num_groups", 32),
            latent_channels=raw["latent_channels"],
            scaling_factor=1.0 if patches else raw.get("scaling_factor") or DIFFUSERS_SCALING_FACTOR,
            shift_factor=0.0 if patches else raw.get("shift_factor") or 0.0,
            quant_convs=raw.get("use_quant_conv", True),
            patch=patch[0],
            patch_eps=raw.get("batch_norm_eps", 1e-4),
        )
    except (KeyError, TypeError) as error:
        raise WeightsError(f"the AutoencoderKL configuration cannot be used: {error!r}") from error


def our_key(key: str) -> str | None:
    """Our name for an entry of a diffusers checkpoint; ``None`` if there is none."""
    if key in _STATISTICS:
        return _STATISTICS[key]
    name = vae.our_key(key)
    return f"vae.{name}" if name else None


def convert(state: Mapping[str, Tensor], config: AutoencoderKLConfig | None) -> tuple[AutoencoderKLConfig, dict[str, Tensor]]:
    """Diffusers' tensors in our names, and the sizes that their shapes imply.

    Raises:
        KeysError: there is no name for one, or the shapes contradict each other or ``config``.
    """
    own = renamed(state, our_key, "AutoencoderKL", lambda key: key != _COUNTER)
    named = {name: vae.our_tensor(name, tensor) for name, tensor in own.items()}
    base = config or AutoencoderKLConfig(scaling_factor=DIFFUSERS_SCALING_FACTOR)
    sizes = vae.infer_sizes(named, base.groups, "vae.")
    found = replace(
        base,
        widths=sizes.widths,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        quant_convs=sizes.quant_convs,
        patch=math.isqrt(len(named["patch_norm.mean"]) // sizes.latent_channels) if "patch_norm.mean" in named else 1,
    )
    require_agreement(found, config)
    return found, named


class PatchNorm(Float32Module):
    """Latents of neighbours as the channels of one, each less its mean and divided by its deviation; and back.

    Args:
        channels: of the result.
        patch: neighbours along each side.
        eps: added to the variances.
    """

    def __init__(self, channels: int, patch: int, eps: float) -> None:
        super().__init__()
        self.patch, self.eps = patch, eps
        self.mean = nn.Parameter(torch.zeros(channels))
        self.variance = nn.Parameter(torch.ones(channels))

    def forward(self, latents: Float[Tensor, "batch latent rows columns"]) -> Float[Tensor, "batch channels _ _"]:
        return (F.pixel_unshuffle(latents, self.patch) - self.mean[:, None, None]) / self._deviation

    def inverse(self, latents: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch latent _ _"]:
        """Latents that the decoder takes."""
        return F.pixel_shuffle(latents * self._deviation + self.mean[:, None, None], self.patch)

    @property
    def _deviation(self) -> Float[Tensor, "channels 1 1"]:
        return torch.sqrt(self.variance + self.eps)[:, None, None]


class AutoencoderKL(LatentImageTokenizer[AutoencoderKLConfig]):
    """Images of any size to grids of latents, one for every 8 x 8 pixels in the usual case, and back to images of their size.

    FLUX.2 has one for every 16 x 16 pixels, four neighbours in one. Right and lower edges are continued up to a whole number of
    cells, and cut off again when decoding.
    """

    Config = AutoencoderKLConfig
    family = "autoencoder_kl"
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 1), "decode": Budget(1, 1)}
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)
    identity = ("vae.encoder.quant_conv.weight", "vae.encoder.quant_conv.bias")
    #: Of checkpoints without that convolution.
    other_identity = ("vae.encoder.network.conv_out.weight", "vae.encoder.network.conv_out.bias")

    def __init__(self, config: AutoencoderKLConfig | None = None, *, name: str = "autoencoder_kl") -> None:
        super().__init__(config or AutoencoderKLConfig(), name)
        self.vae = vae.VAE(self.config.vae)
        self.patch_norm = (
            PatchNorm(self.config.dim, self.config.patch, self.config.patch_eps) if self.config.patch > 1 else None
        )

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=0,
            dim=self.config.dim,
            fingerprint=self.fingerprint,
        )

    def identity_keys(self) -> tuple[str, ...]:
        return self.identity if self.config.quant_convs else self.other_identity

    def encode(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        encoder_precision: str = "fp32",
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> Latents:
        """Images to latents, scaled to about unit variance.

        Args:
            items: as for `ImageTokenizer.encode`.
            fit, interpolation: nothing to choose, as every size is taken as it is.
            posterior: ``mode`` takes the posterior's mean, ``sample`` draws from it.
            generator: of the draws.
            encoder_precision: ``bf16`` computes the encoder in bfloat16.
            range: what black and white are in floating point; see `zoo.media.prepare_image`.
            max_pixels: refuse larger images.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, unreadable, too large, not finite or of the wrong kind; names the item.
        """
        prepared = self.prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        return self.encode_prepared(
            prepared, posterior=posterior, generator=generator, encoder_precision=encoder_precision, progress=progress
        )

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        encoder_precision: str = "fp32",
        progress: bool = False,
    ) -> Latents:
        """Encode what `prepare` gave, to latents; arguments and errors as for `encode`."""
        sample, dtype = vae.is_sampled(posterior), precision_named(encoder_precision)
        encode = partial(self.encode_images, dtype=dtype, sample=sample, generator=generator)
        return self.encode_batches(items, encode, progress)

    def encode_images(
        self, images: Images, dtype: torch.dtype, sample: bool = False, generator: torch.Generator | None = None
    ) -> Sequence[Float[Tensor, "channels rows columns"]]:
        padded = whole_cells(images, self.config.factor)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            mean, log_variance = self.vae.encoder(padded)
        if sample:
            mean = mean + torch.exp(0.5 * log_variance) * vae.posterior_noise(mean.shape, generator, mean.device)
        latents = (mean - self.config.shift_factor) * self.config.scaling_factor
        return list(latents if self.patch_norm is None else self.patch_norm(latents))

    def decode_images(self, values: Float[Tensor, "batch channels rows columns"]) -> Images:
        latents = values.float() if self.patch_norm is None else self.patch_norm.inverse(values.float())
        images: Tensor = self.vae.decoder(latents / self.config.scaling_factor + self.config.shift_factor)
        return images

    def compile_modules(self) -> None:
        """Compile both halves; the first calls, and those at a new size, are slow."""
        self.vae.encoder.compile(dynamic=True)
        self.vae.decoder.compile(dynamic=True)


TOKENIZER = AutoencoderKL
