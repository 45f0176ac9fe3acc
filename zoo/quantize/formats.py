"""The former home of `zoo.kernels.formats`, for one release."""

from __future__ import annotations

import warnings
from typing import Any

from zoo.kernels import formats


def __getattr__(name: str) -> Any:
    value = getattr(formats, name)
    if not name.startswith("__"):
        warnings.warn("zoo.quantize.formats is zoo.kernels.formats now", DeprecationWarning, stacklevel=2)
    return value
