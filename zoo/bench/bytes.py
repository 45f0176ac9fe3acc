"""Byte tokenizers: embedding files and classifying them, against the original's way of computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import registry
from zoo.bench.measure import Job, Work, random_model
from zoo.bench.quantized import Call, quantized_model
from zoo.tokenizer import Tokenizer

UNIT = "file"
# ``lengths`` in bytes of a file, by default that of the files which the model was trained on; ``quantize``: methods of
# `zoo.quantize`.
CASES: dict[str, Any] = {"batches": (1, 8), "lengths": (), "quantize": ()}

# Bytes of the official files: fixed ones of 224 x 224 pixels or a second at 16 kHz, and the mean of JPEG files, which vary.
_PIXELS, _SAMPLES = 3 * 224 * 224, 16_000
_IMAGE_BYTES = {"fHWC": _PIXELS, "fCHW": _PIXELS, "TIFF": _PIXELS + 140, "PNG": 150_864}
_JPEG_BYTES = {100: 48_564, 60: 8_400}
_WAV_BYTES = {"float32": 4 * _SAMPLES + 58, "int32": 4 * _SAMPLES + 80, "int16": 2 * _SAMPLES + 44, "uint8": _SAMPLES + 44}
_MP3_BYTES = 3_240
# Shortest and longest file of a mixed batch over the mean; JPEG files of photographs vary by more.
_SPREAD = (0.63, 1.49)


def jobs(
    entry: registry.Entry,
    device: str,
    peers: bool,
    batches: Sequence[int],
    lengths: Sequence[int],
    quantize: Sequence[str] = (),
) -> Iterator[Job]:
    """Everything to measure: ours in float32, the transformer in bfloat16 and quantized, then the original's way."""
    tokenizer: Any = random_model(entry, device)
    packed: dict[str, Any] = {method: quantized_model(entry, device, method) for method in quantize}
    config = tokenizer.config
    for length in lengths or (_typical_length(config),):
        for batch in batches:
            files = random_files(_mixed(length, batch) if config.file == "JPEG" else [length] * batch)
            tokens = tokenizer.encode([file.to(torch.uint8) for file in files])
            case = f"{batch} x {length} bytes"

            embed: Work = partial(tokenizer.embed, tokens, positions=True)
            classify: Work = partial(tokenizer.classify, tokens)
            # Embedding is additions, which nobody counts; the first call makes the table of what is added.
            tokenizer.embed(tokens)
            yield Job(entry.name, "embed", case, batch, embed)
            yield Job(entry.name, "classify", case, batch, classify, tokenizer)
            tokenizer.set_precision("bf16")
            yield Job(f"{entry.name}, bf16", "classify", case, batch, classify, tokenizer, torch.bfloat16)
            tokenizer.set_precision("fp32")
            for method, model in packed.items():
                for precision, suffix in (("fp32", ""), ("bf16", ", bf16")):
                    model.set_precision(precision)
                    yield Job(f"{entry.name}, {method}{suffix}", "classify", case, batch, partial(model.classify, tokens))
            if peers:
                dense = f"{entry.name}, dense"
                yield Job(dense, "embed", case, batch, partial(dense_embedding, tokenizer, files))
                yield Job(dense, "classify", case, batch, partial(dense_logits, tokenizer, files))


def smallest_call(entry: registry.Entry, batches: Sequence[int], lengths: Sequence[int], quantize: Sequence[str]) -> Call:
    """Classification of the first case, with random bytes."""
    length = (lengths or (_typical_length(registry.check_config(entry)),))[0]
    return Call("classify", [file.tolist() for file in random_files([length] * batches[0])], {})


def _typical_length(config: Any) -> int:
    """Bytes of the files that a model was trained on."""
    if config.file == "JPEG":
        return _JPEG_BYTES.get(config.quality, _JPEG_BYTES[100])
    if config.file == "WAV":
        return _WAV_BYTES[config.sample_type]
    return int(_IMAGE_BYTES.get(config.file, _MP3_BYTES) * config.keep)


def _mixed(mean: int, batch: int) -> list[int]:
    """Lengths of a batch of files that vary as JPEG files do; a single one has the mean."""
    low, high = _SPREAD
    steps = [i / (batch - 1) for i in range(batch)] if batch > 1 else []
    return [round(mean * low * (high / low) ** step) for step in steps] or [mean]


def items(tokenizer: Tokenizer[Any], count: int) -> list[bytes]:
    """Input of a comparison of two releases: random bytes, as many as in the files that the model was trained on."""
    files = random_files([_typical_length(tokenizer.config)] * count)
    return [bytes(file.tolist()) for file in files]


def random_files(lengths: Sequence[int]) -> list[Tensor]:
    """Random bytes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator) for length in lengths]


def dense_embedding(tokenizer: Any, files: Sequence[Tensor]) -> Tensor:
    """Tokens with positions as the original computes them: every byte embedded, then a convolution over 192 channels.

    Files are padded to the longest, and the padding is computed with.
    """
    embedding = tokenizer.embedding
    padding = len(embedding.bytes) - 1
    ids = torch.nn.utils.rnn.pad_sequence(list(files), batch_first=True, padding_value=padding).to(tokenizer.device)
    embedded = F.embedding(ids, embedding.bytes).transpose(1, 2)
    tokens = F.conv1d(embedded, embedding.reduction, stride=embedding.stride).transpose(1, 2)
    summed: Tensor = tokens + embedding.positions[: tokens.shape[1]]
    return summed


def dense_logits(tokenizer: Any, files: Sequence[Tensor]) -> Tensor:
    """Logits as the original computes them, with the same weights: whole windows, filler and all, and every score in memory.

    Masks, which the original builds in every block and does not use, are left out, so this is its lower bound. So is the rule
    by which it normalises over tokens at some lengths.
    """
    transformer = tokenizer.transformer
    x = dense_embedding(tokenizer, files)
    for index, block in enumerate(transformer.blocks):
        x = _dense_block(block, x)
        if str(index) in transformer.merges:
            merge = transformer.merges[str(index)]
            pairs = F.pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)
            x = merge.norm(merge.reduction(pairs))
    logits: Tensor = tokenizer.classifier(transformer.norm(x).mean(1))
    return logits


def _dense_block(block: Any, x: Tensor) -> Tensor:
    batch, count, dim = x.shape
    rolled = F.pad(x, (0, 0, 0, -count % block.window)).roll(-block.shift, 1)
    windows = rolled.reshape(-1, block.window, dim)
    qkv = block.attn.qkv(block.norm1(windows)).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    windows = windows + block.attn.proj(mixed)
    windows = windows + block.mlp(block.norm2(windows))
    return windows.reshape(batch, -1, dim).roll(block.shift, 1)[:, :count]
