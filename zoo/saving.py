"""Files in our own layout, written: a folder or repository that `zoo.load` reads again, with a model card."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from zoo import registry
from zoo.download import naming_write_errors, translating_hub_errors
from zoo.media import replacing, write_json
from zoo.quantization.packed import descriptions, exact_keys, format_metadata

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class Saveable(nn.Module):
    """A module that knows its identity.

    Attributes:
        config: a dataclass of plain values.
        name: name in the registry, or the one it was saved under.
        fingerprint: identity of the weights, if it is known already.
    """

    family: ClassVar[str]
    modality: ClassVar[str]
    config: Any
    name: str
    fingerprint: str

    def compute_fingerprint(self) -> str:
        """Identity of the weights."""
        raise NotImplementedError


def saved_config(tokenizer: Saveable) -> dict[str, Any]:
    """Configuration that a saved tokenizer states about itself."""
    quantization = descriptions(tokenizer)
    return {
        "zoo": 1,
        "family": registry.family_name(type(tokenizer)),
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint or tokenizer.compute_fingerprint(),
        "config": asdict(tokenizer.config),
        **({"quantization": quantization} if quantization else {}),
    }


def write_saved_file(tokenizer: Saveable, path: Path, dtype: torch.dtype | None = None) -> None:
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


def save_pretrained(tokenizer: Saveable, folder: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card into a folder.

    Raises:
        DiskFullError, NotWritableError: there is no room for them, or no permission.
    """
    folder = Path(folder)
    write_saved_file(tokenizer, folder / WEIGHTS_FILE)
    with naming_write_errors(folder / CONFIG_FILE):
        write_json(folder / CONFIG_FILE, saved_config(tokenizer), indent=2)
    with naming_write_errors(folder / "README.md"), replacing(folder / "README.md") as temporary:
        temporary.write_text(_model_card(tokenizer), encoding="utf-8")
    return folder


def push_to_hub(
    tokenizer: Saveable,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload tokenizer",
) -> str:
    """Create the repository if it is not there and upload what `save_pretrained` writes; returns the commit's URL.

    Raises:
        HubError: as `load` does.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch, translating_hub_errors(repo_id, None, revision, None):
        folder = save_pretrained(tokenizer, scratch)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)


def _model_card(tokenizer: Saveable) -> str:
    """The family's card where the model is in the catalogue, behind the Hub's front matter."""
    known = registry.entries().get(tokenizer.name)
    licence = known.licence.weights if known else "other"
    front = {
        "library_name": "tokenizer-zoo",
        "license": licence.lower() if licence in ("MIT", "Apache-2.0") else "other",
        "tags": ["tokenizer", tokenizer.family, tokenizer.modality],
    }
    body = read_card(known.card) if known else f"# {tokenizer.name}\n\nA {tokenizer.family} tokenizer.\n"
    usage = 'Load it with `zoo.load("hf-hub:<this repository>")` from the `tokenizer-zoo` package.\n'
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{usage}\n{body}"


def read_card(file: str) -> str:
    """The text of a model card."""
    return (resources.files("zoo.cards") / file).read_text(encoding="utf-8")
