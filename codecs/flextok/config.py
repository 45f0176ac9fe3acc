"""Sizes of a FlexTok."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.nn.vae import VAESizes

MASK_MODES = ("causal_last", "causal", "full")
GUIDANCE_METHODS = ("apg", "cfg")


@dataclass(frozen=True)
class FlexTokConfig:
    """Sizes of one model; the defaults are the official d18-d28 checkpoints.

    Attributes:
        vae_widths, vae_layers_per_block, vae_groups, latent_channels: the autoencoder, see `VAESizes`.
        scaling_factor: latents are multiplied by it, to have about unit variance.
        grid: rows and columns of patches.
        patch_size: rows and columns of latents in a patch.
        registers: tokens per image.
        levels: of the finite scalar quantizer, per component.
        encoder_dim, encoder_depth, encoder_head_dim: width, blocks and width of an attention head of the encoder.
        encoder_mask: what the encoder's registers see: all patches and earlier registers (``causal_last``), everything before
            them (``causal``; patches see earlier patches only) or everything (``full``).
        decoder_dim, decoder_depth, decoder_head_dim: the same of the decoder.
        mlp_ratio: width of the feed-forward layers over that of the model, before the 2/3 of gated ones.
        max_timestep: scale of the timestep's sinusoidal features; t itself lies in [0, 1].
        frequency_embedding_size: number of those features.
        steps, guidance, guidance_method: sampling when `decode` is not told otherwise; ``apg`` is normalised guidance
            (arXiv 2410.02416), ``cfg`` the plain classifier-free one.
        logit_normal: noise levels of training follow a logit-normal distribution, instead of the one below.
        mode_scale: concentration of the noise levels of training around the middle (arXiv 2403.03206, equation 20).
    """

    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers_per_block: int = 2
    vae_groups: int = 32
    latent_channels: int = 16
    scaling_factor: float = 0.88
    grid: tuple[int, int] = (16, 16)
    patch_size: tuple[int, int] = (2, 2)
    registers: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    encoder_dim: int = 1152
    encoder_depth: int = 18
    encoder_head_dim: int = 64
    encoder_mask: str = "causal_last"
    decoder_dim: int = 1792
    decoder_depth: int = 28
    decoder_head_dim: int = 64
    mlp_ratio: float = 4.0
    max_timestep: float = 1000.0
    frequency_embedding_size: int = 256
    steps: int = 20
    guidance: float = 7.5
    guidance_method: str = "apg"
    logit_normal: bool = False
    mode_scale: float = 0.25

    def __post_init__(self) -> None:
        for part, dim, head_dim in (
            ("encoder", self.encoder_dim, self.encoder_head_dim),
            ("decoder", self.decoder_dim, self.decoder_head_dim),
        ):
            if dim % head_dim:
                raise ValueError(f"{part}_dim {dim} is not a multiple of {part}_head_dim {head_dim}")
        if len(self.grid) != 2 or len(self.patch_size) != 2 or min(*self.grid, *self.patch_size) < 1:
            raise ValueError(f"grid and patch_size must be two positive integers, not {self.grid} and {self.patch_size}")
        if self.frequency_embedding_size < 2:
            raise ValueError(f"frequency_embedding_size must be at least 2, not {self.frequency_embedding_size}")
        if min(self.levels) < 2:
            raise ValueError(f"every component needs at least 2 levels, not {self.levels}")
        if self.encoder_mask not in MASK_MODES:
            raise ValueError(f"encoder_mask must be one of {', '.join(MASK_MODES)}, not {self.encoder_mask!r}")
        if self.guidance_method not in GUIDANCE_METHODS:
            raise ValueError(f"guidance_method must be one of {', '.join(GUIDANCE_METHODS)}")

    @property
    def vae(self) -> VAESizes:
        """Sizes of the autoencoder."""
        return VAESizes(self.vae_widths, self.vae_layers_per_block, self.vae_groups, self.latent_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model was made for."""
        return self.grid[0] * self.cell[0], self.grid[1] * self.cell[1]

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width in pixels of a patch."""
        return self.patch_size[0] * self.vae.factor, self.patch_size[1] * self.vae.factor

    @property
    def patch_channels(self) -> int:
        """Numbers in a patch of latents."""
        return self.patch_size[0] * self.patch_size[1] * self.latent_channels
