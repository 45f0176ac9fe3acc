"""The contract that every tokenizer keeps: items in, tokens out, tokens in, media out."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, no_configuration
from zoo.errors import ArgumentError, InputError, ItemError, MismatchError
from zoo.errors import listing as listing  # old home of the name; it goes with the next release
from zoo.errors import naming_item as naming_item  # likewise
from zoo.progress import progress_bar as progress_bar  # likewise
from zoo.spec import Spec
from zoo.tokens import Meta, Tokens

ConfigT = TypeVar("ConfigT")

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tokenizer(nn.Module, ABC, Generic[ConfigT]):
    """A loaded tokenizer.

    A family implements `encode`, `decode`, `embed` and `spec`, names its frozen ``Config``, and says in ``checkpoint`` how
    official files map to its own state dict.

    Attributes:
        config: sizes and settings of the model.
        name: name in the registry, or the one it was saved under.
        fingerprint: 16 hexadecimal digits that identify the checkpoint; set when weights are loaded.
    """

    Config: ClassVar[type]
    family: ClassVar[str]
    modality: ClassVar[str]
    #: How upstream's checkpoints of the family are read.
    checkpoint: ClassVar[Checkpoint]
    #: State dict entries that tell checkpoints apart and are stored as upstream stored them.
    identity: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
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
        """What this tokenizer promises."""

    @abstractmethod
    def encode(self, items: Any, *, progress: bool = False) -> Tokens:
        """Media to tokens; one item or a list, ragged sizes welcome. Each item gets the ids that it gets alone."""

    @abstractmethod
    def decode(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Tokens to media, one tensor per item."""

    @abstractmethod
    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The vectors that a language model would be fed; zero where an item has ended."""

    # ---- what all families share

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Numbers in the state dict."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def reconstruct(self, items: Any) -> list[Tensor]:
        """``decode(encode(items))``."""
        return self.decode(self.encode(items))

    def set_precision(self, precision: str) -> None:
        """Precision of the decoder's products: ``"fp32"`` or ``"bf16"``. Encoders stay in float32."""
        if precision not in PRECISIONS:
            raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.to(PRECISIONS[precision])

    def reset_buffers(self) -> None:
        """Fill in the buffers that no checkpoint holds, after the model was built on the meta device."""
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if module is not self and callable(reset):
                reset()

    def compile_modules(self) -> None:
        """Compile the parts that do the work; the first calls are slow. A family names them."""
        raise ArgumentError(f"{self.family} has nothing to compile")

    def compute_fingerprint(self) -> str:
        """Identity of the weights: a hash over the ``identity`` tensors, equal on every machine and for every dtype stored."""
        state = self.state_dict()
        digest = hashlib.sha256(self.family.encode())
        for key in self.identity:
            digest.update(key.encode() + str(tuple(state[key].shape)).encode())
            digest.update(state[key].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, ``config.json`` and a model card; ``zoo.load("local-dir:<folder>")`` reads them."""
        from zoo import hub

        return hub.save_pretrained(self, folder)

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
        from zoo import hub

        return hub.push_to_hub(self, repo_id, private=private, token=token, revision=revision, commit_message=commit_message)

    def tokens(self, ids: Sequence[Int[Tensor, " _"]], meta: Sequence[Meta] = ()) -> Tokens:
        """Wrap sequences of ids, from a language model say, as tokens of this checkpoint."""
        spec = self.spec
        return Tokens.from_sequences(
            ids, tokenizer=spec.name, fingerprint=spec.fingerprint, vocab_size=spec.vocab_size, meta=meta
        )

    def _check(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Tokens:
        """Tokens that this checkpoint can decode.

        Raises:
            MismatchError: they belong to another checkpoint.
            InputError: an id is out of range, or an item is empty.
        """
        spec = self.spec
        if not isinstance(tokens, Tokens):
            tokens = self.tokens(_bare_sequences(tokens))
        if tokens.fingerprint != spec.fingerprint:
            raise MismatchError(
                f"these tokens were made by {tokens.tokenizer} ({tokens.fingerprint or 'unknown checkpoint'}), this is "
                f"{spec.name} ({spec.fingerprint}): ids of one checkpoint mean nothing to another one"
            )
        if not len(tokens):
            raise InputError("there are no tokens to decode")
        for index, ids in enumerate(tokens.unpadded()):
            if not len(ids):
                raise ItemError("the sequence is empty", index)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= spec.vocab_size:
                outside = low if low < 0 else high
                raise ItemError(f"id {outside} is outside the vocabulary, 0 to {spec.vocab_size - 1}", index)
        return tokens


def _bare_sequences(ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Sequences of ids without their padding of -1."""
    if isinstance(ids, Tensor):
        if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids must be integers [batch, length], not {ids.dtype} {list(ids.shape)}")
        ids = list(ids.reshape(-1, ids.shape[-1]))
    sequences = []
    for index, row in enumerate(ids):
        row = torch.as_tensor(row)
        if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise ItemError(f"ids must be a sequence of integers, not {row.dtype} {list(row.shape)}", index)
        end = int((row != -1).sum())
        if (row[end:] != -1).any():
            raise ItemError("padding of -1 stands before the end", index)
        sequences.append(row[:end].to(torch.int64))
    return sequences


def as_items(items: Any, batch_rank: int) -> list[Any]:
    """A list of items; a single one becomes a list of one, and a tensor of rank ``batch_rank`` is taken apart.

    Raises:
        InputError: there are none.
    """
    if isinstance(items, list):
        numbers = bool(items) and isinstance(items[0], int | float)
        listed = [items] if numbers else items
    elif getattr(items, "ndim", None) == batch_rank:
        listed = list(items)
    else:
        listed = [items]
    if not listed:
        raise InputError("there is nothing to encode")
    return listed


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
