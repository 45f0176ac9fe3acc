"""Pairs of `zoo bench originals`: networks of sound as their authors write them, searches beside faiss, packed decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import registry
from zoo.bench.codebook import Size, vectors
from zoo.bench.measure import Pair, Work, count_flops, random_model
from zoo.bench.quantized import quantized_model
from zoo.bench.sound_networks import PlainHiFiGAN, PlainWavTokenizer
from zoo.hub import load_upstream
from zoo.kernels.codebook import nearest, prepare
from zoo.quantization.packed import set_resident

#: Searches of many queries, for short vectors and long ones.
SEARCHES = (Size(8, 8192, 16384), Size(32, 8192, 16384), Size(512, 32768, 4096))


def wavtokenizer(name: str = "wavtokenizer-small-75", durations: Sequence[float] = (1, 10, 60)) -> Iterator[Pair]:
    """Encoding, and decoding in float32 and bfloat16, beside the network as its authors write it."""
    plain = PlainWavTokenizer(registry.check_config(registry.get(name))).eval().requires_grad_(False)
    tokenizer, half = (load_upstream("wavtokenizer", None, plain.official_state()) for _ in range(2))
    half.set_precision("bf16")
    rate, hop = tokenizer.config.sample_rate, tokenizer.config.hop_length
    generator = torch.Generator().manual_seed(0)

    def pairs(seconds: float) -> Iterator[Pair]:
        waveform = torch.randn(1, round(seconds * rate), generator=generator) * 0.1
        ids = torch.randint(tokenizer.config.codebook_size, (1, round(seconds * rate / hop)), generator=generator)

        def original() -> Tensor:
            return plain.decode(ids)

        operations = count_flops(plain, original)
        encoding = count_flops(plain, lambda: plain.encode(waveform))
        yield Pair(
            name,
            f"encode {seconds:g} s",
            lambda: tokenizer.encode(waveform).ids,
            lambda: plain.encode(waveform),
            operations=encoding,
        )
        yield Pair(name, f"decode {seconds:g} s", lambda: tokenizer.decode(ids)[0], original, operations=operations)
        yield Pair(
            f"{name}, bf16",
            f"decode {seconds:g} s",
            lambda: half.decode(ids)[0],
            _autocast(original),
            operations=operations,
            dtype=torch.bfloat16,
        )

    for seconds in durations:
        yield from pairs(seconds)


def vocoder(name: str = "vectok-knnvc", seconds: float = 10.0) -> Iterator[Pair]:
    """kNN-VC's HiFi-GAN beside the network as its authors write it, in float32 and bfloat16."""
    config = registry.check_config(registry.get(name))
    plain = PlainHiFiGAN(config.vocoder, config.vector_dim).eval().requires_grad_(False)
    settings = _knnvc_settings(config)
    ours, half = (load_upstream("vectok", settings, plain.state_dict()) for _ in range(2))
    half.set_precision("bf16")
    frames = round(seconds * config.sample_rate / config.vocoder.hop_length)
    vectors = torch.randn(1, frames, config.vector_dim, generator=torch.Generator().manual_seed(0))

    def original() -> Tensor:
        found: Tensor = plain(vectors)
        return found

    operations = count_flops(plain, original)
    for label, tokenizer, work, dtype in (
        (name, ours, original, torch.float32),
        (f"{name}, bf16", half, _autocast(original), torch.bfloat16),
    ):
        own = _vocoded(tokenizer, vectors)
        yield Pair(label, f"vocoder {seconds:g} s", own, work, operations=operations, dtype=dtype)


def _knnvc_settings(config: Any) -> dict[str, Any]:
    """The configuration of kNN-VC's generator."""
    sizes = config.vocoder
    return {
        "resblock": sizes.resblock,
        "hubert_dim": config.vector_dim,
        "hifi_dim": sizes.pre_width,
        "upsample_initial_channel": sizes.channels,
        "upsample_rates": sizes.rates,
        "upsample_kernel_sizes": sizes.kernels,
        "resblock_kernel_sizes": sizes.resblock_kernels,
        "resblock_dilation_sizes": sizes.resblock_dilations,
        "sampling_rate": config.sample_rate,
    }


def _vocoded(tokenizer: Any, vectors: Float[Tensor, "batch frames dim"]) -> Work:
    return lambda: torch.stack(tokenizer.vocode(list(vectors)))


def _autocast(work: Work) -> Work:
    def cast_down() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return work()

    return cast_down


def search(sizes: Sequence[Size] = SEARCHES) -> Iterator[Pair]:
    """The nearest code beside the flat index of faiss, where that is installed."""
    if not find_spec("faiss"):
        return
    for size in sizes:
        yield _search(size)


def _search(size: Size) -> Pair:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    codes, x = vectors(size, "cpu")
    prepared = prepare(codes)
    index = faiss.IndexFlatL2(size.dim)
    index.add(codes.numpy())
    return Pair(
        "zoo.kernels.codebook, faiss IndexFlatL2",
        str(size),
        lambda: nearest(x, prepared),
        lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),
    )


def packed(
    name: str = "wavtokenizer-small-75",
    methods: Sequence[str] = ("int8", "fp8-e4m3", "fp4-e2m1"),
    durations: Sequence[float] = (1, 10),
) -> Iterator[Pair]:
    """Decoders with packed weights that are kept decoded, beside the same ones as they are, in the same precision."""
    entry = registry.get(name)
    for precision in ("fp32", "bf16"):
        plain = random_model(entry, "cpu")
        plain.set_precision(precision)
        token_rate = plain.spec.token_rate
        assert token_rate is not None
        for method in methods:
            tokenizer = quantized_model(entry, "cpu", method)
            tokenizer.set_precision(precision)
            set_resident(tokenizer, "auto")
            for seconds in durations:
                count = round(seconds * token_rate)
                ids = torch.randint(plain.spec.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
                ours, original = (_decoded(model, ids) for model in (tokenizer, plain))
                yield Pair(f"{name}, {method}, {precision}", f"decode {seconds:g} s", ours, original, alike=False)


def _decoded(tokenizer: Any, ids: Int[Tensor, "batch frames"]) -> Work:
    return lambda: tokenizer.decode(ids)
