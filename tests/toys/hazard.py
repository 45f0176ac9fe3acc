"""A tokenizer of bytes whose items do harm: what the engine has to live through."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.errors import InputError
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.bytes import FileTokenizer
from zoo.tokens import Tokens


@dataclass(frozen=True)
class HazardConfig:
    """What is added to every byte, so that two checkpoints have other ids; and where scales end."""

    shift: int = 0
    segments: tuple[int, ...] = ()


class Hazard(FileTokenizer[HazardConfig]):
    """Bytes to ids; an item that begins with the name of a harm does it while it is prepared, or while it is encoded."""

    Config = HazardConfig
    family = "hazard"
    identity = ("shift",)
    checkpoint = Checkpoint(recognises=lambda keys: False, convert=lambda state, config: (config, dict(state)))
    at_once: ClassVar[Mapping[str, Budget]] = {}

    def __init__(self, config: HazardConfig | None = None, *, name: str = "hazard") -> None:
        super().__init__(config or HazardConfig(), name)
        self.shift = torch.nn.Parameter(torch.tensor([float(self.config.shift)]), requires_grad=False)
        self.fingerprint = self.compute_fingerprint()

    @property
    def spec(self) -> Spec:
        return Spec(self.name, self.family, "bytes", 512, 1, fingerprint=self.fingerprint, lossless=True)

    def prepare(self, items: Any, *, max_bytes: int = 1 << 20, delay: float = 0.0) -> list[Prepared]:
        time.sleep(delay)
        for item in items if isinstance(items, list) else [items]:
            _harm(item.partition(b" ")[0])
        return super().prepare(items, max_bytes=max_bytes)

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> Tokens:
        for item in items:
            head, _, rest = bytes(item.tensors["octets"].tolist()).partition(b" ")
            if head == b"encode":
                _harm(rest.partition(b" ")[0])
        tokens = super().encode_prepared(items, progress=progress)
        return replace_segments(tokens, self.config.segments)

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " length"]:
        return octets.to(torch.int64) + self.config.shift

    def octets(self, ids: Int[Tensor, " length"]) -> Any:
        return (ids - self.config.shift).to(torch.uint8).numpy()

    def embed(self, tokens: Any) -> Float[Tensor, "batch length 1"]:
        return self.check(tokens).ids.clamp(min=0)[..., None].float()


def replace_segments(tokens: Tokens, segments: tuple[int, ...]) -> Tokens:
    return Tokens.from_sequences(
        tokens.unpadded(),
        tokenizer=tokens.tokenizer,
        fingerprint=tokens.fingerprint,
        vocab_size=tokens.vocab_size,
        segments=segments,
    )


def _harm(kind: bytes) -> None:
    if kind == b"bad":
        raise InputError("it is bad")
    if kind == b"odd":
        raise RuntimeError("a library failed at <object at 0x7f0012345678>")
    if kind == b"memory":
        raise MemoryError
    if kind == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == b"exit":
        os._exit(3)
    if kind == b"hang":
        time.sleep(3600)
