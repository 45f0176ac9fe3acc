"""Losses and fits of a Vec-Tok's training: k-means, the loss of the inverse model, the adversaries of the vocoder.

Byte pairs are learnt by `units.BPE.train`. What the paper leaves open (initialisation, the weight of SSIM, prompts) is chosen
here, and named in the model card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from zoo.codecs.vectok.logmel import LogMel
from zoo.kernels.codebook import nearest, prepare
from zoo.nn.discriminators import Judgement, PeriodDiscriminator
from zoo.nn.losses import feature_matching_loss, least_squares_discriminator_loss, least_squares_generator_loss

Points = Float[Tensor, "points dim"]
Centres = Float[Tensor, "centres dim"]

# ----------------------------------------------------------------------------------------------------------------- k-means


def choose_centres(points: Points, count: int, generator: torch.Generator) -> Centres:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is drawn by its squared distance to those before it.

    Args:
        points: at least ``count`` of them.
        count: centres wanted.
        generator: on the CPU.
    """
    if len(points) < count:
        raise ValueError(f"{len(points)} points do not make {count} centres")
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    distances = (points - points[first]).square().sum(1)
    for _ in range(count - 1):
        total = distances.double().cumsum(0)
        # Where all points coincide with a centre, any of them will do.
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        following = min(int(torch.searchsorted(total, drawn, right=True)), len(points) - 1)
        chosen.append(following)
        distances = torch.minimum(distances, (points - points[following]).square().sum(1))
    return points[chosen].clone()


def fit_kmeans(
    points: Points, centres: Centres, *, iterations: int = 100, tolerance: float = 1e-4
) -> tuple[Centres, list[float]]:
    """Lloyd's algorithm on all points. Returns the centres, and the inertia before each update.

    Args:
        points: vectors whose recordings' means were taken away.
        centres: where to start, from `choose_centres` say.
        iterations: updates at most.
        tolerance: stop when the inertia, the mean squared distance, falls by less than this share.

    An empty cluster is given the point that is farthest from its centre.
    """
    inertias: list[float] = []
    for _ in range(iterations):
        ids = nearest(points, prepare(centres))
        distances = _distances(points, centres, ids)
        inertias.append(distances.double().mean().item())
        if len(inertias) > 1 and inertias[-2] - inertias[-1] < tolerance * inertias[-2]:
            break
        counts = torch.bincount(ids, minlength=len(centres))
        sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, ids, points.double())
        centres = (sums / counts.clamp(min=1)[:, None]).to(points)
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = points[distances.topk(len(empty)).indices]
    return centres, inertias


def _distances(points: Points, centres: Centres, ids: Int[Tensor, " points"]) -> Float[Tensor, " points"]:
    blocks = zip(points.split(65_536), ids.split(65_536), strict=True)
    return torch.cat([(block - centres[own]).square().sum(1) for block, own in blocks])


class MiniBatchKMeans:
    """k-means on a stream of batches (Sculley 2010): a centre is the mean of all points that it was ever given.

    Args:
        centres: where to start.
        reseed_below: after each batch, centres with a smaller share of all points than this part of an equal share are put on
            far points of the batch; 0 never moves any.
    """

    def __init__(self, centres: Centres, reseed_below: float = 0.0) -> None:
        self.centres = centres.clone()
        self.counts = torch.zeros(len(centres), dtype=torch.float64, device=centres.device)
        self.reseed_below = reseed_below

    def update(self, batch: Points) -> float:
        """Take a batch in; returns its inertia under the centres before."""
        ids = nearest(batch, prepare(self.centres))
        distances = _distances(batch, self.centres, ids)
        counts = torch.bincount(ids, minlength=len(self.centres)).double()
        sums = torch.zeros_like(self.centres, dtype=torch.float64).index_add_(0, ids, batch.double())
        self.counts += counts
        given = counts > 0
        step = (sums[given] - counts[given, None] * self.centres[given]) / self.counts[given, None]
        self.centres[given] += step.to(self.centres)
        self._reseed(batch, distances)
        return distances.double().mean().item()

    def _reseed(self, batch: Points, distances: Float[Tensor, " points"]) -> None:
        starved = (self.counts < self.reseed_below * self.counts.mean()).nonzero()[:, 0][: len(batch)]
        self.centres[starved] = batch[distances.topk(len(starved)).indices]
        # A moved centre starts as one that has had its equal share for a while, or the next batch would move it again.
        self.counts[starved] = self.reseed_below * self.counts.mean()


# ------------------------------------------------------------------------------------------------------- inverse k-means


def corrupt(
    units: Int[Tensor, "*shape"],
    num_units: int,
    generator: torch.Generator | None = None,
    *,
    masked: float = 0.1,
    replaced: float = 0.1,
) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Units, some of them replaced at random, and which are to be hidden behind the mask vector (paper: 10 % each)."""
    device = generator.device if generator else units.device
    drawn = torch.rand(units.shape, generator=generator, device=device).to(units.device)
    others = torch.randint(num_units, units.shape, generator=generator, device=device).to(units.device)
    return torch.where(drawn < replaced, others, units), drawn >= 1 - masked


def draw_prompt(frames: int, target: slice, generator: torch.Generator, *, shortest: int = 75, longest: int = 200) -> slice:
    """A stretch of a recording of ``frames`` vectors that serves as prompt for a target within it, outside the target.

    Raises:
        ValueError: neither side of the target has ``shortest`` vectors.
    """
    sides = [side for side in (slice(0, target.start), slice(target.stop, frames)) if side.stop - side.start >= shortest]
    if not sides:
        raise ValueError(f"{frames} vectors leave no prompt of {shortest} beside {target.start} to {target.stop}")
    side = sides[int(torch.randint(len(sides), (1,), generator=generator))]
    room = side.stop - side.start
    length = int(torch.randint(shortest, min(longest, room) + 1, (1,), generator=generator))
    start = side.start + int(torch.randint(room - length + 1, (1,), generator=generator))
    return slice(start, start + length)


def inverse_loss(
    predicted: Float[Tensor, "batch frames dim"],
    target: Float[Tensor, "batch frames dim"],
    scale: Float[Tensor, " dim"] | None = None,
    ssim_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean squared error and structural dissimilarity of speech vectors (paper: both, their weights are not published).

    Args:
        scale: standard deviation of each number over the training data, by which both are divided.
        ssim_weight: of ``1 - ssim``.
    """
    if scale is not None:
        predicted, target = predicted / scale, target / scale
    return F.mse_loss(predicted, target) + ssim_weight * (1 - ssim(predicted, target).mean())


def ssim(predicted: Float[Tensor, "batch frames dim"], target: Float[Tensor, "batch frames dim"]) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al. 2004) of vectors as images of one channel.

    Gaussian window of 11 with a deviation of 1.5, whole windows only, K1 = 0.01, K2 = 0.03, and the target's range as that of
    the data; the target carries no gradient.

    Raises:
        ValueError: there are fewer than 11 frames or numbers per vector.
    """
    if min(target.shape[1:]) < 11:
        raise ValueError(f"structural similarity needs at least 11 x 11 numbers, not {list(target.shape[1:])}")
    target = target.detach()
    reach = target.flatten(1).amax(1) - target.flatten(1).amin(1)
    c1, c2 = ((k * reach[:, None, None].clamp(min=1e-8)).square() for k in (0.01, 0.03))
    ux, uy = _blur(predicted), _blur(target)
    vx, vy = _blur(predicted.square()) - ux.square(), _blur(target.square()) - uy.square()
    vxy = _blur(predicted * target) - ux * uy
    similarity = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux.square() + uy.square() + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


def _blur(x: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows_left columns_left"]:
    steps = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    window = torch.exp(-steps.square() / (2 * 1.5**2))
    window = window / window.sum()
    blurred = F.conv2d(F.conv2d(x[:, None], window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    return blurred[:, 0]


# ------------------------------------------------------------------------------------------------------------- vocoder


class ScaleDiscriminator(nn.Module):
    """Grouped convolutions on a waveform (MelGAN, arXiv 1910.06711, as HiFi-GAN has it).

    Args:
        widths: channels of the convolutions.
        spectral: normalise weights by their spectral norm rather than by their length.
    """

    #: Kernel, stride and groups of each convolution.
    LAYERS = ((15, 1, 1), (41, 2, 4), (41, 2, 16), (41, 4, 16), (41, 4, 16), (41, 1, 16), (5, 1, 1))

    def __init__(self, widths: Sequence[int] = (128, 128, 256, 512, 1024, 1024, 1024), spectral: bool = False) -> None:
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=math.gcd(groups, inputs)))
            for (inputs, outputs), (kernel, stride, groups) in zip(pairwise((1, *widths)), self.LAYERS, strict=True)
        )
        self.score = norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> list[Tensor]:
        """Every feature map ``[batch, channels, time]``, the score map last."""
        x = waveform[:, None]
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        return [*maps, self.score(x)]


class HiFiGANDiscriminators(nn.Module):
    """HiFi-GAN's adversaries: five periods, and three scales, the first with spectral norm (arXiv 2010.05646, section 2.3).

    Feature matching compares every map, the scores among them.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        period_widths: Sequence[int] = (32, 128, 512, 1024, 1024),
        scale_widths: Sequence[int] = (128, 128, 256, 512, 1024, 1024, 1024),
    ) -> None:
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(period, period_widths) for period in periods)
        self.scales = nn.ModuleList(ScaleDiscriminator(scale_widths, spectral=index == 0) for index in range(3))

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Judgement:
        maps = [discriminator(waveform) for discriminator in self.periods]
        for index, discriminator in enumerate(self.scales):
            if index:
                waveform = F.avg_pool1d(waveform[:, None], 4, 2, padding=2)[:, 0]
            maps.append(discriminator(waveform))
        return Judgement([m[-1] for m in maps], maps)


def discriminator_loss(real: Judgement, fake: Judgement) -> Float[Tensor, ""]:
    """Loss of the adversaries, with ``fake`` from a detached waveform."""
    return least_squares_discriminator_loss(real.scores, fake.scores)


def generator_loss(
    real: Judgement,
    fake: Judgement,
    target: Float[Tensor, "batch samples"],
    estimate: Float[Tensor, "batch samples"],
    spectrogram: LogMel,
    *,
    feature_weight: float = 2.0,
    mel_weight: float = 45.0,
) -> Float[Tensor, ""]:
    """Loss of the vocoder: the adversaries' scores, their features, and the log-mel distance (HiFi-GAN's weights)."""
    mel = F.l1_loss(spectrogram(estimate), spectrogram(target))
    features = feature_matching_loss(real.features, fake.features)
    return least_squares_generator_loss(fake.scores) + feature_weight * features + mel_weight * mel
