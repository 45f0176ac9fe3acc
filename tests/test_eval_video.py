"""Video: metrics, the thumbnails of the same bits, and a run with its report."""

from __future__ import annotations

import base64
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from small_models_adapters_video import small_vidtok
from zoo import media
from zoo.eval import reconstruct
from zoo.eval.modality import video
from zoo.eval.modality.base import Measures

CLIP = torch.rand(3, 6, 16, 24, generator=torch.Generator().manual_seed(0))


def test_it_is_a_modality() -> None:
    assert isinstance(video, Measures)


def test_metrics() -> None:
    assert video.psnr(CLIP, CLIP) == video.frame_psnr(CLIP, CLIP) == video.temporal_psnr(CLIP, CLIP) == 100
    # One frame off by 0.1, the others right: the clip's error is a sixth of that frame's.
    off = CLIP.clone()
    off[:, 2] += 0.1
    assert video.psnr(CLIP, off) == pytest.approx(20 + 10 * np.log10(6), abs=1e-3)
    assert video.frame_psnr(CLIP, off) == pytest.approx((5 * 100 + 20) / 6, abs=1e-3)
    # Two of the five differences are off.
    assert video.temporal_psnr(CLIP, off) == pytest.approx(20 + 10 * np.log10(5 / 2), abs=1e-3)
    # A clip that is too bright throughout moves as it should.
    assert video.temporal_psnr(CLIP, CLIP + 0.1) > 90 and video.psnr(CLIP, CLIP + 0.1) == pytest.approx(20, abs=1e-3)
    assert video.temporal_psnr(CLIP[:, :1], CLIP[:, :1]) is None
    assert video.ssim(CLIP, CLIP) == pytest.approx(1) and video.ssim(CLIP[..., :8], CLIP[..., :8]) is None


def test_the_baseline_spends_its_bits_on_frames_or_on_pixels() -> None:
    small_vidtok_spec = small_vidtok().spec
    still = CLIP[:, :1].expand(3, 8, 16, 24)
    moving = torch.stack([CLIP[:, 0].roll(5 * shift, 2) for shift in range(8)], dim=1)
    for clip, holds in ((still, True), (moving, False)):
        for bits in (0, 200, 20_000):
            shown = video.baseline((clip * 2 - 1, Fraction(24)), small_vidtok_spec, bits)
            assert shown.shape == clip.shape and shown.min() >= -1 and shown.max() <= 1
        same = [bool(torch.equal(shown[:, place], shown[:, place + 1])) for place in range(7)]
        assert all(same) if holds else not all(same)


def test_a_run_and_its_report(tmp_path: Path) -> None:
    tokenizer = small_vidtok()
    smooth = torch.sin(torch.arange(3 * 6 * 16 * 24) / 400).reshape(3, 6, 16, 24)
    (tmp_path / "films").mkdir()
    media.write_video(tmp_path / "films" / "a.mkv", smooth, 12)
    media.write_video(tmp_path / "films" / "b.mp4", smooth[:, :3], 24)
    (tmp_path / "films" / "c.mp4").write_bytes(b"no film")
    summary = reconstruct.run(tokenizer, tmp_path / "films", tmp_path / "out", progress=False)
    assert summary["failed"] == 1 and summary["frames"] == 9 and summary["seconds"] == pytest.approx(0.625)
    assert {"psnr", "frame_psnr", "ssim", "temporal_psnr"} <= summary["metrics"].keys() and "fvd" in summary["skipped"]
    expected = (2 * 24 + 24) * 12 / 0.625
    assert summary["tokens"]["bits_per_second"] == pytest.approx(expected)
    item = media.prepare_video(tmp_path / "films" / "a.mkv")
    [decoded] = tokenizer.reconstruct(tmp_path / "films" / "a.mkv")
    original = media.pixels_of(item.frames).transpose(0, 1)
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["psnr"]["ours"]
    assert rows["n"] == 2
    own = video.psnr((original + 1) / 2, (decoded.clamp(-1, 1) + 1) / 2)
    assert own == pytest.approx(rows["mean"], abs=10)
    page = (tmp_path / "out" / "report.html").read_text()
    films = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", page)
    assert len(films) == 2
    frames = [torch.stack(list(media.read_video(base64.b64decode(film)).frames), dim=1) for film in films]
    assert sorted(film.shape[1] for film in frames) == [3, 6] and all(film.shape[3] == 3 * 24 for film in frames)
    assert page.count("data:image/webp") >= 2


def test_features_of_clips_from_python(tmp_path: Path) -> None:
    for name, frames in (("a", 3), ("b", 5)):
        media.write_video(tmp_path / f"{name}.mkv", CLIP[:, :1].expand(3, frames, 16, 24) * 2 - 1)

    def features(clip: torch.Tensor) -> np.ndarray:
        return np.array([float(clip.mean()), float(clip.std()), clip.shape[1]], np.float32)

    summary = reconstruct.run(
        small_vidtok(), tmp_path, tmp_path / "out", metrics=["fvd"], networks={"fvd": features}, progress=False
    )
    assert summary["metrics"]["fvd"]["ours"]["value"] > 0
    with pytest.raises(zoo.WeightsError, match="from Python"):
        reconstruct.run(small_vidtok(), tmp_path, tmp_path / "out", networks={"fvd": str(tmp_path / "a.mkv")}, progress=False)
