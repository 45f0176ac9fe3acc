"""Metrics of texts: whether every byte comes back, bytes of an id, and ids of a word by script."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from zoo.errors import InputError
from zoo.eval.modality.base import Metric, MetricFunction, Row, Variant
from zoo.spec import Spec
from zoo.tokens import Tokens

EXTENSIONS = None
BASELINE = "the text"
NOTES = (
    "Texts are compared byte for byte; the baseline is the text itself, which takes 8 bits per byte. A word is a run of "
    "letters and marks of one script, and an id counts for every word that it has bytes of."
)
TEMPLATE = "text.html.j2"
ON_DEVICE = False

#: Scripts by the first word of their letters' names in Unicode, without those of few texts.
SCRIPTS = (
    *("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "TAMIL"),
    *("TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "THAI", "LAO", "TIBETAN", "MYANMAR", "GEORGIAN", "ETHIOPIC", "KHMER"),
    *("HANGUL", "HIRAGANA", "KATAKANA", "CJK"),
)
_SHOWN = 1000


class Text(bytes):
    """The bytes of a text, and where it was found."""

    path: Path


# ----------------------------------------------------------------------------------------------------------------- metrics


def exactness(reference: bytes, estimate: bytes) -> float:
    """1 if both are equal, 0 if they are not."""
    return float(reference == estimate)


def bytes_per_token(tokenizer: Any, tokens: Tokens, reference: Text) -> float | None:
    """Bytes of the text over its ids; undefined of an empty text."""
    return len(reference) / int(tokens.lengths[0]) if len(reference) and int(tokens.lengths[0]) else None


@lru_cache(1 << 16)
def script_of(character: str) -> str | None:
    """Script of a letter; ``None`` of anything else, and the empty string of a mark, which goes with the letter before it."""
    kind = unicodedata.category(character)
    if kind.startswith("M"):
        return ""
    return unicodedata.name(character, "").split(" ")[0].split("-")[0] or None if kind.startswith("L") else None


def words(text: str) -> Iterator[tuple[str, int, int]]:
    """Script, first byte and end of each word in UTF-8."""
    script: str | None = None
    start = position = 0
    for character in text:
        found = script_of(character)
        if found == "" and script is not None:
            found = script
        if found != script:
            if script:
                yield script, start, position
            script, start = found or None, position
        position += len(character.encode())
    if script:
        yield script, start, position


def tokens_per_word(script: str, tokenizer: Any, tokens: Tokens, reference: Text) -> float | None:
    """Ids that the words of a script have bytes in, by word; undefined where a text has none, or is no UTF-8."""
    try:
        places = [(start, end) for found, start, end in words(reference.decode()) if found == script]
    except UnicodeDecodeError:
        return None
    if not places:
        return None
    [spans] = tokenizer.spans(tokens)
    ends, starts = spans[:, 1].contiguous(), spans[:, 0].contiguous()
    first = torch.searchsorted(ends, torch.tensor([start for start, _ in places]), right=True)
    behind = torch.searchsorted(starts, torch.tensor([end for _, end in places]))
    return float((behind - first).sum()) / len(places)


METRICS: Mapping[str, Metric] = {
    "exactness": Metric("exactness", "", True, exactness, "share of texts that come back byte for byte"),
    "bytes_per_token": Metric(
        "bytes per token", "", True, bytes_per_token, "bytes of a text over its ids, markers too", of_tokens=True
    ),
    **{
        f"tokens_per_{script.lower()}_word": Metric(
            f"tokens per word, {script.title()}",
            "",
            False,
            partial(tokens_per_word, script),
            f"ids that a word in {script.title()} letters has bytes in",
            of_tokens=True,
        )
        for script in SCRIPTS
    },
}


# ---- what the run asks: see `zoo.eval.modality.base`


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> Text:
    """The bytes of a text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = Text(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    text.path = Path(path)
    return text


def comparable(decoded: bytes, reference: bytes) -> bytes:
    """The decoded bytes as they are."""
    return decoded


def properties(reference: Text, spec: Spec) -> dict[str, Any]:
    """Bytes, characters and words, and the size that DEFLATE makes of a text."""
    text = reference.decode(errors="replace")
    return {
        "text_bytes": len(reference),
        "characters": len(text),
        "words": sum(1 for _ in words(text)),
        "deflated_bytes": len(zlib.compress(reference, 9)),
    }


def baseline(reference: bytes, spec: Spec, bits: int) -> bytes:
    """The text."""
    return reference


def measure(function: MetricFunction, spec: Spec, *signals: bytes) -> Any:
    """The function of a text and what was decoded."""
    return function(*signals)


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per byte, character and word."""
    tokens = sum(row["tokens"] for row in rows)
    amounts = {unit: sum(row[column] for row in rows) for unit, column in _UNITS.items()}
    return {unit: tokens / amount for unit, amount in amounts.items() if amount}


_UNITS = {"byte": "text_bytes", "character": "characters", "word": "words"}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Bytes, characters and words, bytes of an id, what DEFLATE makes of a byte, and seconds of work per megabyte."""
    size = sum(row["text_bytes"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return {
        **{column: sum(row[column] for row in rows) for column in _UNITS.values()},
        "bytes_per_token": size / tokens if tokens else None,
        "deflate_bits_per_byte": 8 * sum(row["deflated_bytes"] for row in rows) / size if size else None,
        "speed": {
            f"{direction}_seconds_per_megabyte": sum(row[f"{direction}_seconds"] for row in rows) / size * 1e6 if size else None
            for direction in ("encode", "decode")
        },
    }


def heading(summary: Mapping[str, Any]) -> str:
    """Bytes, and bytes of an id."""
    rate = summary["bytes_per_token"]
    return f"{summary['text_bytes']} bytes" + (f", {rate:.3g} bytes per token" if rate else "")


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bytes per token, bits per byte, and speed."""
    found = [(f"{summary['tokens'].get('bits_per_byte', 0):.3g}", "bits per byte as tokens")]
    if rate := summary["bytes_per_token"]:
        found.insert(0, (f"{rate:.3g}", "bytes per token"))
    if (deflated := summary["deflate_bits_per_byte"]) is not None:
        found.append((f"{deflated:.2f}", "bits per byte by DEFLATE"))
    for direction, name in (("encode", "encoding"), ("decode", "decoding")):
        if seconds := summary["speed"][f"{direction}_seconds_per_megabyte"]:
            found.append((f"{1 / seconds:.3g} MB/s", name))
    return found


def shown(reference: Text, variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """The beginning of a text."""
    text = reference.decode(errors="replace")
    return {
        "caption": f"{len(reference)} bytes, {variants[-1].tokens} tokens"
        + (f"; the first {_SHOWN} characters are shown" if len(text) > _SHOWN else ""),
        "figures": variants[-1].figures,
        "text": text[:_SHOWN],
    }
