"""Video tokenizers: encoding and decoding of clips, beside the library's own class on the whole of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo import registry
from zoo.bench.measure import Job, Work, random_model
from zoo.tokenizer import Tokenizer

UNIT = "frame"
# ``lengths`` in frames of 128 x 128 pixels.
CASES: dict[str, Any] = {"batches": (1,), "lengths": (17, 65)}

#: Height and width of the clips.
SIDE = 128
_WIDE = torch.bfloat16


def jobs(entry: registry.Entry, device: str, peers: bool, batches: Sequence[int], lengths: Sequence[int]) -> Iterator[Job]:
    """Everything to measure: ours, ours with a decoder in bfloat16, and the library's class."""
    tokenizer: Any = random_model(entry, device)
    encode_all, decode_all = (
        _LIBRARIES[entry.family](tokenizer, device) if peers and entry.family in _LIBRARIES else (None, None)
    )
    for batch in batches:
        for frames in lengths:
            case, amount = f"{batch} x {frames} frames", batch * frames
            films = clips(batch, frames)
            tokens = tokenizer.encode(films)

            def encoding(films: Sequence[Tensor] = films) -> Work:
                return lambda: tokenizer.encode(films)

            def decoding(tokens: Any = tokens) -> Work:
                return lambda: tokenizer.decode(tokens)

            yield Job(entry.name, "encode", case, amount, encoding(), tokenizer)
            yield Job(entry.name, "decode", case, amount, decoding(), tokenizer)
            tokenizer.set_precision("bf16")
            yield Job(f"{entry.name}, bf16", "decode", case, amount, decoding(), tokenizer, _WIDE)
            tokenizer.set_precision("fp32")
            if encode_all is None or decode_all is None:
                continue
            fed = [_fed(tokenizer, film).to(device) for film in films]
            found = [encode_all(film) for film in fed]
            name = f"{entry.name}, the class"
            yield Job(name, "encode", case, amount, _each(encode_all, fed))
            yield Job(name, "decode", case, amount, _each(decode_all, found))


def _each(run: Callable[[Tensor], Any], items: Sequence[Tensor]) -> Work:
    return lambda: [run(item) for item in items]


def clips(count: int, frames: int) -> list[Float[Tensor, "3 frames height width"]]:
    """Clips of random pixels in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, frames, SIDE, SIDE, generator=generator) * 2 - 1 for _ in range(count)]


def items(tokenizer: Tokenizer[Any], count: int) -> list[Float[Tensor, "3 frames height width"]]:
    """Input of a comparison of two releases."""
    return clips(count, 17)


def _fed(tokenizer: Any, clip: Tensor) -> Float[Tensor, "1 3 total height width"]:
    """A clip with the frames that our tokenizer repeats before and behind it, which the classes would leave out."""
    timing = tokenizer.timing(clip.shape[1])
    places = (torch.arange(timing.total) - timing.lead).clamp(0, clip.shape[1] - 1)
    return clip[:, places][None]


def _diffusers(tokenizer: Any, device: str) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
    import diffusers

    network = getattr(diffusers, getattr(tokenizer.config, "network", "AutoencoderVidTok"))
    model = network(**tokenizer.config.library).eval().requires_grad_(False).to(device)
    if not tokenizer.spec.continuous:
        return lambda clip: model.encode(clip)[1], lambda ids: model._decode(ids, decode_from_indices=True)
    decode = model._decode if network.__name__ == "AutoencoderVidTok" else model.decode
    return lambda clip: model.encode(clip).latent_dist.mode(), decode


def _emu3(tokenizer: Any, device: str) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    model: Any = Emu3VQVAE(Emu3VQVAEConfig(**tokenizer.config.library)).eval().requires_grad_(False).to(device)

    def encode(clip: Tensor) -> Any:
        # The class cuts time and rows to the size that it is told, which is to cut nothing.
        frames = clip.transpose(1, 2)
        return model.encode(frames, torch.tensor([[1 << 12, 1 << 12]], dtype=torch.int64)).image_tokens[0]

    return encode, lambda ids: model.decode(ids[None])


#: The class of each family, as functions of a clip and of what that gives.
_LIBRARIES: dict[str, Callable[[Any, str], tuple[Callable[[Tensor], Any], Callable[[Any], Any]]]] = {
    "vidtok": _diffusers,
    "video_kl": _diffusers,
    "emu3_video": _emu3,
}
