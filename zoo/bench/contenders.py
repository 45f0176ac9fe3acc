"""Programs that people write by hand where `zoo tokenize` would do, each run from start to the file with the ids.

    python -m zoo.bench.contenders NAME CONTENDER FOLDER OUT WORKERS

``OUT`` gets the ids of the files of ``FOLDER`` in the order of their names, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.hub import load
from zoo.tokenizer import Tokenizer

#: Files of one batch.
BATCH = 16

Ids = list[list[int]]


def loop(name: str, files: Sequence[Path], workers: int) -> Ids:
    """Files one after the other, in one process."""
    tokenizer = load(name)
    return [tokenizer.encode(file).tolist()[0] for file in files]


class _Prepared(torch.utils.data.Dataset[Any]):
    """Files that are read and prepared when they are asked for."""

    def __init__(self, tokenizer: Tokenizer[Any], files: Sequence[Path]) -> None:
        self._tokenizer, self._files = tokenizer, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        return self._tokenizer.prepare(self._files[index])[0]


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


def loader(name: str, files: Sequence[Path], workers: int) -> Ids:
    """A ``DataLoader`` reads and prepares in processes of its own, the network runs in this one."""
    tokenizer = load(name)
    batches = torch.utils.data.DataLoader(
        _Prepared(tokenizer, files), batch_size=BATCH, num_workers=workers, collate_fn=_as_list
    )
    return [ids for batch in batches for ids in tokenizer.encode_prepared(batch).tolist()]


class _RayEncoder:
    """A class for ``map_batches`` that loads the model once for each actor."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        self._tokenizer = load(name)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids = self._tokenizer.encode(list(batch["bytes"])).tolist()
        return {"path": batch["path"], "ids": np.array([np.array(one) for one in ids] + [None], dtype=object)[:-1]}


def ray_data(name: str, files: Sequence[Path], workers: int) -> Ids:
    """Ray Data, the way its documentation shows."""
    import ray

    # Twice the cores, on paper: actors that hold all of them leave none to the tasks that read, and nothing ever begins.
    ray.init(num_cpus=2 * workers, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as out:
            read = ray.data.read_binary_files(str(files[0].parent), include_paths=True)
            strategy = ray.data.ActorPoolStrategy(size=workers)
            encoded = read.map_batches(_RayEncoder, fn_constructor_args=(name,), batch_size=BATCH, compute=strategy)
            encoded.write_parquet(out)
            rows = ray.data.read_parquet(out).take_all()
    finally:
        ray.shutdown()
    return [list(map(int, row["ids"])) for row in sorted(rows, key=lambda row: row["path"])]


def padded(name: str, files: Sequence[Path], workers: int) -> Ids:
    """Batches padded to their longest recording, and cut to the length that each has by itself."""
    tokenizer = load(name)
    found: Ids = []
    hop = tokenizer.spec.hop_length or 1
    for start in range(0, len(files), BATCH):
        prepared = tokenizer.prepare(list(files[start : start + BATCH]))
        longest = max(item.amount for item in prepared)
        waves = [torch.nn.functional.pad(item.tensors["waveform"], (0, longest - item.amount)) for item in prepared]
        tokens = tokenizer.encode(torch.stack(waves)).tolist()
        found += [ids[: -(-item.amount // hop)] for item, ids in zip(prepared, tokens, strict=True)]
    return found


CONTENDERS: Mapping[str, Callable[[str, Sequence[Path], int], Ids]] = {
    "loop": loop,
    "DataLoader": loader,
    "Ray Data": ray_data,
    "padded batches": padded,
}


def main(name: str, contender: str, folder: str, out: str, workers: str) -> None:
    """Run a contender."""
    torch.set_num_threads(1)
    files = sorted(Path(folder).iterdir())
    Path(out).write_text(json.dumps(CONTENDERS[contender](name, files, int(workers))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
