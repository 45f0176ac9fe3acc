"""Emu3's tokenizer for video: one id for 4 frames of 8 x 8 pixels (arXiv 2409.18869, section 3.1.1).

The network is transformers' ``Emu3VQVAE``. Its layers see one frame, at any resolution, or time, at that of the ids alone. So
frames go through it a few at a time, and a clip's ids are those of one pass whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import WeightsError
from zoo.kernels.codebook import CodebookSearch
from zoo.nn.library import Exact, Half, built, plain_config
from zoo.precision import Float32Module
from zoo.spec import Spec
from zoo.tokenizer.video import Fed, Timing, VideoTokenizer
from zoo.tokens import Tokens

# Settings of the original configuration under the names that transformers gave them.
_NAMES = {"ch": "base_channels", "ch_mult": "channel_multiplier", "double_z": "double_latent", "z_channels": "latent_channels"}
_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Emu3VideoConfig:
    """Sizes of one model; the defaults are those of ``BAAI/Emu3-VisionTokenizer``.

    Attributes:
        library: settings of transformers' ``Emu3VQVAE``.
        mean, std: of each channel of pixels in [0, 1], which are subtracted and divided by.
        parts: what is loaded, ``encoder``, ``decoder`` or both.
    """

    library: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    parts: tuple[str, ...] = ("encoder", "decoder")


def upstream_config(raw: Mapping[str, Any]) -> Emu3VideoConfig:
    """Read ``config.json``, the original's or that of transformers, with ``preprocessor_config.json`` under that name in it.

    Raises:
        WeightsError: it describes another network, or the normalisation cannot be read.
    """
    settings = {_NAMES.get(key, key): value for key, value in plain_config(raw).items()}
    preprocessor = settings.pop(_PREPROCESSOR, None)
    settings = settings.get("vq_config", settings)
    known = _settings_class()().to_dict().keys() - {"model_type"}
    library = {key: value for key, value in settings.items() if key in known}
    if not {"base_channels", "channel_multiplier"} <= library.keys():
        raise WeightsError("this is not the configuration of Emu3's vision tokenizer")
    library.setdefault("hidden_size", library["base_channels"] * library["channel_multiplier"][-1])
    if preprocessor is None:
        return Emu3VideoConfig(plain_config(library))
    try:
        mean, std = (tuple(map(float, preprocessor[name])) for name in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{_PREPROCESSOR} cannot be used: {error!r}") from error
    return Emu3VideoConfig(plain_config(library), mean, std)


def convert(state: Mapping[str, Tensor], config: Emu3VideoConfig | None) -> tuple[Emu3VideoConfig, dict[str, Tensor]]:
    """The tensors of the halves that are wanted, in our names.

    Raises:
        WeightsError: there is no configuration.
    """
    if config is None:
        raise WeightsError("the sizes of this network do not follow from its tensors: it needs its config.json beside it")
    halves = {"encoder": "encoder", "quant_conv": "encoder", "decoder": "decoder", "post_quant_conv": "decoder"}
    named = {}
    for key, tensor in state.items():
        half, _, rest = key.partition(".")
        if key == "quantize.embedding.weight":
            named["codebook.weight"] = tensor
        elif halves.get(half) in config.parts or half not in halves:
            named[f"{half}.network.{rest}"] = tensor
    return config, named


class Codebook(Float32Module):
    """The nearest row of a codebook, evaluated exactly."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self._search = CodebookSearch()

    def ids(self, vectors: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape"]:
        """Ids of vectors."""
        return self._search(vectors, self.weight)


class Emu3Video(VideoTokenizer[Emu3VideoConfig, Tokens]):
    """Clips of any length and size to ids, one for 4 frames of 8 x 8 pixels, and back to as many frames."""

    Config = Emu3VideoConfig
    family = "emu3_video"
    # The keys are those of the tokenizer of images, which takes files that say nothing else.
    checkpoint = Checkpoint(
        recognises=lambda keys: False, convert=convert, config=upstream_config, companions=lambda raw: (_PREPROCESSOR,)
    )
    identity = ("codebook.weight",)
    #: Frames that go through the layers of single frames at once.
    block_frames = 4

    def __init__(self, config: Emu3VideoConfig | None = None, *, name: str = "emu3_video") -> None:
        super().__init__(config or Emu3VideoConfig(), name)
        self._settings: Any = _settings_class()(**self.config.library, attn_implementation="sdpa")
        network = cast(Any, built(self._network))
        if "encoder" in self.config.parts:
            self.encoder, self.quant_conv = Exact(network.encoder), Exact(network.quant_conv)
        if "decoder" in self.config.parts:
            self.decoder, self.post_quant_conv = Half(network.decoder), Half(network.post_quant_conv)
        self.codebook = Codebook(self._settings.codebook_size, self._settings.embed_dim)

    def _network(self) -> nn.Module:
        from transformers import Emu3VQVAE

        return Emu3VQVAE(self._settings)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="video",
            vocab_size=self._settings.codebook_size,
            dim=self._settings.embed_dim,
            fingerprint=self.fingerprint,
            temporal_stride=self._settings.temporal_downsample_factor,
            patch_size=self.cell,
        )

    @property
    def cell(self) -> tuple[int, int]:
        side = 2 ** (len(self._settings.channel_multiplier) - 1)
        return side, side

    def timing(self, frames: int) -> Timing:
        """The last frame is repeated up to whole groups of 4, the class's least; the class drops what is over."""
        stride = self._settings.temporal_downsample_factor
        return Timing(0, frames + -frames % stride, -(-frames // stride))

    def encode_clip(self, clip: Fed, generator: torch.Generator | None, sample: bool) -> Int[Tensor, "frames rows columns"]:
        network: Any = self.encoder.network
        mean, std = (
            torch.tensor(self._statistics(which), dtype=torch.float32, device=self.device)[:, None, None]
            for which in ("mean", "std")
        )
        parts = []
        for frames in clip.blocks(self.block_frames, self.block_frames):
            images = ((frames[0].transpose(0, 1) + 1) / 2 - mean) / std
            hidden = network.norm_out(network.middle_block(network.down_block(network.conv_in(images))))
            parts.append(network.conv_out(F.silu(hidden)))
        hidden = torch.cat(parts).transpose(0, 1)[None]
        for halving in network.time_conv:
            hidden = F.silu(halving(hidden))
        for block in network.time_res_stack:
            hidden = block(hidden)
        vectors = self.quant_conv.network(hidden)[0]
        return self.codebook.ids(vectors.movedim(0, -1).contiguous())

    def decode_clip(self, values: Int[Tensor, "frames rows columns"]) -> Iterator[Float[Tensor, "3 frames height width"]]:
        network: Any = self.decoder.network
        codes = F.embedding(values, self.codebook.weight).movedim(-1, 0)[None].to(self.decoder.dtype)
        # The codes, which the norms see, take the way through time as well.
        both = torch.cat([self.post_quant_conv.network(codes), codes])
        for block in network.time_res_stack:
            both = block(both)
        for doubling in network.time_conv:
            both = F.silu(doubling(both))
        hidden, codes = both.transpose(1, 2).unbind(0)
        mean, std = (
            torch.tensor(self._statistics(which), dtype=torch.float32, device=self.device)[:, None, None, None]
            for which in ("mean", "std")
        )
        for start in range(0, len(hidden), self.block_frames):
            seen = codes[start : start + self.block_frames]
            inner = network.middle_block(network.conv_in(hidden[start : start + self.block_frames]), seen)
            inner = network.norm_out(network.up_block(inner, seen), seen)
            frames = network.conv_out(F.silu(inner)).float().transpose(0, 1)
            yield (frames * std + mean) * 2 - 1

    def _statistics(self, which: str) -> Sequence[float]:
        found: Sequence[float] = getattr(self.config, which)
        return found

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of ids; zero where an item has ended."""
        rows = [F.embedding(ids.to(self.device), self.codebook.weight) for ids in self.check(tokens).unpadded()]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


TOKENIZER = Emu3Video


def _settings_class() -> Any:
    from transformers import Emu3VQVAEConfig

    return Emu3VQVAEConfig
