"""The tokenizer: sequences of nucleotides to ids and back without loss, of any length in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.checkpoint import Checkpoint, shape_of
from zoo.codecs.genome.bpe import Merges, Windows
from zoo.codecs.genome.config import GenomeConfig
from zoo.codecs.genome.letters import Reader, Residue, checked, folded_places, put_together, taken_apart
from zoo.errors import ArgumentError, InputError, KeysError, naming_item
from zoo.media.bytes import MAX_BYTES
from zoo.media.genome import reverse_complement
from zoo.media.text import characters
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Prepared
from zoo.tokenizer.text import Errors, Specials, TextTokenizer
from zoo.tokens import Meta, Tokens
from zoo.utf8 import utf8

#: What becomes of lower case, which marks repeats in genomes: it is remembered beside the ids, or encoded as it is.
Case = Literal["upper", "keep"]
#: What becomes of runs of N: one id each, or one for a run.
Unknown = Literal["upstream", "fold"]
#: Letters of a stream that are read at once.
_BLOCK = 1 << 20


class Genome(TextTokenizer[GenomeConfig]):
    """Byte-pair encoding of DNA by the ``tokenizer.json`` of a model, which is held as it is.

    A sequence is letters of the IUPAC alphabet of nucleotides. It comes back exactly: what ids do not hold is kept beside them.
    Without that, a letter that has no id decodes to N. Its ids are those of the library for the whole sequence, however long it
    is (see `zoo.codecs.genome.bpe`).
    """

    Config = GenomeConfig
    family = "genome"
    identity = ("file",)

    file: Tensor

    def __init__(self, config: GenomeConfig | None = None, *, name: str = "genome") -> None:
        super().__init__(config or GenomeConfig(), name)
        self.register_buffer("file", torch.zeros(self.config.file_bytes, dtype=torch.uint8))
        if self.config.dim and "vectors" in self.config.parts:
            self.vectors = torch.nn.Parameter(torch.zeros(self.config.vocab_size, self.config.dim))
        self._merges: Merges | None = None

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=self.config.vocab_size,
            dim=self.config.dim,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    @property
    def merges(self) -> Merges:
        """The encoding that the file describes."""
        if self._merges is None:
            self._merges = Merges(self.file.cpu().numpy().tobytes())
        return self._merges

    def __getstate__(self) -> dict[str, Any]:
        # The library's objects are made again where the tokenizer is sent to.
        return self.__dict__ | {"_merges": None}

    # ---- sequences to ids

    def encode(
        self,
        items: Any,
        *,
        specials: Specials = "none",
        case: Case = "upper",
        unknown: Unknown = "upstream",
        rna: bool = False,
        strip_whitespace: bool = False,
        compat: Literal["upstream"] | None = None,
        max_bytes: int = MAX_BYTES,
        progress: bool = False,
    ) -> Tokens:
        """Sequences to ids.

        A string is the sequence itself, never a path. Records of FASTA and FASTQ are read by `zoo.media.genome.read`.

        Args:
            items: as `zoo.tokenizer.text.TextTokenizer.encode`; letters of the IUPAC alphabet in upper or lower case.
            specials: ``"upstream"`` adds the markers of the file's template, ``[CLS]`` and ``[SEP]`` say.
            case: ``"upper"`` encodes lower case as upper case and remembers where it was. ``"keep"`` encodes it as it is: none
                of the official files has ids for it.
            unknown: ``"upstream"`` gives each N an id; ``"fold"`` gives a run of N a single one, and remembers its length.
            rna: encode U as T, and remember that; otherwise a U has no id in the official files.
            strip_whitespace: take white space out of the sequence, for good.
            compat: ``"upstream"`` gives the ids of the library for any text as it is, lower case and white space too. Nothing
                is kept beside them, so that not all of it comes back.
            max_bytes: refuse longer sequences.
            progress: show a progress bar.

        Raises:
            ItemError: an item cannot be read, or holds something else than such letters; names the item and the position.

        >>> tok = zoo.load("genome-tiny")
        >>> tokens = tok.encode(["ACGTNNNNacgt", "ACGT"], unknown="fold")
        >>> tok.decode(tokens)
        ['ACGTNNNNacgt', 'ACGT']
        """
        return self.encode_prepared(
            self.prepare(items, max_bytes=max_bytes),
            specials=specials,
            case=case,
            unknown=unknown,
            rna=rna,
            strip_whitespace=strip_whitespace,
            compat=compat,
            progress=progress,
        )

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        specials: Specials = "none",
        case: Case = "upper",
        unknown: Unknown = "upstream",
        rna: bool = False,
        strip_whitespace: bool = False,
        compat: Literal["upstream"] | None = None,
        progress: bool = False,
    ) -> Tokens:
        """Encode what `prepare` gave, to ids."""
        before, behind = self.markers_of(specials)
        if compat is not None:
            return self._as_upstream(items, specials)
        reader = self._reader(case, unknown, rna, strip_whitespace)
        metas: list[Meta] = []

        def letters_of(items: Sequence[Prepared]) -> Iterator[str]:
            # One at a time, so that a long sequence is not held twice.
            for index, item in enumerate(items):
                with naming_item(index):
                    letters, residue = reader(item.tensors["octets"].numpy())
                metas.append(_meta(item.meta, residue))
                text = letters.tobytes().decode()
                del letters
                yield text

        sequences: list[Tensor] = []
        with progress_bar("encode", len(items), progress, unit="sequence") as advance:
            for ids in self._ids_of(letters_of(items)):
                whole = torch.empty(len(before) + len(ids) + len(behind), dtype=torch.int64)
                for place, part in ((0, before), (len(before), ids), (len(before) + len(ids), behind)):
                    whole.numpy()[place : place + len(part)] = part
                sequences.append(whole)
                del ids
                advance(1)
        return self.tokens(sequences, metas)

    def _ids_of(self, sequences: Iterable[str]) -> Iterator[Sequence[int]]:
        """Ids of sequences: short ones, such as reads, in calls of many, long ones in windows."""
        merges, total = self.merges, 0
        batch: list[str] = []
        for index, sequence in enumerate(sequences):
            if len(sequence) > merges.window or total > _BLOCK:
                yield from merges.encode_short(batch)
                batch, total = [], 0
            if len(sequence) > merges.window:
                with naming_item(index):
                    yield merges.encode(sequence)
            else:
                batch.append(sequence)
                total += len(sequence)
        yield from merges.encode_short(batch)

    def _reader(self, case: Case, unknown: Unknown, rna: bool, strip_whitespace: bool) -> Reader:
        """The way from the bytes of a sequence to the letters that are encoded, and what is kept beside them."""
        for option, value, choices in (("case", case, get_args(Case)), ("unknown", unknown, get_args(Unknown))):
            if value not in choices:
                raise ArgumentError(f"{option} must be {' or '.join(map(repr, choices))}, not {value!r}")
        known = np.zeros(256, bool)
        known[[ord(text) for text in self.merges.texts if len(text) == 1]] = True
        options = {"upper": case == "upper", "rna": rna, "fold": unknown == "fold"}

        def read(octets: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Residue]:
            return taken_apart(checked(octets, strip_whitespace=strip_whitespace), known, ord("N"), **options)

        return read

    def _as_upstream(self, items: Sequence[Prepared], specials: Specials) -> Tokens:
        sequences = []
        for index, item in enumerate(items):
            with naming_item(index):
                text = characters(item.tensors["octets"].numpy())
                found = self.merges.library.encode(text, add_special_tokens=specials == "upstream")
                sequences.append(torch.tensor(found.ids, dtype=torch.int64))
        return self.tokens(sequences, [item.meta for item in items])

    def markers_of(self, specials: Specials) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and behind a sequence."""
        super().markers_of(specials)
        return (self.merges.before, self.merges.behind) if specials == "upstream" else ((), ())

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " _"]:
        """The ids of a sequence under the default options."""
        letters, _ = self._reader("upper", "upstream", False, False)(octets.numpy())
        return torch.tensor(self.merges.encode(letters.tobytes().decode()), dtype=torch.int64)

    def encode_stream(
        self,
        pieces: Iterable[str | bytes] | str | bytes,
        *,
        case: Case = "upper",
        unknown: Unknown = "upstream",
        rna: bool = False,
        strip_whitespace: bool = False,
    ) -> Iterator[Tokens]:
        """The ids of one sequence of any length that comes in pieces, in bounded memory.

        Args:
            pieces: consecutive letters of the sequence, in pieces of any length; or all of them as one string or bytes.
            case, unknown, rna, strip_whitespace: as `encode`.

        Yields:
            Tokens of consecutive stretches: their ids, one behind the other, are those of the whole sequence, and each decodes
            to its stretch. A run of N is held as a whole if it is folded.

        Raises:
            InputError: as `encode`; positions count from the piece's beginning.
        """
        pieces = [pieces] if isinstance(pieces, str | bytes) else pieces
        reader = self._reader(case, unknown, rna, strip_whitespace)
        windows, merges = Windows(self.merges), self.merges
        # Letters as they came that no ids were given for yet, and those of them that were not encoded.
        waiting, unread = bytearray(), bytearray()
        text = 0

        def stretch(ids: list[int]) -> Tokens:
            _, residue = reader(np.frombuffer(bytes(waiting), np.uint8))
            length = merges.length(ids)
            places, more = folded_places(residue.folded)
            length += int(more[places < length].sum())
            _, residue = reader(np.frombuffer(bytes(waiting[:length]), np.uint8))
            del waiting[:length]
            return self.tokens([torch.tensor(ids, dtype=torch.int64)], [_meta({"text": text}, residue)])

        for piece in pieces:
            if not isinstance(piece, str | bytes | bytearray | memoryview):
                raise InputError(f"a piece of a sequence is a string or bytes, not {type(piece).__name__}")
            text |= isinstance(piece, str)
            octets = utf8(piece) if isinstance(piece, str) else bytes(piece)
            unread += checked(np.frombuffer(octets, np.uint8), strip_whitespace=strip_whitespace).tobytes()
            # A run of N at the end may go on in the next piece.
            ready = len(unread.rstrip(b"Nn")) if unknown == "fold" else len(unread)
            if ready < _BLOCK:
                continue
            yield stretch(self._pushed(windows, reader, waiting, unread, ready))
        ids = self._pushed(windows, reader, waiting, unread, len(unread), last=True)
        if ids:
            yield stretch(ids)

    @staticmethod
    def _pushed(
        windows: Windows, reader: Reader, waiting: bytearray, unread: bytearray, ready: int, *, last: bool = False
    ) -> list[int]:
        """Encode the letters that are ready, and move them to those that wait for their ids."""
        letters, _ = reader(np.frombuffer(bytes(unread[:ready]), np.uint8))
        waiting += unread[:ready]
        del unread[:ready]
        return windows.push(letters.tobytes().decode(), last=last)

    def reverse_complement(self, sequences: Any, **options: Any) -> Any:
        """The other strand of sequences, or of tokens. Ids of one strand say nothing of those of the other: it is encoded anew.

        Args:
            sequences: a string, bytes, or what `encode` returned.
            options: of `encode`, for tokens.

        Returns:
            A string, bytes or tokens, as what went in.
        """
        if isinstance(sequences, str | bytes):
            return _turned(sequences)
        return self.encode([_turned(sequence) for sequence in self.decode(sequences)], **options)

    # ---- and back

    def decode(
        self,
        tokens: Any,
        *,
        as_text: bool | None = None,
        errors: Errors = "strict",
        compat: Literal["upstream"] | None = None,
    ) -> list[str | bytes]:
        """The sequences, letter for letter.

        Args:
            tokens, as_text, errors: as `zoo.tokenizer.text.TextTokenizer.decode`. Bare ids decode in upper case, with N for
                letters that have no id.
            compat: ``"upstream"`` gives the string of the library, which puts spaces between tokens and drops unknown letters.

        Raises:
            MismatchError, ItemError: as there.
        """
        if compat is None:
            return super().decode(tokens, as_text=as_text, errors=errors)
        return [self.merges.library.decode(ids) for ids in self.check(tokens).tolist()]

    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The letters of ids, with what is kept beside them put back; special ids have none."""
        texts = [*self.merges.texts]
        texts[self.merges.unknown] = "N"
        encoded = np.frombuffer("".join([texts[number] for number in ids.tolist()]).encode(), np.uint8)
        return put_together(encoded, Residue.from_bytes(meta.get("residue", b"")))

    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """Letters of each id; 0 for special ones."""
        widths = self.merges.lengths[ids]
        folded = Residue.from_bytes(meta.get("residue", b"")).folded
        if len(folded):
            places, more = (torch.from_numpy(values) for values in folded_places(folded))
            ends = widths.cumsum(0)
            there = places < int(ends[-1]) if len(ends) else places < 0
            widths = widths.index_add(0, torch.searchsorted(ends, places[there], right=True), more[there])
        return widths

    def embed(self, tokens: Any) -> Float[Tensor, "batch length dim"]:
        """The checkpoint's vector of each id; zero where an item has ended.

        Raises:
            ArgumentError: the model has none.
            WeightsError: they were not loaded.
        """
        if not self.config.dim:
            return super().embed(tokens)
        self.require("vectors", "embedding")
        ids = self.check(tokens).ids.to(self.device)
        return self.vectors.detach().float()[ids.clamp(min=0)] * (ids >= 0)[..., None]


def _turned(sequence: str | bytes) -> str | bytes:
    if isinstance(sequence, str):
        return reverse_complement(sequence)
    return reverse_complement(sequence)


def _meta(prepared: Meta, residue: Residue) -> Meta:
    content = residue.to_bytes()
    return {**prepared, **({"residue": content} if content else {})}


# ---- official files

_FILE, _VECTORS = "tokenizer.json", "bert.embeddings.word_embeddings.weight"


def _convert(state: Mapping[str, Tensor], config: GenomeConfig | None) -> tuple[GenomeConfig, dict[str, Tensor]]:
    [length] = shape_of(state, _FILE, rank=1)
    tensors = {"file": state[_FILE]}
    # The file decides, whatever the catalogue says of it; on the meta device there is none.
    known = GenomeConfig() if config is None else config
    size = known.vocab_size if state[_FILE].is_meta else Merges(state[_FILE].numpy().tobytes()).vocab_size
    dim = known.dim
    if _VECTORS in state:
        rows, dim = shape_of(state, _VECTORS, rank=2)
        if rows != size:
            raise KeysError(f"{_VECTORS} has {rows} rows, and {_FILE} {size} ids")
        tensors["vectors"] = state[_VECTORS]
    return GenomeConfig(size, dim, length, ("ids", "vectors") if _VECTORS in state else ("ids",)), tensors


Genome.checkpoint = Checkpoint(
    recognises=lambda keys: set(keys) == {_FILE}, convert=_convert, wanted=lambda key: key in (_FILE, _VECTORS)
)
