"""Oobleck, the autoencoder of Stable Audio: stereo sound as a sequence of latents.

Paper: Evans et al., "Stable Audio Open", arXiv 2407.14358, section 3. The network is the one of the library diffusers,
``AutoencoderOobleck``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.errors import KeysError, WeightsError
from zoo.latents import Latents
from zoo.nn.library import Exact, LibraryConfig, built, folded, in_own_dtype, plain_config, without_weight_norm
from zoo.nn.stages import Chain, Each, Reach, Window, convolutions
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.stepped import SteppedAudioTokenizer


@dataclass(frozen=True)
class OobleckConfig(LibraryConfig):
    """Sizes of one model; ``library`` is a configuration of ``diffusers.AutoencoderOobleck``."""


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an Oobleck of diffusers."""
    return {"encoder.block.0.res_unit1.snake1.beta", "decoder.block.0.snake1.beta"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> OobleckConfig | None:
    """Read the library's ``config.json``.

    Raises:
        WeightsError: it is that of another model.
    """
    if raw.get("_class_name") != "AutoencoderOobleck":
        raise WeightsError(f"this is the configuration of {raw.get('_class_name')}, not of AutoencoderOobleck")
    return OobleckConfig({key: value for key, value in plain_config(raw).items() if key != "_class_name"})


def convert(state: Mapping[str, Tensor], config: OobleckConfig | None) -> tuple[OobleckConfig, dict[str, Tensor]]:
    """The library's tensors in our names, weight norm multiplied out.

    Raises:
        KeysError: there is no configuration, or half of a weight norm is missing.
    """
    if config is None:
        raise KeysError("the tensors of Oobleck tell neither its sample rate nor its strides: pass config.json")
    named = {}
    for key, tensor in folded(state).items():
        part, _, rest = key.partition(".")
        if part not in ("encoder", "decoder") or part in config.parts:
            named[f"encoder.network.{rest}" if part == "encoder" else key] = tensor
        if key == "encoder.conv2.bias":
            named["mark"] = tensor.clone()
    return config, named


def network_for(config: OobleckConfig) -> nn.Module:
    """The library's module with plain weights.

    Raises:
        WeightsError: the configuration is not a possible one, or not of stereo sound.
    """
    from diffusers import AutoencoderOobleck

    try:
        network = without_weight_norm(AutoencoderOobleck.from_config(dict(config.library)))
    except Exception as error:
        raise WeightsError(f"the configuration of Oobleck cannot be used: {error}") from error
    sizes: Any = network.config
    if sizes.audio_channels != 2:
        raise WeightsError(f"this Oobleck has {sizes.audio_channels} channels, and two are supported")
    return network


class Oobleck(SteppedAudioTokenizer[OobleckConfig, Latents]):
    """The autoencoder of arXiv 2407.14358, continuous: latents ``[channels, frames]``, the mean of the posterior.

    Audio of any sample rate is resampled; one channel is repeated, more than two are averaged first. An item is padded with
    zeros to whole frames. Encoding always runs in float32.
    """

    Config = OobleckConfig
    family = "oobleck"
    identity = ("mark",)
    checkpoint = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, settings=("parts",))
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1 << 17, 1 << 22), "decode": Budget(64, 4_000)}
    channels = 2
    latent_axes = ("frames",)

    def __init__(self, config: OobleckConfig | None = None, *, name: str = "oobleck") -> None:
        super().__init__(config or OobleckConfig(), name)
        network = cast(Any, built(lambda: network_for(self.config)))
        self.sizes: Any = network.config
        # The encoder's last bias, which tells checkpoints apart, in either half.
        self.register_buffer("mark", torch.zeros(network.encoder.conv2.bias.shape))
        if "encoder" in self.config.parts:
            self.encoder = Exact(network.encoder)
        if "decoder" in self.config.parts:
            self.decoder = network.decoder

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=0,
            dim=self.sizes.decoder_input_channels,
            fingerprint=self.fingerprint,
            sample_rate=self.sizes.sampling_rate,
            hop_length=math.prod(self.sizes.downsampling_ratios),
            parts=self.config.parts,
            streaming="exact",
        )

    def encoder_steps(self, codebooks: int) -> Chain:
        """See `SteppedAudioTokenizer`."""
        reach = Reach.of(convolutions(self.encoder), rows_in=self.hop_length)
        return Chain([Window(self.encoder, reach), Each(lambda posterior: posterior.chunk(2, dim=1)[0])])

    def decoder_steps(self) -> Chain:
        """See `SteppedAudioTokenizer`."""
        reach = Reach.of(convolutions(self.decoder), rows_out=self.hop_length)
        return Chain([Window(lambda latents: in_own_dtype(self.decoder, latents), reach)])

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The latents of each frame, zero where an item has ended."""
        checked: Latents = self.check(tokens)
        return nn.utils.rnn.pad_sequence([own.T.to(self.device) for own in checked.values], batch_first=True)


TOKENIZER = Oobleck
