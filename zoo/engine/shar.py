"""Lhotse Shar: shards of cuts, ``cuts.000000.jsonl.gz``, with a tar of their recordings and of other data beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from zoo.engine.packed import opened
from zoo.engine.places import Places, beside
from zoo.errors import MissingExtraError

#: Extension of what stands in a tar for a recording that there is none of.
NOTHING = ".nodata"
#: Members of a tar that describe others.
_DESCRIPTIONS = (".json", ".nometa")
_CUTS = re.compile(r"cuts\.(\d+)\.jsonl(\.gz)?")


@dataclass(frozen=True)
class Cut:
    """One cut.

    Attributes:
        name: its id.
        columns: what is known of it: ``id``, ``duration``, ``text``, ``speaker``, ``language``, and values of its own.
        part: first second, seconds and channels of the recording that it is; ``None`` if it is all of it.
    """

    name: str
    columns: Mapping[str, Any]
    part: tuple[float, float, list[int]] | None


def is_cuts(name: str) -> bool:
    """Whether a file is a shard of cuts, by its name."""
    return _CUTS.fullmatch(os.path.basename(name)) is not None


def is_data(name: str) -> bool:
    """Whether a member of a tar is data, by its name."""
    return not name.endswith(_DESCRIPTIONS)


def without_fields(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names and places of files, without those that belong to cuts in the same folder."""
    folders = {os.path.dirname(place) for _, place in files if is_cuts(place)}
    return [(name, place) for name, place in files if os.path.dirname(place) not in folders or is_cuts(place)]


def recordings_of(place: str) -> str:
    """The tar with the recordings of a shard of cuts."""
    return beside(place, f"recording.{_number(place)}.tar")


def cuts_of(place: str, places: Places) -> Iterator[Cut | str]:
    """The cuts of a shard in their order; of one that cannot be used, why.

    Raises:
        MissingExtraError: lhotse is not installed.
    """
    try:
        from lhotse.serialization import deserialize_item
    except ImportError as error:
        raise MissingExtraError("Lhotse Shar needs lhotse: pip install 'tokenizer-zoo[exports]'") from error
    pattern = beside(place, f"*.{_number(place)}.jsonl*")
    names = {os.path.basename(other).partition(".")[0]: other for _, other in places.matches(pattern) if not is_cuts(other)}
    fields = {name: chain(_lines(other, places), repeat(b"")) for name, other in names.items()}
    for line in _lines(place, places):
        more = {name: next(lines) for name, lines in fields.items()}
        try:
            cut = deserialize_item(json.loads(line))
            own = {name: json.loads(text).get(name) for name, text in more.items() if text}
            found: Cut | str = _cut(cut, own)
        except Exception as error:
            # The library raises errors of many kinds, and plain ones.
            found = f"the line is no cut: {type(error).__name__}: {' '.join(str(error).split())}"
        yield found


def _cut(cut: Any, own: dict[str, Any]) -> Cut | str:
    from lhotse import MonoCut, MultiCut

    if not isinstance(cut, MonoCut | MultiCut):
        return f"{cut.id} is a {type(cut).__name__}, which is no cut of one recording"
    custom = {name: value for name, value in (cut.custom or {}).items() if _is_plain(value)}
    said = {name: [getattr(speech, name) for speech in cut.supervisions] for name in ("text", "speaker", "language")}
    spoken = {name: " ".join(filter(None, values)) for name, values in said.items() if any(values)}
    columns = {"id": cut.id, "duration": cut.duration} | spoken | custom | own
    if not cut.has_recording:
        return Cut(cut.id, columns, None)
    recording = cut.recording
    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    places = [recording.channel_ids.index(channel) for channel in channels]
    whole = cut.start == 0 and cut.num_samples == recording.num_samples and len(places) == len(recording.channel_ids)
    return Cut(cut.id, columns, None if whole else (cut.start, cut.duration, places))


def taken_out(content: bytes, start: float, duration: float, channels: list[int]) -> tuple[Any, int]:
    """The samples ``[channels, samples]`` of a part of a recording, and its rate."""
    from lhotse import Recording

    recording = Recording.from_bytes(content, "recording")
    return recording.load_audio(offset=start, duration=duration)[channels], recording.sampling_rate


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)


def _lines(place: str, places: Places) -> Iterator[bytes]:
    with opened(place, places) as file:
        yield from (line for line in file if line.strip())


def _number(place: str) -> str:
    found = _CUTS.fullmatch(os.path.basename(place))
    assert found is not None
    return found[1]
