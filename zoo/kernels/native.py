"""Kernels in C, compiled on first use where a C compiler is installed; everything works without, only slower.

Kernels are specific to the CPU, so the cache key names kernel and CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch

from zoo.download import cache_root
from zoo.media import replacing

_log = logging.getLogger("zoo")

# GCC takes half of an x86 processor's widest registers unless it is told otherwise.
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = ("-O3", "-march=native", *_WIDE, "-shared", "-fPIC", "-std=c11")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: Operations that one thread does while others would only just have been started.
LITTLE = 1 << 20
#: Set to a non-empty value to do without compiled kernels.
SWITCH = "ZOO_NO_NATIVE"


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """The compiled form of a C file in this package; ``None`` where it cannot be compiled or is switched off."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get(SWITCH) or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s could not be compiled, slower code does its work: %s", source, error)
        return None


def unwatched(*tensors: torch.Tensor) -> bool:
    """Whether code that reads and writes the memory of these tensors alone does all there is to do.

    Gradients, compilers, exports and modes that count or replace operators see PyTorch's operators only.
    """
    return (
        all(type(tensor) in _PLAIN and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._len_torch_dispatch_stack()
    )


def _compiled(source: str, compiler: str) -> Path:
    """Path of the shared library, compiled if it is not there."""
    text = resources.files("zoo.kernels").joinpath(source).read_text(encoding="utf-8")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    processor = Path("/proc/cpuinfo")
    features = next((line for line in _lines(processor) if line.startswith(("flags", "Features"))), "")
    key = hashlib.sha256("\n".join([text, version, features, *_FLAGS]).encode()).hexdigest()[:16]
    target = cache_root() / "kernels" / f"{Path(source).stem}-{key}.so"
    if not target.exists():
        with replacing(target) as temporary:
            command = [compiler, *_FLAGS, "-x", "c", "-", "-o", str(temporary), "-lm"]
            subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=120)
    return target


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="zoo-kernel")


def over_rows(function: object, rows: int, work: int, *arguments: object) -> None:
    """Call a C function ``f(first_row, last_row, *arguments)`` for all rows, in PyTorch's number of threads.

    Args:
        function: of a `library`; it must not touch the same output in two rows.
        rows: rows of the output.
        work: operations in all; little work stays in one thread.
        arguments: what else the function takes.
    """
    assert callable(function)
    threads = min(torch.get_num_threads(), max(1, work // LITTLE), rows)
    if threads == 1:
        function(0, rows, *arguments)
        return
    cuts = [index * rows // threads for index in range(threads + 1)]
    done = [_pool(threads).submit(function, first, last, *arguments) for first, last in pairwise(cuts)]
    for part in done:
        part.result()
