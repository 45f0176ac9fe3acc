"""Token data sets in the layouts of other libraries."""

from __future__ import annotations

import base64
import io
import json
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from zoo.engine.megatron import ids_bytes, index_bytes
from zoo.engine.selection import Item, Selection
from zoo.engine.store import Store
from zoo.errors import ArgumentError, MissingExtraError, output_error

#: Files of a shard of Lhotse Shar: field and ending.
_SHAR = (("cuts", "jsonl.gz"), ("codes", "tar"))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder that takes the place of ``path`` when the block ends without an error.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        Store(path.parent).adopt(temporary, path.name)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def to_datasets(data: Selection) -> Any:
    """See `zoo.TokenDataset.to_datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("a datasets.Dataset needs datasets: pip install 'tokenizer-zoo[exports]'") from error
    names = [name for name in data.names() if name not in data.shelf.carried or name in data.columns]
    found = datasets.Dataset.from_parquet(data.shelf.paths(), columns=names)
    return found if data.rows is None else found.select(data.rows)


def to_webdataset(data: Selection, folder: Path, shard_items: int) -> list[Path]:
    """See `zoo.TokenDataset.to_webdataset`."""
    if shard_items < 1:
        raise ArgumentError(f"a shard holds at least 1 item, not {shard_items}")
    _require_no_other(folder, {f"shard-{number:06d}.tar" for number in range(-(-len(data) // shard_items))}, "shard-*.tar")
    items = enumerate(data)
    paths: list[Path] = []
    while chosen := list(islice(items, shard_items)):
        path = folder / f"shard-{len(paths):06d}.tar"
        with whole(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, item in chosen:
                for suffix, content in _members(data, item):
                    # A tar with the same items is the same byte for byte.
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        paths.append(path)
    return paths


def _require_no_other(folder: Path, own: set[str], pattern: str) -> None:
    """Refuse a folder with shards that would not be replaced, since readers take all that there are."""
    if other := next((path.name for path in sorted(folder.glob(pattern)) if path.name not in own), None):
        raise ArgumentError(f"{folder} has {other}, which is none of the {len(own)} files to write: choose another folder")


def _members(data: Selection, item: Item) -> Iterator[tuple[str, bytes]]:
    record: dict[str, Any] = {"key": item.key, "tokenizer": data.header.tokenizer, "fingerprint": data.header.fingerprint}
    record |= {"error": item.error, "columns": dict(item.columns)}
    if item.tokens is not None:
        buffer = io.BytesIO()
        np.save(buffer, item.tokens.unpadded()[0].numpy().astype(data.header.id_type.to_pandas_dtype()))
        yield "npy", buffer.getvalue()
        remembered: dict[str, Any] = dict(*item.tokens.meta)
        octets = {name: base64.b64encode(own).decode() for name, own in remembered.items() if isinstance(own, bytes)}
        record |= {"length": int(item.tokens.lengths[0]), "meta": remembered | octets}
        record["segments"] = list(item.tokens.segments)
    try:
        yield "json", json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a column of {item.key} has no place in JSON ({error}): choose others with columns=") from error


def to_megatron(data: Selection, path: Path) -> tuple[Path, Path]:
    """See `zoo.TokenDataset.to_megatron`."""
    # A name may have a dot of its own.
    ids, index = path.with_name(f"{path.name}.bin"), path.with_name(f"{path.name}.idx")
    lengths: list[np.ndarray] = []
    kind = data.header.id_type.to_pandas_dtype()
    with whole(index) as index_temporary:
        with whole(ids) as temporary, temporary.open("wb") as file:
            for table in data.shelf.tables(data.rows, ("ids",)):
                lists = table["ids"].combine_chunks()
                lengths.append(pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False))
                file.writelines(ids_bytes([lists.flatten().to_numpy(zero_copy_only=False).astype(kind, copy=False)]))
        sizes = np.concatenate([np.empty(0, np.int32), *lengths])
        index_temporary.write_bytes(index_bytes(kind, sizes, np.arange(len(sizes) + 1)))
    return ids, index


def to_shar(data: Selection, folder: Path, shard_items: int) -> dict[str, list[str]]:
    """See `zoo.TokenDataset.to_shar`."""
    if "samples" not in data.header.meta:
        raise ArgumentError(f"Lhotse holds recordings, and these are tokens of {data.header.modality}")
    try:
        from lhotse import MonoCut, SupervisionSegment
        from lhotse.shar import SharWriter
    except ImportError as error:
        raise MissingExtraError("Lhotse Shar needs lhotse: pip install 'tokenizer-zoo[exports]'") from error
    sound = int(np.count_nonzero(data.shelf.lengths()[data.all_rows()] >= 0))
    shards = -(-sound // shard_items)
    own = {f"{field}.{number:06d}.{ending}" for number in range(shards) for field, ending in _SHAR}
    for field, ending in _SHAR:
        _require_no_other(folder, own, f"{field}.*.{ending}")
    folder.mkdir(parents=True, exist_ok=True)
    with SharWriter(str(folder), fields={"codes": "numpy"}, shard_size=shard_items) as writer:
        for item in data:
            if item.tokens is None:
                continue
            [meta] = item.tokens.meta
            seconds = meta["samples"] / meta["sample_rate"]
            text = item.columns.get("text")
            speech = [SupervisionSegment(item.key, item.key, 0.0, seconds, text=text)] if isinstance(text, str) else []
            custom = dict(item.columns) | {"tokenizer": data.header.tokenizer, "fingerprint": data.header.fingerprint}
            cut = MonoCut(item.key, 0.0, seconds, 0, supervisions=speech, custom=custom)
            frames = item.tokens.frames()[0].numpy().astype(np.int32)
            writer.write(cut.attach_tensor("codes", frames, frame_shift=seconds / max(1, len(frames)), temporal_dim=0))
    return dict(writer.output_paths)
