"""What the ids themselves say: how much of the vocabulary is used, and how evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def usage_statistics(counts: NDArray[np.int64], tokens_per_second: float | None) -> dict[str, Any]:
    """Statistics of how often each id occurred.

    Returns:
        ``tokens``; ``used`` share of the vocabulary; ``entropy_bits`` per token (of single ids); ``perplexity`` 2^entropy;
        ``nominal_bits`` per token; and, where media has a duration, both as bits per second. The entropy of few tokens is an
        underestimate: it cannot exceed log2 of their number.
    """
    total = int(counts.sum())
    share = counts[counts > 0] / max(total, 1)
    entropy = float(-(share * np.log2(share)).sum()) + 0.0
    nominal = max(1, (len(counts) - 1).bit_length())
    found: dict[str, Any] = {
        "tokens": total,
        "vocab_size": len(counts),
        "used": float((counts > 0).mean()),
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "nominal_bits": nominal,
    }
    if tokens_per_second is not None:
        found |= {"bits_per_second": nominal * tokens_per_second, "entropy_bits_per_second": entropy * tokens_per_second}
    return found
