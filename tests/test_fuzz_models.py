"""Damaged files of models: the corpus, mutations of it, and files that were made to take memory or time."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from fuzz import targets_models as targets
from zoo import documents, registry
from zoo.state_dict import read_state

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
TARGETS = ("latents", "saved_config", "safetensors_metadata", "torch_archive", "catalogue", "upstream_config")
# Mutations of each target; ZOO_FUZZ_ROUNDS asks for more.
ROUNDS = int(os.environ.get("ZOO_FUZZ_ROUNDS", "60"))
TOKENS = (
    *(
        b"0",
        b"-1",
        b"9",
        b"999999999",
        b"99999999999999999999",
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'""',
        b"[[]]",
    ),
    *(
        b"\xff\xff\xff\xff",
        b"\x00",
        b"\x7f\xff\xff\xff",
        b"PK\x03\x04",
        b"&a [*a]",
        b"*a",
        b"<<: ",
        b"!!binary ",
        b"\xed\xa0\x80",
    ),
)


def seeds(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three changes: other bytes, other numbers and words, pieces left out or doubled."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 16, 64)))
        kind = rng.randrange(4)
        if kind == 0:
            content = content[:start] + rng.randbytes(end - start) + content[end:]
        elif kind == 1:
            content = content[:start] + content[end:]
        elif kind == 2:
            content = content[:end] + content[start:]
        else:
            # A whole number or word gives way, so that the file around it stays sound.
            words = [(i, j) for i, j in _words(content)] or [(start, end)]
            first, last = rng.choice(words)
            content = content[:first] + rng.choice(TOKENS) + content[last:]
    return content


def _words(content: bytes) -> list[tuple[int, int]]:
    """Where runs of letters, digits and points lie."""
    found, start = [], None
    for i, byte in enumerate(content + b" "):
        inside = chr(byte).isalnum() or byte in b"._"
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            found.append((start, i))
            start = None
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    assert seeds(target)
    for content in seeds(target):
        getattr(targets, target)(content)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str) -> None:
    """Reproducible: the seed of a failure is that of its round."""
    sound = seeds(target)
    for number in range(ROUNDS):
        rng = random.Random(f"{target} {number}")
        content = mutated(rng.choice(sound), rng)
        try:
            getattr(targets, target)(content)
        except BaseException as error:
            raise AssertionError(f"round {number} of {target}: {content[:2000]!r}") from error


@pytest.mark.parametrize("target", ["torch_archive", "latents", "safetensors_metadata"])
def test_truncated_files(target: str) -> None:
    for content in seeds(target):
        for size in range(0, len(content), max(1, len(content) // 40)):
            getattr(targets, target)(content[:size])


# ------------------------------------------------------------------------------------------- made to take memory or time


def repacked(path: Path, replace: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A PyTorch archive with another pickle in it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as sound, zipfile.ZipFile(path, "w", compression) as archive:
        for record in sound.infolist():
            content = sound.read(record)
            archive.writestr(record.filename, replace(content) if record.filename.endswith("data.pkl") else content)
    return path


def long_text(_: bytes) -> bytes:
    return pickle.dumps({"a": "x" * (1 << 29)}, protocol=2)


def byte_array(_: bytes) -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."


def many_sets(_: bytes) -> bytes:
    return b"\x80\x02](" + b"\x8f" * (1 << 20) + b"e."


def many_mappings(_: bytes) -> bytes:
    return b"\x80\x02ccollections\nOrderedDict\nq\x00](" + b"h\x00)R" * (1 << 20) + b"e."


def repeated_numbers(path: Path) -> Path:
    torch.save({"a": torch.ones(1).expand(1 << 40), "b": torch.ones(1, dtype=torch.float16).expand(1 << 20, 1 << 20)}, path)
    return path


def far_storage(path: Path) -> Path:
    """The old format, with a storage of 8 GB that is not there."""
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    # The number of elements, once in the storage and once in the shape.
    path.write_bytes(content.replace(b"K\x04", b"J\xff\xff\xff\x77"))
    return path


def deep_model(path: Path) -> Path:
    config = {"num_layers": 10**9, "dim": 32, "latent_dim": 16, "intermediate_dim": 48}
    saved = {"zoo": 1, "family": "wavtokenizer", "name": "a", "fingerprint": "", "config": config}
    save_file({"a": torch.zeros(1)}, path, metadata={"zoo": json.dumps(saved)})
    return path


BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "compressed.pt": (lambda path: repacked(path, long_text, zipfile.ZIP_DEFLATED), "compressed"),
    "byte array.pt": (lambda path: repacked(path, byte_array), "bytearray"),
    "sets.pt": (lambda path: repacked(path, many_sets), "containers"),
    "mappings.pt": (lambda path: repacked(path, many_mappings), "containers"),
    "repeated.pt": (repeated_numbers, "would take"),
    "storage.pt": (far_storage, "damaged"),
    "deep.safetensors": (deep_model, "far larger model"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_stays_near_the_size_of_the_file(name: str, tmp_path: Path) -> None:
    make, reason = BOMBS[name]
    path = make(tmp_path / name)
    assert path.stat().st_size < 6 << 20
    code = """
import resource, sys, zoo, torch
from zoo import hub
from zoo.state_dict import read_state
import zoo.codecs.wavtokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    zoo.load(f"local-dir:{sys.argv[1]}") if sys.argv[1].endswith(".safetensors") else read_state(sys.argv[1])
except zoo.WeightsError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    *message, megabytes = found.stdout.splitlines()
    assert reason in "\n".join(message) and name in "\n".join(message)
    assert int(megabytes) < 200


def test_tied_and_repeated_weights_are_read(tmp_path: Path) -> None:
    """What checkpoints do: the same numbers under several names, small expanded buffers, optimizers with their own tensors."""
    weight = torch.randn(64, 64)
    state = {"a.weight": weight, "b.weight": weight, "ema.weight": weight.T, "mask": torch.ones(1).expand(32, 32)}
    optimizer = {"state": {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)} for i in range(500)}}
    torch.save({"state_dict": state, "optimizer_states": [optimizer]}, tmp_path / "model.ckpt")
    found = read_state(tmp_path / "model.ckpt")
    assert found.keys() == state.keys() and torch.equal(found["b.weight"], weight)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "levels"),
        ("- " * 100_000, "levels"),
        ("? " * 100_000, "levels"),
        ("&a [*a]", "alias of itself"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(12)
        ), "values"),
        ("- [2020-99-99]", "month"),
        ("- {[1]: 2}", "key is a list"),
        ("- " + "9" * 5000, "digits"),
        ("- !!python/object/apply:os.system ['false']", "could not determine a constructor"),
        ("x" * ((16 << 20) + 1), "16 MiB"),
        ("a: 1\na: 2", "duplicate key"),
        ("\udcff", "decode"),
    ],
    ids=["flow", "block", "keys", "itself", "aliases", "date", "unhashable", "digits", "object", "long", "duplicate", "utf-8"],
)  # fmt: skip
def test_catalogues_that_no_parser_should_meet(text: str, reason: str, tmp_path: Path) -> None:
    """In a process of its own: libyaml's composer ends the process on deep nesting."""
    path = tmp_path / "catalogue.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(zoo.RegistryError, match=reason) as caught:
        registry.read(path)
    assert "catalogue.yaml" in str(caught.value) and len(str(caught.value)) < 2000


def test_documents_within_the_bounds_are_read() -> None:
    assert documents.parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    assert documents.parse_json("[" * 90 + "]" * 90)
    with pytest.raises(ValueError, match="levels"):
        documents.parse_json("[" * 100_000)
