"""RAE, representation autoencoders: what a vision transformer sees of an image, and a decoder that paints it again.

Paper: Zheng et al., "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690. The network is diffusers'
``AutoencoderRAE``; its encoder is DINOv2 with registers, SigLIP 2 or MAE, frozen, without the scale of its last norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, renamed
from zoo.errors import ItemError, KeysError, WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, built, full_settings, known_settings
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.image import Images, ImageTokenizer

# Settings of training, and statistics that the tensors hold as well.
_NOT_SIZES = ("latents_mean", "latents_std", "noise_tau", "use_encoder_loss")
# The class divides by the deviations of latents with this added to them.
_EPSILON = 1e-5
# DINOv2's first states: one of the class, four registers.
_BESIDE = 5


@dataclass(frozen=True)
class RAEConfig:
    """Sizes of one model.

    Attributes:
        library: settings of diffusers' ``AutoencoderRAE``; what is left out gets the library's default.
        statistics: shape of the means and of the deviations of latents.

    Raises:
        WeightsError: the library has no such setting, or the model is none of images of three channels and grids of latents.
    """

    library: Mapping[str, Any] = field(default_factory=dict)
    statistics: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        from diffusers import AutoencoderRAE

        given = {name: value for name, value in self.library.items() if name not in _NOT_SIZES}
        settings = {k: v for k, v in full_settings(AutoencoderRAE, given).items() if k not in _NOT_SIZES}
        object.__setattr__(self, "library", settings)
        object.__setattr__(self, "statistics", tuple(self.statistics))
        checks = {
            "num_channels must be 3": settings["num_channels"] == 3,
            "reshape_to_2d must be true": bool(settings["reshape_to_2d"]),
            "scaling_factor must not be 0": settings["scaling_factor"] != 0,
            "encoder_type must be dinov2, siglip2 or mae": settings["encoder_type"] in ("dinov2", "siglip2", "mae"),
            "encoder_patch_size must divide encoder_input_size": settings["encoder_patch_size"] > 0
            and settings["encoder_input_size"] % settings["encoder_patch_size"] == 0,
        }
        if failed := [text for text, holds in checks.items() if not holds]:
            raise WeightsError("; ".join(failed))

    @property
    def grid(self) -> int:
        """Rows, and columns, of latents."""
        return int(self.library["encoder_input_size"] // self.library["encoder_patch_size"])

    @property
    def side(self) -> int:
        """Height, and width, of an image."""
        return int(self.grid * self.library["patch_size"])


class Statistics(Float32Module):
    """Means and deviations of pixels in [0, 1], and of latents."""

    pixel_mean: Tensor
    pixel_std: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1, dtype=torch.float32))
        self.register_buffer("pixel_std", torch.ones(1, 3, 1, 1, dtype=torch.float32))
        self.register_buffer("latent_mean", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("latent_std", torch.ones(shape, dtype=torch.float32))


# ---- checkpoints of diffusers

_STATISTICS = {
    "encoder_mean": "statistics.pixel_mean",
    "encoder_std": "statistics.pixel_std",
    "_latents_mean": "statistics.latent_mean",
    "_latents_std": "statistics.latent_std",
}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of diffusers' ``AutoencoderRAE``."""
    return {"_latents_mean", "encoder_mean", "decoder.trainable_cls_token"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> RAEConfig | None:
    """Read diffusers' ``config.json``.

    Raises:
        WeightsError: a setting is impossible.
    """
    from diffusers import AutoencoderRAE

    if raw.get("_class_name") != "AutoencoderRAE":
        return None
    return RAEConfig(known_settings(AutoencoderRAE, {k: v for k, v in raw.items() if k not in _NOT_SIZES}))


def wanted(key: str) -> bool:
    """Whether a tensor is read: the positions of the decoder are computed, and older files hold them too."""
    return key != "decoder.decoder_pos_embed"


def our_key(key: str) -> str | None:
    """Our name for an entry of a checkpoint; ``None`` if there is none."""
    half, _, rest = key.partition(".")
    return _STATISTICS.get(key) or (f"encoder.network.{rest}" if half == "encoder" else key if half == "decoder" else None)


def convert(state: Mapping[str, Tensor], config: RAEConfig | None) -> tuple[RAEConfig, dict[str, Tensor]]:
    """The tensors in our names.

    Raises:
        KeysError: there is no name for one, or the statistics of latents are missing.
        WeightsError: there is no configuration, which alone tells the number of heads and the size of images.
    """
    if config is None:
        raise WeightsError("the sizes of this network do not follow from its tensors: it needs its config.json beside it")
    if "_latents_mean" not in state:
        raise KeysError("missing: _latents_mean")
    return replace(config, statistics=tuple(state["_latents_mean"].shape)), renamed(state, our_key, "AutoencoderRAE", wanted)


# ---- the tokenizer


class RAE(ImageTokenizer[RAEConfig, Latents]):
    """Square images of one size to a grid of what a vision transformer sees, and back.

    Latents are normalised, as diffusion models are trained on them. The encoder sees the image at its own resolution, which the
    class resizes to by cubic interpolation.
    """

    Config = RAEConfig
    family = "rae"
    identity = ()
    latent_axes = ("rows", "columns")
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 8), "decode": Budget(1, 8)}
    checkpoint = Checkpoint(
        recognises=recognises, convert=convert, config=upstream_config, wanted=wanted, settings=("statistics",)
    )

    def __init__(self, config: RAEConfig | None = None, *, name: str = "rae") -> None:
        super().__init__(config or RAEConfig(), name)
        try:
            model: Any = built(self._network)
        except AttributeError as error:
            kind = self.config.library["encoder_type"]
            raise WeightsError(f"diffusers cannot build {kind} with this release of transformers: {error}") from error
        self.encoder, self.decoder = Exact(model.encoder), model.decoder
        self.statistics = Statistics(self.config.statistics)

    def _network(self) -> nn.Module:
        from diffusers import AutoencoderRAE

        return cast(nn.Module, AutoencoderRAE(**self.config.library))

    def identity_keys(self) -> tuple[str, ...]:
        """Statistics of latents, and the last matrix of the encoder."""
        matrices = [key for key, tensor in self.state_dict().items() if key.startswith("encoder.") and tensor.ndim == 2]
        return ("statistics.latent_mean", "statistics.latent_std", matrices[-1])

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=0,
            dim=self.config.library["encoder_hidden_size"],
            fingerprint=self.fingerprint,
            image_size=(self.config.side, self.config.side),
        )

    def check(self, tokens: Any) -> Latents:
        """See `zoo.Tokenizer.check`; latents are a grid of the model's size."""
        checked = super().check(tokens)
        side = self.config.grid
        for index, values in enumerate(checked.values):
            if tuple(values.shape[1:]) != (side, side):
                raise ItemError(
                    f"latents of {self.name} are {side} x {side}, not {' x '.join(map(str, values.shape[1:]))}", index
                )
        return checked

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Float[Tensor, "channels rows columns"]]:
        own, library = self.statistics, self.config.library
        side, grid = library["encoder_input_size"], self.config.grid
        pixels = (images + 1) / 2
        if pixels.shape[2] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            states = self._states((pixels - own.pixel_mean) / own.pixel_std).float()
        latents = states.transpose(1, 2).unflatten(2, (grid, grid))
        return list((latents - own.latent_mean) / (own.latent_std + _EPSILON) * library["scaling_factor"])

    def _states(self, pixels: Images) -> Float[Tensor, "batch cells channels"]:
        """What the encoder gives for the cells of an image, row by row."""
        network: Any = self.encoder.network
        kind, cells = self.config.library["encoder_type"], self.config.grid**2
        if kind == "dinov2":
            found: Tensor = network(pixels).last_hidden_state[:, _BESIDE:]
        elif kind == "siglip2":
            found = network(pixels, interpolate_pos_encoding=True).last_hidden_state
        else:
            # MAE goes through cells in the order of these numbers.
            order = torch.arange(cells, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
            found = network(pixels, order, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        return found

    def decode_images(self, values: Float[Tensor, "batch channels rows columns"]) -> Images:
        own = self.statistics
        states = values.float() / self.config.library["scaling_factor"] * (own.latent_std + _EPSILON) + own.latent_mean
        network: Any = self.decoder
        rows = states.flatten(2).transpose(1, 2).to(next(network.parameters()).dtype)
        pixels = network.unpatchify(network(rows, return_dict=True).logits).float()
        images: Tensor = (pixels * own.pixel_std + own.pixel_mean) * 2 - 1
        return images

    def embed(self, tokens: Latents | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The latents as sequences, row by row."""
        return torch.stack([values.flatten(1).T.to(self.device) for values in self.check(tokens).values])


TOKENIZER = RAE
