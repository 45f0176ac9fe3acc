"""Latents: what a continuous tokenizer makes of media, in memory and in a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from zoo.download import naming_write_errors
from zoo.errors import FormatError, InputError, ItemError, MismatchError
from zoo.indexing import positions
from zoo.media import file_content, replacing

_KIND = "zoo.Latents"
_VERSION = "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_META = TypeAdapter(list[dict[str, int | float | str]])


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of latents of one continuous tokenizer, beside `zoo.Tokens` for the discrete ones.

    Attributes:
        values: one tensor per item; the grids of the items may differ, such as height and width for images.
        tokenizer: name of the tokenizer they belong to.
        fingerprint: identity of its checkpoint; latents mean nothing under another one. Empty when unknown.
        meta: per item what decoding needs besides the values, such as the size of the image.

    >>> latents = zoo.Latents((torch.zeros(4, 8, 8), torch.ones(4, 8, 12)), tokenizer="mine", fingerprint="")
    >>> len(latents), [list(value.shape) for value in latents[1].values]
    (2, [[4, 8, 12]])
    """

    values: tuple[Float[Tensor, "_channels ..."], ...]
    tokenizer: str
    fingerprint: str
    meta: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Latents:
        """The chosen items, as latents again; ``index`` as for `zoo.Tokens`, masks among them."""
        chosen = positions(index, len(self))
        meta = tuple(self.meta[i] for i in chosen) if self.meta else ()
        return replace(self, values=tuple(self.values[i] for i in chosen), meta=meta)

    def __iter__(self) -> Iterator[Latents]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        shapes = [list(value.shape) for value in self.values[:8]]
        more = ", …" if len(self) > 8 else ""
        return f"Latents({self.tokenizer}, items={len(self)}, shapes=[{', '.join(map(str, shapes))}{more}])"

    def equal(self, other: Latents) -> bool:
        """Whether both hold the same numbers of the same checkpoint with the same meta."""
        return (
            (self.fingerprint, len(self), self.meta) == (other.fingerprint, len(other), other.meta)
            and all(left.dtype == right.dtype for left, right in zip(self.values, other.values, strict=True))
            and all(torch.equal(left, right) for left, right in zip(self.values, other.values, strict=True))
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Latents:
        """The same latents on a device, in a floating-point type."""
        return replace(self, values=tuple(value.to(device=device, dtype=dtype) for value in self.values))

    def check(self, channels: int, *axes: str) -> None:
        """Make sure that these can be decoded: ``[channels, *axes]`` each, finite and not empty.

        Raises:
            InputError: there are none, or one is of another shape or not finite; names the item.
        """
        if not len(self):
            raise InputError("there are no latents to decode")
        for index, values in enumerate(self.values):
            if values.ndim != 1 + len(axes) or values.shape[0] != channels or not values.numel():
                raise ItemError(f"latents must be [{', '.join((str(channels), *axes))}], not {list(values.shape)}", index)
            if not torch.isfinite(values).all():
                raise ItemError("the latents hold NaN or infinite values", index)

    def stack(self) -> Float[Tensor, "batch channels ..."]:
        """All items as one tensor.

        Raises:
            InputError: there are none, or their grids differ.
        """
        if not self.values:
            raise InputError("nothing to stack")
        first = self.values[0].shape
        for index, value in enumerate(self.values):
            if value.shape != first:
                raise ItemError(f"latents {list(value.shape)} cannot be stacked on {list(first)}", index)
        return torch.stack(self.values)

    @staticmethod
    def cat(batches: Sequence[Latents]) -> Latents:
        """One batch of several, all of the same checkpoint.

        Raises:
            MismatchError: they are of different checkpoints.
        """
        if not batches:
            raise InputError("nothing to concatenate")
        first = batches[0]
        for i, other in enumerate(batches):
            if other.fingerprint != first.fingerprint:
                raise MismatchError(f"latents of {other.tokenizer} cannot join latents of {first.tokenizer}", i)
        with_meta = all(batch.meta for batch in batches)
        return replace(
            first,
            values=tuple(value for batch in batches for value in batch.values),
            meta=tuple(meta for batch in batches for meta in batch.meta) if with_meta else (),
        )

    # ---- files: safetensors with the tensors "0", "1", ... and the other attributes in its metadata

    def to_bytes(self) -> bytes:
        """The content of a ``.safetensors`` file; every tensor keeps its floating-point type."""
        # Clones, because safetensors refuses tensors that share memory, as rows of one batch do.
        tensors = {str(i): value.detach().cpu().contiguous().clone() for i, value in enumerate(self.values)}
        attributes = {
            "kind": _KIND,
            "version": _VERSION,
            "tokenizer": self.tokenizer,
            "fingerprint": self.fingerprint,
            "meta": json.dumps([dict(meta) for meta in self.meta]),
        }
        return save_safetensors(tensors, attributes)

    @classmethod
    def from_bytes(cls, content: bytes) -> Latents:
        """Read the content of a ``.safetensors`` file of latents.

        Raises:
            FormatError: it is truncated, corrupt, of an unknown version, or holds something else.
        """
        if content.startswith(b"\x89zt"):
            raise FormatError("this is a .zt file of tokens, which zoo.Tokens.load reads")
        try:
            tensors = load_safetensors(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except Exception as error:
            # Safetensors reports damage as its own error; what it lets pass (types unknown to torch, shapes that overflow)
            # fails where tensors are made, in as many ways.
            raise FormatError(f"the file of latents is truncated or corrupt: {str(error)[:200]}") from error
        attributes = header.get("__metadata__")
        if not isinstance(attributes, Mapping) or attributes.get("kind") != _KIND:
            raise FormatError("this safetensors file does not hold latents")
        if attributes.get("version") != _VERSION:
            raise FormatError(
                f"version {str(attributes.get('version'))[:20]} of latents is not known to this release (it reads {_VERSION})"
            )
        try:
            meta = _META.validate_json(attributes["meta"])
            values = tuple(tensors.pop(str(i)) for i in range(len(tensors)))
            tokenizer, fingerprint = attributes["tokenizer"], attributes["fingerprint"]
        except (KeyError, ValueError) as error:
            raise FormatError(f"the file of latents is incomplete or corrupt: {str(error)[:200]}") from error
        if len(meta) not in (0, len(values)):
            raise FormatError(f"meta of {len(meta)} items does not fit latents of {len(values)}")
        for i, value in enumerate(values):
            if value.dtype not in _DTYPES or value.ndim < 1:
                raise FormatError(f"tensor {i} is {value.dtype} {list(value.shape)}, not latents [channels, ...]")
        return cls(values, tokenizer, fingerprint, tuple(meta))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.safetensors`` file, under a temporary name first.

        Raises:
            DiskFullError, NotWritableError: there is no room for it, or no permission.
        """
        with naming_write_errors(Path(path)), replacing(path) as temporary:
            temporary.write_bytes(self.to_bytes())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Latents:
        """Read a ``.safetensors`` file of latents.

        Raises:
            InputError: there is no such file, or it cannot be read; names it.
            FormatError: it is not a sound file of latents; names the file.
        """
        try:
            return cls.from_bytes(file_content(path))
        except FormatError as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from error
