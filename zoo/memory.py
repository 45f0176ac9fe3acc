"""Memory that PyTorch frees on a CPU: kept for what comes next, or returned.

The C library gives large pieces back to the system at once, and the next map of the same size comes as new pages, which the
system fills with zeros one by one. Image networks make such maps at every layer.
"""

from __future__ import annotations

import ctypes
import os

from zoo.errors import ArgumentError

# Parameters of ``mallopt`` (its manual page), and where the C library's own thresholds end up in a process with large maps.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_SETTINGS: dict[str, dict[int, int]] = {
    # No piece is mapped by itself, and the heap never shrinks.
    "keep": {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1},
    "return": {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20},
}
#: Variables that make glibc keep memory from the start of a process.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def set_allocator(allocator: str) -> None:
    """Keep memory that was freed for what comes next, or return it to the system.

    This holds for all of the process. ``keep`` saves time wherever large tensors come and go; the process then holds what it
    once needed at most until it ends, or until ``return`` gives back what is free. Results do not depend on it.

    Args:
        allocator: ``keep``, or ``return``, which is much like what the system does by itself.

    Raises:
        ArgumentError: there is no such way, or the C library is not glibc, which alone has it.
    """
    if allocator not in _SETTINGS:
        raise ArgumentError(f"allocator must be one of {', '.join(_SETTINGS)}, not {allocator!r}")
    library = _glibc()
    if library is None:
        raise ArgumentError(f"allocator={allocator!r} needs glibc's malloc, which this system does not have")
    for parameter, value in _SETTINGS[allocator].items():
        if not library.mallopt(parameter, value):
            raise ArgumentError(f"this system's malloc refuses to be told to {allocator} memory")
    if allocator == "return":
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return None
    library = ctypes.CDLL(None) if is_glibc else None
    return library if library is not None and hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
