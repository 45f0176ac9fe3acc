"""The tokenizer zoo: one ``zoo.load("name")``, one ``encode``/``decode``, for every modality.

Public names are imported when first used, so that ``import zoo`` and the ``zoo list`` command do not wait for torch.

>>> tok = zoo.load("wavtokenizer-tiny")
>>> tokens = tok.encode([(torch.zeros(48_000), 48_000), torch.zeros(6_000)])
>>> tokens
Tokens(wavtokenizer-tiny, items=2, lengths=[75, 19], vocab_size=1024)
>>> [list(audio.shape) for audio in tok.decode(tokens)]
[[1, 24000], [1, 6000]]
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from zoo.errors import (
    ArgumentError,
    ChecksumError,
    CorruptWeightsError,
    DiskFullError,
    DownloadError,
    FormatError,
    GatedRepoError,
    HubError,
    IndexingError,
    InputError,
    ItemError,
    KeysError,
    MismatchError,
    MissingExtraError,
    MissingReaderError,
    NotOnHubError,
    NotWritableError,
    OfflineError,
    OutputError,
    RegistryError,
    UnsafePickleError,
    WeightsError,
    ZooError,
)

if TYPE_CHECKING:
    from zoo import compress, engine, quantization
    from zoo.engine import TokenDataset
    from zoo.hub import convert, load, load_upstream, pull
    from zoo.latents import Latents
    from zoo.memory import set_allocator
    from zoo.onnx_export import export
    from zoo.quantization import quantize
    from zoo.registry import Entry, info, register, register_family
    from zoo.registry import names as list
    from zoo.spec import Spec
    from zoo.tokenizer import Tokenizer
    from zoo.tokens import Tokens
    from zoo.vocabulary import Vocabulary


class _Former:
    """Finds modules under their former names; what knows these is loaded with the first module that is asked for."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("zoo.") or name == "zoo.moved":
            return None
        from zoo import moved

        return moved.find_spec(name)


# Before Python's own search, which may find the empty folders of former packages.
if not any(getattr(finder, "__qualname__", "") == _Former.__qualname__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Former)

__version__ = "0.1.0"

# Where each public name lives; "module:attribute" where it is called differently there.
_HOMES = {
    "convert": "zoo.hub",
    "list": "zoo.registry:names",
    "load": "zoo.hub",
    "load_upstream": "zoo.hub",
    "pull": "zoo.hub",
    "quantize": "zoo.quantization",
    "Entry": "zoo.registry",
    "export": "zoo.onnx_export",
    "info": "zoo.registry",
    "register": "zoo.registry",
    "register_family": "zoo.registry",
    "set_allocator": "zoo.memory",
    "Latents": "zoo.latents",
    "Spec": "zoo.spec",
    "TokenDataset": "zoo.engine",
    "Tokenizer": "zoo.tokenizer",
    "Tokens": "zoo.tokens",
    "Vocabulary": "zoo.vocabulary",
}

# Packages that are public names themselves.
_PACKAGES = ("compress", "engine", "media", "quantization", "quantizers", "streams", "text")

__all__ = [
    "ArgumentError",
    "ChecksumError",
    "CorruptWeightsError",
    "DiskFullError",
    "DownloadError",
    "Entry",
    "FormatError",
    "GatedRepoError",
    "HubError",
    "IndexingError",
    "InputError",
    "ItemError",
    "KeysError",
    "Latents",
    "MismatchError",
    "MissingExtraError",
    "MissingReaderError",
    "NotOnHubError",
    "NotWritableError",
    "OfflineError",
    "OutputError",
    "RegistryError",
    "Spec",
    "TokenDataset",
    "Tokenizer",
    "Tokens",
    "UnsafePickleError",
    "Vocabulary",
    "WeightsError",
    "ZooError",
    "compress",
    "convert",
    "engine",
    "export",
    "info",
    "list",
    "load",
    "load_upstream",
    "pull",
    "quantization",
    "quantize",
    "register",
    "register_family",
    "set_allocator",
    "text",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"zoo.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__():  # type: ignore[no-untyped-def]  # "list" is the catalogue's in this module
    return __all__
