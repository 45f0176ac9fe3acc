"""A random ByteFormer small enough for every test, and weights under the names of the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.codecs.byteformer import ByteFormer, ByteFormerConfig

SMALL_BYTEFORMER = ByteFormerConfig(
    dim=24, heads=2, hidden=40, kernel=4, windows=(16,), shifts=(0, 8, 0), merges=(0, 1), max_tokens=600, classes=7
)


def small_byteformer(seed: int = 0, config: ByteFormerConfig = SMALL_BYTEFORMER) -> ByteFormer:
    """A ByteFormer with random weights throughout, none of them zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = ByteFormer(config, name=f"small-byteformer-{seed}").eval().requires_grad_(False)
        for tensor in tokenizer.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def upstream_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the original's class at a configuration in the original's terms, by its key names."""
    dim, hidden, kernel = config["embed_dim"], config["ffn_dim"], config["conv_kernel_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.weight": (config["vocab_size"], dim),
        "token_reduction_net.weight": (dim, dim, kernel),
        "pos_embed.pos_embed.pos_embed": (1, 1, config["max_num_tokens"], dim),
        "post_transformer_norm.weight": (dim,),
        "post_transformer_norm.bias": (dim,),
        "classifier.weight": (config["n_classes"], dim),
        "classifier.bias": (config["n_classes"],),
    }
    for block in range(config["n_transformer_layers"]):
        attention, feed_forward = f"transformer.{block}.pre_norm_mha", f"transformer.{block}.pre_norm_ffn"
        shapes |= {f"{part}.0.{kind}": (dim,) for part in (attention, feed_forward) for kind in ("weight", "bias")}
        shapes |= {f"{attention}.1.qkv_proj.weight": (3 * dim, dim), f"{attention}.1.qkv_proj.bias": (3 * dim,)}
        shapes |= {f"{attention}.1.out_proj.weight": (dim, dim), f"{attention}.1.out_proj.bias": (dim,)}
        shapes |= {f"{feed_forward}.1.weight": (hidden, dim), f"{feed_forward}.1.bias": (hidden,)}
        shapes |= {f"{feed_forward}.4.weight": (dim, hidden), f"{feed_forward}.4.bias": (dim,)}
        if config["downsample"][block]:
            merge = f"downsamplers.downsample_{block}"
            shapes |= {
                f"{merge}.reduction.weight": (dim, 2 * dim),
                f"{merge}.norm.weight": (dim,),
                f"{merge}.norm.bias": (dim,),
            }
    generator = torch.Generator().manual_seed(seed)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_scale = key.endswith("weight")
            return is_scale + 0.2 * values
        fan = 1 if key.startswith(("embeddings", "pos_embed")) else values[0].numel()
        return values * fan**-0.5

    return {key: draw(key, shape) for key, shape in shapes.items()}
