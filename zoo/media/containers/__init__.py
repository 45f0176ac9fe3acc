"""Contents of audio files: recognised by content, and measured instead of believed."""

from __future__ import annotations

import os
from io import BufferedIOBase

from zoo.errors import InputError
from zoo.media.containers.boxes import check_boxes
from zoo.media.containers.chunks import (
    W64_RIFF,
    MpegInside,
    aiff_tracks,
    au_tracks,
    caf_tracks,
    is_wave,
    riff_tracks,
    w64_tracks,
)
from zoo.media.containers.flac import flac_tracks
from zoo.media.containers.mpeg import find_mpeg, mpeg_tracks
from zoo.media.containers.ogg import ogg_tracks, vorbis_order
from zoo.media.containers.spliced import Track, read_at, spliced, without_tags

__all__ = ["Track", "find_tracks", "foreign_kind", "vorbis_order"]

# The beginnings of files that FFmpeg reads and libsndfile does not.
_FOREIGN = (
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF (WMA)"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"TTA1", "True Audio"),
    (0, b"tBaK", "TAK"),
    (0, b"#!AMR", "AMR"),
    (0, b"ADIF", "AAC"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"\x7f\xfe\x80\x01", "DTS"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b"FLV\x01", "Flash video"),
    (0, b"DSD ", "DSD"),
    (0, b"FRM8", "DSD"),
    (0, b".RMF", "RealMedia"),
    (0, b"\x00\x00\x01\xba", "MPEG program stream"),
)
# Those of kinds that libsndfile reads and that are left to it.
_OTHERS = (
    b"Creative Voice File",
    b"NIST_1A",
    b"FORM",
    b" paf",
    b"fap ",
    b"\x64\xa3",
    b"MATLAB",
    b"2BIT",
    b"PVF1",
    b"\xf0\x7e",
    b"ALawSound",
)
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof")


def foreign_kind(head: bytes) -> str | None:
    """The name of the kind of file that begins like this, if FFmpeg is what reads it."""
    for offset, mark, kind in _FOREIGN:
        if head[offset : offset + len(mark)] == mark:
            return kind
    if head[4:8] in _MP4_BOXES:
        return "MP4 or QuickTime (M4A, AAC, ALAC)"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC (ADTS)"
    if len(head) > 188 and head[0] == head[188] == 0x47:
        return "MPEG transport stream"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    return None


def find_tracks(handle: BufferedIOBase, name: str) -> list[Track]:
    """The recordings of an audio file, one behind the other.

    Raises:
        InputError: the file is truncated or damaged, or holds nothing but tags.
    """
    size = handle.seek(0, os.SEEK_END)
    start, end = without_tags(handle, size)
    if start >= end:
        raise InputError(f"{name} holds nothing but tags")
    head = read_at(handle, start, 256)
    tracks = _known_tracks(handle, head, start, end, name)
    if tracks:
        return tracks
    if foreign_kind(head) is None:
        return [Track(spliced(handle, [(start, size - start)]))]
    check_boxes(handle, start, size, name)
    return [Track(spliced(handle, [(start, size - start)]), decoder="av")]


def _known_tracks(handle: BufferedIOBase, head: bytes, start: int, end: int, name: str) -> list[Track] | None:
    if is_wave(head):
        try:
            return riff_tracks(handle, start, end, name)
        except MpegInside as inside:
            return mpeg_tracks(handle, inside.start, inside.start + inside.length, name)
    if head[:4] == b"OggS":
        return ogg_tracks(handle, start, end, name)
    if head[:4] == b"fLaC":
        return flac_tracks(handle, start, end, name)
    if head[:16] == W64_RIFF:
        return w64_tracks(handle, start, end, name)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return aiff_tracks(handle, start, end, name)
    if head[:4] in (b".snd", b"dns."):
        return au_tracks(handle, start, end, name)
    if head[:4] == b"caff":
        return caf_tracks(handle, start, end, name)
    if head.startswith(_OTHERS) or foreign_kind(head) is not None:
        return None
    first = find_mpeg(handle, start, end)
    return None if first is None else mpeg_tracks(handle, first, end, name)
