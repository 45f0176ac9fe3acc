"""Published accuracy of visual-token compression, as others report it; nothing here was measured by this package."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    """A method's accuracy at a number of visual tokens, as a share of the uncompressed model's, mean over benchmarks.

    Attributes:
        method: as in `zoo.compress.METHODS` where it is there.
        tokens: left of an image.
        retention: in percent.
    """

    method: str
    tokens: int
    retention: float


class ReportedTable(NamedTuple):
    """Published figures of one model."""

    model: str
    tokens: int
    source: str
    rows: tuple[Reported, ...]


TABLES = (
    ReportedTable(
        "LLaVA-1.5-7B",
        576,
        "mean over up to 9 benchmarks, no training; tables of arXiv 2412.04467 and of papers that repeat them, within 0.5",
        (
            Reported("fastv", 192, 91.2),
            Reported("fastv", 64, 76.7),
            Reported("prumerge", 192, 91.4),
            Reported("prumerge", 128, 89.4),
            Reported("prumerge", 64, 87.7),
            Reported("pyramiddrop", 192, 96.7),
            Reported("pyramiddrop", 128, 94.9),
            Reported("pyramiddrop", 64, 77.5),
            Reported("tome", 128, 80.4),
            Reported("tome", 64, 70.1),
            Reported("sparsevlm", 192, 96.1),
            Reported("sparsevlm", 128, 93.8),
            Reported("sparsevlm", 64, 87.3),
            Reported("mustdrop", 192, 97.2),
            Reported("mustdrop", 128, 95.7),
            Reported("mustdrop", 64, 90.1),
            Reported("visionzip", 192, 98.1),
            Reported("visionzip", 128, 97.2),
            Reported("visionzip", 64, 94.5),
        ),
    ),
    ReportedTable(
        "LLaVA-NeXT-7B",
        2880,
        "mean over 9 benchmarks, no training; tables of the papers of GlobalCom2 and MustDrop",
        (
            Reported("fastv", 320, 88.0),
            Reported("prumerge", 320, 85.6),
            Reported("pyramiddrop", 320, 90.9),
            Reported("sparsevlm", 320, 89.7),
            Reported("globalcom2", 320, 92.2),
            Reported("mustdrop", 320, 92.2),
        ),
    ),
    ReportedTable(
        "LLaVA-1.5-7B",
        576,
        "baselines, mean over 6 benchmarks; arXiv 2502.11501",
        (
            Reported("random", 144, 95.0),
            Reported("pool", 144, 96.4),
            Reported("fastv", 144, 89.8),
            Reported("sparsevlm", 144, 93.5),
        ),
    ),
)
