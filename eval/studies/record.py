"""Record of a study: its figures with the command and the machine that gave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.eval.options import command_line
from zoo.machine import device_name
from zoo.media import write_json


def write_result(content: Mapping[str, Any], path: Path, device: torch.device | str = "cpu") -> None:
    """Write figures with the command, the device and the number of threads that gave them, and print them."""
    run = {"command": command_line(), "device": device_name(torch.device(device)), "threads": torch.get_num_threads()}
    content = run | dict(content)
    write_json(path, content, indent=2)
    print(json.dumps(content, indent=2))
