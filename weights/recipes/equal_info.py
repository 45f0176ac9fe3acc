"""The counts of ``equal-info-16``: pairs and triples of bytes in the reference pages that ship with Python.

    python -m zoo.weights.recipes.equal_info --out weights/equal-info-16.safetensors

The pages differ by the version of Python: the embedded table is of 3.11.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.codecs.equal_info import EqualInfo
from zoo.hub import write_saved_file
from zoo.weights.data.text import plain


def train(bits: int = 16) -> EqualInfo:
    """A tokenizer with the pages' counts."""
    return EqualInfo.of(plain(), bits=bits, name=f"equal-info-{bits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=16)
    arguments = parser.parse_args()
    write_saved_file(train(arguments.bits), arguments.out)


if __name__ == "__main__":
    main()
