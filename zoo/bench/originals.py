"""`zoo bench originals`: families beside packages, networks and a lookup as their authors write them.

Both sides have the same random weights and get the same input, in one process, in turns; a row is the median of its turns.
*Ragged* is a batch of eight recordings of different lengths, which the packages pad to the longest one.

The lookups of IBQ's authors make matrices of cells by codes: products of latents and codes, their softmax, ones at its
maxima, and the product of these with the codebook. SEED-Voken keeps the gradient's path in evaluation too, and multiplies
twice. Ours searches and gathers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo import registry
from zoo.bench import image_originals, sound_originals
from zoo.bench.audio import original_s3tokenizer, original_snac
from zoo.bench.measure import Pair, Work, matmul_rate, peak_memory, random_model
from zoo.errors import InputError
from zoo.hub import load_upstream
from zoo.kernels.codebook import nearest, prepare
from zoo.machine import described
from zoo.media import write_json

#: Lengths of a ragged batch, over that of its longest item.
RAGGED = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Row:
    """Measurements of a pair.

    Attributes:
        name, case: of the pair.
        ours, original: CPU seconds of all threads, medians.
        times: the original's CPU seconds over ours, the median of the turns.
        ours_memory, original_memory: bytes allocated in a later call, at most.
        equal: share of ids that are equal; ``None`` where they need not be.
        apart: largest difference of numbers, over the original's largest; ``None`` for ids and where they need not be equal.
        floor_share: time at the measured rate of a large matrix product over ours, where operations are counted.
    """

    name: str
    case: str
    ours: float
    original: float
    times: float
    ours_memory: int
    original_memory: int
    equal: float | None
    apart: float | None = None
    floor_share: float | None = None


def run(
    names: Sequence[str] | None = None,
    *,
    threads: int | None = None,
    repetitions: int = 3,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """The table, as plain values.

    Args:
        names: of the parts of `PARTS`; all by default.
        threads: threads of PyTorch; its own choice if ``None``.
        repetitions: turns of a row, after two calls of each side.
        json_path: write the result there.

    Raises:
        InputError: there is no such part.
    """
    chosen = list(PARTS if names is None else names)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise InputError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if threads:
        torch.set_num_threads(threads)
    rates = {dtype: matmul_rate("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)}
    # Models are made outside of inference mode, as programs make them: writes to tensors from inside are not counted.
    with torch.no_grad():
        rows = [measured(pair, repetitions, rates) for name in chosen for pair in PARTS[name]()]
    content = {
        "machine": described()
        | {"matmul_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()}},
        "rows": [asdict(row) for row in rows],
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_table(content: Mapping[str, Any]) -> None:
    """The result of `run`, as a table."""
    machine = content["machine"]
    console = Console()
    console.print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}")
    table = Table("model", "case", "ours, CPU s", "original", "times", "+MB", "alike", "floor")
    for row in content["rows"]:
        table.add_row(
            row["name"],
            row["case"],
            f"{row['ours']:.3f}",
            f"{row['original']:.3f}",
            f"{row['times']:.2f}",
            f"{row['ours_memory'] / 1e6:.0f}, {row['original_memory'] / 1e6:.0f}",
            _likeness(row),
            "" if row["floor_share"] is None else f"{row['floor_share']:.0%}",
        )
    console.print(table)


def _likeness(row: Mapping[str, Any]) -> str:
    """Share of equal ids, or how far numbers are apart."""
    if row["equal"] is not None:
        return f"{row['equal']:.2%}"
    return "" if row["apart"] is None else f"{row['apart']:.0e}"


def measured(pair: Pair, repetitions: int, rates: Mapping[torch.dtype, float]) -> Row:
    """Both sides of a pair, in turns; ``rates`` are those of large matrix products."""
    with torch.inference_mode():
        pair.original()
        pair.ours()
        with peak_memory("cpu") as ours_peak:
            own = pair.ours()
        with peak_memory("cpu") as original_peak:
            theirs = pair.original()
    equal = apart = None
    if pair.alike and own.is_floating_point():
        apart = float((own - theirs).abs().max() / theirs.abs().max())
    elif pair.alike:
        equal = float((own == theirs).double().mean())
    del own, theirs
    turns = [(_seconds(pair.ours), _seconds(pair.original)) for _ in range(repetitions)]
    seconds = median(ours for ours, _ in turns)
    return Row(
        pair.name,
        pair.case,
        seconds,
        median(original for _, original in turns),
        median(original / ours for ours, original in turns),
        ours_peak[0],
        original_peak[0],
        equal,
        apart,
        None if pair.operations is None else pair.operations / rates[pair.dtype] / seconds,
    )


def _seconds(work: Work) -> float:
    with torch.inference_mode():
        started = time.process_time()
        work()
        return time.process_time() - started


# ---------------------------------------------------------------------------------------------------------------- parts


def snac(name: str = "snac-24khz", seconds: float = 4.0) -> Iterator[Pair]:
    """Encoding, decoding without noise to be seeded, and a ragged batch, beside the package ``snac``."""
    original, settings = original_snac(registry.check_config(registry.get(name)))
    tokenizer = load_upstream("snac", settings, original.state_dict())
    rate = tokenizer.config.sample_rate
    one, items = _sounds(seconds, rate)
    codes, tokens = original.encode(one[None, None]), tokenizer.encode(one)

    def own_ids() -> Tensor:
        return tokenizer.encode(one).codes()[0].flatten()

    def their_ids() -> Tensor:
        levels = [level[0].unflatten(0, (codes[0].shape[1], -1)) for level in original.encode(one[None, None])]
        places = [levels[level][:, own] for level, own in tokenizer.config.places]
        return torch.stack(places, dim=1).flatten()

    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)[:, None]
    yield Pair(name, f"encode {seconds:g} s", own_ids, their_ids)
    yield Pair(name, f"decode {seconds:g} s", lambda: tokenizer.decode(tokens), lambda: original.decode(codes), alike=False)
    yield Pair(name, _ragged_case(items, rate), lambda: tokenizer.encode(items), lambda: original.encode(padded), alike=False)


def s3tokenizer(name: str = "s3tokenizer-v2-25hz", seconds: float = 30.0, longest: float = 15.0) -> Iterator[Pair]:
    """Encoding of one recording and of a ragged batch beside the package ``s3tokenizer``."""
    tokenizer = random_model(registry.get(name), "cpu")
    encode, rate = original_s3tokenizer(tokenizer), 16_000
    [one, _], [_, items] = _sounds(seconds, rate), _sounds(longest, rate)

    def their_ids() -> Tensor:
        ids, lengths = encode([one])
        found: Tensor = ids[0, : lengths[0]]
        return found

    yield Pair(name, f"encode {seconds:g} s", lambda: tokenizer.encode(one).ids[0], their_ids)
    yield Pair(name, _ragged_case(items, rate), lambda: tokenizer.encode(items), lambda: encode(items), alike=False)


def lookup(sizes: Mapping[str, tuple[int, bool]] | None = None, dim: int = 256, side: int = 16) -> Iterator[Pair]:
    """The codes of one image of 256 x 256 pixels, found and gathered.

    Args:
        sizes: number of codes by name, and whether the original keeps the gradient's path.
        dim: width of the codes.
        side: cells of a side of the image.
    """
    for name, (count, straight) in (sizes or {"emu3.5": (131_072, False), "ibq-262144": (262_144, True)}).items():
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(count, dim, generator=generator)
        latents = torch.randn(1, dim, side, side, generator=generator)
        yield _lookup(f"{name}, lookup", codes, latents, straight)


def _lookup(
    name: str, codes: Float[Tensor, "codes dim"], latents: Float[Tensor, "batch dim rows columns"], straight: bool
) -> Pair:
    prepared = prepare(codes, metric="dot")

    def ours() -> Int[Tensor, " cells"]:
        ids = nearest(latents.permute(0, 2, 3, 1), prepared)
        F.embedding(ids, codes).permute(0, 3, 1, 2)
        return ids.flatten()

    return Pair(
        name, f"{latents[0, 0].numel()} cells, {len(codes)} codes", ours, lambda: dense_lookup(latents, codes, straight)
    )


def dense_lookup(
    latents: Float[Tensor, "batch dim rows columns"], codes: Float[Tensor, "codes dim"], straight: bool
) -> Int[Tensor, " cells"]:
    """Ids of the largest dot products, and their codes by dense products, as the authors' evaluation computes them.

    Args:
        latents: what to look up.
        codes: the codebook.
        straight: with the straight-through sum of soft and hard choices, and a second product (SEED-Voken).
    """
    logits = torch.einsum("bdhw,nd->bnhw", latents, codes)
    soft = logits.softmax(1)
    ids = soft.max(1, keepdim=True).indices
    hard = torch.zeros_like(logits).scatter_(1, ids, 1.0)
    for chosen in [hard - soft + soft, hard] if straight else [hard]:
        torch.einsum("bnhw,nd->bdhw", chosen, codes)
    return ids.flatten()


#: The parts of the table, by name.
PARTS: dict[str, Callable[[], Iterator[Pair]]] = {
    "snac": snac,
    "s3tokenizer": s3tokenizer,
    "lookup": lookup,
    "flextok": image_originals.flextok,
    "tokenflow": image_originals.tokenflow,
    "wavtokenizer": sound_originals.wavtokenizer,
    "vocoder": sound_originals.vocoder,
    "search": sound_originals.search,
    "packed": sound_originals.packed,
}


def _sounds(longest: float, rate: int) -> tuple[Float[Tensor, " samples"], list[Tensor]]:
    """One recording of noise, and a ragged batch."""
    generator = torch.Generator().manual_seed(0)
    items = [torch.randn(round(longest * share * rate), generator=generator) * 0.1 for share in RAGGED]
    return items[-1], items


def _ragged_case(items: Sequence[Tensor], rate: int) -> str:
    shortest, longest = len(items[0]) / rate, len(items[-1]) / rate
    return f"encode {len(items)} of {shortest:g} to {longest:g} s"
