"""Small LLaVA models with random weights, or with those of an original LLaVA checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE = 95  # id of the placeholder, unless another one is asked for


def llava(
    *,
    views: bool = False,
    attention: str = "sdpa",
    side: int = 6,
    layers: int = 8,
    tower_layers: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    image: int = IMAGE,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tower: Any = None,
    **config: Any,
) -> Any:
    """A LLaVA (or LLaVA-NeXT, with ``views``) whose images are ``side`` x ``side`` patches of 14 pixels."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    torch.manual_seed(seed)
    vision_config = tower or CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": tower_layers,
            "num_attention_heads": 4,
            "image_size": 14 * side,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
            **(vision or {}),
        }
    )
    text_config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **(text or {}),
        }
    )
    if views:
        tile = vision_config.image_size
        config.setdefault("image_grid_pinpoints", [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [tile, 3 * tile]])
    kind, model = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration) if views else (LlavaConfig, LlavaForConditionalGeneration)
    )
    settings = kind(
        vision_config=vision_config, text_config=text_config, image_token_id=image, attn_implementation=attention, **config
    )
    built = model(settings).eval()
    with torch.no_grad():
        # initial weights are so small that everything looks alike
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return built


def from_original(case: dict[str, Any], weights: dict[str, Tensor], ids: Tensor, *, attention: str = "sdpa") -> tuple[Any, int]:
    """The Hugging Face model of an original LLaVA checkpoint, given its golden case's configuration, and its placeholder.

    The placeholder is an id that the prompt ``ids`` does not use.
    """
    image = next(token for token in range(3, len(weights["model.embed_tokens.weight"])) if token not in ids)
    views = "grid_pinpoints" in case
    vision = dict(case["vision"])
    text = dict(
        case.get("text") or {"vocab_size": len(weights["model.embed_tokens.weight"]), "hidden_size": case["mm"]["hidden_size"]}
    )
    rope = text.pop("rope_theta", None)
    if rope is not None:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": rope}
    # original LLaVA lists widths before heights
    config = {"image_grid_pinpoints": [[height, width] for width, height in case["grid_pinpoints"]]} if views else {}
    built = llava(
        views=views,
        attention=attention,
        image=image,
        side=vision["image_size"] // vision["patch_size"],
        layers=text.get("num_hidden_layers", 2),
        vision=vision,
        text=text,
        vision_feature_layer=case["mm"]["mm_vision_select_layer"],
        **config,
    )
    state = {_hugging_face_name(key): value for key, value in weights.items()}
    result = built.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    allowed = () if "text" in case else ("model.language_model.", "lm_head.")
    assert all(key.startswith(allowed) for key in result.missing_keys) if allowed else not result.missing_keys
    return built, image


def _hugging_face_name(key: str) -> str:
    for old, new in (
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.image_newline", "model.image_newline"),
        ("model.", "model.language_model."),
    ):
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def expand_images(ids: Tensor, lengths: list[int], *, image: int = IMAGE, old: int = -200) -> Tensor:
    """One row of ids with every image's single mark replaced by as many placeholders as it has features."""
    parts: list[Tensor] = []
    remaining = iter(lengths)
    for token in ids.flatten().tolist():
        parts.append(torch.full((next(remaining),), image) if token == old else torch.tensor([token]))
    return torch.cat(parts)[None]
