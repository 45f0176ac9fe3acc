"""Video: films, arrays and tensors, frame by frame, brought to a model's size and back again.

PyAV (the extra ``video``) reads and writes films. Frames are RGB ``[3, height, width]``, and a level of 0 to 255 is
``level / 127.5 - 1``.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ArgumentError, InputError, MissingReaderError
from zoo.media.files import FILE_TYPES, open_source, replacing
from zoo.media.image import prepare, reading
from zoo.media.image.prepare import FITS, INTERPOLATIONS, restore_image
from zoo.media.items import video_item
from zoo.precision import all_finite

log = logging.getLogger("zoo")

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
#: Most frames that a clip may have unless the caller says otherwise.
MAX_FRAMES = 1024
#: Most pixels that each frame may have: those of 1920 x 1088.
MAX_FRAME_PIXELS = 2_100_000
#: Frames per second of arrays that come without a rate.
FRAME_RATE = Fraction(24)

# Rates beyond this are damage: high-speed cameras store their films at the rate of playback.
_HIGHEST_RATE = 1000
# How much of a film may be missing at its end before it counts as truncated: containers round their lengths.
_MISSING_FRAMES, _MISSING_SECONDS = 3, 0.25
_EXTRA = 'pip install "tokenizer-zoo[video]"'

#: Levels of 8 bits, or float32 that is nominally in [-1, 1].
Frame = UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"]


@dataclass(frozen=True)
class Video:
    """A clip that is read once, from its start to its end.

    Attributes:
        frames: float32 ``[3, height, width]``, nominally in [-1, 1], in the order in which they are shown.
        count: how many there are; ``None`` where only decoding tells.
        fps: frames per second.
        height, width: of each frame, upright.
    """

    frames: Iterator[Float[Tensor, "3 height width"]]
    count: int | None
    fps: Fraction
    height: int
    width: int


@dataclass(frozen=True)
class PreparedVideo:
    """A clip as a model takes it, and what is needed to put its reconstruction back.

    Attributes:
        frames: levels of 8 bits where the clip has them at this size, else float32 nominally in [-1, 1].
        meta: ``frames``, ``fps_num`` and ``fps_den`` of the clip; the ``width`` and ``height`` that it had before it was
            resized, and ``fit``.
    """

    frames: UInt8[Tensor, "frames 3 height width"] | Float[Tensor, "frames 3 height width"]
    meta: dict[str, Any]


def pixels_of(frames: UInt8[Tensor, ...] | Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Levels 0 to 255 as float32 in [-1, 1]; floats as they are."""
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float()


def frame_rate(fps: Any) -> Fraction:
    """A number of frames per second as an exact fraction: 29.97 is 2997/100.

    Raises:
        ArgumentError: it is no number above 0 and up to 1000.
    """
    try:
        if isinstance(fps, bool):
            raise TypeError
        rate = Fraction(fps) if isinstance(fps, int | Fraction | str) else Fraction(float(fps)).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ArgumentError(f"the frame rate must be a number of frames per second, not {fps!r}") from error
    if not 0 < rate <= _HIGHEST_RATE or rate.denominator > 1_000_000:
        raise ArgumentError(f"the frame rate must lie above 0 and not above {_HIGHEST_RATE}, not {fps!r}")
    return rate


def read_video(item: Any, *, fps: Any = None, max_frames: int = MAX_FRAMES, max_pixels: int = MAX_FRAME_PIXELS) -> Video:
    """Open a clip. Its frames are decoded as they are asked for.

    Films are shown upright, as their display matrix says; transparent pixels are laid on white. Their colours go to RGB by
    FFmpeg, by the matrix and the range that the film names. Sound is ignored.

    Args:
        item: a path or the bytes of a film (MP4, MOV, MKV, WebM, AVI, GIF) or of a still image, an open file, an array
            ``[frames, height, width, 1|3|4]``, a tensor ``[1|3|4, frames, height, width]``, a PIL image, a list of them, or a
            pair ``(array, fps)``. Numbers are uint8, uint16 or floats in [-1, 1]. An array of rank 3 is a single frame.
        fps: frames per second to bring the clip to: at each step the latest frame that is shown by then. Without it every frame
            is taken, and the rate is the film's average one. Arrays have 24 unless a pair says otherwise.
        max_frames: refuse clips of more frames.
        max_pixels: refuse clips whose frames have more pixels.

    Raises:
        InputError: it is of the wrong kind, empty, without frames, damaged, truncated or too large. Damage that lies behind the
            start is found by the iterator of frames.
        MissingReaderError: PyAV is needed and not there.

    >>> video = read_video(torch.zeros(3, 5, 16, 24), fps=12)
    >>> video.fps, len(list(video.frames))
    (Fraction(12, 1), 3)
    """
    source = _open(item, max_frames, max_pixels, fps)
    return Video(map(pixels_of, source.frames), source.count, source.fps, source.height, source.width)


def prepare_video(
    item: Any,
    *,
    fit: str = "none",
    size: int | Sequence[int] | None = None,
    fps: Any = None,
    interpolation: str = "bilinear",
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> PreparedVideo:
    """Read a clip, and bring its frames to a size.

    Args:
        item: as for `read_video`.
        fit: ``"none"`` keeps the size; ``"crop"``, ``"stretch"`` and ``"pad"`` as in `zoo.media.prepare_image`.
        size: ``(height, width)`` of the result, or one number for both; with another fit than ``"none"``.
        fps: as for `read_video`.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        max_frames: refuse clips of more frames.
        max_pixels: refuse clips whose frames have more pixels.

    Raises:
        InputError: as for `read_video`.
        ArgumentError: there is no such fit or interpolation, or fit and size contradict each other.

    >>> clip = prepare_video((np.zeros((9, 33, 47, 3), np.uint8), 25))
    >>> list(clip.frames.shape), clip.meta["fps_num"], clip.meta["fit"]
    ([9, 3, 33, 47], 25, 'none')
    """
    stream = stream_video(
        item, fit=fit, size=size, fps=fps, interpolation=interpolation, max_frames=max_frames, max_pixels=max_pixels
    )
    frames = stream.read()
    assert frames is not None
    return PreparedVideo(frames, stream.meta)


class VideoStream:
    """The frames of a clip at the size that is wanted, read once from front to back, with what is known when all are read.

    Attributes:
        name: for messages.
        file: path or content of the file that they come from, which can be read again; ``None`` for arrays and images.
        count: frames that were read so far.
        fps: frames per second.
        size: height and width of the frames as they come.
    """

    def __init__(self, source: _Source, file: Any, fit: str, size: tuple[int, int] | None, interpolation: str) -> None:
        self.name, self.file, self.fps, self.count = source.name, file, source.fps, 0
        self.size = size or (source.height, source.width)
        self._source, self._fit, self._wanted, self._interpolation = source, fit, size, interpolation

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._source.frames:
            self.count += 1
            yield frame if self._wanted is None else _fitted(frame, self._wanted, self._fit, self._interpolation)
        if not self.count:
            raise InputError(f"{self.name} holds no frames")

    def read(self, most: int | None = None) -> Tensor | None:
        """All frames ``[frames, 3, height, width]``, or ``None`` where they have more than ``most`` numbers.

        Then too, they are read to the end, so that what is damaged is found.

        Raises:
            InputError: as for `read_video`.
        """
        held: list[Tensor] | None = []
        for frame in self:
            if held is not None:
                held.append(frame)
            if most is not None and self.count * frame.numel() > most:
                held = None
        if held is None:
            return None
        if len({frame.dtype for frame in held}) > 1:
            held = [pixels_of(frame) for frame in held]
        return torch.stack(held)

    @property
    def meta(self) -> dict[str, Any]:
        """See `PreparedVideo`; of a clip that was read to its end."""
        size = {"width": self._source.width, "height": self._source.height, "fit": self._fit}
        return {"frames": self.count, "fps_num": self.fps.numerator, "fps_den": self.fps.denominator} | size


def stream_video(
    item: Any,
    *,
    fit: str = "none",
    size: int | Sequence[int] | None = None,
    fps: Any = None,
    interpolation: str = "bilinear",
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> VideoStream:
    """Open a clip whose frames are brought to a size as they are read; arguments and errors as for `prepare_video`."""
    wanted = _wanted_size(fit, size)
    if interpolation not in INTERPOLATIONS:
        raise ArgumentError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    content, rate = video_item(item)
    file = content if isinstance(content, FILE_TYPES) else None
    source = _open(content if rate is None else (content, rate), max_frames, max_pixels, fps)
    return VideoStream(source, file, fit, wanted, interpolation)


def restore_video(
    frames: Float[Tensor, "3 frames height width"], meta: Mapping[str, Any], max_pixels: int = MAX_FRAME_PIXELS
) -> Float[Tensor, "3 frames original_height original_width"]:
    """A clip of the size that ``meta`` remembers; whole cells are cut off where nothing was resized.

    Raises:
        InputError: ``meta`` is not what `prepare_video` gives, or asks for more than ``max_pixels``.
    """
    try:
        width, height, fit = int(meta["width"]), int(meta["height"]), meta["fit"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"without its width, height and fit a clip cannot be restored; its meta is {dict(meta)}") from error
    if fit == "none":
        if frames.shape[2] < height or frames.shape[3] < width or min(height, width) < 1:
            raise InputError(f"a clip of {frames.shape[3]} x {frames.shape[2]} pixels came back, not one of {width} x {height}")
        return frames[:, :, :height, :width]
    return torch.stack([restore_image(frame, meta, max_pixels) for frame in frames.unbind(1)], dim=1)


def video_info(item: Any) -> tuple[int | None, Fraction]:
    """Number of frames, where that is known without decoding, and frames per second.

    Raises:
        InputError: the item is no clip, or its header is damaged.
    """
    source = _open(item, 1 << 62, 1 << 62, None)
    try:
        return source.count, source.fps
    finally:
        source.close()


def write_video(
    path: str | os.PathLike[str],
    frames: Float[Tensor, "3 frames height width"] | Iterable[Float[Tensor, "3 height width"]],
    fps: Any = FRAME_RATE,
    *,
    lossless: bool = False,
) -> Path:
    """Write a film, its format chosen by the extension: ``.mp4`` is H.264, ``.webm`` VP9, ``.mkv`` FFV1 without any loss.

    H.264 as players take it has an even width and height: the last row or column is repeated where they are odd. With
    ``lossless`` it is RGB of the size that the frames have, which few players show. Values are clipped to [-1, 1] and rounded
    to 256 levels, halves upwards.

    Args:
        path: the file.
        frames: the clip, or its frames one after the other.
        fps: frames per second.
        lossless: without a loss beyond the rounding to levels.

    Raises:
        InputError: no film has that extension, there are no frames, or they differ in size.
        MissingReaderError: PyAV is not there.
    """
    path, rate = Path(path), frame_rate(fps)
    if path.suffix.lower() not in _WRITTEN:
        raise InputError(f"cannot write {path.name}: films are written as {', '.join(_WRITTEN)}")
    codec, pixel_format, options, muxer = _WRITTEN[path.suffix.lower()][lossless]
    given: Iterable[Tensor] = frames.unbind(1) if isinstance(frames, Tensor) else frames
    levels = (_levels(frame) for frame in given)
    first = next(levels, None)
    if first is None:
        raise InputError(f"{path.name} would have no frames")
    height, width = first.shape[:2]
    rows, columns = (-(-height // 2) * 2, -(-width // 2) * 2) if pixel_format == "yuv420p" else (height, width)
    if (rows, columns) != (height, width):
        log.info("%s: frames of %d x %d are continued to %d x %d", path.name, width, height, columns, rows)
    av = _pyav(path.name)
    with (
        replacing(path) as temporary,
        _translating(path.name, "cannot be written"),
        av.open(str(temporary), "w", format=muxer) as container,
    ):
        stream = container.add_stream(codec, rate=rate, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = columns, rows, pixel_format
        for frame in _chained(first, levels):
            if frame.shape[:2] != (height, width):
                raise InputError(f"frames differ in size: {width} x {height}, then {frame.shape[1]} x {frame.shape[0]}")
            whole = np.pad(frame, ((0, rows - height), (0, columns - width), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")))
        container.mux(stream.encode())
    return path


# Codec, pixel format, options and container by extension; the second of each pair is without loss.
_Written = tuple[str, str, Mapping[str, str], str]
_FFV1: _Written = ("ffv1", "bgr0", {}, "matroska")
_WRITTEN: Mapping[str, tuple[_Written, _Written]] = {
    ".mp4": (
        ("libx264", "yuv420p", {"crf": "16", "threads": "1"}, "mp4"),
        ("libx264rgb", "rgb24", {"qp": "0", "threads": "1"}, "mp4"),
    ),
    ".webm": (
        ("libvpx-vp9", "yuv420p", {"crf": "20", "b": "0", "row-mt": "1"}, "webm"),
        ("libvpx-vp9", "gbrp", {"lossless": "1", "row-mt": "1"}, "webm"),
    ),
    ".mkv": (_FFV1, _FFV1),
}


def _chained(first: NDArray[np.uint8], others: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    yield first
    yield from others


def _levels(frame: Float[Tensor, "3 height width"]) -> NDArray[np.uint8]:
    """Levels ``[height, width, 3]`` of a frame in [-1, 1]."""
    if not all_finite(frame):
        raise InputError("frames hold NaN or infinite pixels")
    levels = ((frame.detach().cpu().double().clamp(-1, 1) + 1) * 127.5 + 0.5).floor()
    return np.asarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------------------------------ sources


@dataclass
class _Source:
    """Frames as they are stored, and what is known of them."""

    name: str
    frames: Iterator[Tensor]
    count: int | None
    fps: Fraction
    height: int
    width: int
    container: Any = None

    def close(self) -> None:
        if self.container is not None:
            self.container.close()


def _open(item: Any, max_frames: int, max_pixels: int, fps: Any) -> _Source:
    if max_frames < 1 or max_pixels < 1:
        raise ArgumentError(f"max_frames and max_pixels must be at least 1, not {max_frames} and {max_pixels}")
    wanted = None if fps is None else frame_rate(fps)
    content, rate = video_item(item)
    if isinstance(content, FILE_TYPES):
        source = _open_file(content, max_frames, max_pixels, wanted)
    else:
        given = FRAME_RATE if rate is None else _given_rate(rate)
        source = _open_frames(content, given, max_frames, max_pixels, wanted)
    source.frames = _counted(source.frames, max_frames, source.name)
    return source


def _given_rate(rate: Any) -> Fraction:
    try:
        return frame_rate(rate.item() if isinstance(rate, Tensor | np.ndarray | np.generic) else rate)
    except ArgumentError as error:
        raise InputError(error.reason) from error


def _counted(frames: Iterator[Tensor], most: int, name: str) -> Iterator[Tensor]:
    for number, frame in enumerate(frames):
        if number == most:
            raise _too_many(name, None, most)
        yield frame


def _too_many(name: str, count: int | None, most: int) -> InputError:
    known = f"{count} frames, " if count is not None else ""
    return InputError(
        f"{name} has {known}more than max_frames = {most}: cut it up, ask for fewer with fps=, or raise that limit"
    )


def _open_frames(frames: Any, rate: Fraction, max_frames: int, max_pixels: int, wanted: Fraction | None) -> _Source:
    """Frames of an array, a tensor or PIL images, each taken as an image is."""
    single = list(_single_frames(frames))
    if not single:
        raise InputError("the clip holds no frames")
    count = len(single) if wanted is None else _steps(Fraction(len(single)) / rate, wanted)
    if count > max_frames:
        raise _too_many("the clip", count, max_frames)
    first = _loaded(single[0], max_pixels)
    height, width = first.shape[1:]

    def shown() -> Iterator[Tensor]:
        for frame in single:
            levels = _loaded(frame, max_pixels)
            if levels.shape[1:] != (height, width):
                raise InputError(f"frames differ in size: {width} x {height}, then {levels.shape[2]} x {levels.shape[1]}")
            yield levels

    if wanted is None:
        return _Source("the clip", shown(), count, rate, height, width)
    times = ((frame, index / rate, 1 / rate) for index, frame in enumerate(shown()))
    return _Source("the clip", _resampled(times, wanted), count, wanted, height, width)


def _single_frames(frames: Any) -> Sequence[Any]:
    if isinstance(frames, list | tuple):
        return frames
    if isinstance(frames, Tensor):
        if frames.ndim == 3:
            return [frames]
        if frames.ndim != 4 or frames.shape[0] not in (1, 3, 4):
            raise InputError(f"a tensor of a clip must be [1|3|4, frames, height, width], not of shape {tuple(frames.shape)}")
        return frames.unbind(1)
    if frames.ndim == 2 or (frames.ndim == 3 and frames.shape[2] in (1, 3, 4)):
        return [frames]
    if frames.ndim != 4 or frames.shape[3] not in (1, 3, 4):
        raise InputError(f"an array of a clip must be [frames, height, width, 1|3|4], not of shape {tuple(frames.shape)}")
    return list(frames)


def _loaded(frame: Any, max_pixels: int) -> Tensor:
    image = reading.load(frame, max_pixels, None)
    if isinstance(image, Tensor):
        return image.float().contiguous()
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _resampled(frames: Iterable[tuple[Tensor, Fraction, Fraction]], fps: Fraction) -> Iterator[Tensor]:
    """At each step of a rate the latest frame that is shown by then; frames come with their times and durations."""
    latest: tuple[Tensor, Fraction, Fraction] | None = None
    start, step = Fraction(0), 0
    for frame, time, duration in frames:
        if latest is None:
            start = time
        while latest is not None and step / fps < time - start:
            yield latest[0]
            step += 1
        latest = frame, time, duration
    if latest is not None:
        while step / fps < latest[1] - start + latest[2]:
            yield latest[0]
            step += 1


def _steps(seconds: Fraction, fps: Fraction) -> int:
    """Steps of a rate that begin within a time."""
    return int(-(-seconds * fps // 1))


# ------------------------------------------------------------------------------------------------------------------ geometry


def _wanted_size(fit: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if fit not in FITS:
        raise ArgumentError(f"fit must be one of {', '.join(FITS)}, not {fit!r}")
    if (fit == "none") != (size is None):
        raise ArgumentError(f"fit={fit!r} goes {'without a' if fit == 'none' else 'with a'} size of (height, width)")
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ArgumentError(f"size must be (height, width) in pixels, not {size!r}")
    if sides[0] * sides[1] > reading.MAX_PIXELS:
        raise ArgumentError(f"a size of {sides[1]} x {sides[0]} pixels is too large")
    return sides[0], sides[1]


def _fitted(frame: Tensor, size: tuple[int, int], fit: str, interpolation: str) -> Tensor:
    source = frame.permute(1, 2, 0).numpy() if frame.dtype == torch.uint8 else frame
    return prepare.prepare_image(source, size, fit, reading.MAX_PIXELS, interpolation).pixels


# --------------------------------------------------------------------------------------------------------------------- films


def _pyav(name: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingReaderError(f"{name}: films are read and written with PyAV: {_EXTRA}") from error
    return av


@contextmanager
def _translating(name: str, what: str) -> Iterator[None]:
    """Errors of FFmpeg as `InputError`."""
    import av

    try:
        yield
    except InputError:
        raise
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"{name} {what}: {getattr(error, 'strerror', None) or error}") from error


def _open_file(content: Any, max_frames: int, max_pixels: int, wanted: Fraction | None) -> _Source:
    handle, name = open_source(content, "video")
    if reading.is_still(handle):
        handle.close()
        still = _open_frames([content], FRAME_RATE, max_frames, max_pixels, wanted)
        still.name = name
        return still
    av = _pyav(name)
    handle.seek(0)
    try:
        source = _open_film(av, handle, name, wanted)
    except BaseException:
        handle.close()
        raise
    try:
        if source.count is not None and source.count > max_frames:
            raise _too_many(name, source.count, max_frames)
        reading.check_pixels(source.width, source.height, max_pixels, name)
    except InputError:
        source.close()
        handle.close()
        raise
    return source


def _open_film(av: Any, handle: io.BufferedIOBase, name: str, wanted: Fraction | None) -> _Source:
    with _translating(name, "is not a video file that can be read"):
        container = av.open(handle, mode="r", metadata_errors="ignore")
    # Covers of recordings are pictures, not films; streams of an unknown codec have no decoder.
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        container.close()
        raise InputError(f"{name} holds no video track that can be decoded")
    stream = streams[0]
    rate = Fraction(stream.average_rate or stream.guessed_rate or FRAME_RATE)
    if not 0 < rate <= _HIGHEST_RATE:
        container.close()
        raise InputError(f"{name} has {float(rate):g} frames per second; up to {_HIGHEST_RATE} can be read")
    frames = _decoded(container, stream, name, rate, handle)
    with _translating(name, "cannot be decoded"):
        try:
            first = next(frames, None)
        except InputError:
            container.close()
            raise
    if first is None:
        container.close()
        raise InputError(f"{name} holds no frames that can be read: it is empty or truncated")
    height, width = first[0].shape[1:]
    known = int(stream.frames) or None
    if wanted is None:
        shown: Iterator[Tensor] = (frame for frame, _, _ in _after(first, frames))
        return _Source(name, shown, known, rate, height, width, container)
    count = None if known is None else _steps(Fraction(known) / rate, wanted)
    return _Source(name, _resampled(_after(first, frames), wanted), count, wanted, height, width, container)


_Timed = tuple[Tensor, Fraction, Fraction]


def _after(first: _Timed, others: Iterator[_Timed]) -> Iterator[_Timed]:
    yield first
    yield from others


def _decoded(container: Any, stream: Any, name: str, rate: Fraction, handle: io.BufferedIOBase) -> Iterator[_Timed]:
    """Frames as levels of 8 bits with their times and durations in seconds."""
    shape, number, end, start = None, 0, Fraction(0), None
    with handle, container, _translating(name, "is damaged"):
        promised = _promised(container, stream)
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise InputError(f"{name} is damaged at frame {number}")
            levels = _upright_levels(frame)
            if shape is not None and levels.shape != shape:
                raise InputError(
                    f"{name} changes its size at frame {number}: {shape[2]} x {shape[1]}, then {list(levels.shape)}"
                )
            shape = levels.shape
            base = frame.time_base
            time = Fraction(frame.pts) * base if frame.pts is not None and base else number / rate
            duration = Fraction(frame.duration) * base if frame.duration and base else 1 / rate
            start = time if start is None else start
            end = max(end, time + duration)
            yield levels, time, duration
            number += 1
        missing = Fraction(0) if promised is None or start is None else promised - (end - start)
        if missing > max(_MISSING_FRAMES / rate, Fraction(_MISSING_SECONDS)):
            raise InputError(
                f"{name} is truncated: {float(end - (start or 0)):.3g} s of {float(promised or 0):.3g} s can be read"
            )


def _promised(container: Any, stream: Any) -> Fraction | None:
    """Seconds that the film claims to last; ``None`` where it says nothing, or speaks of its sound as well."""
    if stream.duration and stream.time_base:
        return Fraction(stream.duration) * stream.time_base
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, 1_000_000)
    return None


def _upright_levels(frame: Any) -> UInt8[Tensor, "3 height width"]:
    from PIL import Image

    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        layer = Image.fromarray(frame.to_ndarray(format="rgba"))
        levels = np.array(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
    else:
        levels = frame.to_ndarray(format="rgb24")
    if turns := round(frame.rotation / 90) % 4:
        levels = np.rot90(levels, turns)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(levels, 2, 0)))
