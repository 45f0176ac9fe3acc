"""What a start costs: libraries that take seconds to import stay out of the processes that don't need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: They take 1 to 6 seconds each.
HEAVY = ("torch._dynamo", "diffusers", "transformers", "scipy", "sympy")

SCRIPT = """
import sys
import zoo
zoo.load(sys.argv[1])
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


@pytest.mark.parametrize("name", ["wavtokenizer-tiny", "flextok-tiny"])
def test_loading_imports_no_compiler_and_no_other_zoo(name: str) -> None:
    command = [sys.executable, "-c", SCRIPT, name, *HEAVY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
