"""Images as grids of ids by the vector-quantised autoencoders of transformers and diffusers: Emu3, Janus, MoVQ, aMUSEd.

A convolutional encoder, the nearest row of a codebook, a convolutional decoder (VQGAN, arXiv 2012.09841). The networks are the
libraries' own modules: transformers' ``Emu3VQVAE`` (arXiv 2409.18869) and ``JanusVQVAE`` (2410.13848), diffusers' ``VQModel``
with plain norms (aMUSEd, 2401.01808) or norms that see the codes (MoVQ, 2209.09002). What happens around them is ours: sizes,
normalisation, the search of the codebook, and one image where Emu3's class computes four equal frames.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo import media
from zoo.checkpoint import Checkpoint, renamed
from zoo.errors import KeysError, WeightsError
from zoo.kernels.codebook import CodebookSearch
from zoo.nn import vae
from zoo.nn.library import built, full_settings, known_settings
from zoo.nn.norm import exact_group_norms
from zoo.precision import Float32Module, compute_dtype
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared, runs_of_equals
from zoo.tokenizer.image import Grid, Image, Images, ImageTokenizer, grids_of, whole_cells, without_margins
from zoo.tokens import Tokens

NETWORKS = ("emu3", "janus", "vqmodel")
Vectors = Float[Tensor, "batch dim rows columns"]

PARTS = ("encoder", "decoder")
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class VQImagesConfig:
    """Sizes and settings.

    Attributes:
        network: ``emu3`` and ``janus`` for transformers' ``Emu3VQVAE`` and ``JanusVQVAE``, ``vqmodel`` for diffusers' class.
        library: settings of that class; what is left out gets the library's default.
        mean, std: of red, green and blue in [0, 1]: the network is fed ``(x - mean) / std`` and gives such numbers.
        parts: what is loaded.

    Raises:
        WeightsError: the library has no such setting, or the network is none for images of three channels.
    """

    network: str = "vqmodel"
    library: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise WeightsError(f"network must be one of {', '.join(NETWORKS)}, not {self.network!r}")
        settings = full_settings(_settings_class(self.network), self.library)
        object.__setattr__(self, "library", settings)
        checks = {
            "in_channels and out_channels must be 3": settings["in_channels"] == settings["out_channels"] == 3,
            "double_latent must be false": not settings.get("double_latent", False),
            "mean and std must be three numbers each": len(self.mean) == len(self.std) == 3,
            "std must be positive": min(self.std, default=0) > 0,
            f"parts must be some of {', '.join(PARTS)}": bool(self.parts) and set(self.parts) <= set(PARTS),
        }
        if failed := [text for text, holds in checks.items() if not holds]:
            raise WeightsError("; ".join(failed))

    @property
    def codebook_size(self) -> int:
        """Number of ids."""
        name = {"emu3": "codebook_size", "janus": "num_embeddings", "vqmodel": "num_vq_embeddings"}[self.network]
        return int(self.library[name])

    @property
    def code_dim(self) -> int:
        """Numbers of a code."""
        if self.network == "vqmodel":
            return int(self.library["vq_embed_dim"] or self.library["latent_channels"])
        return int(self.library["embed_dim"])

    @property
    def factor(self) -> int:
        """Pixels per id, along each side."""
        levels = self.library["block_out_channels" if self.network == "vqmodel" else "channel_multiplier"]
        return 1 << (len(levels) - 1)


def _settings_class(network: str) -> type[Any]:
    """What takes the settings of a network: transformers' class of its configuration, or diffusers' of the model."""
    if network == "emu3":
        from transformers import Emu3VQVAEConfig

        return Emu3VQVAEConfig
    if network == "janus":
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig

        return JanusVQVAEConfig
    from diffusers import VQModel

    return VQModel


# ---------------------------------------------------------------------------------------------------------------- networks


class Encoder(Float32Module):
    """Normalised images to the vectors that are looked up in the codebook; stays in float32."""

    def __init__(self, network: nn.Module, quant_conv: nn.Module) -> None:
        super().__init__()
        self.network = exact_group_norms(network)
        self.quant_conv = quant_conv

    def forward(self, images: Images) -> Vectors:
        # Convolutions on a CPU are several times quicker in this layout.
        vectors: Tensor = self.quant_conv(self.network(images.to(memory_format=torch.channels_last)))
        return vectors


class Decoder(nn.Module):
    """Codes to normalised images, in the precision of the weights.

    Args:
        norms_see_codes: whether the norms are MoVQ's, scaled and shifted by the codes (arXiv 2209.09002, equation 4).
    """

    def __init__(self, network: nn.Module, post_quant_conv: nn.Module, norms_see_codes: bool = False) -> None:
        super().__init__()
        self.network = network
        self.post_quant_conv = post_quant_conv
        self.norms_see_codes = norms_see_codes

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return compute_dtype(self.network.conv_in)  # type: ignore[arg-type]  # all of these networks begin with it

    def forward(self, codes: Vectors) -> Images:
        codes = codes.to(self.dtype, memory_format=torch.channels_last)
        features = self.post_quant_conv(codes)
        images: Tensor = self.network(features, codes) if self.norms_see_codes else self.network(features)
        return images


class EmuEncoder(Encoder):
    """Emu3's encoder of video for an image, which is a clip of equal frames: the layers that see single frames run once."""

    def __init__(self, network: nn.Module, quant_conv: nn.Module, frames: int) -> None:
        super().__init__(network, quant_conv)
        self.frames = frames

    def forward(self, images: Images) -> Vectors:
        network: Any = self.network
        hidden = network.conv_in(images.to(memory_format=torch.channels_last))
        hidden = network.norm_out(network.middle_block(network.down_block(hidden)))
        clip = network.conv_out(F.silu(hidden))[:, :, None].repeat(1, 1, self.frames, 1, 1)
        for halving in network.time_conv:
            clip = F.silu(halving(clip))
        for block in network.time_res_stack:
            clip = block(clip)
        vectors: Tensor = self.quant_conv(clip)
        return vectors[:, :, 0]


class EmuDecoder(Decoder):
    """Emu3's decoder of video for an image, the first of the frames: only that one goes through the layers of single frames."""

    def forward(self, codes: Vectors) -> Images:
        network: Any = self.network
        codes = codes.to(self.dtype)[:, :, None]
        # The codes, which the norms see, take the way through time as well.
        clips = torch.cat([self.post_quant_conv(codes), codes])
        for block in network.time_res_stack:
            clips = block(clips)
        for doubling in network.time_conv:
            clips = F.silu(doubling(clips))
        hidden, codes = clips[:, :, 0].to(memory_format=torch.channels_last).chunk(2)
        hidden = network.up_block(network.middle_block(network.conv_in(hidden), codes), codes)
        images: Tensor = network.conv_out(F.silu(network.norm_out(hidden, codes)))
        return images


class Codebook(Float32Module):
    """The nearest row of a codebook, the smallest index among equals, evaluated exactly.

    Args:
        unit: whether vectors and rows are brought to length 1 first, as Janus' original code has it. transformers' class does
            so with the rows that it decodes and forgets it in the search.
    """

    def __init__(self, size: int, dim: int, unit: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.unit = unit
        self._search = CodebookSearch(unit_widths=(dim,) if unit else ())

    def ids(self, vectors: Vectors) -> Int[Tensor, "batch rows columns"]:
        """Ids of vectors."""
        return self._search(vectors.float().permute(0, 2, 3, 1), self.weight)

    def codes(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Codes of ids."""
        rows = F.embedding(ids, self.weight)
        return F.normalize(rows, dim=-1) if self.unit else rows


def _networks(config: VQImagesConfig) -> tuple[Encoder, Decoder]:
    """Both halves, taken out of the library's model."""
    # Attention by torch's fused kernel, as both libraries do by default; others differ in the last bits.
    if config.network == "emu3":
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        settings = Emu3VQVAEConfig(**{**config.library, "attn_implementation": "sdpa"})
        model: Any = built(lambda: Emu3VQVAE(settings))
        frames = config.library["temporal_downsample_factor"]
        return EmuEncoder(model.encoder, model.quant_conv, frames), EmuDecoder(model.decoder, model.post_quant_conv)
    if config.network == "janus":
        from transformers import JanusVQVAE
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig

        model = built(lambda: JanusVQVAE(JanusVQVAEConfig(**config.library)))
        return Encoder(model.encoder, model.quant_conv), Decoder(model.decoder, model.post_quant_conv)
    from diffusers import VQModel

    make: Any = VQModel
    model = built(lambda: make(**config.library))
    norms_see_codes = config.library["norm_type"] == "spatial"
    return Encoder(model.encoder, model.quant_conv), Decoder(model.decoder, model.post_quant_conv, norms_see_codes)


# ------------------------------------------------------------------------------------------ checkpoints of both libraries


# Where the network is a part of a language model of transformers.
_INSIDE = "model.vqmodel."
_BESIDE = ("model.", "lm_head.")
_CODEBOOK = "quantize.embedding.weight"
_MARKS: tuple[Collection[str], ...] = (
    ("quant_conv.conv.weight", "encoder.time_conv.0.conv.conv.weight"),
    # Levels of the decoder are counted from the coarsest, unlike those of the original VQGAN.
    ("quant_conv.weight", "encoder.mid.attn_1.q.weight", "decoder.up.0.upsample.conv.weight"),
    ("quant_conv.weight", "encoder.mid_block.resnets.0.conv1.weight"),
)
# Settings of Emu3's original configuration under the names that transformers gave them.
_EMU_NAMES = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "double_z": "double_latent",
    "z_channels": "latent_channels",
}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of one of the networks, alone or inside a language model."""
    found = {key.removeprefix(_INSIDE) for key in keys if wanted(key)}
    return _CODEBOOK in found and any(found.issuperset(marks) for marks in _MARKS)


def wanted(key: str) -> bool:
    """Whether an entry is not of the language model around the network."""
    return key.startswith(_INSIDE) or not key.startswith(_BESIDE)


def network_of(raw: Mapping[str, Any]) -> str | None:
    """The network that an upstream configuration describes; ``None`` if it is another one's."""
    if raw.get("_class_name") == "VQModel":
        return "vqmodel"
    kind = str(raw.get("model_type", "")).lower()
    for network in ("emu3", "janus"):
        if kind.startswith(network):
            return network
    return "emu3" if {"ch_mult", "temporal_downsample_factor"} <= raw.keys() else None


def companions(raw: Mapping[str, Any]) -> Collection[str]:
    """Checkpoints of transformers have the normalisation of pixels in a file of its own."""
    return () if network_of(raw) in (None, "vqmodel") else (PREPROCESSOR,)


def upstream_config(raw: Mapping[str, Any]) -> VQImagesConfig | None:
    """Read the ``config.json`` of either library, of Emu3's original tokenizer, or of a language model around the network.

    Beside the settings of a network of transformers, ``raw`` holds the content of ``preprocessor_config.json`` under that name.

    Raises:
        WeightsError: a setting is impossible, or nothing says how pixels are normalised.
    """
    network = network_of(raw)
    if network is None:
        return None
    given = dict(raw.get("vq_config", raw))
    if network == "emu3":
        given = {_EMU_NAMES.get(key, key): value for key, value in given.items()}
        if {"base_channels", "channel_multiplier"} <= given.keys():
            given.setdefault("hidden_size", given["base_channels"] * given["channel_multiplier"][-1])
    library = known_settings(_settings_class(network), given)
    if network == "vqmodel":
        return VQImagesConfig(network, library)
    if PREPROCESSOR not in raw:
        raise WeightsError(f"nothing says how pixels are normalised: the configuration needs {PREPROCESSOR} beside it")
    mean, std = _normalisation(raw[PREPROCESSOR])
    return VQImagesConfig(network, library, mean, std)


def _normalisation(raw: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels that an image processor of transformers subtracts and divides by."""
    try:
        scale = float(raw.get("rescale_factor", 1 / 255))
        if not raw.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-6:
            raise WeightsError(f"{PREPROCESSOR}: pixels must be scaled to [0, 1]")
        if not raw.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        return tuple(map(float, raw["image_mean"])), tuple(map(float, raw["image_std"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{PREPROCESSOR} cannot be used: {error!r}") from error


def our_key(key: str) -> str | None:
    """Our name for an entry of a checkpoint; ``None`` if there is none."""
    name = key.removeprefix(_INSIDE)
    return "quantizer.weight" if name == _CODEBOOK else vae.our_key(name)


def convert(state: Mapping[str, Tensor], config: VQImagesConfig | None) -> tuple[VQImagesConfig, dict[str, Tensor]]:
    """The tensors of both halves, or of those that are wanted, in our names.

    Raises:
        KeysError: there is no name for one, or the codebook has another size than the configuration says.
    """
    if config is None:
        raise WeightsError("the sizes of this network do not follow from its tensors: it needs its config.json beside it")
    ours = renamed(state, our_key, "VQ", wanted)
    if "quantizer.weight" not in ours:
        raise KeysError("missing: quantizer.weight")
    named = {name: vae.our_tensor(name, tensor) for name, tensor in ours.items()}
    absent = tuple(f"{part}." for part in PARTS if part not in config.parts)
    return config, {name: tensor for name, tensor in named.items() if not name.startswith(absent)}


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted, companions=companions)


# --------------------------------------------------------------------------------------------------------------- tokenizer


class VQImages(ImageTokenizer[VQImagesConfig, Tokens]):
    """Images of any size to one id for every 8 x 8 or 16 x 16 pixels, row by row, and back to images of their size.

    Right and lower edges are continued up to a whole number of cells, and cut off again when decoding. Norms and attention see
    the whole image: images are batched where their sizes are equal. Tokens remember the rows of the grid; of bare ids it is a
    square unless ``grid`` says otherwise.
    """

    Config = VQImagesConfig
    family = "vq_images"
    checkpoint = CHECKPOINT
    identity = ("quantizer.weight",)
    # On a CPU, one by one costs nothing and makes results independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 8), "decode": Budget(1, 8)}

    def __init__(self, config: VQImagesConfig | None = None, *, name: str = "vq_images") -> None:
        super().__init__(config or VQImagesConfig(), name)
        encoder, decoder = _networks(self.config)
        self.quantizer = Codebook(self.config.codebook_size, self.config.code_dim, unit=self.config.network == "janus")
        if "encoder" in self.config.parts:
            self.encoder = encoder
        if "decoder" in self.config.parts:
            self.decoder = decoder

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=self.config.codebook_size,
            dim=self.config.code_dim,
            fingerprint=self.fingerprint,
            parts=self.config.parts,
        )

    # ---- encode

    def prepare(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
    ) -> list[Prepared]:
        """Images as they are: ``pixels`` ``[3, height, width]`` in [-1, 1]; ``amount`` counts pixels.

        Arguments and errors as for `encode`.
        """
        plain = super().prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        rows = [-(-item.tensors["pixels"].shape[1] // self.config.factor) for item in plain]
        return [Prepared(item.tensors, {**item.meta, "rows": n}, item.amount) for item, n in zip(plain, rows, strict=True)]

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Int[Tensor, " length"]]:
        padded = self._normalised(whole_cells(images, self.config.factor))
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            vectors = self.encoder(padded)
        return list(self.quantizer.ids(vectors).flatten(1))

    def _normalised(self, images: Images) -> Images:
        if self._halved:
            return images
        mean, std = self._statistics(images.device)
        return ((images + 1) / 2 - mean) / std

    def _in_range(self, images: Images) -> Images:
        if self._halved:
            return images
        mean, std = self._statistics(images.device)
        return (images * std + mean) * 2 - 1

    @property
    def _halved(self) -> bool:
        """Whether the network takes pixels in [-1, 1]."""
        return set(self.config.mean) == set(self.config.std) == {0.5}

    def _statistics(self, device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
        mean, std = torch.tensor([self.config.mean, self.config.std], dtype=torch.float32, device=device)[..., None, None]
        return mean, std

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        grid: Grid | None = None,
        size: str | None = "original",
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Image]:
        """Tokens to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``.
            grid: rows and columns of ids, of bare ids that are no square.
            size: ``"original"`` for the size of the encoded image, where the tokens know it; ``None`` for whole cells.
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id or an option is out of range, or an item is no grid.
            WeightsError: the decoder was not loaded.
        """
        self.require("decoder", "decoding to images")
        self.require_known_size(size)
        checked = self.check(tokens)
        grids = grids_of(checked, grid)
        images: list[Tensor] = []
        values = checked.unpadded()
        with progress_bar("decode", len(values), progress, unit="image") as advance:
            for batch in runs_of_equals(grids, self.budget("decode")):
                ids = torch.stack([values[i] for i in batch]).unflatten(1, grids[batch[0]])
                codes = self.quantizer.codes(ids.to(self.device)).permute(0, 3, 1, 2)
                images += self._in_range(self.decoder(codes).float().contiguous())
                advance(len(batch))
        return without_margins(images, checked, size)

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of the ids, of length 1 in Janus; zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.quantizer.codes(ids.clamp(min=0)) * (ids >= 0)[..., None]

    def compile_modules(self) -> None:
        """Compile the halves that are loaded; the first calls, and those at a new size, are slow."""
        for part in self.config.parts:
            self.get_submodule(part).compile(dynamic=True)


TOKENIZER = VQImages
