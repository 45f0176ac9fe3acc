"""The recipe of ``genome-tiny``: byte-pair encoding trained on the genome that Debian's package ``bowtie-examples`` ships.

    apt-get download bowtie-examples && dpkg-deb -x bowtie-examples_*.deb data
    python -m zoo.weights.recipes.genome --out weights/genome-tiny.safetensors data/usr/share/doc/bowtie/examples/genomes/*.gz

Vocabulary and file are as DNABERT-2's: 4096 ids, and the same special ones. Words are stretches of a sequence, of both strands,
and merges go by counts. The last part of every sequence is held out: `held_out` gives it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from zoo.codecs.genome import Genome
from zoo.hub import load_upstream, write_saved_file
from zoo.media.genome import read, reverse_complement

SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
NAME = "genome-tiny"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code and the sequences.

    Attributes:
        vocab_size: ids, with the special ones.
        word: letters of a stretch, which no merge crosses.
        held_out: share of each sequence, at its end, that is not trained on.
        longest: letters of a token.
    """

    vocab_size: int = 4096
    word: int = 512
    held_out: float = 0.2
    longest: int = 32


def trained(sequences: Iterable[str], recipe: Recipe) -> Tokenizer:
    """The tokenizer of sequences in upper case; letters other than A, C, G and T cut words."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[*SPECIALS],
        initial_alphabet=["A", "C", "G", "T"],
        limit_alphabet=4,
        max_token_length=recipe.longest,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(sequences, recipe), trainer)
    markers = [(name, SPECIALS.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=markers
    )
    return tokenizer


def _words(sequences: Iterable[str], recipe: Recipe) -> Iterator[str]:
    for sequence in sequences:
        kept = sequence[: round(len(sequence) * (1 - recipe.held_out))]
        for strand in (kept, reverse_complement(kept)):
            for start in range(0, len(strand), recipe.word):
                yield "".join(letter if letter in "ACGT" else " " for letter in strand[start : start + recipe.word])


def held_out(sequence: str, recipe: Recipe | None = None) -> str:
    """The part of a sequence that is not trained on."""
    share = (recipe or Recipe()).held_out
    return sequence[round(len(sequence) * (1 - share)) :]


def build(paths: Sequence[Path], recipe: Recipe) -> Genome:
    """The model of the sequences in FASTA files."""
    sequences = (record.sequence.upper() for path in paths for record in read(path))
    file = trained(sequences, recipe).to_str().encode()
    model = load_upstream("genome", None, {"tokenizer.json": torch.frombuffer(bytearray(file), dtype=torch.uint8)})
    assert isinstance(model, Genome)
    model.name = NAME
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", type=Path, nargs="+", help="FASTA files")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--vocab-size", type=int, default=Recipe.vocab_size, help="number of ids")
    chosen = parser.parse_args(arguments)
    write_saved_file(build(chosen.sequences, Recipe(vocab_size=chosen.vocab_size)), chosen.out)


if __name__ == "__main__":
    main()
