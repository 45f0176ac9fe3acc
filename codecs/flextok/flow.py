"""The rectified flow: Euler sampling with guidance, and the loss it is trained with.

``x_t = t * noise + (1 - t) * image``; the model predicts ``noise - image`` and t runs from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.codecs.flextok.config import FlexTokConfig
from zoo.codecs.flextok.decoder import Decoder, Timestep
from zoo.tokenizer import groups_of_similar_length

Guidance = float | Callable[[float], float]
LatentTensor = Float[Tensor, "batch channels rows columns"]

# Fixed in the original code.
APG_MOMENTUM = -0.5
APG_NORM_THRESHOLD = 2.5
# Tokens in one batch, and how much of it may be padding.
TOKENS_AT_ONCE = {"cpu": 8_192, "cuda": 262_144}
PADDING = 0.1


class NormalisedGuidance:
    """Adaptive projected guidance (arXiv 2410.02416): the part of the guidance that changes the direction of the prediction."""

    def __init__(self) -> None:
        self._running: Tensor | None = None

    def __call__(self, conditional: LatentTensor, unconditional: LatentTensor, scale: float) -> LatentTensor:
        """One step; the difference of earlier steps is carried on with a negative momentum."""
        difference = conditional - unconditional
        if self._running is not None:
            difference = difference + APG_MOMENTUM * self._running
        self._running = difference
        axes = (1, 2, 3)
        norm = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
        difference = difference * (APG_NORM_THRESHOLD / norm).clamp(max=1.0)
        direction = conditional.double()
        direction = direction / torch.linalg.vector_norm(direction, dim=axes, keepdim=True).clamp(min=1e-12)
        exact = difference.double()
        orthogonal = exact - (exact * direction).sum(axes, keepdim=True) * direction
        return conditional + (scale - 1) * orthogonal.to(conditional.dtype)


def classifier_free_guidance(conditional: LatentTensor, unconditional: LatentTensor, scale: float) -> LatentTensor:
    """Away from the unconditional prediction (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def sample(
    decoder: Decoder,
    noise: LatentTensor,
    codes: Float[Tensor, "batch count components"],
    keep: Sequence[int],
    *,
    steps: int,
    guidance: Guidance,
    method: str,
    on_step: Callable[[], object] = lambda: None,
) -> LatentTensor:
    """Scaled latents by Euler's method in ``steps`` equal steps from t = 1.

    Items with and without condition go through the decoder together wherever their lengths are similar.

    Args:
        decoder: the velocity field.
        noise: at t = 1.
        codes: of the tokens, padded to the longest item.
        keep: tokens of each item.
        guidance: scale, or a function from t to the scale; exactly 1 saves the unconditional pass.
        method: how the two passes are combined.
        on_step: called after each step.
    """
    items = len(keep)
    guided = callable(guidance) or guidance != 1
    combine = NormalisedGuidance() if method == "apg" else classifier_free_guidance
    passes = _Passes(decoder, codes, keep, guided, (noise.shape[2], noise.shape[3]))
    times = [step / steps for step in range(steps, 0, -1)]
    x = noise
    for t, timestep in zip(
        times, decoder.timesteps(torch.tensor(times, dtype=torch.float32, device=noise.device)), strict=True
    ):
        velocity = passes.velocity(x, timestep)
        if guided:
            scale = guidance(t) if callable(guidance) else guidance
            velocity = combine(velocity[:items], velocity[items:], scale)
        x = x - velocity / steps
        on_step()
    return x


class _Passes:
    """The conditional passes of all items and, behind them, the unconditional ones, batched by length."""

    def __init__(
        self,
        decoder: Decoder,
        codes: Float[Tensor, "batch count components"],
        keep: Sequence[int],
        guided: bool,
        size: tuple[int, int],
    ) -> None:
        self.decoder, self.items = decoder, len(keep)
        config = decoder.config
        patches = (size[0] // config.patch_size[0]) * (size[1] // config.patch_size[1])
        counts = [*keep, *([0] * len(keep) if guided else [])]
        budget = TOKENS_AT_ONCE.get(codes.device.type, TOKENS_AT_ONCE["cuda"])
        self.batches = []
        for group in groups_of_similar_length([patches + count for count in counts], budget, waste=PADDING):
            passes = torch.tensor(group, dtype=torch.int64, device=codes.device)
            items = passes % self.items
            condition = decoder.condition(codes[items], [counts[i] for i in group], [index >= self.items for index in group])
            self.batches.append((passes, items, condition))
        self.total = len(counts)

    def velocity(self, x: LatentTensor, timestep: Timestep) -> Float[Tensor, "passes channels rows columns"]:
        """Velocities of all passes, conditional ones first."""
        out = x.new_empty(self.total, *x.shape[1:])
        for passes, items, condition in self.batches:
            out[passes] = self.decoder(x[items], timestep, condition)
        return out


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "batch channels rows columns"]:
    """Standard normal noise from one seed per item, the same on every device and in every batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=own, device="cpu", dtype=torch.float32) for own in generators])


# ---- training


def noise_levels(u: Float[Tensor, " batch"], config: FlexTokConfig) -> Float[Tensor, " batch"]:
    """Noise levels t of training from uniform draws: around the middle (arXiv 2403.03206, section 3.1), or logit-normal."""
    if config.logit_normal:
        return torch.sigmoid(torch.special.ndtri(u))
    return 1 - u - config.mode_scale * (torch.cos(torch.pi / 2 * u).square() - 1 + u)


def flow_loss(
    decoder: Decoder,
    latents: LatentTensor,
    codes: Float[Tensor, "batch registers components"],
    *,
    noise: LatentTensor,
    t: Float[Tensor, " batch"],
    keep: Int[Tensor, " batch"],
    null: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared error of the velocity per item, differentiable in codes and decoder.

    Args:
        decoder: the velocity field.
        latents: scaled latents of the images.
        codes: all codes of each item.
        noise: standard normal.
        t: noise level of each item, in [0, 1].
        keep: codes kept by nested dropout (section 3.3).
        null: items trained without condition.
    """
    level = t[:, None, None, None]
    velocity = decoder(level * noise + (1 - level) * latents, decoder.timestep(t), decoder.dense_condition(codes, keep, null))
    return (velocity - (noise - latents)).square().mean(dim=(1, 2, 3))


def prefix_ladder(longest: int) -> Iterator[int]:
    """1, 2, 4, … and the whole length."""
    k = 1
    while k < longest:
        yield k
        k *= 2
    yield longest
