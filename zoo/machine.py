"""The machine that figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ArgumentError


def device_name(device: torch.device) -> str:
    """Name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_amx() -> bool:
    """Whether the processor has matrix units for bfloat16, by which measurements of it differ most."""
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and "amx_tile" in cpu_info.read_text(errors="replace")


def described(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, AMX, vector instructions, threads and version of PyTorch, as figures keep them."""
    return {
        "device": device_name(torch.device(device)),
        "amx": has_amx(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def usable_device(device: torch.device | str) -> torch.device:
    """A device by its name, if this machine has it.

    Raises:
        ArgumentError: there is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(f"the device {str(device)!r} cannot be used: {reason}") from error
    if found.type == "meta":
        raise ArgumentError("the device 'meta' holds no numbers")
    return found
