"""Films, arrays and tensors as clips, and clips as films."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import media
from zoo.media.video import frame_rate

RANDOM = np.random.default_rng(0)
LEVELS = RANDOM.integers(0, 256, (7, 33, 47, 3)).astype(np.uint8)
CLIP = torch.from_numpy(LEVELS).permute(3, 0, 1, 2) / 127.5 - 1


def frames_of(item, **options) -> torch.Tensor:
    return torch.stack(list(media.read_video(item, **options).frames), dim=1)


def film(times: list[int], path: Path, size: tuple[int, int] = (16, 16), **settings) -> Path:
    """A film whose frames are shown at multiples of 1/100 s, each darker than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=100)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "bgr0"
        stream.codec_context.time_base = Fraction(1, 100)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 250 - 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("extension", [".mp4", ".mkv", ".webm"])
def test_lossless_films_come_back_as_they_were(tmp_path: Path, extension: str) -> None:
    path = media.write_video(tmp_path / f"film{extension}", CLIP, Fraction(30000, 1001), lossless=True)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        {"bytes": path.read_bytes(), "path": None},
    ):
        assert torch.equal(frames_of(source), CLIP)
    video = media.read_video(path)
    assert (video.height, video.width) == (33, 47)
    # WebM and Matroska round times to milliseconds.
    assert abs(video.fps - Fraction(30000, 1001)) < Fraction(1, 100)
    assert video.count in (7, None)
    assert media.prepare_video(path).frames.dtype == torch.uint8


def test_films_for_players_have_even_sides(tmp_path: Path) -> None:
    smooth = torch.linspace(-1, 1, 47).expand(3, 4, 33, 47)
    for extension in (".mp4", ".webm"):
        path = media.write_video(tmp_path / f"film{extension}", smooth, 24)
        found = frames_of(path)
        assert found.shape == (3, 4, 34, 48)
        assert (found[:, :, :33, :47] - smooth).abs().mean() < 0.05
    with pytest.raises(zoo.InputError, match="cannot write"):
        media.write_video(tmp_path / "film.txt", smooth)
    with pytest.raises(zoo.InputError, match="no frames"):
        media.write_video(tmp_path / "film.mp4", smooth[:, :0])
    with pytest.raises(zoo.InputError, match="NaN"):
        media.write_video(tmp_path / "film.mp4", smooth * torch.nan)
    with pytest.raises(zoo.ArgumentError, match="frame rate"):
        media.write_video(tmp_path / "film.mp4", smooth, 0)
    assert not (tmp_path / "film.txt").exists()


def test_rounding_is_half_up_and_clipped(tmp_path: Path) -> None:
    values = torch.tensor([-9.0, -1.0, -0.5 / 127.5, 0.5 / 127.5 * 1.0000001, 9.0]).expand(3, 1, 2, 5)
    found = frames_of(media.write_video(tmp_path / "f.mkv", values))
    assert ((found[0, 0, 0] + 1) * 127.5).round().tolist() == [0, 0, 127, 128, 255]


def test_arrays_and_tensors() -> None:
    assert torch.equal(frames_of(LEVELS), CLIP)
    assert torch.equal(frames_of(torch.from_numpy(LEVELS).permute(3, 0, 1, 2)), CLIP)
    assert torch.equal(frames_of(CLIP), CLIP)
    assert torch.equal(frames_of(CLIP.permute(1, 2, 3, 0).numpy()), CLIP)
    assert torch.equal(frames_of([Image.fromarray(frame) for frame in LEVELS]), CLIP)
    assert torch.equal(frames_of(Image.fromarray(LEVELS[0])), CLIP[:, :1])
    content = io.BytesIO()
    Image.fromarray(LEVELS[0]).save(content, "PNG")
    assert torch.equal(frames_of(content.getvalue()), CLIP[:, :1])
    # Arrays have their channels last and tensors first, where a shape could be read both ways.
    ambiguous = RANDOM.integers(0, 256, (3, 5, 4, 3)).astype(np.uint8)
    assert frames_of(ambiguous).shape == (3, 3, 5, 4)
    assert frames_of(torch.from_numpy(ambiguous)).shape == (3, 5, 4, 3)
    assert media.read_video((LEVELS, 30)).fps == 30
    assert media.read_video((CLIP, torch.tensor(12.5))).fps == Fraction(25, 2)
    assert media.read_video(LEVELS).fps == 24
    opaque = np.concatenate([LEVELS, np.full_like(LEVELS[..., :1], 255)], axis=-1)
    assert torch.equal(frames_of(opaque), CLIP)
    assert frames_of(np.concatenate([LEVELS, np.zeros_like(LEVELS[..., :1])], axis=-1)).min() == 1


def test_a_rate_takes_the_latest_frame_that_is_shown(tmp_path: Path) -> None:
    path = film([0, 10, 20, 30, 60, 65, 90], tmp_path / "variable.mkv")
    numbers = [round((250 - (frame[0, 0, 0].item() + 1) * 127.5) / 10) for frame in media.read_video(path, fps=10).frames]
    assert numbers == [0, 1, 2, 3, 3, 3, 4, 5, 5, 6]
    assert len(list(media.read_video(path).frames)) == 7
    still = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    for fps, expected in ((12, [0, 2, 4]), (48, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (16, [0, 1, 3, 4])):
        video = media.read_video((still, 24), fps=fps)
        found = [round((frame[0, 0, 0].item() + 1) * 127.5) for frame in video.frames]
        assert found == expected and video.count == len(expected) and video.fps == fps
    assert frame_rate(29.97) == Fraction(2997, 100) and frame_rate("30000/1001") == Fraction(30000, 1001)
    for wrong in (0, -1, float("nan"), float("inf"), "x", True, 2000, None):
        with pytest.raises(zoo.ArgumentError, match="frame rate"):
            frame_rate(wrong)


def turned(content: bytes, matrix: tuple[int, ...]) -> bytes:
    """An MP4 whose track has another display matrix."""
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16
    fixed = struct.pack(">9i", *(value << (30 if index % 3 == 2 else 16) for index, value in enumerate(matrix)))
    return content[:place] + fixed + content[place + 36 :]


def test_films_are_shown_upright(tmp_path: Path) -> None:
    content = media.write_video(tmp_path / "film.mp4", CLIP, lossless=True).read_bytes()
    assert torch.equal(frames_of(turned(content, (1, 0, 0, 0, 1, 0, 0, 0, 1))), CLIP)
    # A quarter turn clockwise, as telephones write it.
    upright = frames_of(turned(content, (0, 1, 0, -1, 0, 0, 0, 0, 1)))
    assert torch.equal(upright, CLIP.rot90(-1, (2, 3)))
    assert torch.equal(frames_of(turned(content, (-1, 0, 0, 0, -1, 0, 0, 0, 1))), CLIP.rot90(2, (2, 3)))


def test_animations_lie_on_white() -> None:
    content = io.BytesIO()
    frames = [Image.new("RGBA", (8, 6), colour) for colour in ((255, 0, 0, 255), (0, 0, 255, 255))]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (4, 0, 8, 6))
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    found = frames_of(content.getvalue())
    assert found.shape == (3, 2, 6, 8)
    assert found[:, :, 0, 0].T.tolist() == [[1, -1, -1], [-1, -1, 1]]
    assert (found[..., 4:] == 1).all()


def test_sizes_and_fits(tmp_path: Path) -> None:
    for fit in ("crop", "stretch", "pad"):
        clip = media.prepare_video(LEVELS, fit=fit, size=(16, 24))
        assert clip.frames.shape == (7, 3, 16, 24) and clip.meta["height"] == 33
        image = media.prepare_image(LEVELS[3], (16, 24), fit)
        assert (clip.frames[3] - image.pixels).abs().max() < 1e-6
        back = media.restore_video(clip.frames.transpose(0, 1), clip.meta)
        assert back.shape == CLIP.shape
    for options in ({"fit": "crop"}, {"size": 16}, {"fit": "no", "size": 8}, {"fit": "pad", "size": (0, 3)}):
        with pytest.raises(zoo.ArgumentError):
            media.prepare_video(LEVELS, **options)


def test_limits_are_kept_before_anything_is_decoded(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "film.mp4", CLIP)
    with pytest.raises(zoo.InputError, match="7 frames, more than max_frames = 6"):
        media.read_video(path, max_frames=6)
    with pytest.raises(zoo.InputError, match="48 x 34 = 1632 pixels"):
        media.read_video(path, max_pixels=1600)
    # Matroska does not say how many frames there are.
    unknown = media.write_video(tmp_path / "film.mkv", CLIP)
    with pytest.raises(zoo.InputError, match="more than max_frames = 6"):
        list(media.read_video(unknown, max_frames=6).frames)
    large = np.broadcast_to(np.uint8(0), (2, 2160, 3840, 3))
    with pytest.raises(zoo.InputError, match="max_pixels"):
        media.prepare_video(large)
    assert len(list(media.read_video(path, fps=12, max_frames=4).frames)) == 4


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    content = media.write_video(tmp_path / "film.mp4", CLIP.repeat(1, 6, 1, 1)).read_bytes()
    for cut in (100, len(content) // 2, len(content) - 400):
        with pytest.raises(zoo.InputError, match=r"not a video file|truncated|damaged"):
            media.prepare_video(content[:cut])
    moving = tmp_path / "moving.mp4"
    with av.open(str(moving), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 34, "yuv420p"
        for _ in range(6):
            for frame in LEVELS[:, :34, :]:
                whole = np.pad(frame, ((0, 1), (0, 1), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(whole, format="rgb24")))
        container.mux(stream.encode())
    assert media.prepare_video(moving.read_bytes()).meta["frames"] == 42
    with pytest.raises(zoo.InputError, match=r"truncated|damaged"):
        media.prepare_video(moving.read_bytes()[: len(moving.read_bytes()) // 2])
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(zoo.InputError, match="no video track"):
        media.read_video(sound.getvalue())
    with pytest.raises(zoo.InputError, match="not a video file"):
        media.read_video(b"nothing of the kind" * 30)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(zoo.InputError, match="differ in size"):
        list(media.read_video([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))]).frames)
