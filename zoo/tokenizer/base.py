"""The contract that every tokenizer keeps: items in, tokens out, tokens in, media out."""

from __future__ import annotations

import functools
import hashlib
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeVar

from zoo import saving
from zoo.checkpoint import Checkpoint, no_configuration
from zoo.errors import ArgumentError, InputError, ItemError, MismatchError, WeightsError
from zoo.errors import listing as listing  # old home of the name; it goes with the next release
from zoo.errors import naming_item as naming_item  # likewise
from zoo.latents import Latents
from zoo.media.items import as_array, item_list
from zoo.moved import warn
from zoo.precision import Float32Module, is_whole_numbers, undisturbed, undisturbed_reading
from zoo.progress import progress_bar as progress_bar  # likewise
from zoo.spec import Frame, Spec
from zoo.tokenizer.graphs import Graphs
from zoo.tokens import Meta, Tokens, as_ids, is_integral

ConfigT = TypeVar("ConfigT")
#: What a family encodes to: tokens, or the latents of a continuous tokenizer.
EncodedT = TypeVar("EncodedT", bound=Tokens | Latents, default=Tokens)
#: What it decodes to, one for each item.
MediaT = TypeVar("MediaT", default=Tensor)

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_named(name: str) -> torch.dtype:
    """The floating-point type of a precision.

    Raises:
        ArgumentError: there is no such precision.
    """
    if name not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, not {name!r}")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Prepared:
    """One item as the network takes it: on the CPU, picklable, with what its tokens will remember.

    Attributes:
        tensors: what the network is fed, by name; `Tokenizer.prepare` says which.
        meta: see `Tokens`.
        amount: how much it is, in the unit that batches are counted in: samples, pixels, points or bytes.
    """

    tensors: Mapping[str, Tensor]
    meta: Meta
    amount: int


@dataclass(frozen=True)
class Budget:
    """Amounts that go through a network at once: they decide memory and speed, never the numbers.

    Attributes:
        cpu: on a CPU, small enough for its caches.
        cuda: on anything else, large enough to fill it.
    """

    cpu: int
    cuda: int

    def on(self, device: torch.device) -> int:
        """The amount for a device."""
        return self.cpu if device.type == "cpu" else self.cuda


class Tokenizer(saving.Saveable, ABC, Generic[ConfigT, EncodedT, MediaT]):
    """A loaded tokenizer: ``encode`` is ``encode_prepared(prepare(items))``, and ``decode`` the way back.

    A family derives from the base class of its kind of media (`zoo.tokenizer.image`, say), which makes that trip. It brings its
    networks, `spec`, `embed` and the one or two methods that its base names; it names its frozen ``Config`` and says in
    ``checkpoint`` how official files map to its own state dict. What `prepare`, `encode`, `decode` and `embed` give does not
    depend on the program's settings, such as default dtype and device, autocast, and TF32 and bf16 shortcuts; see
    `zoo.precision.undisturbed`. ``.double()``, ``.half()`` and ``.bfloat16()`` choose the type that decoders compute in;
    what ids depend on stays in float32, and so do embeddings and media.

    Attributes:
        config: sizes and settings of the model.
        name: name in the registry, or the one it was saved under.
        fingerprint: 16 hexadecimal digits that identify the checkpoint; set when weights are loaded.
    """

    Config: ClassVar[type]
    family: ClassVar[str]
    #: Name in `zoo.modality`.
    modality: ClassVar[str]
    #: How much goes through the networks at once, by what is done: ``encode``, ``decode``, ...
    at_once: ClassVar[Mapping[str, Budget]] = {}
    #: Whether an item may have no ids at all, as an empty file has none.
    may_be_empty: ClassVar[bool] = False
    #: Names of the axes of latents behind the channels, for messages.
    latent_axes: ClassVar[tuple[str, ...]] = ()
    #: Why there are no `graphs`; a family that has some overrides that method.
    no_graphs: ClassVar[str] = "nobody has written its networks as plain graphs yet"
    #: How upstream's checkpoints of the family are read.
    checkpoint: ClassVar[Checkpoint]
    #: State dict entries that tell checkpoints apart and are stored as upstream stored them.
    identity: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shield what a family implements from the settings of the program that calls it."""
        super().__init_subclass__(**kwargs)
        for name in ("encode", "encode_prepared", "decode", "embed"):
            if name in cls.__dict__ and not is_whole_numbers(cls.__dict__[name]):
                setattr(cls, name, _with_old_options(undisturbed(cls.__dict__[name])))
        if "prepare" in cls.__dict__ and not is_whole_numbers(cls.__dict__["prepare"]):
            # Without a look at where the parameters are, which preparing has no need of.
            setattr(cls, "prepare", undisturbed_reading(cls.__dict__["prepare"]))  # noqa: B010  (its signature is its own)
        if "checkpoint" not in cls.__dict__ and "convert_checkpoint" in cls.__dict__:
            warnings.warn(
                f"{cls.__name__}: the class methods recognises, wanted, upstream_config and convert_checkpoint are deprecated: "
                "set `checkpoint` to a zoo.Checkpoint of such functions",
                DeprecationWarning,
                stacklevel=2,
            )
            cls.checkpoint = Checkpoint(
                recognises=cls.recognises,  # type: ignore[attr-defined]
                convert=cls.convert_checkpoint,  # type: ignore[attr-defined]
                config=cls.upstream_config,  # type: ignore[attr-defined]
                wanted=cls.wanted,  # type: ignore[attr-defined]
                metadata=getattr(cls, "upstream_metadata", no_configuration),
            )

    def __init__(self, config: ConfigT, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.fingerprint = ""

    # ---- what a family implements

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Promises of this tokenizer."""

    def prepare(self, items: Any) -> list[Prepared]:
        """Read items and bring them to the form that the network takes; on the CPU, without any parameter.

        Raises:
            ItemError: an item cannot be used; names the item.
            ArgumentError: the family encodes in one step.
        """
        raise ArgumentError(f"{self.family} encodes in one step and prepares nothing")

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> EncodedT:
        """Run the network on what `prepare` gave. Each item gets the ids that it gets alone."""
        raise ArgumentError(f"{self.family} encodes in one step and takes nothing prepared")

    def encode(self, items: Any, *, progress: bool = False) -> EncodedT:
        """Media to tokens; one item or a list, ragged sizes welcome. Each item gets the ids that it gets alone."""
        return self.encode_prepared(self.prepare(items), progress=progress)

    @abstractmethod
    def decode(self, tokens: EncodedT | Tensor | Sequence[Tensor]) -> list[MediaT]:
        """Tokens to media, one for each item."""

    @abstractmethod
    def embed(self, tokens: EncodedT | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The vectors that a language model would be fed; zero where an item has ended."""

    # ---- what all families share

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        # Every call asks for it; `parameters` takes longer than a small item.
        waiting: list[torch.nn.Module] = [self]
        while waiting:
            module = waiting.pop()
            for parameter in module._parameters.values():
                if parameter is not None:
                    return parameter.device
            waiting.extend(reversed([child for child in module._modules.values() if child is not None]))
        return torch.device("cpu")

    @property
    def num_parameters(self) -> int:
        """Numbers in the state dict."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def reconstruct(self, items: Any) -> list[MediaT]:
        """``decode(encode(items))``."""
        return self.decode(self.encode(items))

    @classmethod
    def options(cls, action: Literal["encode", "decode"]) -> Mapping[str, Any]:
        """The options of `encode` or `decode` by name, with their defaults.

        >>> dict(type(zoo.load("wavtokenizer-tiny")).options("encode"))
        {'progress': False}
        """
        parameters = inspect.signature(getattr(cls, action)).parameters.values()
        return {own.name: own.default for own in parameters if own.kind is inspect.Parameter.KEYWORD_ONLY}

    def hints(self, item: Any) -> dict[str, Any]:
        """Options of `decode` that belong to an item and are not in its tokens, such as its speaker's voice."""
        return {}

    def graphs(self) -> Graphs:
        """The halves as plain functions of tensors, for `zoo.export`.

        Raises:
            ArgumentError: there are none; says why.
        """
        raise ArgumentError(f"{self.name} cannot be exported: {self.no_graphs}")

    @property
    def parts(self) -> tuple[str, ...] | None:
        """Parts of the model that are loaded; ``None`` if it has none to choose from."""
        parts: tuple[str, ...] | None = getattr(self.config, "parts", None)
        return parts

    def require(self, part: str, purpose: str) -> None:
        """Refuse what a part that was not loaded is needed for.

        Raises:
            WeightsError: it was not loaded; says how to load it.
        """
        if self.parts is not None and part not in self.parts:
            wanted = tuple(dict.fromkeys([*self.parts, part]))
            raise WeightsError(
                f"{purpose} needs the {part}, which is not loaded: load {self.name} with parts={wanted}, or all of it"
            )

    def exact_parts(self) -> tuple[str, ...]:
        """Names of the modules that ids depend on, whose layers must not be rounded."""
        return ("encoder",)

    def budget(self, action: str) -> int:
        """Amount that goes through a network at once on this device."""
        return self.at_once[action].on(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tokenizer[ConfigT, EncodedT, MediaT]:
        """Cast or move all tensors, but for those that ids depend on, which are only moved: they stay in float32.

        Ids are thus the same after ``.double()``, ``.half()`` and ``.bfloat16()``; decoders compute in the type that was asked
        for, and media are float32.
        """
        super()._apply(fn, recurse)
        for module in self.modules():
            if isinstance(module, Float32Module):
                module.float()
        return self

    def set_precision(self, precision: str) -> None:
        """Precision of the decoder's products: ``"fp32"`` or ``"bf16"``. Encoders stay in float32.

        Processors without AVX-512 or AMX have no bf16 products: there ``"fp32"`` is the quicker one, by an order of magnitude.
        """
        self.to(precision_named(precision))

    def reset_buffers(self) -> None:
        """Fill in the buffers that no checkpoint holds, after the model was built on the meta device."""
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if module is not self and callable(reset):
                reset()

    def compile_modules(self) -> None:
        """Compile the hot modules, which each family lists. The first calls are slow."""
        raise ArgumentError(f"{self.family} has nothing to compile")

    def identity_keys(self) -> tuple[str, ...]:
        """The ``identity`` of this model, where not all of a family have the same tensors."""
        return self.identity

    def compute_fingerprint(self) -> str:
        """Identity of the weights: a hash over the ``identity`` tensors, equal on every machine and for every dtype stored."""
        state = self.state_dict()
        digest = hashlib.sha256(self.family.encode())
        for key in self.identity_keys():
            digest.update(key.encode() + str(tuple(state[key].shape)).encode())
            digest.update(state[key].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, ``config.json`` and a model card; ``zoo.load("local-dir:<folder>")`` reads them."""
        return saving.save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload tokenizer",
    ) -> str:
        """Upload what `save_pretrained` writes; ``zoo.load("hf-hub:<repo_id>")`` reads it. Returns the commit's URL."""
        return saving.push_to_hub(self, repo_id, private=private, token=token, revision=revision, commit_message=commit_message)

    def tokens(self, ids: Sequence[Int[Tensor, " _"]], meta: Sequence[Meta] = ()) -> Tokens:
        """Wrap sequences of ids, from a language model say, as tokens of this checkpoint."""
        return self._tokens(self.spec, ids, meta, copy=True)

    def _tokens(self, spec: Spec, ids: Sequence[Int[Tensor, " _"]], meta: Sequence[Meta], copy: bool) -> Tokens:
        # Only a few families have segments, and asking many short tensors for their lengths takes a while.
        segmented = type(self).segments is not Tokenizer.segments
        return Tokens.from_sequences(
            ids,
            tokenizer=spec.name,
            fingerprint=spec.fingerprint,
            vocab_size=spec.vocab_size,
            meta=meta,
            segments=self.segments(max(map(len, ids), default=0)) if segmented else (),
            frame=spec.frame,
            copy=copy,
        )

    def segments(self, length: int) -> Sequence[int]:
        """Ends of the segments, such as scales, that a sequence of a length is made of; none unless a family has some."""
        return ()

    def tokens_of_codes(self, codes: Sequence[Tensor], meta: Sequence[Meta] = ()) -> Tokens:
        """Wrap codes ``[frames, places]`` of each item, each from 0 within its codebook, as tokens of this checkpoint."""
        spec = self.spec
        assert spec.frame is not None
        return Tokens.from_codes(codes, frame=spec.frame, tokenizer=spec.name, fingerprint=spec.fingerprint, meta=meta)

    def wrap(self, values: Sequence[Tensor], meta: Sequence[Meta]) -> EncodedT:
        """Make the result of `encode`: of ids ``[length]``, codes ``[frames, places]`` of several codebooks, or latents."""
        spec = self.spec
        if spec.ids_per_frame > 1:
            return self.tokens_of_codes(values, meta)  # type: ignore[return-value]  # as below
        if spec.continuous:
            return Latents(tuple(values), spec.name, spec.fingerprint, tuple(meta))  # type: ignore[return-value]  # as below
        return self._tokens(spec, values, meta, copy=False)  # type: ignore[return-value]  # which of the two, the spec says

    def check(self, tokens: Any) -> EncodedT:
        """Tokens, or latents, that this checkpoint can decode: those of `encode`, or bare ids or latents as they come.

        Raises:
            MismatchError: they belong to another checkpoint.
            ItemError: an id is out of range, an item is empty, or latents are of another shape or not finite.
            InputError: there are none.
        """
        checked = self._check_latents(tokens) if self.spec.continuous else self._check_tokens(tokens)
        return checked  # type: ignore[return-value]  # as in `wrap`

    def _check_tokens(self, tokens: Any) -> Tokens:
        spec = self.spec
        if not isinstance(tokens, Tokens):
            codes = spec.ids_per_frame > 1 and getattr(tokens, "ndim", 0) == 3
            tokens = self.tokens_of_codes(list(torch.as_tensor(tokens))) if codes else self.tokens(_bare_sequences(tokens))
        if tokens.fingerprint != spec.fingerprint:
            raise MismatchError(
                f"these tokens were made by {tokens.tokenizer} ({tokens.fingerprint or 'unknown checkpoint'}), this is "
                f"{spec.name} ({spec.fingerprint}): ids of one checkpoint mean nothing to another one"
            )
        if not len(tokens):
            raise InputError("there are no tokens to decode")
        for index, ids in enumerate(tokens.unpadded()):
            if not len(ids):
                if self.may_be_empty:
                    continue
                raise ItemError("the sequence is empty", index)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= spec.vocab_size:
                outside = low if low < 0 else high
                raise ItemError(f"id {outside} is outside the vocabulary, 0 to {spec.vocab_size - 1}", index)
        if spec.ids_per_frame > 1:
            self._check_frames(tokens)
        return tokens

    def _check_frames(self, tokens: Tokens) -> None:
        """Refuse ids of another frame, or of another codebook than that of their place."""
        own, frame = self.spec.frame, tokens.frame or Frame((tokens.vocab_size,))
        assert own is not None
        allowed = [own.keep(count)[0] for count in range(1, own.codebooks + 1)] if self.spec.residual else [own]
        if frame not in allowed:
            raise InputError(
                f"tokens of {frame.codebooks} codebooks cannot be decoded by {self.spec.name}, which has {own.codebooks}"
            )
        sizes = torch.tensor(frame.placed_sizes, device=tokens.lengths.device)
        frames, codes = tokens.frames(), tokens.codes()
        wrong = (frames >= 0) & ((codes < 0) | (codes >= sizes))
        if wrong.any():
            index, step, place = wrong.nonzero()[0].tolist()
            found, position = int(frames[index, step, place]), step * frame.ids_per_frame + place
            raise ItemError(f"id {found} at position {position} does not belong to codebook {frame.order[place]}", index)

    def _check_latents(self, latents: Any) -> Latents:
        spec = self.spec
        if not isinstance(latents, Latents):
            latents = Latents(tuple(latents), spec.name, spec.fingerprint)
        if latents.fingerprint != spec.fingerprint:
            raise MismatchError(
                f"these latents were made by {latents.tokenizer} ({latents.fingerprint or 'unknown checkpoint'}), this is "
                f"{spec.name} ({spec.fingerprint})"
            )
        latents.check(spec.dim, *self.latent_axes)
        return latents

    def training_losses(self, *batch: Any, **options: Any) -> Any:
        """Former way to ``losses(tokenizer, ...)`` in the family's module ``training``; it goes with the next release."""
        home = f"{type(self).__module__.rpartition('.')[0]}.training"
        warn(f"{type(self).__name__}.training_losses", f"{home}.losses")
        return import_module(home).losses(self, *batch, **options)

    def _check(self, tokens: Any) -> EncodedT:
        """Old name of `check`."""
        warnings.warn("_check is deprecated: call check", DeprecationWarning, stacklevel=2)
        return self.check(tokens)


#: Options that had another name in the release before.
_OLD_OPTIONS = {"precision": "encoder_precision"}


def _with_old_options(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes its options by their old names as well, with a warning."""
    parameters = inspect.signature(method).parameters
    renamed = {old: new for old, new in _OLD_OPTIONS.items() if new in parameters and old not in parameters}
    if not renamed:
        return method

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        for old in renamed.keys() & kwargs.keys():
            warnings.warn(f"{old}= of {method.__name__} is now {renamed[old]}=", DeprecationWarning, stacklevel=2)
            kwargs[renamed[old]] = kwargs.pop(old)
        return method(*args, **kwargs)

    return called


def _bare_sequences(ids: Any) -> list[Int[Tensor, " _"]]:
    """Sequences of ids without their padding of -1.

    Args:
        ids: an array or tensor ``[batch, length]`` or ``[length]``, a list of integers, or a list, a NumPy array of objects or
            an array of PyArrow that holds sequences ``[length]``.

    Raises:
        InputError: they are no integers, or padding stands before the end; names the item.
    """
    if isinstance(ids, list | tuple):
        single = bool(ids) and hasattr(ids[0], "__index__") and getattr(ids[0], "ndim", 0) == 0
        rows = [ids] if single else list(ids)
    else:
        array = ids if isinstance(ids, Tensor) else _array_of_ids(ids)
        if array.dtype == object:
            rows = list(array)
        else:
            if array.ndim not in (1, 2) or (0 not in array.shape and not is_integral(array)):
                raise InputError(f"ids must be integers [batch, length], not {array.dtype} {list(array.shape)}")
            rows = list(array[None] if array.ndim == 1 else array)
    sequences = []
    for index, sequence in enumerate(rows):
        row = as_ids(sequence, index)
        end = int((row != -1).sum())
        if (row[end:] != -1).any():
            raise ItemError("padding of -1 stands before the end", index)
        sequences.append(row[:end])
    return sequences


def _array_of_ids(ids: Any) -> Any:
    try:
        return as_array(ids)
    except InputError as error:
        raise InputError(f"ids must be integers [batch, length]: {error.reason}") from error


def as_items(items: Any, batch_rank: int) -> list[Any]:
    """A list of items; see `zoo.media.items.item_list`."""
    return item_list(items, batch_rank)


def runs_of_equals(keys: Sequence[Hashable], most: int) -> Iterator[list[int]]:
    """Consecutive indices with equal keys, at most ``most`` at a time."""
    start = 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or stop - start == most or keys[stop] != keys[start]:
            yield list(range(start, stop))
            start = stop


def groups_of_equals(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of equal lengths, longest first, at most ``budget`` steps in a group but always one item."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    for stop in range(1, len(order) + 1):
        length = lengths[order[start]]
        if stop == len(order) or lengths[order[stop]] != length or (stop - start + 1) * length > budget:
            yield order[start:stop]
            start = stop


def groups_of_similar_length(lengths: Sequence[int], budget: int, waste: float = 0.1) -> Iterator[list[int]]:
    """Indices grouped for batching: at most ``budget`` padded steps and a share of ``waste`` padding in each group.

    An item longer than the budget makes a group of its own.
    """
    group: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group:
            padded = lengths[group[0]] * (len(group) + 1)
            if padded > budget or total + lengths[index] < (1 - waste) * padded:
                yield group
                group, total = [], 0
        group.append(index)
        total += lengths[index]
    if group:
        yield group
