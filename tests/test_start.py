"""What a start costs: libraries that take seconds to import stay out of the processes that don't need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: They take 1 to 6 seconds each.
HEAVY = ("torch._dynamo", "diffusers", "transformers", "torchvision", "scipy", "sympy")

SCRIPT = """
import sys
import numpy
import zoo
item = {"image": numpy.zeros((9, 7, 3), numpy.uint8), "audio": (numpy.zeros(24, numpy.float32), 24000)}
zoo.load(sys.argv[1]).encode(item[sys.argv[2]])
print(*(name for name in sys.argv[3:] if name in sys.modules))
"""


@pytest.mark.parametrize(("name", "media"), [("wavtokenizer-tiny", "audio"), ("flextok-tiny", "image")])
def test_encoding_imports_no_compiler_and_no_other_zoo(name: str, media: str) -> None:
    command = [sys.executable, "-c", SCRIPT, name, media, *HEAVY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
