"""VidTok: clips to finite scalar codes or to latents, and back (arXiv 2412.13061).

The network is diffusers' ``AutoencoderVidTok``: 2-D convolutions within frames, 1-D convolutions along time, and 3-D ones where
both are narrow (section 3.1 of the paper); FSQ with 8 levels in each channel (section 3.2) or a Gaussian posterior.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, Half, Turn, built, plain_config
from zoo.spec import Spec
from zoo.tokenizer.video import Fed, Timing, VideoTokenizer
from zoo.tokens import Tokens

#: Releases of causal models that the network computes as they were trained.
VERSION = "1.1"


@dataclass(frozen=True)
class VidTokConfig:
    """Sizes of one model; the defaults are those of ``vidtok_fsq_causal_488_32768_v1_1``.

    Attributes:
        library: settings of diffusers' ``AutoencoderVidTok``.
        version: release of a causal model's weights; only those of 1.1 are computed as they were trained.
        parts: what is loaded, ``encoder``, ``decoder`` or both.
    """

    library: Mapping[str, Any] = field(
        default_factory=lambda: {"regularizer": "fsq", "codebook_size": 32768, "z_channels": 5, "double_z": False}
    )
    version: str = VERSION
    parts: tuple[str, ...] = ("encoder", "decoder")

    @property
    def causal(self) -> bool:
        """Whether no frame depends on later ones."""
        return bool(self.library.get("is_causal", True))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.library.get("z_channels", 4))

    @property
    def levels(self) -> int:
        """Levels of each channel; 0 of a model with latents."""
        return 8 if self.library.get("regularizer", "kl") == "fsq" else 0

    @property
    def stages(self) -> int:
        """Resolutions of the network."""
        return len(self.library.get("ch_mult", (1, 2, 4, 4)))

    @property
    def temporal(self) -> int:
        """Frames that one latent frame stands for."""
        halvings = self.library.get("tempo_ds")
        return int(2 ** (2 if halvings is None else len(halvings)))

    @property
    def spatial(self) -> int:
        """Pixels along each side of a cell."""
        halvings = self.library.get("spatial_ds")
        return int(2 ** (self.stages - 1 if halvings is None else len(halvings)))


# ---- checkpoints: those of microsoft/VidTok have the names of diffusers' class


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a VidTok that is not causal.

    Nothing in a file tells a causal model of version 1.0 from one of 1.1, so neither is recognised without a word about it.
    """
    return {"encoder.conv_in.weight", "encoder.down_temporal.0.block.0.conv1.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> VidTokConfig | None:
    """Settings of ``AutoencoderVidTok`` with ``version`` beside them, or diffusers' ``config.json``, whose class has one.

    Raises:
        WeightsError: the model is causal and of version 1.0, or of one that is not named.
    """
    settings = plain_config(raw)
    kind = settings.pop("_class_name", None)
    if kind not in (None, "AutoencoderVidTok"):
        raise WeightsError(f"this is the configuration of {kind}, not of AutoencoderVidTok")
    version = settings.pop("version", VERSION if kind else None)
    inner = settings.pop("library", None)
    library = {**settings, **(inner or {})}
    if library.get("is_causal", True):
        _require_version(version)
    return VidTokConfig(library)


def _require_version(version: Any) -> None:
    if version is None:
        raise WeightsError(
            "nothing in a causal VidTok checkpoint tells version 1.0 from 1.1, and only 1.1 is computed as it was trained: "
            'give its settings with version: "1.1" if it is one'
        )
    if str(version) != VERSION:
        raise WeightsError(
            f"causal VidTok of version {version} pads time with zeros and repeats frames, which AutoencoderVidTok does not: "
            "use the checkpoint of version 1.1"
        )


def convert(state: Mapping[str, Tensor], config: VidTokConfig | None) -> tuple[VidTokConfig, dict[str, Tensor]]:
    """The tensors of the halves that are wanted, in our names.

    Raises:
        WeightsError: there is no configuration and the model is causal, or its sizes cannot be told.
    """
    if config is None:
        if not recognises(state.keys()):
            _require_version(None)
        config = VidTokConfig(_sizes(state))
    if config.causal:
        _require_version(config.version)
    named = {}
    for key, tensor in state.items():
        half, _, rest = key.partition(".")
        if half in config.parts or key.startswith("encoder.conv_out."):
            named[f"{half}.network.{rest}"] = tensor
        elif half not in ("encoder", "decoder"):
            named[key] = tensor
    return config, named


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of a model that is not causal, from the shapes of its tensors."""
    width = state["encoder.conv_in.weight"].shape[0]
    stages = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
    multiples = [state[f"encoder.down.{stage}.block.0.conv1.weight"].shape[0] // width for stage in range(stages)]
    channels = state["decoder.conv_in.weight"].shape[1]
    double = state["encoder.conv_out.weight"].shape[0] == 2 * channels
    found = {"ch": width, "ch_mult": multiples, "num_res_blocks": blocks, "z_channels": channels, "double_z": double}
    found |= {"is_causal": False, "regularizer": "kl" if double else "fsq"}
    return found if double else found | {"codebook_size": 8**channels}


def wanted(key: str) -> bool:
    """Whether a tensor is one of the network: those of the training losses are left out."""
    return not key.startswith(("loss.", "regularization."))


# ---- the tokenizer


class VidTok(VideoTokenizer[VidTokConfig, Any]):
    """Clips to ids, one for 4 frames of 8 x 8 pixels in the usual case, or to latents, and back.

    Causal models take a clip block by block, in bounded memory, both ways; those that are not causal take it as a whole.
    """

    Config = VidTokConfig
    family = "vidtok"
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)
    identity = ("encoder.network.conv_out.conv.weight", "encoder.network.conv_out.conv.bias")
    #: Frames that a causal encoder takes at once, and a causal decoder gives.
    block_frames = 16

    def __init__(self, config: VidTokConfig | None = None, *, name: str = "vidtok") -> None:
        super().__init__(config or VidTokConfig(), name)
        if self.config.causal:
            _require_version(self.config.version)
        network = cast(Any, built(self._network))
        # The last convolution tells checkpoints apart, so a decoder alone has it too.
        encoder = network.encoder if "encoder" in self.config.parts else nn.ModuleDict({"conv_out": network.encoder.conv_out})
        self.encoder = Exact(encoder)
        if "decoder" in self.config.parts:
            self.decoder = Half(_with_doubling(network.decoder) if self.config.causal else network.decoder)
        if self.config.levels:
            self.quantizer = Exact(network.regularization)
        for module in network.modules():
            if hasattr(module, "causal_cache") and hasattr(module, "time_pad"):
                module.register_forward_hook(_keep_little)
        self._turns = {"encoder": Turn(), "decoder": Turn()}

    def _network(self) -> nn.Module:
        from diffusers import AutoencoderVidTok

        return cast(nn.Module, AutoencoderVidTok(**self.config.library))

    def identity_keys(self) -> tuple[str, ...]:
        """The encoder's last convolution, whose name has no ``conv`` in models that are not causal."""
        own = self.state_dict()
        return tuple(key if key in own else key.replace(".conv.", ".") for key in self.identity)

    @property
    def spec(self) -> Spec:
        channels = self.config.channels
        return Spec(
            name=self.name,
            family=self.family,
            modality="video",
            vocab_size=self.config.levels**channels if self.config.levels else 0,
            dim=channels,
            fingerprint=self.fingerprint,
            temporal_stride=self.config.temporal,
            patch_size=self.cell,
        )

    @property
    def cell(self) -> tuple[int, int]:
        return self.config.spatial, self.config.spatial

    def timing(self, frames: int) -> Timing:
        """Causal models of version 1.1 repeat the first frame in front, the others the last frame up to groups of 16."""
        stride = self.config.temporal
        if self.config.causal:
            return Timing(-frames % stride, frames + -frames % stride, -(-frames // stride))
        total = -(-frames // 16) * 16
        return Timing(0, total, total // stride)

    def encode_clip(self, clip: Fed, generator: torch.Generator | None, sample: bool) -> Tensor:
        block = self.block_frames if self.config.causal else len(clip)
        with self._turns["encoder"]:
            try:
                _begin(self.encoder)
                parts = []
                for frames in clip.blocks(block, block):
                    parts.append(self.encoder.network(frames))
                    _go_on(self.encoder)
            finally:
                _begin(self.encoder)
        z = torch.cat(parts, dim=2)
        if self.config.levels:
            ids: Tensor = self.quantizer.network(z)[1][0].long()
            return ids
        mean, log_variance = z[0].chunk(2)
        if not sample:
            return mean
        draw = torch.randn(
            mean.shape, generator=generator, device=generator.device if generator else mean.device, dtype=torch.float32
        )
        return mean + draw.to(mean.device) * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode_clip(self, values: Tensor) -> Iterator[Float[Tensor, "3 frames height width"]]:
        z = (self._codes(values).movedim(-1, 0) if self.config.levels else values)[None].to(self.decoder.dtype)
        block = max(1, self.block_frames // self.config.temporal) if self.config.causal else z.shape[2]
        with self._turns["decoder"]:
            try:
                _begin(self.decoder)
                for start in range(0, z.shape[2], block):
                    if start + block >= z.shape[2]:
                        _end(self.decoder)
                    yield self.decoder.network(z[:, :, start : start + block])[0]
                    _go_on(self.decoder)
            finally:
                _begin(self.decoder)

    def _codes(self, ids: Tensor) -> Float[Tensor, "... dim"]:
        """Vectors of ids, in [-1, 1]."""
        network: Any = self.quantizer.network
        codes: Tensor = network.indices_to_codes(ids.reshape(1, -1))[0]
        return codes.float().reshape(*ids.shape, -1)

    def embed(self, tokens: Tokens | Latents | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of ids, or latents as sequences in the order of ids; zero where an item has ended."""
        checked = self.check(tokens)
        if isinstance(checked, Latents):
            rows = [values.flatten(1).T.float().to(self.device) for values in checked.values]
        else:
            rows = [self._codes(ids.to(self.device)) for ids in checked.unpadded()]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


TOKENIZER = VidTok


# ---- caches, which lie in the network's modules


class Doubling(nn.Module):
    """Twice as many frames, between neighbours in time on straight lines, and a causal convolution of them.

    The first frames of a clip, ``apart`` of them, make a piece of their own, as in diffusers' ``VidTokUpsample3D``, whose
    parameters these are. What follows the last frame of a block is drawn when the next one is known: a clip in blocks has the
    numbers of one pass, unlike with the class's own cache.

    Attributes:
        ends: whether the next block is the last one.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv, self.mix_factor = layer.conv, layer.mix_factor
        self.apart = int(layer.num_temp_upsample)
        self.is_first_chunk, self.ends = True, False
        self.held: Tensor | None = None

    def forward(self, x: Float[Tensor, "1 channels _frames rows columns"]) -> Float[Tensor, "1 channels _twice rows columns"]:
        found = []
        if self.is_first_chunk:
            found.append(_doubled(x[:, :, : self.apart]))
            x = x[:, :, self.apart :]
        frames = x if self.held is None else torch.cat([self.held, x], dim=2)
        if frames.shape[2]:
            # Of the frame that was held back there was the first half.
            done, known = int(self.held is not None), 2 * frames.shape[2] - (0 if self.ends else 1)
            found.append(_doubled(frames)[:, :, done:known])
            self.held = frames[:, :, -1:].clone()
        y = torch.cat(found, dim=2)
        share = torch.sigmoid(self.mix_factor)
        mixed: Tensor = share * y + (1 - share) * self.conv(y)
        return mixed


def _doubled(x: Float[Tensor, "1 channels _frames rows columns"]) -> Float[Tensor, "1 channels _twice rows columns"]:
    return F.interpolate(x.float(), scale_factor=[2.0, 1.0, 1.0], mode="trilinear").to(x.dtype)


def _with_doubling(decoder: nn.Module) -> nn.Module:
    """Diffusers' decoder with layers that double the frames of a clip in blocks, under the same names."""
    for owner in list(decoder.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer).__name__ == "VidTokUpsample3D":
                setattr(owner, name, Doubling(layer))
    return decoder


def _keep_little(module: Any, args: Any, output: Any) -> None:
    """Leave no more in a causal convolution's cache than the next block needs; the library keeps its whole input."""
    cache = module.causal_cache
    module.causal_cache = cache[:, :, cache.shape[2] - module.time_pad :].clone()


def _begin(half: nn.Module) -> None:
    """Empty the caches: the next block is the first one."""
    module: Any
    for module in half.modules():
        if hasattr(module, "causal_cache"):
            module.causal_cache = None
        if hasattr(module, "is_first_chunk"):
            module.is_first_chunk = True
        if isinstance(module, Doubling):
            module.held, module.ends = None, False


def _end(half: nn.Module) -> None:
    """The next block is the last one."""
    for module in half.modules():
        if isinstance(module, Doubling):
            module.ends = True


def _go_on(half: nn.Module) -> None:
    """The next block follows the last one."""
    module: Any
    for module in half.modules():
        if hasattr(module, "is_first_chunk"):
            module.is_first_chunk = False
