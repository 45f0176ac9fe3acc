"""Files in our own layout, written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zoo import registry
from zoo.download import naming_write_errors
from zoo.hub.build import AnyTokenizer
from zoo.media import replacing
from zoo.quantization.packed import descriptions, exact_keys, format_metadata


def saved_config(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What a saved tokenizer says about itself."""
    quantization = descriptions(tokenizer)
    return {
        "zoo": 1,
        "family": registry.family_name(type(tokenizer)),
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint or tokenizer.compute_fingerprint(),
        "config": asdict(tokenizer.config),
        **({"quantization": quantization} if quantization else {}),
    }


def write_saved_file(tokenizer: AnyTokenizer, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file in our layout, its configuration in the metadata; floats in ``dtype`` if one is given.

    Raises:
        DiskFullError, NotWritableError: there is no room for it, or no permission.
    """
    tensors = {}
    exact = exact_keys(tokenizer)
    for key, tensor in tokenizer.state_dict().items():
        stored = tensor.detach().cpu()
        cast = dtype is not None and stored.is_floating_point() and key not in exact
        tensors[key] = (stored.to(dtype) if cast else stored).contiguous()
    metadata = {"zoo": json.dumps(saved_config(tokenizer)), **format_metadata(descriptions(tokenizer))}
    with naming_write_errors(path), replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
