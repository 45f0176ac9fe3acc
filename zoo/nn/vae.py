"""The image autoencoder of latent diffusion models, diffusers' ``AutoencoderKL``, in two halves of different precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ArgumentError, KeysError
from zoo.nn.conv2d import Conv2d
from zoo.nn.resnet import Decoder, Encoder
from zoo.precision import Float32Module, compute_dtype

# diffusers renamed the projections of the attention in the middle; older files store them as 1x1 convolutions too.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VAESizes:
    """Sizes of an autoencoder; the defaults are Stable Diffusion's with 16 latent channels.

    Attributes:
        widths: channels at each resolution; every step but the last halves it.
        layers_per_block: residual blocks per resolution.
        groups: of the group norms.
        latent_channels: channels of a latent.
        quant_convs: whether 1x1 convolutions stand behind the encoder and before the decoder.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    latent_channels: int = 16
    quant_convs: bool = True

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        factor: int = 2 ** (len(self.widths) - 1)
        return factor


class VAEEncoder(Float32Module):
    """Images to the mean and log-variance of their latents; stays in float32."""

    def __init__(self, network: nn.Module, quant_conv: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.quant_conv = quant_conv

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch latent rows columns"], Float[Tensor, "batch latent rows columns"]]:
        """Mean and log-variance of the posterior, the latter clamped to [-30, 20]."""
        # Convolutions on a CPU are several times quicker in this layout.
        moments = self.quant_conv(self.network(images.to(memory_format=torch.channels_last)))
        mean, log_variance = moments.contiguous().float().chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)


class VAEDecoder(nn.Module):
    """Latents to images, in the precision of its weights."""

    def __init__(self, network: Decoder, post_quant_conv: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv = post_quant_conv
        self.network = network

    def forward(self, latents: Float[Tensor, "batch latent rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Images as float32, nominally in [-1, 1], not clamped."""
        latents = latents.to(compute_dtype(self.network.conv_in), memory_format=torch.channels_last)
        images: Tensor = self.network(self.post_quant_conv(latents))
        return images.float().contiguous()


class VAE(nn.Module):
    """Encoder and decoder. Its state dict has ``encoder.network``, ``encoder.quant_conv`` and the same for the decoder.

    Stable Diffusion 3 and FLUX.1 have no such convolutions, and no entries for them.
    """

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths, latent = sizes.widths, sizes.latent_channels
        encoder = Encoder(2 * latent, widths, sizes.layers_per_block, sizes.groups)
        decoder = Decoder(latent, 3, widths, sizes.layers_per_block, sizes.groups)
        convs = sizes.quant_convs
        self.encoder = VAEEncoder(encoder, Conv2d(2 * latent, 2 * latent, 1) if convs else nn.Identity())
        self.decoder = VAEDecoder(decoder, Conv2d(latent, latent, 1) if convs else nn.Identity())


def is_sampled(posterior: str) -> bool:
    """Whether latents are drawn from the posterior (``sample``) rather than its mean (``mode``).

    Raises:
        ArgumentError: it is neither.
    """
    if posterior not in ("mode", "sample"):
        raise ArgumentError(f"posterior must be 'mode' or 'sample', not {posterior!r}")
    return posterior == "sample"


def posterior_noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, ...]:
    """Standard normal numbers to draw latents with, made where the generator is."""
    source = generator.device if generator else device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=torch.float32).to(device)


_HALVES = {
    "encoder.": "encoder.network.",
    "quant_conv.": "encoder.quant_conv.",
    "decoder.": "decoder.network.",
    "post_quant_conv.": "decoder.post_quant_conv.",
}


def our_key(key: str) -> str | None:
    """Our name for an entry of a diffusers checkpoint; ``None`` if it belongs to no autoencoder."""
    for theirs, ours in _HALVES.items():
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
            break
    else:
        return None
    stem, _, kind = key.rpartition(".")
    parent, _, last = stem.rpartition(".")
    return f"{parent}.{_OLD_ATTENTION[last]}.{kind}" if ".attentions." in parent and last in _OLD_ATTENTION else key


def our_tensor(key: str, tensor: Tensor) -> Tensor:
    """A tensor under `our_key`'s name: projections stored as 1x1 convolutions become matrices."""
    return tensor[:, :, 0, 0] if ".attentions." in key and ".to_" in key and tensor.ndim == 4 else tensor


def infer_sizes(state: Mapping[str, Tensor], groups: int, prefix: str = "") -> VAESizes:
    """The sizes that the shapes of tensors in our names imply; the number of groups leaves no trace in them.

    Raises:
        KeysError: tensors that would tell are missing.
    """
    widths: dict[int, int] = {}
    layers = 0
    pattern = re.compile(rf"{re.escape(prefix)}encoder\.network\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    for key, tensor in state.items():
        if found := pattern.fullmatch(key):
            widths[int(found[1])] = tensor.shape[0]
            layers = max(layers, int(found[2]) + 1)
    output = state.get(f"{prefix}encoder.network.conv_out.weight")
    if output is None or not widths:
        raise KeysError("the encoder of the image autoencoder is missing")
    convs = f"{prefix}encoder.quant_conv.weight" in state
    return VAESizes(tuple(widths[level] for level in sorted(widths)), layers, groups, output.shape[0] // 2, convs)
