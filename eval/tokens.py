"""Statistics of the ids themselves: how much of the vocabulary is used, and how evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def usage_statistics(counts: NDArray[np.int64], tokens_per: Mapping[str, float]) -> dict[str, Any]:
    """Statistics of how often each id occurred.

    Args:
        counts: occurrences of each id of the vocabulary.
        tokens_per: tokens that a unit of media takes, by the unit's name: ``{"second": 75.0}``.

    Returns:
        ``tokens``; ``used`` share of the vocabulary; ``entropy_bits`` per token (of single ids); ``perplexity`` 2^entropy;
        ``nominal_bits`` per token; and both as bits per unit, ``bits_per_second`` and ``entropy_bits_per_second``. The entropy
        of few tokens is an underestimate: it cannot exceed log2 of their number.
    """
    total = int(counts.sum())
    entropy = _entropy(counts)
    nominal = max(1, (len(counts) - 1).bit_length())
    found: dict[str, Any] = {
        "tokens": total,
        "vocab_size": len(counts),
        "used": float((counts > 0).mean()),
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "nominal_bits": nominal,
    }
    for unit, rate in tokens_per.items():
        found |= {f"bits_per_{unit}": nominal * rate, f"entropy_bits_per_{unit}": entropy * rate}
    return found


def position_entropy(sequences: Sequence[Sequence[int]]) -> list[float] | None:
    """Entropy in bits of the ids at each position, where all sequences are of one length; at most log2 of their number."""
    if len(sequences) < 2 or len({len(ids) for ids in sequences}) != 1:
        return None
    return [_entropy(np.unique(column, return_counts=True)[1]) for column in np.array(sequences).T]


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0
