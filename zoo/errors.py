"""Every error the library raises on purpose. Each one names the item and the reason, and says what to do next."""

from __future__ import annotations

import errno
from collections.abc import Sequence

#: Numbers of the operating system's errors.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class ZooError(Exception):
    """Base of all errors raised by the zoo."""


class InputError(ZooError, ValueError):
    """Something that was passed cannot be used; ``index`` is an item's position in the batch, ``None`` for the whole call."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        self.index = index
        self.reason = reason
        super().__init__(reason if index is None else f"item {index}: {reason}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, int | None]]:
        # The default would pickle the formatted message and prefix the index a second time.
        return type(self), (self.reason, self.index)


class ItemError(InputError):
    """One item of a batch cannot be used, whatever the others are; ``index`` is its position. Without it, the rest can be."""

    index: int

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(reason, index)


class ArgumentError(InputError):
    """An argument of the call is wrong, whatever the items are, so that trying other items is of no use."""


class IndexingError(ArgumentError, IndexError):
    """A batch is indexed beyond its end, by a mask of another length, or by something that is no index."""


class MismatchError(InputError):
    """The tokens come from another checkpoint and cannot be decoded by this one."""


class FormatError(ZooError, ValueError):
    """A ``.zt`` file or a file of latents is truncated, corrupt, of an unknown version or hostile."""


class RegistryError(ZooError, ValueError):
    """A catalogue entry is invalid, or a name is not in any catalogue."""


class HubError(ZooError, OSError):
    """Files could not be fetched from the Hugging Face Hub."""


class GatedRepoError(HubError):
    """The repository needs an accepted licence and a token."""


class OfflineError(HubError):
    """There is no network (or it is switched off) and the file is not in the cache."""


class NotOnHubError(HubError):
    """Something does not exist on the Hub; ``missing`` says what: ``"repository"``, ``"revision"`` or ``"file"``."""

    def __init__(self, message: str, missing: str) -> None:
        self.missing = missing
        super().__init__(message)

    def __reduce__(self) -> tuple[type[NotOnHubError], tuple[str, str]]:
        return type(self), (str(self), self.missing)


class OutputError(ZooError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only, something else is in the way."""


class NotWritableError(OutputError, HubError):
    """A folder, the cache say, cannot be written: no permission, or a read-only disk."""


class DiskFullError(OutputError, HubError):
    """The cache, or the disk that a file is written to, has no room for it."""


class DownloadError(HubError):
    """The Hub answered with an error, or the transfer broke off."""


class WeightsError(ZooError):
    """A checkpoint cannot be used."""


class ChecksumError(WeightsError):
    """The file is not the one that the catalogue names."""


class UnsafePickleError(WeightsError):
    """The pickle holds more than tensors and plain containers, so it is not opened."""


class KeysError(WeightsError):
    """Tensors are missing, unexpected or of the wrong shape."""


class CorruptWeightsError(WeightsError):
    """The file is truncated or not of the format its name says."""


class MissingExtraError(ZooError, ImportError):
    """An optional dependency is not installed; the message names the ``pip install`` that brings it."""


class MissingReaderError(InputError, MissingExtraError):
    """A file is of a kind that only an optional dependency reads; the message names the ``pip install`` that brings it."""


class naming_item:
    """Turn an `InputError` raised inside into an `ItemError` of that item; an `ArgumentError` is no item's fault."""

    # Not a generator: one is entered for every item, and small items notice.
    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, InputError) or isinstance(error, ArgumentError):
            return
        if isinstance(error, MismatchError):
            raise MismatchError(error.reason, self.index) from error
        raise ItemError(error.reason, self.index) from error


def listing(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def output_error(path: object, error: OSError) -> OutputError:
    """Turn an operating system's error about a written file into ours: no room, no permission, or something else."""
    if error.errno in NO_ROOM:
        return DiskFullError(f"no room for {path}: free some space, or write to another disk")
    reason = f"{path} cannot be written: {error.strerror or error}"
    return NotWritableError(reason) if error.errno in NO_PERMISSION else OutputError(reason)
