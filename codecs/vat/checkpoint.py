"""Configuration and tensors of the reference design, in the place of an official checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.vat.config import SCHEDULE, VATConfig
from zoo.errors import KeysError, WeightsError

_RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(point_proj|point_attention|moments)\.", r"encoder.\1."),
        (r"^(point_queries|latent_queries)$", r"encoder.\1"),
        (r"^(encoder|decoder)\.(?=\d)", r"\1.blocks."),
        (r"^(encoder|decoder)_norm\.", r"\1.norm."),
        (r"^(latent_proj|upsampler)\.", r"decoder.\1."),
        (r"^(latent_position|plane_queries)$", r"decoder.\1"),
        (r"^query\.", "query.layers."),
        (r"^(quantizer\.(?:codebook|gain))$", r"\1"),
    )
]


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of the reference design."""
    return {"point_proj.weight", "latent_queries", "plane_queries", "quantizer.codebook", "quantizer.gain"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> VATConfig | None:
    """Read the reference design's sizes; what it does not name has the default.

    Raises:
        WeightsError: a size is impossible, or sizes contradict each other.
    """
    if "token_scales" not in raw:
        return None
    known = {field.name for field in fields(VATConfig)}
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key in known
    }
    try:
        return VATConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the VAT configuration cannot be used: {error}") from error


def our_key(key: str) -> str | None:
    """Our name for a tensor of the reference design; ``None`` if it has none."""
    for pattern, replacement in _RENAMED:
        if pattern.match(key):
            return pattern.sub(replacement, key)
    return None


def convert(state: Mapping[str, Tensor], config: VATConfig | None) -> tuple[VATConfig, dict[str, Tensor]]:
    """Rename the tensors and compare their sizes with the configuration.

    Without one, sizes are inferred, and what leaves no trace in them is taken from the published models.

    Raises:
        KeysError: tensors are missing or unexpected, or their shapes contradict each other or ``config``.
    """
    named = renamed(state, our_key, "VAT")
    found = _infer_config(named, config)
    require_agreement(found, config)
    return found, named


def _infer_config(named: Mapping[str, Tensor], config: VATConfig | None) -> VATConfig:
    """The configuration, or that of the published models, with the sizes that the shapes imply."""
    shape = partial(shape_of, named)

    def count(stem: str) -> int:
        return len(layer_numbers(named, stem))

    width, point_dim = shape("encoder.point_proj.weight")
    codebook_size, latent_dim = shape("quantizer.codebook")
    (scales,) = shape("quantizer.gain")
    if config and len(config.token_scales) != scales:
        raise KeysError(f"the checkpoint has {scales} scales and the configuration {len(config.token_scales)}")
    (head,) = shape("encoder.point_attention.attn.q_norm.weight")
    learned = "encoder.point_queries" in named
    base = config or VATConfig()
    blocks, query_layers = "decoder.upsampler.up_blocks", count("query.layers")
    channels = [shape(f"{blocks}.{i}.resnets.0.conv1.weight")[0] for i in range(count(blocks))]
    try:
        return replace(
            base,
            token_scales=config.token_scales if config else SCHEDULE[:scales],
            norm_groups=config.norm_groups if config else _norm_groups(channels),
            width=width,
            heads=width // head,
            num_point_queries=shape("encoder.point_queries")[0] if learned else base.num_point_queries,
            point_query="learned" if learned else "fps",
            num_frequencies=(point_dim - 6) // 6,
            num_latents=shape("encoder.latent_queries")[0],
            encoder_layers=count("encoder.blocks"),
            decoder_layers=count("decoder.blocks"),
            latent_dim=latent_dim,
            codebook_size=codebook_size,
            plane_size=round((shape("decoder.plane_queries")[0] / 3) ** 0.5),
            upsampler_channels=tuple(reversed(channels)),
            upsampler_layers=count(f"{blocks}.0.resnets") - 1,
            mid_attention="decoder.upsampler.mid_block.attentions.0.to_q.weight" in named,
            triplane_channels=shape("decoder.upsampler.conv_out.weight")[0],
            query_hidden=shape("query.layers.0.weight")[0] if query_layers > 1 else base.query_hidden,
            query_layers=query_layers,
        )
    except ValueError as error:
        raise KeysError(f"the sizes of this checkpoint do not fit together, or need its configuration: {error}") from error


def _norm_groups(channels: Sequence[int]) -> int:
    """Groups of the published models' norms: those of the large ones if the channels can be split so."""
    return 32 if all(count % 32 == 0 for count in channels) else 8


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)
