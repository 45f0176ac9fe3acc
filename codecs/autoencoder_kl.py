"""The autoencoder of latent diffusion as a continuous tokenizer: images to `zoo.Latents` and back.

The KL-regularised convolutional autoencoder of arXiv 2112.10752 (section 3.1), as diffusers' ``AutoencoderKL`` builds it.
FlexTok's three come as catalogue entries; any other with the same blocks loads with ``hf-hub:`` or ``local-dir:``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo import media
from zoo.checkpoint import Checkpoint, renamed, require_agreement
from zoo.errors import InputError, MismatchError, WeightsError, listing, naming_item
from zoo.latents import Latents
from zoo.nn import vae
from zoo.nn.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Tokenizer, as_items


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of one model; the defaults are Stable Diffusion's with 16 latent channels.

    Attributes:
        widths, layers_per_block, groups, latent_channels: see `zoo.nn.vae.VAESizes`.
        scaling_factor: latents are multiplied by it, to have about unit variance.
        shift_factor: subtracted from latents before that.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    latent_channels: int = 16
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @property
    def vae(self) -> vae.VAESizes:
        """Sizes of the network."""
        return vae.VAESizes(self.widths, self.layers_per_block, self.groups, self.latent_channels)


# ---- checkpoints of diffusers

#: What diffusers assumes where a configuration names no scaling factor.
DIFFUSERS_SCALING_FACTOR = 0.18215


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of diffusers' ``AutoencoderKL``."""
    return {"encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> AutoencoderKLConfig | None:
    """Read diffusers' ``config.json``.

    Raises:
        WeightsError: it describes another kind of autoencoder.
    """
    if raw.get("_class_name") != "AutoencoderKL":
        return None
    checks = {
        "down_block_types": set(raw.get("down_block_types", ())) <= {"DownEncoderBlock2D"},
        "up_block_types": set(raw.get("up_block_types", ())) <= {"UpDecoderBlock2D"},
        "act_fn": raw.get("act_fn", "silu") == "silu",
        "in_channels": raw.get("in_channels", 3) == raw.get("out_channels", 3) == 3,
        "use_quant_conv": raw.get("use_quant_conv", True) and raw.get("use_post_quant_conv", True),
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
            scaling_factor=raw.get("scaling_factor") or DIFFUSERS_SCALING_FACTOR,
            shift_factor=raw.get("shift_factor") or 0.0,
        )
    except (KeyError, TypeError) as error:
        raise WeightsError(f"the AutoencoderKL configuration cannot be used: {error!r}") from error


def convert(state: Mapping[str, Tensor], config: AutoencoderKLConfig | None) -> tuple[AutoencoderKLConfig, dict[str, Tensor]]:
    """Diffusers' tensors in our names, and the sizes that their shapes imply.

    Raises:
        KeysError: there is no name for one, or the shapes contradict each other or ``config``.
    """
    own = renamed(state, vae.our_key, "AutoencoderKL")
    named = {f"vae.{name}": vae.our_tensor(name, tensor) for name, tensor in own.items()}
    base = config or AutoencoderKLConfig(scaling_factor=DIFFUSERS_SCALING_FACTOR)
    sizes = vae.infer_sizes(named, base.groups, "vae.")
    found = replace(base, widths=sizes.widths, layers_per_block=sizes.layers_per_block, latent_channels=sizes.latent_channels)
    require_agreement(found, config)
    return found, named


class AutoencoderKL(Tokenizer[AutoencoderKLConfig]):
    """Images of any size to grids of latents, one for every 8 x 8 pixels in the usual case, and back to images of their size.

    Right and lower edges are continued up to a whole number of cells, and cut off again when decoding.
    """

    Config = AutoencoderKLConfig
    family = "autoencoder_kl"
    modality = "image"
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)
    identity = ("vae.encoder.quant_conv.weight", "vae.encoder.quant_conv.bias")

    def __init__(self, config: AutoencoderKLConfig | None = None, *, name: str = "autoencoder_kl") -> None:
        super().__init__(config or AutoencoderKLConfig(), name)
        self.vae = vae.VAE(self.config.vae)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=0,
            dim=self.config.latent_channels,
            fingerprint=self.fingerprint,
        )

    def encode(  # type: ignore[override]  # a continuous tokenizer gives latents
        self,
        items: Any,
        *,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> Latents:
        """Images to latents, scaled to about unit variance.

        Args:
            items: one item or a list of them, each a path, the bytes of an image file, a PIL image, an array ``[height, width,
                channels]`` or a tensor ``[channels, height, width]``; floats in [-1, 1]. A tensor of rank 4 is a list.
            posterior: ``mode`` takes the posterior's mean, ``sample`` draws from it.
            generator: of the draws.
            range: what black and white are in floating point; see `zoo.media.prepare_image`.
            max_pixels: refuse larger images.
            progress: show a progress bar.

        Raises:
            InputError: an item is empty, unreadable, too large, not finite or of the wrong kind; names the item.
        """
        if posterior not in ("mode", "sample"):
            raise InputError(f"posterior must be 'mode' or 'sample', not {posterior!r}")
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=4)):
            with naming_item(index):
                prepared.append(media.prepare_image(item, size=(0, 0), fit="none", max_pixels=max_pixels, range=range))
        values = []
        with progress_bar("encode", len(prepared), progress, unit="image") as advance:
            for image in prepared:
                values.append(self._encode_image(image.pixels, posterior == "sample", generator))
                advance(1)
        spec = self.spec
        return Latents(tuple(values), spec.name, spec.fingerprint, tuple(image.meta for image in prepared))

    @torch.no_grad()
    def _encode_image(
        self, image: Float[Tensor, "3 height width"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "channels rows columns"]:
        height, width = image.shape[1:]
        factor = self.config.vae.factor
        padded = F.pad(image[None].to(self.device), (0, -width % factor, 0, -height % factor), mode="replicate")
        with exact_float32(self.device):
            mean, log_variance = self.vae.encoder(padded)
        if sample:
            device = generator.device if generator else mean.device
            noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        latents: Tensor = (mean[0] - self.config.shift_factor) * self.config.scaling_factor
        return latents

    def decode(  # type: ignore[override]  # a continuous tokenizer decodes latents
        self,
        tokens: Latents | Tensor | Sequence[Tensor],
        *,
        size: str | None = "original",
        progress: bool = False,
    ) -> list[Float[Tensor, "3 _ _"]]:
        """Latents to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare latents ``[batch, channels, rows, columns]`` or a list of ``[channels, rows,
                columns]``, of a diffusion model say.
            size: ``"original"`` for the size of the encoded image, ``None`` for whole cells.
            progress: show a progress bar.

        Raises:
            MismatchError: the latents belong to another checkpoint.
            InputError: an item has another number of channels, or is not finite.
        """
        if size not in (None, "original"):
            raise InputError(f"size must be None or 'original', not {size!r}")
        latents = self._check_latents(tokens)
        images = []
        with progress_bar("decode", len(latents), progress, unit="image") as advance:
            for index, values in enumerate(latents.values):
                image = self._decode_one(values)
                if size == "original" and latents.meta:
                    image = image[:, : latents.meta[index]["height"], : latents.meta[index]["width"]]
                images.append(image)
                advance(1)
        return images

    @torch.no_grad()
    def _decode_one(self, values: Float[Tensor, "channels rows columns"]) -> Float[Tensor, "3 height width"]:
        raw = values[None].to(self.device).float() / self.config.scaling_factor + self.config.shift_factor
        with exact_float32(self.device):
            image: Tensor = self.vae.decoder(raw)[0]
        return image

    def _check_latents(self, latents: Latents | Tensor | Sequence[Tensor]) -> Latents:
        spec = self.spec
        if not isinstance(latents, Latents):
            latents = Latents(tuple(latents), spec.name, spec.fingerprint)
        if latents.fingerprint != spec.fingerprint:
            raise MismatchError(
                f"these latents were made by {latents.tokenizer} ({latents.fingerprint or 'unknown checkpoint'}), this is "
                f"{spec.name} ({spec.fingerprint})"
            )
        latents.check(self.config.latent_channels, "rows", "columns")
        return latents

    def embed(  # type: ignore[override]  # a continuous tokenizer embeds latents
        self, tokens: Latents | Tensor | Sequence[Tensor]
    ) -> Float[Tensor, "batch length dim"]:
        """The latents as sequences, row by row, zero where an item has ended."""
        rows = [values.flatten(1).T.to(self.device) for values in self._check_latents(tokens).values]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def compile_modules(self) -> None:
        """Compile both halves; the first calls, and those at a new size, are slow."""
        self.vae.encoder.compile(dynamic=True)
        self.vae.decoder.compile(dynamic=True)


TOKENIZER = AutoencoderKL
