"""Text that ships with Python: the reference pages of ``pydoc_data.topics``, under the licence of Python (PSF-2.0)."""

from __future__ import annotations

import re
from pydoc_data.topics import topics


def pages() -> list[list[str]]:
    """Pages in the order of their names, each a list of its lines that have letters, without margins."""
    found = []
    for name in sorted(topics):
        lines = (re.sub(r"\s+", " ", line).strip() for line in topics[name].splitlines())
        found.append([line for line in lines if re.search(r"[A-Za-z]", line)])
    return [page for page in found if page]


def plain() -> bytes:
    """All pages as they are, one behind the other."""
    return "\n".join(topics[name] for name in sorted(topics)).encode()
