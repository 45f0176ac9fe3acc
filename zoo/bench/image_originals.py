"""Pairs of `zoo bench originals`: FlexTok and TokenFlow beside `zoo.bench.image_networks` with the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.bench.image import autoencoder_of_diffusers, pictures
from zoo.bench.image_networks import GUIDANCE, FlexTokNetworks, TokenFlowDecoder, TokenFlowEncoder
from zoo.bench.measure import Pair, random_model
from zoo.precision import exact_float32

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def flextok(name: str = "flextok-d12-d12-in1k", lengths: Sequence[int] = (16, 256), steps: int = 4) -> Iterator[Pair]:
    """FlexTok's encoder, guided steps and autoencoder; the original keeps its autoencoder in float32 under autocast.

    Args:
        name: in the catalogue.
        lengths: tokens of the prefixes.
        steps: guided steps of a call.
    """
    tokenizer: Any = random_model(registry.get(name), "cpu")
    config = tokenizer.config
    images = pictures(1, *config.image_size)
    original, autoencoder = FlexTokNetworks(tokenizer), autoencoder_of_diffusers(config.vae, tokenizer.vae)

    def ids(precision: str) -> Tensor:
        return tokenizer.encode(images, encoder_precision=precision).ids[0]

    def original_ids(dtype: torch.dtype) -> Tensor:
        scaled: Tensor = config.scaling_factor * autoencoder.encode(images).latent_dist.mode()
        with _autocast(dtype):
            return original.encode(scaled).flatten()

    for precision, dtype in _PRECISIONS.items():
        case = f"encode, {precision}" + ", autocast" * (precision == "bf16")
        yield Pair(name, case, partial(ids, precision), partial(original_ids, dtype))
    tokens, latents = tokenizer.encode(images), tokenizer.latents(images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.fsq.codes(tokens.ids)

    def sampled(k: int) -> Tensor:
        prefix = tokens.truncate(k)
        return tokenizer.decode_latents(prefix, noise, steps=steps, guidance=GUIDANCE, guidance_method="apg")

    def original_sampled(k: int, dtype: torch.dtype) -> Tensor:
        with _autocast(dtype):
            return original.sample(noise, codes, k, steps)

    def original_image(dtype: torch.dtype) -> Tensor:
        image: Tensor = autoencoder.decode((latents / config.scaling_factor).to(dtype)).sample[0]
        return image.float()

    for precision, dtype in _PRECISIONS.items():
        tokenizer.set_precision(precision)
        for k in lengths:
            case = f"{steps} guided steps of {k} tokens, {precision}" + ", autocast" * (precision == "bf16")
            yield Pair(name, case, partial(sampled, k), partial(original_sampled, k, dtype))
        # Not the class's own method, which warns.
        nn.Module.to(autoencoder, dtype)
        case = f"autoencoder, decode, {precision}" + " weights" * (precision == "bf16")
        yield Pair(name, case, lambda: tokenizer.decode_scaled(latents)[0], partial(original_image, dtype))


def tokenflow(name: str = "tokenflow-b-256") -> Iterator[Pair]:
    """TokenFlow's encoder and its pixel decoder; the latter's weights also turned to bfloat16 and channels last.

    Args:
        name: in the catalogue; a model whose teacher is CLIP.
    """
    tokenizer: Any = random_model(registry.get(name), "cpu")
    images = pictures(1, *tokenizer.spec.image_size)
    original = TokenFlowEncoder(tokenizer)

    def ids(precision: str) -> Tensor:
        return tokenizer.encode(images, encoder_precision=precision).ids[0]

    def original_ids(dtype: torch.dtype) -> Tensor:
        with _autocast(dtype):
            found: Tensor = original(images)
        return found.flatten()

    for precision, dtype in _PRECISIONS.items():
        case = f"encode, {precision}" + ", autocast" * (precision == "bf16")
        yield Pair(name, case, partial(ids, precision), partial(original_ids, dtype))
    tokens = tokenizer.encode(images)
    latents = tokenizer.quantizer.latents(tokens.ids)[:, tokenizer.config.semantic_code_dim :]
    decoder: Any = TokenFlowDecoder(tokenizer)

    def ours() -> Tensor:
        with exact_float32(tokenizer.device):
            image: Tensor = tokenizer.decoder(latents)[0]
        return image

    def original_image(dtype: torch.dtype) -> Tensor:
        with _autocast(dtype):
            image: Tensor = decoder(latents)[0]
        return image.float()

    yield Pair(name, "decode, fp32", ours, partial(original_image, torch.float32))
    tokenizer.set_precision("bf16")
    yield Pair(name, "decode, bf16, autocast", ours, partial(original_image, torch.bfloat16))
    decoder.bfloat16().to(memory_format=torch.channels_last)
    yield Pair(name, "decode, bf16 weights in channels last", ours, lambda: decoder(latents.bfloat16())[0].float())
