"""Fewer visual tokens in a vision-language model that its user has loaded: one call puts a method in, another takes it out.

    handle = zoo.compress.apply(model, "mustdrop", keep=0.25)
    model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    handle.stats
    zoo.compress.remove(model)

``keep`` is a share of the visual tokens everywhere, and ``keep=1`` leaves all of them; a number of tokens has another name.
Names are imported when first used, so that the command line does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.compress.methods import METHODS, SUPPORTED

if TYPE_CHECKING:
    from zoo.compress import kv, mrt5
    from zoo.compress.attach import Handle, apply, remove
    from zoo.compress.globalcom2 import GlobalCom2
    from zoo.compress.mustdrop import MustDrop
    from zoo.compress.quecc import QueCC, QueCCProjector
    from zoo.compress.sequence import adaptive_prefix, shorten
    from zoo.compress.stats import Stats, prefill_flops

# Where each public name lives; a module by itself has no attribute.
_HOMES = {
    "apply": "zoo.compress.attach",
    "remove": "zoo.compress.attach",
    "Handle": "zoo.compress.attach",
    "Stats": "zoo.compress.stats",
    "prefill_flops": "zoo.compress.stats",
    "MustDrop": "zoo.compress.mustdrop",
    "GlobalCom2": "zoo.compress.globalcom2",
    "QueCC": "zoo.compress.quecc",
    "QueCCProjector": "zoo.compress.quecc",
    "adaptive_prefix": "zoo.compress.sequence",
    "shorten": "zoo.compress.sequence",
    "tokens": "zoo.compress.sequence",
}
_MODULES = {"kv", "mrt5"}

__all__ = [
    "METHODS",
    "SUPPORTED",
    "GlobalCom2",
    "Handle",
    "MustDrop",
    "QueCC",
    "QueCCProjector",
    "Stats",
    "adaptive_prefix",
    "apply",
    "kv",
    "mrt5",
    "prefill_flops",
    "remove",
    "shorten",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"zoo.compress.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo.compress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
