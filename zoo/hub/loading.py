"""From a name to a loaded tokenizer: entry, files, safe state dict, strict load."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.download import download, verify
from zoo.errors import (
    ArgumentError,
    InputError,
    KeysError,
    NotOnHubError,
    WeightsError,
    listing,
)
from zoo.hub.build import (
    AnyTokenizer,
    Request,
    blaming,
    build,
    converted_state,
    json_config,
    log,
    read_config,
    with_companions,
)
from zoo.hub.converted import find_converted
from zoo.hub.own import embedded_path, from_saved, from_saved_file
from zoo.hub.pieces import (
    DIFFUSERS_WEIGHTS_FILE,
    Place,
    Sources,
    fetch_piece,
    parts_of,
    require_place,
    wanted_pieces,
)
from zoo.hub.upstream import from_upstream_file, read_prefixed
from zoo.machine import usable_device
from zoo.precision import exact_float32
from zoo.registry import MAIN, Entry
from zoo.saving import CONFIG_FILE, WEIGHTS_FILE
from zoo.state_dict import opening_safetensors, safetensors_keys
from zoo.tokenizer import PRECISIONS


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    compile: bool = False,
    quantize: str | None = None,
    parts: str | Sequence[str] | None = None,
    files: Mapping[str, Place] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> AnyTokenizer:
    """Load a tokenizer, ready to encode and decode.

    Tensors of the wanted type are memory-mapped, others converted piece by piece.

    Args:
        name: a name in the catalogue, ``hf-hub:org/repo[@revision]`` or ``local-dir:path``, where the path is
            that of a folder by `save_pretrained` or of a single ``.safetensors`` file, as the recipes write.
        device: where to put it; the CPU by default.
        dtype: parameter dtype. Encoders usually stay in float32 because rounding changes ids; families with encoders too
            large for that say so.
        precision: ``"fp32"`` or ``"bf16"``, the precision of the decoder's products; ids do not change.
        compile: compile the parts that do the work with ``torch.compile``; the first calls are slow.
        quantize: a method of `zoo.quantize`, ``"fp4-e2m1"`` say; what that keeps stays as it is. A tokenizer that was saved
            quantized loads as it was saved without it.
        parts: names of the parts to load where a model has several, such as ``"encoder"``; nothing is downloaded for the
            others, and what needs them raises an error that says so. All of them by default.
        files: where pieces of a model lie that the catalogue does not know or that lie elsewhere, by the names that `zoo.info`
            shows: a file, a folder, or ``hf-hub:org/repo[@revision]``.
        revision: branch, tag or commit of the Hub repository instead of the catalogue's.
        cache_dir: cache of downloads instead of ``HF_HOME``'s.
        local_files_only: do not touch the network.
        token: access token for gated and private repositories; ``HF_TOKEN`` and the login are used otherwise.

    Raises:
        RegistryError: no such name.
        InputError: the name is no string, the model has no such part or piece, there is no such method of quantization, or the
            dtype is none of floating-point numbers.
        HubError: the files cannot be had; each subclass says what to do next.
        WeightsError: the files cannot be used.

    >>> encoder = zoo.load("seed-tiny", parts="encoder")
    >>> encoder.parts, encoder.spec.max_tokens, encoder.spec.vocab_size
    (('encoder',), 32, 1024)
    """
    with exact_float32(torch.device("cpu")):
        if not isinstance(name, str):
            raise ArgumentError(f"the name of a tokenizer is a string, not {name!r}; of a folder, 'local-dir:path'")
        if precision is not None and precision not in PRECISIONS:
            raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(f"dtype must be a floating-point type of torch, such as torch.bfloat16, not {dtype!r}")
        device = None if device is None else usable_device(device)
        fetch = functools.partial(download, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        request = Request(Sources(fetch, files or {}, revision), parts, dtype, precision)
        if name.startswith(("hf-hub:", "local-dir:")):
            if files:
                raise InputError("files= places the pieces of a model in the catalogue")
            tokenizer = _from_address(name, request)
        else:
            tokenizer = _from_entry(registry.get(name), request)
        if quantize is not None:
            from zoo.quantization.conversion import quantize as quantize_model

            quantize_model(tokenizer, quantize)
        if device is not None:
            tokenizer.to(device)
        if compile:
            tokenizer.compile_modules()
        return tokenizer


def _from_entry(entry: Entry, request: Request) -> AnyTokenizer:
    cls = registry.family_class(entry.family)
    whole = registry.check_config(entry)
    config = request.choose_parts(whole, entry.name)
    if entry.licence.non_commercial:
        _warn_non_commercial(entry.name, entry.licence.weights)
    weights = entry.weights
    if weights.source == "none":
        raise WeightsError(
            f"no weights of {entry.name} were ever published; train it with the recipe its card names ({entry.card}) and load "
            "the result with local-dir:<folder>"
        )
    if weights.source == "embedded":
        if request.sources.places:
            raise InputError(f"{entry.name} is in the package: there is nothing to place with files=")
        return from_saved_file(embedded_path(entry), request, expect=config)
    if converted := find_converted(entry, request, whole, config):
        # Upstream's configuration, where there was one, decided when the file was written.
        return from_saved_file(converted, request, expect=None if _configured_upstream(entry) else config)
    if weights.pieces:
        return _from_pieces(cls, entry, config, request)
    path, upstream = fetch_entry(entry, request)
    return from_upstream_file(cls, upstream, path, entry.name, request, expected=config)


def _configured_upstream(entry: Entry) -> bool:
    """Whether upstream's own configuration, or the graph that an ONNX file holds, has a say in an entry's."""
    return (
        entry.weights.format in ("onnx", "json")
        or entry.weights.config is not None
        or any(piece.config_field for piece in entry.weights.pieces.values())
    )


def _from_pieces(cls: type[AnyTokenizer], entry: Entry, config: Any, request: Request) -> AnyTokenizer:
    """Load the requested parts of a model split over several files. If a tensor occurs in several, the first file wins."""
    pieces = wanted_pieces(entry, config)
    for name, piece in pieces.items():
        # Before anything is downloaded in vain.
        require_place(entry, name, piece, request.sources)
    state: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        found = fetch_piece(entry, name, piece, request.sources)
        if piece.config_field:
            configs = {component: json_config(files.config) for component, files in found.items() if files.config}
            with blaming(f"{entry.name}: the configurations of {name}"):
                config = replace(config, **{piece.config_field: configs})
        for files in found.values():
            if files.weights:
                state = read_prefixed(cls, files.weights, files.prefix) | state
    with blaming(f"{entry.name}: {', '.join(pieces)}"):
        # What is not taken over must not stay in memory while the rest is cast: the name is bound anew.
        found, state = converted_state(cls, state, config)
    if absent := sorted(set(parts_of(config)) - set(parts_of(found))):
        raise KeysError(f"{entry.name}: the files hold no {listing(absent)}")
    return build(cls, found, state, name=entry.name, request=request)


def fetch_entry(entry: Entry, request: Request) -> tuple[Path, Mapping[str, Any] | None]:
    """The weights file of an entry, and upstream's configuration where the entry names one."""
    weights = entry.weights
    path = fetch_piece(entry, MAIN, weights.all_pieces()[MAIN], request.sources)[MAIN].weights
    assert path is not None
    if weights.config is None or weights.repo is None or MAIN in request.sources.places:
        return path, None
    repo, config = weights.repo, PurePosixPath(weights.config)
    revision = request.sources.revision or weights.revision

    def beside(file: str) -> Path:
        return request.sources.download(repo, str(config.with_name(file)), revision, ask=f"zoo pull {entry.name}")

    raw = read_config(beside(config.name))
    assert raw is not None
    return path, with_companions(registry.family_class(entry.family), raw, beside, f"{repo}/{config}")


def _from_address(name: str, request: Request) -> AnyTokenizer:
    """A tokenizer outside the catalogue: ``hf-hub:org/repo[@revision]``, or a folder or a single file behind ``local-dir:``."""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:"))
        return _from_folder(path, request) if path.is_dir() else _from_file(path, request)
    repo, _, pinned = name.removeprefix("hf-hub:").partition("@")
    return _from_repo(repo, request.sources.revision or pinned or "main", request)


def _from_repo(repo: str, revision: str, request: Request) -> AnyTokenizer:
    name = f"hf-hub:{repo}" if revision == "main" else f"hf-hub:{repo}@{revision}"
    try:
        config: Mapping[str, Any] = json_config(request.sources.download(repo, CONFIG_FILE, revision))
    except NotOnHubError as error:
        if error.missing != "file":
            raise
        config = {}
    # Autoencoders of diffusion models go by another name.
    file = DIFFUSERS_WEIGHTS_FILE if "_diffusers_version" in config else WEIGHTS_FILE
    path = request.sources.download(repo, file, revision)
    verify(path, None, None)
    if "zoo" in config:
        return from_saved(config, path, request)
    return _from_foreign(path, name, config, request, lambda file: request.sources.download(repo, file, revision))


def _from_file(path: Path, request: Request) -> AnyTokenizer:
    """What a recipe wrote, or a checkpoint in some upstream's layout."""
    if not path.exists():
        raise WeightsError(f"there is no {path}")
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} is neither a folder nor a .safetensors file; load_upstream opens other kinds")
    with opening_safetensors(path) as file:
        own = "zoo" in (file.metadata() or {})
    if own:
        return from_saved_file(path, request, None)
    return _from_foreign(path, f"local-dir:{path}", {}, request, path.with_name)


def _from_folder(folder: Path, request: Request) -> AnyTokenizer:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.exists():
        weights = folder / DIFFUSERS_WEIGHTS_FILE
    if not weights.exists():
        raise WeightsError(f"{folder} holds no {WEIGHTS_FILE}; a folder written by save_pretrained does")
    found = json_config(config) if config.exists() else {}
    if "zoo" in found:
        return from_saved(found, weights, request)
    return _from_foreign(weights, f"local-dir:{folder}", found, request, folder.joinpath)


def _from_foreign(
    path: Path, name: str, config: Mapping[str, Any], request: Request, beside: Callable[[str], Path]
) -> AnyTokenizer:
    """A checkpoint in some upstream's layout, recognised by its keys, with the ``config.json`` beside it or an empty one.

    ``beside`` gives the path of a file that lies where the configuration does.
    """
    if request.parts is not None:
        raise InputError(f"parts= chooses from a catalogue entry or from a tokenizer that was saved; {name} is neither")
    keys = set(safetensors_keys(path))
    for family in dict.fromkeys(entry.family for entry in registry.entries().values()):
        cls = registry.family_class(family)
        if cls.checkpoint.recognises(keys):
            upstream = with_companions(cls, config, beside, name) if config else None
            return from_upstream_file(cls, upstream, path, name, request)
    raise WeightsError(f"{name}: no family recognises this checkpoint; load_upstream takes one whose family you know")


@functools.cache
def _warn_non_commercial(name: str, licence: str) -> None:
    """Cached, so that each model is mentioned once."""
    log.warning("%s: the weights are under %s, which forbids commercial use", name, licence)
