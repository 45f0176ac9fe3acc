"""The exact distribution of the next byte of a language model over tokens.

Phan et al., "Exact byte-level probabilities from tokenized language models for FIM-tasks and model ensembles",
arXiv 2410.09303. A *cover* of a text is a valid list of tokens whose bytes begin with the text. Without the last
token they do not reach its end. The probability of a text is the sum over its covers of the model's probabilities
of their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from zoo.errors import ArgumentError, InputError
from zoo.text.pieces import Pieces, pieces_of
from zoo.utf8 import utf8

Floats = NDArray[np.float64]

# Lists of tokens that the model works on in one pass.
_AT_ONCE = 20
# Common tokens that each list of a pass may repeat before they get a pass of their own.
_REPEATED = 4
# Likely ways on that are worked on beside a text, each at least this likely beside the best, in log space.
_WAYS, _LIKELY = 2, float(np.log(0.2))
# Tokens in all copies of the cache of a pass that works ahead.
_COPIED = 1 << 15


_NOTHING_BEFORE = "the tokenizer has no begin marker and the text no space: pass context=, ids in front of the text"


class NextByte(NamedTuple):
    """A distribution over what comes next; ``bytes`` and ``specials`` add up to 1.

    Attributes:
        bytes: probability of each byte ``[256]``, float64.
        specials: probability of each special id, such as the end of the text.
        invalid: share of the model's probability, before normalisation, on lists that the tokenizer never produces.
    """

    bytes: Floats
    specials: dict[int, float]
    invalid: float


class Cover(NamedTuple):
    """A list of tokens that begins with a text.

    Attributes:
        tokens: ids behind the context, the begin marker not among them.
        rest: bytes by which they reach beyond the text.
        weight: probability among all covers.
    """

    tokens: tuple[int, ...]
    rest: bytes
    weight: float


class _Group(NamedTuple):
    """Covers that differ in their last token alone; of that token, ``used`` bytes belong to the text."""

    tokens: tuple[int, ...]
    used: int
    last: NDArray[np.int64]
    weights: Floats


class CachedModel:
    """Log-probabilities of a causal language model of ``transformers``, with one cache for common beginnings.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache, self._ids = DynamicCache(), list[int]()
        self._known: dict[tuple[int, ...], Floats] = {}

    def __call__(self, ids: Sequence[int]) -> Floats:
        """Log-probabilities of the next token ``[vocabulary]`` behind at least one id."""
        if not self.knows(ids):
            self.prefetch([ids])
        return self._known[tuple(ids)]

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether the last pass was on these ids."""
        return tuple(ids) in self._known

    def prefetch(self, lists: Sequence[Sequence[int]]) -> None:
        """Work out the next tokens behind several lists in one pass, whose results are kept until the next one."""
        wanted = list({tuple(ids): list(ids) for ids in lists}.values())
        common = min(min(_common(wanted[0], ids), len(ids) - 1) for ids in wanted)
        self._keep(_common(self._ids, wanted[0][:common]))
        held = len(self._ids)
        # After a pass that fails the cache holds who knows what.
        self._ids = []
        if len(wanted) > 1 and common - held > _REPEATED:
            self._run([wanted[0][held:common]])
            held = common
        rows = [ids[held:] for ids in wanted]
        width = max(map(len, rows))
        if not held:
            self._cache = DynamicCache()
        elif len(rows) > 1:
            self._cache.batch_repeat_interleave(len(rows))
        # Padding stands behind, where causal attention does not look.
        logits = self._run([row + [row[-1]] * (width - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        found = logits[torch.arange(len(rows), device=logits.device), last].double().log_softmax(-1).cpu().numpy()
        self._known = {tuple(ids): row for ids, row in zip(wanted, found, strict=True)}
        # What comes next most likely goes on behind the last list.
        if len(rows) > 1:
            self._cache.batch_select_indices(last.new_tensor([len(rows) - 1]))
        if width > len(rows[-1]):
            self._cache.crop(len(rows[-1]) - width)
        self._ids = wanted[-1]

    def _run(self, rows: list[list[int]]) -> Tensor:
        if self.model.training:
            raise ArgumentError("the model is in training mode, where dropout draws at random: call model.eval()")
        ids = torch.tensor(rows, device=next(self.model.parameters()).device)
        try:
            with torch.inference_mode():
                logits: Tensor = self.model(ids, past_key_values=self._cache, use_cache=True).logits
        except IndexError as error:
            end = self._cache.get_seq_length() + len(rows[0])
            raise InputError(
                f"the model has no row for an id up to {int(ids.max())}, or for a place up to {end}: the tokenizer is "
                f"another model's, or the text is too long for it"
            ) from error
        return logits

    def _keep(self, count: int) -> None:
        if count < len(self._ids):
            self._cache.crop(count - len(self._ids))
            del self._ids[count:]


class ByteModel:
    """A language model over tokens as a model over bytes.

    The state is a text. `next` gives the exact distribution of the byte behind it, `advance` adds a byte. A call of the model
    goes over the tokens of the text so far, all but the last one or two from the cache, and over those of the likeliest ways
    on. So the bytes of a token that is taken cost one call. No prompt has to end where a token ends.

    Args:
        model: a causal language model of ``transformers`` in evaluation mode; or a function from ids to the log-probabilities
            of the next token ``[vocabulary]``.
        tokenizer: as for `zoo.text.pieces_of`: BPE with pieces for all bytes.
        context: ids in front of the text, whatever they are; the tokenizer's begin id by default.
        escaped: count a space as the three bytes of U+2581, as SentencePiece writes it.

    Raises:
        InputError: the tokenizer is of another kind, or there is nothing in front of the text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: Sequence[int] | None = None,
        escaped: bool = False,
    ) -> None:
        self.pieces: Pieces = pieces_of(tokenizer, escaped)
        self._logprobs: Callable[[Sequence[int]], Any] = CachedModel(model) if hasattr(model, "config") else model
        if context is None:
            context = [] if self.pieces.begin is None else [self.pieces.begin]
        self.context = [int(number) for number in context]
        self.text = b""
        self._exact: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        self._groups: list[_Group] = []
        self._next: tuple[NextByte, list[_Group]] | None = None
        if self.context:
            self.start(b"")

    def start(self, text: str | bytes) -> ByteModel:
        """Begin with a text, which may end inside of a word, a token or a character.

        Raises:
            InputError: the text is no UTF-8, or longer than the model reads; or the model has no begin marker and the text no
                place at which tokens always end.
        """
        pieces = self.pieces
        octets = _octets(text)
        octets = pieces.lead + (octets.replace(b" ", pieces.space) if isinstance(text, str) else octets)
        anchor = pieces.anchor(octets)
        if not anchor and not self.context:
            raise InputError(_NOTHING_BEFORE)
        try:
            tokens = tuple(pieces.encode(octets[:anchor]))
            ends = [end for end in range(anchor, len(octets)) if end == len(octets) or octets[end] & 0xC0 != 0x80]
            lefts = [pieces.encode(octets[:end]) for end in ends]
        except UnicodeDecodeError as error:
            raise InputError(
                f"the byte 0x{octets[error.start]:02x} at offset {error.start} does not belong to UTF-8"
            ) from error
        self._prefetch(lefts)
        self.text = octets[:anchor]
        self._exact, self._groups, self._next = [(tokens, 0.0)], [], None
        for byte in octets[anchor:]:
            self.advance(byte)
        return self

    def next(self, text: str | bytes | None = None) -> NextByte:
        """The distribution of what comes next.

        Args:
            text: begin with this text first; ``None`` for the state as it is.
        """
        if text is not None:
            self.start(text)
        return self._expanded()[0]

    def covers(self) -> list[Cover]:
        """The covers of the text, by weight."""
        found = [Cover(tokens, b"", weight) for tokens, weight in self._exact]
        for group in self._groups:
            for last, weight in zip(group.last.tolist(), group.weights.tolist(), strict=True):
                octets = self.pieces.octets[last] or b""
                found.append(Cover((*group.tokens, last), octets[group.used :], weight))
        top = max(cover.weight for cover in found)
        total = sum(np.exp(cover.weight - top) for cover in found)
        found = [cover._replace(weight=float(np.exp(cover.weight - top) / total)) for cover in found]
        return sorted(found, key=lambda cover: -cover.weight)

    def advance(self, byte: int) -> ByteModel:
        """Add a byte to the text.

        Raises:
            InputError: it is no byte, or the tokenizer never produces a text that goes on with it.
        """
        if not isinstance(byte, int | np.integer) or not 0 <= byte < 256:
            raise ArgumentError(f"a byte is a whole number from 0 to 255, not {byte!r}")
        pieces, (_, groups) = self.pieces, self._expanded()
        exact: list[tuple[tuple[int, ...], float]] = []
        kept = []
        for group in groups:
            chosen = pieces.table[group.last, group.used] == byte
            last, weights, used = group.last[chosen], group.weights[chosen], group.used + 1
            ended = pieces.lengths[last] == used
            found = zip(last[ended].tolist(), weights[ended].tolist(), strict=True)
            exact += [((*group.tokens, number), weight) for number, weight in found]
            if not ended.all():
                kept.append(_Group(group.tokens, used, last[~ended], weights[~ended]))
        top = max([weight for _, weight in exact] + [float(group.weights.max()) for group in kept], default=-np.inf)
        if top == -np.inf:
            raise InputError(f"no list of tokens goes on with the byte 0x{byte:02x}: what it ends or continues is no UTF-8")
        self._exact = [(tokens, weight - top) for tokens, weight in exact]
        self._groups = [group._replace(weights=group.weights - top) for group in kept]
        self.text += bytes([byte])
        self._next = None
        return self

    def logprob(self, text: str | bytes) -> float:
        """Natural logarithm of the probability that a text comes next; the state stays as it is."""
        octets = _octets(text)
        octets = octets.replace(b" ", self.pieces.space) if isinstance(text, str) else octets
        other, total = self.copy(), 0.0
        for place, byte in enumerate(octets):
            if place % _AT_ONCE == 0:
                other._look_ahead(octets[place : place + _AT_ONCE])
            probability = float(other.next().bytes[byte])
            if probability == 0:
                return -np.inf
            total += float(np.log(probability))
            other.advance(byte)
        return total

    def _look_ahead(self, octets: bytes) -> None:
        """Have the model work on all that the next bytes will ask for in one pass."""
        whole, before = self.text + octets, len(self.text)
        ends = [end for end in range(before, len(whole)) if whole[end] & 0xC0 != 0x80]
        with suppress(UnicodeDecodeError):
            self._prefetch([self.pieces.encode(whole[:end]) for end in ends])

    def _prefetch(self, lefts: Sequence[Sequence[int]]) -> None:
        if isinstance(self._logprobs, CachedModel) and 2 < len(lefts) <= _AT_ONCE:
            self._logprobs.prefetch([[*self.context, *left] for left in lefts if self.context or left])

    def _foresee(self) -> None:
        """Have the model work on the likeliest ways on in the same pass as on the text, unless it already has."""
        if not isinstance(self._logprobs, CachedModel) or not self._exact:
            return
        here = [*self.context, *self._exact[0][0]]
        if not here or self._logprobs.knows(here):
            return
        ahead = [[*self.context, *left] for left in self._ways_on()]
        if len(here) * len(ahead) < _COPIED:
            self._logprobs.prefetch([here, *ahead])

    def _ways_on(self) -> list[list[int]]:
        """Encodings of what the text becomes, byte by byte, on its likeliest ways to the end of a token; the best way last."""
        pieces, text, (tokens, _) = self.pieces, self.text, self._exact[0]
        best = [(float(group.weights.max()), number) for number, group in enumerate(self._groups)]
        rests = []
        for weight, number in sorted(best, reverse=True)[:_WAYS]:
            if weight > _LIKELY:
                group = self._groups[number]
                octets = pieces.octets[int(group.last[group.weights.argmax()])] or b""
                rests.append(octets[group.used :])
        anchor, edge, head = pieces.anchor(text), len(text), len(tokens)
        while edge > anchor:
            head -= 1
            edge -= int(pieces.lengths[tokens[head]])
        ends = {text[edge:] + rest[: count + 1]: None for rest in reversed(rests) for count in range(len(rest))}
        found = []
        for whole in ends:
            with suppress(UnicodeDecodeError):
                found.append([*tokens[:head], *pieces.encode(whole)])
        return found[-_AT_ONCE:]

    def sample(self, length: int, *, seed: int | None = None, temperature: float = 1.0, stop: bytes = b"") -> bytes:
        """Bytes drawn one after the other, without the bias of the tokens that the prompt happens to end with.

        Args:
            length: bytes at most; a special token ends the text.
            seed: of the draws.
            temperature: 0 takes the most likely byte.
            stop: end behind these bytes.

        Raises:
            ArgumentError: the length or the temperature is below 0, or no number.
        """
        return _sampled(self, length, seed, temperature, stop)

    def copy(self) -> ByteModel:
        """The same state, to go another way from; the model is shared."""
        other = copy.copy(self)
        other._exact, other._groups = list(self._exact), list(self._groups)
        return other

    def _logs(self, ids: Sequence[int]) -> Floats:
        """Log-probabilities of the tokenizer's ids behind some ids ``[vocabulary]``."""
        logs = np.asarray(self._logprobs(ids), dtype=np.float64)
        if logs.ndim != 1 or len(logs) < len(self.pieces.octets):
            raise InputError(
                f"the tokenizer has {len(self.pieces.octets)} ids, and the model gives log-probabilities of shape {logs.shape}"
            )
        logs = logs[: len(self.pieces.octets)]
        # A comparison with NaN is false.
        if not np.all(logs < np.inf):
            raise InputError(f"the model gives NaN or infinity as log-probabilities behind {len(ids)} ids")
        return logs

    def _expanded(self) -> tuple[NextByte, list[_Group]]:
        """The distribution, and all covers with what may follow the exact ones."""
        if self._next is not None:
            return self._next
        self._foresee()
        pieces = self.pieces
        groups, specials, invalid = list(self._groups), dict.fromkeys(pieces.specials, -np.inf), -np.inf
        for tokens, weight in self._exact:
            ids = [*self.context, *tokens]
            if not ids:
                raise InputError(_NOTHING_BEFORE)
            logs = self._logs(ids) + weight
            allowed = pieces.follows(tokens)
            last = np.flatnonzero(allowed)
            groups.append(_Group(tokens, 0, last, logs[last]))
            wrong = pieces.spelled & ~allowed
            numbers = list(specials)
            if pieces.unfinished(tokens):
                wrong[numbers] = True
            else:
                for number in numbers:
                    specials[number] = float(np.logaddexp(specials[number], logs[number]))
            invalid = float(np.logaddexp(invalid, _logsumexp(logs[wrong])))
        weights = [group.weights for group in groups]
        top = max([float(part.max()) for part in weights if len(part)] + list(specials.values()), default=-np.inf)
        if top == -np.inf:
            raise InputError("the model gives no probability to anything that the tokenizer would go on with")
        mass = np.zeros(256)
        for group in groups:
            values = pieces.table[group.last, group.used]
            mass += np.bincount(values, np.exp(group.weights - top), minlength=256)
        of_specials = {number: float(np.exp(value - top)) for number, value in specials.items()}
        total = float(mass.sum()) + sum(of_specials.values())
        wasted = float(np.exp(invalid - top))
        found = NextByte(
            mass / total, {number: value / total for number, value in of_specials.items()}, wasted / (total + wasted)
        )
        self._next = found, groups
        return self._next


class ByteEnsemble:
    """Several byte models of one text, whatever their vocabularies: the weighted mean of their distributions.

    Args:
        models: each a `ByteModel`.
        weights: of the models; equal ones by default.

    Raises:
        InputError: there is no model, or the weights do not fit.
    """

    def __init__(self, models: Iterable[ByteModel], weights: Sequence[float] | None = None) -> None:
        self.models = list(models)
        given = [1.0] * len(self.models) if weights is None else list(weights)
        fitting = len(given) == len(self.models) and all(0 <= weight < np.inf for weight in given)
        if not self.models or not fitting or sum(given) <= 0:
            raise InputError(f"{len(self.models)} models do not go with the weights {given}")
        self.weights = [weight / sum(given) for weight in given]

    def start(self, text: str | bytes) -> ByteEnsemble:
        """Begin with a text."""
        for model in self.models:
            model.start(text)
        return self

    def next(self, text: str | bytes | None = None) -> NextByte:
        """The mean distribution; all special tokens together are number 0."""
        if text is not None:
            self.start(text)
        found = [model.next() for model in self.models]
        weighted = list(zip(self.weights, found, strict=True))
        octets = sum((weight * part.bytes for weight, part in weighted), np.zeros(256))
        ended = sum(weight * sum(part.specials.values()) for weight, part in weighted)
        return NextByte(octets, {0: ended}, sum(weight * part.invalid for weight, part in weighted))

    def advance(self, byte: int) -> ByteEnsemble:
        """Add a byte to the text."""
        for model in self.models:
            model.advance(byte)
        return self

    def sample(self, length: int, *, seed: int | None = None, temperature: float = 1.0, stop: bytes = b"") -> bytes:
        """Bytes drawn one after the other, as `ByteModel.sample`."""
        return _sampled(self, length, seed, temperature, stop)


def byte_probabilities(model: Any, tokenizer: Any, prefix: str | bytes) -> NextByte:
    """The exact distribution of the byte behind a text, for any causal language model of ``transformers`` over BPE tokens.

    Args:
        model, tokenizer: as for `ByteModel`.
        prefix: the text, which may end anywhere.

    Raises:
        InputError: as `ByteModel` and its ``start``.
    """
    return ByteModel(model, tokenizer).start(prefix).next()


def fill_in_the_middle(
    model: Any,
    tokenizer: Any,
    prefix: str | bytes,
    suffix: str | bytes,
    *,
    markers: tuple[int, int, int],
    length: int = 256,
    seed: int | None = None,
    temperature: float = 1.0,
) -> bytes:
    """Bytes between two texts by a model that was trained to fill in; both texts may be cut anywhere.

    The prompt is in the order that lets the model go on behind the prefix: ``prefix marker, suffix marker, suffix, middle
    marker, prefix``.

    Args:
        model, tokenizer: as for `ByteModel`.
        prefix, suffix: what stands before and behind.
        markers: ids of the model's prefix, suffix and middle markers.
        length: bytes at most; a special token, such as the end of the middle, ends them.
        seed, temperature: as for `ByteModel.sample`.

    Raises:
        InputError: as `ByteModel`; the suffix is no UTF-8.
    """
    pieces = pieces_of(tokenizer)
    before, behind, middle = markers
    octets = _octets(suffix)
    try:
        encoded = pieces.encode(pieces.lead + octets) if octets else []
    except UnicodeDecodeError as error:
        raise InputError(f"the byte at offset {error.start} of the suffix does not belong to UTF-8") from error
    context = [*([] if pieces.begin is None else [pieces.begin]), before, behind, *encoded, middle]
    return ByteModel(model, pieces, context=context).start(prefix).sample(length, seed=seed, temperature=temperature)


def _sampled(model: ByteModel | ByteEnsemble, length: int, seed: int | None, temperature: float, stop: bytes) -> bytes:
    if not (isinstance(length, int | np.integer) and length >= 0):
        raise ArgumentError(f"a number of bytes counts from 0, not {length!r}")
    if not 0 <= temperature < np.inf:
        raise ArgumentError(f"the temperature must be a number from 0 on, not {temperature}")
    generator, found = np.random.default_rng(seed), b""
    while len(found) < length:
        step = model.next()
        chances = np.append(step.bytes, sum(step.specials.values()))
        if temperature == 0:
            byte = int(chances.argmax())
        else:
            with np.errstate(divide="ignore"):
                logs = np.log(chances) / temperature
            chances = np.exp(logs - logs.max())
            byte = int(generator.choice(257, p=chances / chances.sum()))
        if byte == 256:
            break
        found += bytes([byte])
        if stop and found.endswith(stop):
            break
        model.advance(byte)
    return found


def _octets(text: Any) -> bytes:
    if isinstance(text, str):
        return utf8(text)
    if not isinstance(text, bytes | bytearray | memoryview):
        raise ArgumentError(f"a text is a string or bytes, not {type(text).__name__}")
    return bytes(text)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count of the ids that two lists begin with alike."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _logsumexp(values: Floats) -> float:
    return float(np.logaddexp.reduce(values)) if len(values) else -np.inf
