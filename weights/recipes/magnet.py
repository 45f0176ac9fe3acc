"""``magnet-tiny``: the network of MAGNET, trained to guess the next byte of the reference pages that ship with Python.

    python -m zoo.weights.recipes.magnet --out weights/magnet-tiny.safetensors

Every tenth page is kept out; `measure` tells what the model makes of those. Takes about ten minutes on one CPU thread. The
pages differ by the version of Python: the embedded model is trained on those of 3.11.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.codecs.magnet import MagnetConfig, MagnetTokenizer, boundary_loss
from zoo.media import replacing
from zoo.tokenizer.byte_text import FIRST_BYTE
from zoo.weights.data.text import pages
from zoo.weights.recipes import trainer
from zoo.weights.recipes.trainer import Schedule, Trainer

TINY = MagnetConfig(dim=128, heads=4, head_dim=32, hidden=384, layers=(1, 2, 1), scripts=("latin",), priors=(0.2,))
#: One page of as many is kept out.
KEPT_OUT = 10


@dataclass(frozen=True)
class Recipe:
    """Settings of the training.

    Attributes:
        steps, minutes: length of the schedule, whichever is over first.
        rate: highest learning rate.
        rows, length: of a batch, in bytes.
        seed: of weights, batches and sampled boundaries.
    """

    steps: int = 1200
    minutes: float | None = None
    rate: float = 2e-3
    rows: int = 16
    length: int = 256
    seed: int = 0


def texts(kept_out: bool) -> list[bytes]:
    """Pages to train on, or those that are kept out.

    Pages quote each other: lines that stand in one that is kept out are left out of the others.
    """
    every = pages()
    test = every[::KEPT_OUT]
    if kept_out:
        return ["\n".join(lines).encode() for lines in test]
    seen = {line for lines in test for line in lines}
    others = ([line for line in lines if line not in seen] for i, lines in enumerate(every) if i % KEPT_OUT)
    return ["\n".join(lines).encode() for lines in others if lines]


def objective(
    model: MagnetTokenizer, ids: Int[Tensor, "rows length"], noise: Float[Tensor, "rows length"]
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Cross-entropy of the next byte, plus the binomial loss of the boundaries (equations 5 and 6 of the paper)."""
    [script], [prior] = model.config.scripts, model.config.priors
    found = model.network.run(ids, script, noise)
    entropy = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    share = boundary_loss(found.boundaries, prior)
    return entropy + share, {"bits": float(entropy.detach()) / math.log(2), "ends": float(found.boundaries.detach().mean())}


class Training(trainer.Training[MagnetTokenizer]):
    """One stage on random stretches of the pages."""

    def __init__(self, recipe: Recipe, config: MagnetConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.bytes = torch.frombuffer(bytearray(b"\n".join(texts(kept_out=False))), dtype=torch.uint8)
        model = MagnetTokenizer(config, name="magnet-tiny").requires_grad_(True)
        # Embeddings of length 1: what the layers add would be lost beside larger ones.
        model.network.word_emb.weight.data.mul_(config.dim**-0.5)
        super().__init__(recipe, model)

    def make_stage(self, index: int) -> Trainer:
        recipe = self.recipe

        def step(rng: torch.Generator) -> tuple[Float[Tensor, ""], dict[str, float]]:
            starts = torch.randint(len(self.bytes) - recipe.length, (recipe.rows, 1), generator=rng)
            ids = self.bytes[starts + torch.arange(recipe.length, dtype=torch.int64)].long() + FIRST_BYTE
            return objective(self.model, ids, torch.rand(ids.shape, dtype=torch.float32, generator=rng))

        schedule = Schedule(recipe.steps, recipe.rate, recipe.minutes, warmup=100, ema_decay=0.99)
        return Trainer("magnet", [(list(self.model.network.parameters()), 1.0)], step, schedule, recipe.seed)

    def snapshot(self) -> MagnetTokenizer:
        return trainer.shipped(self.model)


def train(recipe: Recipe, out: Path, config: MagnetConfig = TINY, checkpoint_seconds: float = 90.0) -> MagnetTokenizer:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``.

    Raises:
        ValueError: the checkpoint beside ``out`` was made by another recipe.
    """
    return trainer.run(recipe, out, lambda: Training(recipe, config), checkpoint_seconds)


@torch.no_grad()
def measure(model: MagnetTokenizer, texts: Sequence[bytes], longest: int = 1024) -> dict[str, float]:
    """Guesses of the next byte and lengths of words, in stretches of texts of up to ``longest`` bytes.

    Returns:
        ``bits_per_byte`` of all bytes but the first of a stretch; ``bytes_per_word``; ``ends_at_edges``, the share of words
        that end beside a byte that is no letter and no digit; and ``edges``, the share of bytes that are such an end.
    """
    [script] = model.config.scripts
    bits, guessed, words, hits, edges, total = 0.0, 0, 0, 0, 0, 0
    for text in texts:
        for start in range(0, len(text), longest):
            part = text[start : start + longest]
            if len(part) < 2:
                continue
            ids = torch.tensor([list(part)], dtype=torch.int64) + FIRST_BYTE
            found = model.network.run(ids, script)
            bits += float(F.cross_entropy(found.logits[0, :-1], ids[0, 1:], reduction="sum")) / math.log(2)
            ends = (found.boundaries[0, :-1] > 0).tolist()
            at_edge = [not part[i : i + 1].isalnum() or not part[i + 1 : i + 2].isalnum() for i in range(len(part) - 1)]
            hits += sum(end and edge for end, edge in zip(ends, at_edge, strict=True))
            words, edges = words + sum(ends), edges + sum(at_edge)
            guessed, total = guessed + len(ends), total + len(part)
    return {
        "bits_per_byte": bits / guessed,
        "bytes_per_word": total / max(1, words),
        "ends_at_edges": hits / max(1, words),
        "edges": edges / guessed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--figures", type=Path, help="a JSON file of what the model makes of the pages that were kept out")
    options = parser.parse_args(arguments)
    model = train(Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed), options.out)
    if options.figures is not None:
        with replacing(options.figures) as temporary:
            temporary.write_text(json.dumps(measure(model, texts(kept_out=True)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
