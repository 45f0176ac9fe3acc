"""The lexicon of ``lib-tiny``: a reader of the reference pages that ship with Python.

    python -m zoo.weights.recipes.lib --out weights/lib-tiny.safetensors

Takes a few minutes on one CPU thread. The pages differ by the version of Python: the embedded lexicon is of 3.11.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.codecs.lib import Lib, Reader
from zoo.hub import write_saved_file
from zoo.weights.data.text import pages

EPOCHS, SEED = 600, 1


def train(epochs: int = EPOCHS, seed: int = SEED) -> Lib:
    """A tokenizer with the lexicon after that number of pages."""
    return Lib.of(Reader(pages(), seed).read(epochs).lexicon, name="lib-tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    write_saved_file(train(arguments.epochs), arguments.out)


if __name__ == "__main__":
    main()
