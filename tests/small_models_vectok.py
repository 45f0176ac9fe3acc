"""A small random Vec-Tok, whose units, pairs and voices come from its own vectors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zoo.codecs.vectok import BPE, HiFiGANSizes, InverseSizes, ISTFTSizes, LogMelSizes, VecTok, VecTokConfig, Voice, WavLMSizes

SMALL_VECTOK = VecTokConfig(
    vector_dim=32,
    vectors=WavLMSizes(
        width=32,
        layer=2,
        heads=2,
        ffn_dim=48,
        conv_layers=((16, 10, 5), (16, 8, 4), (16, 4, 4), (16, 5, 4)),
        buckets=32,
        max_distance=64,
        conv_kernel=16,
        conv_groups=4,
    ),
    num_units=20,
    merges=0,
    vocab_size=20,
    inverse=InverseSizes(width=24, heads=2, ffn_dim=32, layers=2, depthwise_kernel=7),
    vocoder=HiFiGANSizes(
        pre_width=16,
        channels=16,
        rates=(20, 16),
        kernels=(40, 32),
        resblock_kernels=(3, 5),
        resblock_dilations=((1, 3), (1, 2)),
    ),
)
#: The embedded model's kinds of front end and vocoder, with a context for its units.
SMALL_LOGMEL_VECTOK = replace(
    SMALL_VECTOK,
    vector_dim=24,
    vectors=LogMelSizes(bands=24, n_fft=640),
    context=3,
    vocoder=ISTFTSizes(width=16, ffn_dim=24, blocks=2),
)


def noise(samples: int, seed: int = 0) -> Tensor:
    """Noise whose loudness and colour change from one 20 ms to the next."""
    generator = torch.Generator().manual_seed(seed)
    frames = samples // 320 + 2
    loud, sharp = torch.rand(2, frames, generator=generator).repeat_interleave(320, dim=1)[:, :samples]
    white = torch.randn(samples + 1, generator=generator)
    return 0.3 * loud * (white[1:] - sharp * white[:-1])


def small_vectok(seed: int = 0, config: VecTokConfig = SMALL_VECTOK) -> VecTok:
    """A Vec-Tok with random weights, all of whose parts have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VecTok(config, name=f"small-vectok-{seed}").eval().requires_grad_(False)
        tokenizer.inverse.segment.mul_(20)
        items = [noise(samples, seed + 1) for samples in (16_000, 24_000)]
        if isinstance(config.vectors, LogMelSizes):
            vectors = torch.cat(tokenizer.vectors(items))
            tokenizer.analysis.mean, tokenizer.analysis.std = vectors.mean(0), vectors.std(0)
        vectors = torch.cat([found - found.mean(0) for found in tokenizer.vectors(items)])
        chosen = torch.randperm(len(vectors) - config.context)[: config.num_units]
        width = config.vector_dim
        for part in range(config.context):
            tokenizer.units.centroids[:, part * width : (part + 1) * width] = vectors[chosen + part]
        if tokenizer.units.embedding is not None:
            tokenizer.units.embedding.copy_(vectors[chosen + config.context // 2])
        corpus = [units.tolist() for units in tokenizer.unit_ids(items)]
        tokenizer.set_bpe(BPE.train(corpus, config.num_units, config.num_units + 12))
        tokenizer.set_voices({"low": Voice(torch.randn(60, width) - 1), "high": Voice(torch.randn(50, width) + 1)})
    return tokenizer
