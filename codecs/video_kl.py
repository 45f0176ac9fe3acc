"""Autoencoders of latent video diffusion as continuous tokenizers: clips to `zoo.Latents` and back.

Four networks of diffusers: Wan 2.1 (arXiv 2503.20314, section 4.1), Qwen-Image (arXiv 2508.02324), CogVideoX (arXiv 2408.06072,
section 2.1) and Cosmos (arXiv 2501.03575, section 3). Latents are scaled as the diffusion models were trained on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, Half, built, plain_config
from zoo.spec import Spec
from zoo.tokenizer.video import Fed, Timing, VideoTokenizer

NETWORKS = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLCogVideoX", "AutoencoderKLCosmos")


@dataclass(frozen=True)
class VideoKLConfig:
    """Sizes of one model; the defaults are Wan's 2.1.

    Attributes:
        network: class of diffusers, one of `NETWORKS`.
        library: its settings, scales of the latents among them; what is missing is as the class has it.
        parts: what is loaded, ``encoder``, ``decoder`` or both.
    """

    network: str = "AutoencoderKLWan"
    library: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("encoder", "decoder")


# ---- checkpoints, which have the names of diffusers' classes


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of one of the four networks; Wan and Qwen-Image have the same."""
    found = set(keys)
    wan = {"encoder.norm_out.gamma", "decoder.norm_out.gamma", "quant_conv.weight", "post_quant_conv.weight"}
    cog = {"encoder.conv_in.conv.weight", "decoder.norm_out.conv_y.conv.weight"}
    cosmos = {"encoder.conv_in.conv_s.weight", "decoder.conv_in.conv_s.weight", "quant_conv.weight"}
    return wan <= found or cog <= found or cosmos <= found


def upstream_config(raw: Mapping[str, Any]) -> VideoKLConfig:
    """Read diffusers' ``config.json``.

    Raises:
        WeightsError: it describes another network, or one with settings that are not supported.
    """
    settings = plain_config(raw)
    network = settings.pop("_class_name", None)
    if network not in NETWORKS:
        raise WeightsError(f"this is the configuration of {network}, not of {', '.join(NETWORKS)}")
    config = VideoKLConfig(network, settings)
    _require_supported(config)
    return config


def _require_supported(config: VideoKLConfig) -> None:
    settings = config.library
    channels = [settings.get(key, 3) for key in ("in_channels", "out_channels", "input_channels")]
    halvings = settings.get("temperal_downsample", [False, True, True])
    checks = {
        "network": config.network in NETWORKS,
        "in_channels": channels == [3, 3, 3],
        "patch_size": config.network != "AutoencoderKLWan" or settings.get("patch_size") is None,
        "is_residual": not settings.get("is_residual", False),
        "temperal_downsample": sum(map(bool, halvings)) == 2,
        "use_quant_conv": not (settings.get("use_quant_conv", False) or settings.get("use_post_quant_conv", False)),
        "shift_factor": not settings.get("shift_factor"),
    }
    if wrong := [f"{name} {settings.get(name, config.network)}" for name, holds in checks.items() if not holds]:
        raise WeightsError(f"{config.network} has settings that are not supported: {', '.join(wrong)}")


def convert(state: Mapping[str, Tensor], config: VideoKLConfig | None) -> tuple[VideoKLConfig, dict[str, Tensor]]:
    """The tensors of the halves that are wanted, in our names.

    Raises:
        WeightsError: there is no configuration: the networks share names, and scales of latents stand nowhere else.
    """
    if config is None:
        raise WeightsError("without config.json nothing tells which autoencoder this is, nor how its latents are scaled")
    needed = _needed(config)
    named = {}
    for key, tensor in state.items():
        half, _, rest = key.partition(".")
        if half not in _HALVES or half in needed or key.startswith("encoder.conv_out."):
            named[f"{half}.network.{rest}"] = tensor
    return config, named


_HALVES = ("encoder", "quant_conv", "decoder", "post_quant_conv")


def _needed(config: VideoKLConfig) -> set[str]:
    """Parts of the network for the halves that are wanted; ``quant_conv`` tells checkpoints apart and is always there."""
    halves = {"quant_conv"} | ({"encoder"} & set(config.parts))
    return halves | ({"decoder", "post_quant_conv"} if "decoder" in config.parts else set())


# ---- the tokenizer


class VideoKL(VideoTokenizer[VideoKLConfig, Latents]):
    """Clips of any length and size to grids of latents, and back to as many frames.

    Wan and Qwen-Image encode and decode in bounded memory, CogVideoX too; Cosmos attends to all frames before.
    """

    Config = VideoKLConfig
    family = "video_kl"
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)
    identity = ("encoder.network.conv_out.weight",)

    def __init__(self, config: VideoKLConfig | None = None, *, name: str = "video_kl") -> None:
        super().__init__(config or VideoKLConfig(), name)
        _require_supported(self.config)
        network = cast(Any, built(self._network))
        self._settings: Mapping[str, Any] = plain_config(network.config)
        needed = _needed(self.config)
        self.encoder = Exact(network.encoder if "encoder" in needed else nn.ModuleDict({"conv_out": network.encoder.conv_out}))
        if network.quant_conv is not None:
            self.quant_conv = Exact(network.quant_conv)
        if "decoder" in needed:
            self.decoder = Half(network.decoder)
            if network.post_quant_conv is not None:
                self.post_quant_conv = Half(network.post_quant_conv)

    def _network(self) -> nn.Module:
        import diffusers

        network: nn.Module = getattr(diffusers, self.config.network)(**self.config.library)
        return network

    def identity_keys(self) -> tuple[str, ...]:
        """The encoder's last convolution, whose name depends on the network."""
        return tuple(sorted(key for key in self.state_dict() if key.startswith("encoder.network.conv_out.")))

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="video",
            vocab_size=0,
            dim=self._settings.get("latent_channels") or self._settings["z_dim"],
            fingerprint=self.fingerprint,
            temporal_stride=self._stride,
            patch_size=self.cell,
        )

    @property
    def _stride(self) -> int:
        """Frames of a latent frame, but for the first one, which has one frame."""
        return int(self._settings.get("temporal_compression_ratio", 4))

    @property
    def cell(self) -> tuple[int, int]:
        if self.config.network == "AutoencoderKLCosmos":
            side = int(self._settings["spatial_compression_ratio"])
        elif self.config.network == "AutoencoderKLCogVideoX":
            side = 2 ** (len(self._settings["block_out_channels"]) - 1)
        else:
            side = 2 ** len(self._settings["temperal_downsample"])
        return side, side

    def timing(self, frames: int) -> Timing:
        """The last frame is repeated up to one frame more than whole groups, of 4 frames, or of 8."""
        group = 8 if self.config.network == "AutoencoderKLCogVideoX" else self._stride
        total = frames + -(frames - 1) % group
        return Timing(0, total, 1 + (total - 1) // self._stride)

    # ---- encode

    def encode_clip(self, clip: Fed, generator: torch.Generator | None, sample: bool) -> Tensor:
        encoded = self._encoded_parts(clip)
        if self.config.network == "AutoencoderKLCosmos":
            # Its posterior is a point.
            return self._scaled(encoded[0])
        mean, log_variance = encoded[0].chunk(2)
        if sample:
            device = generator.device if generator else mean.device
            noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=device)
            mean = mean + noise.to(mean.device) * torch.exp(0.5 * log_variance.clamp(-30, 20))
        return self._scaled(mean)

    def _encoded_parts(self, clip: Fed) -> Float[Tensor, "1 channels frames rows columns"]:
        network: Any = self.encoder.network
        if self.config.network == "AutoencoderKLCosmos":
            whole: Tensor = self.quant_conv.network(network(clip[:]))
            return whole
        if self.config.network == "AutoencoderKLCogVideoX":
            # Group norms see a block, so that the blocks are the class's: 9 frames and then 8, or a single one.
            found, cache = [], None
            for frames in clip.blocks(9, 8):
                part, cache = network(frames, conv_cache=cache)
                found.append(part)
            return torch.cat(found, dim=2)
        caches = _caches(network)
        blocks = [network(frames, feat_cache=caches, feat_idx=[0]) for frames in clip.blocks(1, 4)]
        encoded: Tensor = self.quant_conv.network(torch.cat(blocks, dim=2))
        return encoded

    # ---- decode

    def decode_clip(self, values: Tensor) -> Iterator[Float[Tensor, "3 frames height width"]]:
        z, network = self._unscaled(values.float())[None].to(self.decoder.dtype), cast(Any, self.decoder.network)
        if self.config.network == "AutoencoderKLCosmos":
            yield network(self.post_quant_conv.network(z))[0]
        elif self.config.network == "AutoencoderKLCogVideoX":
            cache, start = None, 0
            for stop in range(z.shape[2] if z.shape[2] < 2 else 2 + z.shape[2] % 2, z.shape[2] + 1, 2):
                frames, cache = network(z[:, :, start:stop], conv_cache=cache)
                start = stop
                yield frames[0]
        else:
            z, caches = self.post_quant_conv.network(z), _caches(network)
            for place in range(z.shape[2]):
                first = {"first_chunk": place == 0} if self.config.network == "AutoencoderKLWan" else {}
                frames = network(z[:, :, place : place + 1], feat_cache=caches, feat_idx=[0], **first)
                yield frames[0].clamp(-1, 1)

    # ---- scales

    def _scaled(self, latents: Float[Tensor, "channels frames rows columns"]) -> Float[Tensor, "channels frames rows columns"]:
        mean, scale = self._scales(latents)
        return (latents - mean) * scale

    def _unscaled(
        self, latents: Float[Tensor, "channels frames rows columns"]
    ) -> Float[Tensor, "channels frames rows columns"]:
        mean, scale = self._scales(latents)
        return latents / scale + mean

    def _scales(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and factor of each channel, or of each channel and latent frame.

        Cosmos has statistics of its first 16 latent frames; later ones have those of the last.
        """
        channels, frames = latents.shape[:2]
        if self._settings.get("latents_mean") is None or self._settings.get("latents_std") is None:
            factor = float(self._settings.get("scaling_factor") or 1)
            factor = 1 / factor if self._settings.get("invert_scale_latents") else factor
            return latents.new_zeros(1), latents.new_full((1,), factor)
        mean, deviation = (
            latents.new_tensor(self._settings[name]).reshape(channels, -1) for name in ("latents_mean", "latents_std")
        )
        places = torch.arange(frames, device=latents.device, dtype=torch.int64).clamp(max=mean.shape[1] - 1)
        return mean[:, places, None, None], 1 / deviation[:, places, None, None]

    def embed(self, tokens: Latents | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The latents as sequences: latent frame by latent frame, row by row; zero where an item has ended."""
        rows = [values.flatten(1).T.float().to(self.device) for values in self.check(tokens).values]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


TOKENIZER = VideoKL


def _caches(network: nn.Module) -> list[Any]:
    """Places for the frames that Wan's causal convolutions keep, one for each."""
    return [None] * sum(type(module).__name__.endswith("CausalConv3d") for module in network.modules())
