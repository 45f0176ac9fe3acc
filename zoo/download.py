"""Files from the Hugging Face Hub, verified, and everything that can go wrong on the way as an error with the next step."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import (
    ChecksumError,
    DiskFullError,
    DownloadError,
    GatedRepoError,
    HubError,
    NotOnHubError,
    OfflineError,
)


def cache_root() -> Path:
    """Where converted checkpoints are kept: ``ZOO_CACHE``, by default ``~/.cache/zoo``."""
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
    """A file of a Hub repository, from the cache where it is there."""
    import huggingface_hub

    with translating_hub_errors(repo, file, revision, ask):
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
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"no room for {what}: free some space, or point cache_dir= or HF_HOME to another disk"
            ) from error
        if isinstance(error, HubError):
            raise
        # The client checks the size of what it received and says so in a bare OSError.
        raise DownloadError(f"{what}: the download failed: {error}; try again") from error
