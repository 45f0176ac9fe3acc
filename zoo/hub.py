"""From a name to a loaded tokenizer: entry → files → safe state dict → strict load. And back: save, push, convert."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo import registry
from zoo.errors import (
    ChecksumError,
    CorruptWeightsError,
    DiskFullError,
    DownloadError,
    GatedRepoError,
    HubError,
    KeysError,
    NotOnHubError,
    OfflineError,
    UnsafePickleError,
    WeightsError,
)
from zoo.media import replacing
from zoo.registry import Entry
from zoo.tokenizer import Tokenizer

_log = logging.getLogger("zoo")

AnyTokenizer = Tokenizer[Any]
WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


# ------------------------------------------------------------------------------------------------------------------ load


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    compile: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> AnyTokenizer:
    """Load a tokenizer, ready to encode and decode.

    Args:
        name: a name in the catalogue, ``hf-hub:org/repo[@revision]`` or ``local-dir:path``.
        device: where to put it; the CPU by default.
        dtype: type of the decoder's parameters; encoders stay in float32 because ids would flip.
        precision: ``"fp32"`` or ``"bf16"``, the precision of the decoder's products; the same thing as ``dtype`` by its name.
        compile: compile the parts that do the work with ``torch.compile``; the first calls are slow.
        revision: branch, tag or commit of the Hub repository instead of the catalogue's.
        cache_dir: cache of downloads instead of ``HF_HOME``'s.
        local_files_only: do not touch the network.
        token: access token for gated and private repositories; ``HF_TOKEN`` and the login are used otherwise.

    Raises:
        RegistryError: no such name.
        HubError: the files cannot be had; each subclass says what to do next.
        WeightsError: the files cannot be used.
    """
    download = functools.partial(_download, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    if name.startswith("hf-hub:"):
        repo, _, pinned = name.removeprefix("hf-hub:").partition("@")
        tokenizer = _from_repo(repo, revision or pinned or "main", download)
    elif name.startswith("local-dir:"):
        tokenizer = _from_folder(Path(name.removeprefix("local-dir:")))
    else:
        tokenizer = _from_entry(registry.get(name), revision, download)
    if dtype is not None:
        tokenizer.to(dtype)
    if precision is not None:
        tokenizer.set_precision(precision)
    if device is not None:
        tokenizer.to(device)
    if compile:
        tokenizer.compile_modules()
    return tokenizer


def load_upstream(
    family: str,
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
) -> AnyTokenizer:
    """Load a checkpoint that was trained with the original code.

    Args:
        family: name of the codec family.
        config: upstream's own configuration, as a mapping or the path of a yaml or json file; ``None`` to go by the weights file.
        weights: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file or the state dict itself, in upstream's keys.

    Raises:
        RegistryError: no such family.
        WeightsError: the file cannot be read safely, or does not fit.
    """
    cls = registry.family_class(family)
    raw = _read_config(config)
    name = f"{family}-upstream"
    if not isinstance(weights, Mapping):
        return _from_upstream_file(cls, raw, Path(weights), name)
    upstream = None if raw is None else cls.upstream_config(raw)
    state = {key: tensor for key, tensor in weights.items() if cls.wanted(key)}
    return _build(cls, *cls.convert_checkpoint(state, upstream), name=name)


def _from_upstream_file(
    cls: type[AnyTokenizer], raw: Mapping[str, Any] | None, path: Path, name: str, expected: Any = None
) -> AnyTokenizer:
    """An upstream checkpoint with upstream's configuration: the given one, that in the file's metadata, or ``expected``."""
    if raw is None and path.suffix == ".safetensors":
        with _opening_safetensors(path) as file:
            raw = cls.upstream_metadata(file.metadata() or {})
    config = None if raw is None else cls.upstream_config(raw)
    if config is not None and expected is not None and config != expected:
        found, known = asdict(config), asdict(expected)
        differing = [f"{key} is {found[key]}, not {known[key]}" for key in found if found[key] != known[key]]
        _log.warning("%s: its own configuration differs from the catalogue and is used: %s", name, "; ".join(differing))
    return _build(cls, *cls.convert_checkpoint(read_state(path, cls.wanted), config or expected), name=name)


def _read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    # YAML 1.1 takes JSON's 1e-12 for a string.
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise WeightsError(f"{path}: not valid YAML or JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise WeightsError(f"{path}: must hold a mapping")
    return raw


def _from_entry(entry: Entry, revision: str | None, download: Callable[..., Path]) -> AnyTokenizer:
    cls = registry.family_class(entry.family)
    config = registry.check_config(entry)
    if entry.licence.non_commercial:
        _warn_non_commercial(entry.name, entry.licence.weights)
    weights = entry.weights
    if weights.source == "none":
        raise WeightsError(
            f"no weights of {entry.name} were ever published; train it with the recipe its card names ({entry.card}) and load "
            "the result with local-dir:<folder>"
        )
    if weights.source == "embedded":
        return _from_saved_file(embedded_path(entry), expect=config)
    converted = _converted_path(entry, revision or weights.revision)
    if converted.exists():
        # Upstream's configuration, where there was one, decided when the file was written.
        return _from_saved_file(converted, expect=None if weights.config else config)
    path, upstream = _fetch_entry(entry, revision, download)
    return _from_upstream_file(cls, upstream, path, entry.name, expected=config)


def _fetch_entry(
    entry: Entry, revision: str | None, download: Callable[..., Path]
) -> tuple[Path, Mapping[str, Any] | None]:
    """The weights file of an entry, and upstream's configuration where the entry names one."""
    weights = entry.weights
    assert weights.repo is not None and weights.file is not None
    pinned = revision is None
    ask = f"zoo pull {entry.name}"
    path = download(weights.repo, weights.file, revision or weights.revision, ask=ask)
    _verify(path, weights.sha256 if pinned else None, weights.size if pinned else None)
    if weights.config is None:
        return path, None
    return path, _read_config(download(weights.repo, weights.config, revision or weights.revision, ask=ask))


def _from_repo(repo: str, revision: str, download: Callable[..., Path]) -> AnyTokenizer:
    name = f"hf-hub:{repo}" if revision == "main" else f"hf-hub:{repo}@{revision}"
    try:
        config: Mapping[str, Any] = _json_config(download(repo, CONFIG_FILE, revision))
    except NotOnHubError as error:
        if error.missing != "file":
            raise
        config = {}
    # Autoencoders of diffusion models go by another name.
    file = DIFFUSERS_WEIGHTS_FILE if "_diffusers_version" in config else WEIGHTS_FILE
    path = download(repo, file, revision)
    _verify(path, None, None)
    return _from_saved(config, read_state(path)) if "zoo" in config else _from_foreign(path, name, config)


def _from_folder(folder: Path) -> AnyTokenizer:
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder")
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.exists():
        weights = folder / DIFFUSERS_WEIGHTS_FILE
    if not weights.exists():
        raise WeightsError(f"{folder} holds no {WEIGHTS_FILE}; a folder written by save_pretrained does")
    found = _json_config(config) if config.exists() else {}
    return _from_saved(found, read_state(weights)) if "zoo" in found else _from_foreign(weights, f"local-dir:{folder}", found)


def _from_foreign(path: Path, name: str, config: Mapping[str, Any]) -> AnyTokenizer:
    """A checkpoint in some upstream's layout, recognised by its keys, with the ``config.json`` beside it or an empty one."""
    keys = set(_safetensors_keys(path))
    for family in dict.fromkeys(entry.family for entry in registry.entries().values()):
        cls = registry.family_class(family)
        if cls.recognises(keys):
            return _from_upstream_file(cls, config or None, path, name)
    raise WeightsError(f"{name}: no family recognises this checkpoint; load_upstream takes one whose family you know")


def _json_config(path: Path) -> Mapping[str, Any]:
    """A ``config.json``, ours or somebody else's; empty if it holds no mapping."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptWeightsError(f"{path} is not valid JSON: {error}") from error
    return raw if isinstance(raw, Mapping) else {}


def _from_saved_file(path: Path, expect: Any) -> AnyTokenizer:
    """A file in our own layout, with its configuration in the metadata, which must be the expected one if there is one."""
    with _opening_safetensors(path) as file:
        text = (file.metadata() or {}).get("zoo")
    if text is None:
        raise CorruptWeightsError(f"{path} has no zoo metadata")
    tokenizer = _from_saved(json.loads(text), read_state(path))
    if expect is not None and tokenizer.config != expect:
        raise KeysError(f"{path} holds {tokenizer.config}, the catalogue says {expect}")
    return tokenizer


def _from_saved(saved: Mapping[str, Any], state: Mapping[str, Tensor]) -> AnyTokenizer:
    try:
        cls = registry.family_class(saved["family"])
        settings = saved["config"].items()
        config = cls.Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings})
        name, fingerprint = saved["name"], saved["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptWeightsError(f"the saved configuration cannot be used: {error!r}") from error
    return _build(cls, config, state, name=name, fingerprint=fingerprint)


def _build(
    cls: type[AnyTokenizer], config: Any, state: Mapping[str, Tensor], *, name: str, fingerprint: str | None = None
) -> AnyTokenizer:
    """A tokenizer around a state dict in our own names; it is built without memory, and the tensors are put in as they are."""
    with torch.device("meta"):
        tokenizer = cls(config, name=name)
    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    try:
        tokenizer.load_state_dict(floats, strict=True, assign=True)
    except RuntimeError as error:
        raise KeysError(f"the tensors do not fit {cls.family}: {error}") from error
    tokenizer.reset_buffers()
    tokenizer.eval().requires_grad_(False)
    tokenizer.fingerprint = fingerprint or tokenizer.compute_fingerprint()
    return tokenizer


@functools.cache
def _warn_non_commercial(name: str, licence: str) -> None:
    """Cached, so that each model is mentioned once."""
    _log.warning("%s: the weights are under %s, which forbids commercial use", name, licence)


# ----------------------------------------------------------------------------------------------------------------- files


def embedded_path(entry: Entry) -> Path:
    """The file of an embedded model inside the package."""
    assert entry.weights.file is not None
    path = Path(str(resources.files("zoo.weights") / entry.weights.file))
    if not path.exists():
        raise WeightsError(f"{entry.name}: {entry.weights.file} is not in this installation")
    return path


def read_state(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of a checkpoint, memory-mapped, those only whose key is wanted.

    A Lightning checkpoint's ``state_dict`` is unwrapped. Pickles are opened with ``weights_only=True`` and never otherwise.

    Raises:
        UnsafePickleError: the pickle holds more than tensors and plain containers.
        CorruptWeightsError: the file is damaged, of an unknown format or not there.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptWeightsError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        with _opening_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118  (not a mapping)
    if path.suffix not in _PICKLES:
        raise CorruptWeightsError(f"{path}: unknown kind of checkpoint; expected .safetensors, {', '.join(_PICKLES)}")
    content = _unpickle(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise CorruptWeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    return {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor) and wanted(key)}


# How PyTorch's restricted unpickler names what it will not build.
_BEYOND_TENSORS = re.compile(
    r"(?:GLOBAL \S+)|(?:Trying to call reduce for unrecognized function[^\n]*)|(?:Unsupported class \S+)|(?:Can only [^\n]*)"
)


def _unpickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        if found := _BEYOND_TENSORS.search(str(error)):
            raise UnsafePickleError(
                f"{path} holds more than tensors ({found[0]}) and opening it could run code, so it is refused; "
                "save its state dict as safetensors with the program that made it"
            ) from error
        raise CorruptWeightsError(f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptWeightsError(f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0]}") from error


@contextmanager
def _opening_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CorruptWeightsError(f"{path} is damaged or not a safetensors file: {error}") from error


def _safetensors_keys(path: Path) -> list[str]:
    with _opening_safetensors(path) as file:
        return list(file.keys())


def cache_root() -> Path:
    """Where converted checkpoints are kept: ``ZOO_CACHE``, by default ``~/.cache/zoo``."""
    return Path(os.environ.get("ZOO_CACHE", "~/.cache/zoo")).expanduser()


def _verify(path: Path, sha256: str | None, size: int | None) -> None:
    """Compare a downloaded file with the catalogue's checksum, or with the one under which the Hub stores it.

    Checked once: a marker in the cache remembers the file by path, size and time.
    """
    real = path.resolve()
    status = real.stat()
    expected = sha256 or (real.name if len(real.name) == 64 and set(real.name) <= set("0123456789abcdef") else None)
    mark = hashlib.sha256(f"{real}|{status.st_size}|{status.st_mtime_ns}|{expected}".encode()).hexdigest()
    marker = cache_root() / "verified" / mark
    if marker.exists():
        return
    if size is not None and status.st_size != size:
        _discard(path, real)
        raise ChecksumError(f"{path.name} has {status.st_size} bytes, not {size}; it was removed, load it again")
    if expected is not None:
        with real.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            _discard(path, real)
            raise ChecksumError(
                f"{path.name} is corrupt: its SHA-256 is {found}, not {expected}; it was removed from the cache, load it again"
            )
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _discard(path: Path, real: Path) -> None:
    path.unlink(missing_ok=True)
    real.unlink(missing_ok=True)


def _download(
    repo: str,
    file: str,
    revision: str,
    *,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | None,
    ask: str | None = None,
) -> Path:
    """A file of a Hub repository, from the cache where it is there."""
    import huggingface_hub

    with _translating_hub_errors(repo, file, revision, ask):
        found = huggingface_hub.hf_hub_download(
            repo,
            file,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
        )
    return Path(found)


@contextmanager
def _translating_hub_errors(repo: str, file: str | None, revision: str | None, ask: str | None) -> Iterator[None]:
    """The client's errors as ours, each with the next step."""
    from huggingface_hub import errors

    # The client has changed its HTTP library three times; each time it re-exported the library's base error here.
    transport_error: type[Exception] = vars(errors)["HTTPError"]
    what = f"{repo}/{file}" if file else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise GatedRepoError(
            f"{repo} is gated: accept its licence on its page on the Hub, then pass token= or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotOnHubError(
            f"there is no repository {repo}, or it is private: check the name, or pass token= or set HF_TOKEN",
            missing="repository",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotOnHubError(
            f"{repo} has no revision {revision!r}: check the branch, tag or commit", missing="revision"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise DownloadError(f"{what}: the Hub answered with an error: {error.__cause__}; try again later") from error
        command = f" (run `{ask}` where there is a network)" if ask else ""
        raise OfflineError(
            f"{what} is not in the cache, and the Hub cannot be reached or offline mode is on{command}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise NotOnHubError(f"{repo} has no file {file} at revision {revision!r}", missing="file") from error
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(f"{what}: offline mode is on (HF_HUB_OFFLINE)") from error
    except (errors.HfHubHTTPError, transport_error) as error:
        raise DownloadError(f"{what}: the download failed: {error}; try again, it goes on where it stopped") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"no room for {what}: free some space, or point cache_dir= or HF_HOME to another disk"
            ) from error
        if isinstance(error, HubError):
            raise
        # The client checks the size of what it received and says so in a bare OSError.
        raise DownloadError(f"{what}: the download failed: {error}; try again") from error


# ------------------------------------------------------------------------------------------------------ pull and convert


def pull(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Download the weights of a catalogue entry without loading them; returns where they are.

    Raises:
        RegistryError, HubError, ChecksumError: as `load` does.
    """
    entry = registry.get(name)
    if entry.weights.source == "embedded":
        return embedded_path(entry)
    if entry.weights.source == "none":
        raise WeightsError(f"no weights of {name} were ever published")
    download = functools.partial(_download, cache_dir=cache_dir, local_files_only=False, token=token)
    return _fetch_entry(entry, revision, download)[0]


def convert(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Write the cleaned safetensors of a catalogue entry into our cache, where later loads find it; returns its path.

    It holds the tensors that inference needs, in our names, with weight norm folded: 0.3 of WavTokenizer's 1.75 GB.

    Raises:
        RegistryError, HubError, WeightsError: as `load` does.
    """
    entry = registry.get(name)
    if entry.weights.source != "hub":
        return embedded_path(entry)
    target = _converted_path(entry, revision or entry.weights.revision)
    if not target.exists():
        tokenizer = load(name, revision=revision, cache_dir=cache_dir, token=token)
        write_saved_file(tokenizer, target)
    return target


def _converted_path(entry: Entry, revision: str) -> Path:
    source = hashlib.sha256(f"{entry.weights.repo}/{entry.weights.file}@{revision}".encode()).hexdigest()[:12]
    return cache_root() / "converted" / f"{entry.name}-{source}.safetensors"


# --------------------------------------------------------------------------------------------------------- save and push


def saved_config(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What a saved tokenizer says about itself."""
    return {
        "zoo": 1,
        "family": tokenizer.family,
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint or tokenizer.compute_fingerprint(),
        "config": asdict(tokenizer.config),
    }


def write_saved_file(tokenizer: AnyTokenizer, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file in our layout, its configuration in the metadata; floats in ``dtype`` if one is given."""
    tensors = {}
    for key, tensor in tokenizer.state_dict().items():
        stored = tensor.detach().cpu()
        tensors[key] = (stored.to(dtype) if dtype and stored.is_floating_point() else stored).contiguous()
    with replacing(path) as temporary, _naming_full_disk(path):
        save_file(tensors, temporary, metadata={"zoo": json.dumps(saved_config(tokenizer))})


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(f"no room for {path}") from error
        raise
    except SafetensorError as error:
        if "No space left" in str(error):
            raise DiskFullError(f"no room for {path}") from error
        raise


def save_pretrained(tokenizer: AnyTokenizer, folder: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card into a folder."""
    folder = Path(folder)
    write_saved_file(tokenizer, folder / WEIGHTS_FILE)
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(saved_config(tokenizer), indent=2) + "\n", encoding="utf-8")
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(_model_card(tokenizer), encoding="utf-8")
    return folder


def push_to_hub(
    tokenizer: AnyTokenizer,
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
    with tempfile.TemporaryDirectory() as scratch, _translating_hub_errors(repo_id, None, revision, None):
        folder = save_pretrained(tokenizer, scratch)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)


def _model_card(tokenizer: AnyTokenizer) -> str:
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
