"""Files from the Hugging Face Hub, verified, and everything that can go wrong on the way as an error with the next step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zoo.errors import (
    NO_PERMISSION,
    NO_ROOM,
    ChecksumError,
    DiskFullError,
    DownloadError,
    GatedRepoError,
    HubError,
    NotOnHubError,
    NotWritableError,
    OfflineError,
    ZooError,
    output_error,
)

#: A transfer that brings fewer bytes than this within so many seconds has stalled. A slow line that is steady has a hundred
#: times as much, and what was received is kept: the next attempt goes on there.
STALL_BYTES = 64 << 10
STALL_SECONDS = 60.0


def cache_root() -> Path:
    """Folder of converted checkpoints: ``ZOO_CACHE``, by default ``~/.cache/zoo``."""
    return Path(os.environ.get("ZOO_CACHE", "~/.cache/zoo")).expanduser()


def verify(path: Path, sha256: str | None, size: int | None) -> None:
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
        raise ChecksumError(f"{path.name} has {status.st_size} bytes, not {size}; {_discard(path, real)}")
    if expected is not None:
        with real.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ChecksumError(f"{path.name} is corrupt: its SHA-256 is {found}, not {expected}; {_discard(path, real)}")
    # Where the marker cannot be kept, the file is hashed again the next time.
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _discard(path: Path, real: Path) -> str:
    """Remove a file from the cache; returns what to say about it."""
    try:
        path.unlink(missing_ok=True)
        real.unlink(missing_ok=True)
    except OSError as error:
        return f"it could not be removed ({error.strerror}): remove {path}, then load it again"
    return "it was removed from the cache, load it again"


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk as an error that names what was to be written.

    Raises:
        DiskFullError, NotWritableError: so it is.
    """
    try:
        yield
    except ZooError:
        raise
    except OSError as error:
        raise output_error(path, error) from error
    except SafetensorError as error:
        # It has the system's error in its text alone.
        text = str(error)
        if "No space left" in text or "quota exceeded" in text:
            raise output_error(path, OSError(errno.ENOSPC, text)) from error
        if "Permission denied" in text or "Read-only" in text:
            raise output_error(path, OSError(errno.EROFS, text)) from error
        raise


def download(
    repo: str,
    file: str,
    revision: str,
    *,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | None,
    ask: str | None = None,
) -> Path:
    """A file of a Hub repository, from the cache where it is there.

    Raises:
        HubError: it cannot be had; each subclass says what to do next. A transfer that stalls is a DownloadError.
    """
    import huggingface_hub

    with translating_hub_errors(repo, file, revision, ask), _watching(f"{repo}/{file}"):
        found = huggingface_hub.hf_hub_download(
            repo,
            file,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
        )
    return Path(found)


class _Transfer:
    """What has arrived lately of one file, over all attempts of the client."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._since = time.monotonic()
        self._received = 0

    def advance(self, received: int) -> None:
        """Count bytes that arrived.

        Raises:
            DownloadError: there were too few of them for too long.
        """
        self._received += received
        now = time.monotonic()
        if now - self._since < STALL_SECONDS:
            return
        if self._received < STALL_BYTES:
            raise DownloadError(
                f"{self._what}: the download stalled: {self._received} bytes in {now - self._since:.0f} s; try again later"
            )
        self._since, self._received = now, 0


_transfer: ContextVar[_Transfer | None] = ContextVar("_transfer", default=None)


@contextmanager
def _watching(what: str) -> Iterator[None]:
    """Watch the transfers of this thread within the block: the client's time limits are for single reads, however small."""
    from huggingface_hub import get_session

    responses = get_session().event_hooks["response"]
    if _watch_response not in responses:
        responses.append(_watch_response)
    token = _transfer.set(_Transfer(what))
    try:
        yield
    finally:
        _transfer.reset(token)


def _watch_response(response: Any) -> None:
    """Have the body of a response counted while it is read."""
    transfer = _transfer.get()
    if transfer is None:
        return
    # The client's HTTP library goes by two names.
    library = importlib.import_module(type(response).__module__.partition(".")[0])

    count = transfer.advance

    class Watched(library.SyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            count(0)
            for piece in self._stream:
                count(len(piece))
                yield piece

        def close(self) -> None:
            self._stream.close()

    response.stream = Watched(response.stream)


@contextmanager
def translating_hub_errors(repo: str, file: str | None, revision: str | None, ask: str | None) -> Iterator[None]:
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
        if error.errno in NO_ROOM:
            raise DiskFullError(
                f"no room for {what}: free some space, or point cache_dir= or HF_HOME to another disk"
            ) from error
        if isinstance(error, HubError):
            raise
        if error.errno in NO_PERMISSION:
            raise NotWritableError(
                f"{what}: the cache cannot be written ({error}): point cache_dir= or HF_HOME to a folder that can, or "
                "load with local_files_only=True what is in it"
            ) from error
        # The client checks the size of what it received and says so in a bare OSError.
        raise DownloadError(f"{what}: the download failed: {error}; try again") from error
