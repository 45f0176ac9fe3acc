"""Bytes of a language model, one by one and of a given text, beside the way of the method's authors.

    zoo study byte-speed --threads 1 --out eval/results/bench-bytes-of-a-language-model.json

A small random GPT-2 over BPE with byte fallback, as the authors' program (arXiv 2410.09303) takes it, of Python's reference
pages. That program makes one pass a byte behind a copy of the cache, and encodes every continuation of the last word again to
see which are valid. *Steps of the original* does so with the library tokenizers in the place of SentencePiece. *Its passes
alone* takes our word for what is valid. Times are those of the processor, the median of interleaved rounds; all ways give the
same distributions.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from zoo.machine import described
from zoo.media import write_json
from zoo.text import ByteModel, pieces_of

PROMPT = "the value of the attr"
BYTES, ROUNDS = 80, 5
#: Layers, width and heads, and pieces of the vocabulary.
SIZES = (2, 32, 4, 600)

Floats = NDArray[np.float64]


class Steps:
    """A text as bytes by one pass for each of them.

    Args:
        model: a causal language model of ``transformers``.
        tokenizer: BPE with byte fallback, whose spaces begin words.
        checked: find the valid continuations by encoding all of them again; as they are known otherwise.
    """

    def __init__(self, model: Any, tokenizer: Any, checked: bool = True) -> None:
        self.model, self.checked = model, checked
        self.pieces, self.backend = pieces_of(tokenizer), tokenizer.backend_tokenizer
        names = tokenizer.convert_ids_to_tokens(range(len(self.pieces.octets)))
        self.single = np.array([name.startswith("<") for name in names])

    def start(self, text: bytes) -> None:
        """Begin with a text, byte by byte from its last space on."""
        text = self.pieces.lead + text
        anchor = self.pieces.anchor(text)
        self.text, self.covers, self.exact = text[:anchor], list[tuple[bytes, float]](), 0.0
        self.ids = list[int]()
        self.cache: Any = None
        for byte in text[anchor:]:
            self.next()
            self.advance(byte)

    def next(self) -> Floats:
        """Probabilities of the next byte ``[256]``, without special tokens."""
        pieces, mass = self.pieces, np.zeros(256)
        if self.exact > -np.inf:
            tokens = pieces.encode(self.text)
            logs = self._pass([pieces.begin or 0, *tokens]) + self.exact
            for number in np.flatnonzero(self._valid(tokens)).tolist():
                self.covers.append((pieces.octets[number] or b"", float(logs[number])))
            self.exact = -np.inf
        for rest, weight in self.covers:
            mass[rest[0]] += np.exp(weight)
        return mass / mass.sum()

    def advance(self, byte: int) -> None:
        """Add a byte to the text."""
        kept = [(rest[1:], weight) for rest, weight in self.covers if rest[0] == byte]
        top = max(weight for _, weight in kept)
        self.exact = max((weight - top for rest, weight in kept if not rest), default=-np.inf)
        self.covers = [(rest, weight - top) for rest, weight in kept if rest]
        self.text += bytes([byte])

    def _pass(self, ids: list[int]) -> Floats:
        from transformers import DynamicCache

        same = 0
        while same < min(len(ids) - 1, len(self.ids)) and ids[same] == self.ids[same]:
            same += 1
        cache = copy.deepcopy(self.cache) if same else DynamicCache()
        if same < len(self.ids) and cache is not None and same:
            cache.crop(same - len(self.ids))
        with torch.inference_mode():
            found = self.model(torch.tensor([ids[same:]]), past_key_values=cache, use_cache=True)
        self.cache, self.ids = cache, ids
        logs: Floats = found.logits[0, -1].double().log_softmax(-1).numpy()
        return logs

    def _valid(self, tokens: Sequence[int]) -> NDArray[np.bool_]:
        pieces = self.pieces
        valid = pieces.follows(tokens)
        if not self.checked:
            return valid
        start = max((place for place, number in enumerate(tokens) if self._octets(number).startswith(b" ")), default=0)
        tail = list(tokens[start:])
        lists = [[*tail, number] for number in range(len(pieces.octets))]
        # The tokenizer puts the first space in front of a text by itself.
        texts = [b"".join(map(self._octets, wanted)).decode(errors="replace")[1:] for wanted in lists]
        again = self.backend.encode_batch(texts, add_special_tokens=False)
        same = [own.ids == wanted for own, wanted in zip(again, lists, strict=True)]
        # Whether single bytes are valid, no text tells before the character is finished.
        found: NDArray[np.bool_] = np.where(self.single, valid, same)
        return found

    def _octets(self, number: int) -> bytes:
        return self.pieces.octets[number] or b""


def language_model(layers: int, width: int, heads: int, vocabulary: int, seed: int = 0) -> tuple[Any, Any]:
    """A random GPT-2 whose next tokens are far from equally likely, and its tokenizer."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 259, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([topics[name] for name in sorted(topics)[:40]], trainer)
    state = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    numbers = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024}
        config = GPT2Config(vocab_size=len(names), bos_token_id=1, eos_token_id=2, initializer_range=0.6, **sizes)
        return GPT2LMHeadModel(config).eval().requires_grad_(False), tokenizer


def _by_steps(steps: Steps, octets: bytes) -> Floats:
    steps.start(PROMPT.encode())
    rows = []
    for byte in octets:
        rows.append(steps.next())
        steps.advance(byte)
    return np.stack(rows)


def _one_by_one(model: ByteModel, octets: bytes) -> Floats:
    model.start(PROMPT)
    rows = []
    for byte in octets:
        rows.append(model.next().bytes)
        model.advance(byte)
    return np.stack(rows)


def _scored(model: ByteModel, octets: bytes) -> float:
    return model.start(PROMPT).logprob(octets)


def _printable(model: ByteModel) -> bytes:
    """The likeliest way on of letters and signs of ASCII."""
    found = b""
    while len(found) < BYTES:
        byte = 32 + int(model.next().bytes[32:127].argmax())
        model.advance(byte)
        found += bytes([byte])
    return found


def run(*, threads: int | None = None, json_path: str | Path | None = None) -> dict[str, Any]:
    """Measure the bytes that the model finds most likely, asked for one by one, and the probability of the same text at once.

    Args:
        threads: threads of PyTorch; its own choice if ``None``.
        json_path: write the result there.

    Returns:
        Milliseconds of the processor for a byte by way, and how often the original's steps take as long.
    """
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = language_model(*SIZES)
    octets = _printable(ByteModel(model, tokenizer).start(PROMPT))
    # Everything is made anew for each round, as what is remembered of words would come again.
    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "steps of the original": lambda: partial(_by_steps, Steps(model, tokenizer), octets),
        "its passes alone": lambda: partial(_by_steps, Steps(model, tokenizer, checked=False), octets),
        "one by one": lambda: partial(_one_by_one, ByteModel(model, tokenizer), octets),
        "a given text": lambda: partial(_scored, ByteModel(model, tokenizer), octets),
    }
    results, seconds = {}, {way: list[float]() for way in ways}
    for _ in range(ROUNDS):
        for way, made in ways.items():
            work = made()
            started = time.process_time()
            results[way] = work()
            seconds[way].append(time.process_time() - started)
    expected = results["one by one"] / results["one by one"].sum(1, keepdims=True)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    content = {
        "bytes": len(octets),
        "model": dict(zip(("layers", "width", "heads", "vocabulary"), SIZES, strict=True)),
        "machine": described(),
        "measurements": [
            {
                "contender": way,
                "milliseconds_per_byte": 1e3 * taken / len(octets),
                "original_over_this": medians["steps of the original"] / taken,
            }
            for way, taken in medians.items()
        ],
        "largest_difference": float(np.abs(results["steps of the original"] - expected).max()),
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_table(content: dict[str, Any]) -> None:
    """The measurements for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = content["machine"]
    console.print(f"{machine['device']}, {machine['threads']} threads, {content['bytes']} bytes")
    table = Table("", "CPU ms a byte", "original over this")
    for found in content["measurements"]:
        table.add_row(found["contender"], f"{found['milliseconds_per_byte']:.2f}", f"{found['original_over_this']:.1f}")
    console.print(table)


def main(
    threads: Annotated[int | None, typer.Option(min=1, help="threads of PyTorch")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", "--json", help="write the figures as JSON")] = None,
) -> None:
    """Time the bytes of a language model against the way of the method's authors."""
    print_table(run(threads=threads, json_path=out))
