"""Image metrics against known answers, a baseline that spends what it says, and runs over prefixes."""

from __future__ import annotations

import json
import math
import re
import urllib.error
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.linalg
import scipy.ndimage
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import zoo
from zoo import media
from zoo.cli import app
from zoo.errors import naming_item
from zoo.eval import photographs, reconstruct
from zoo.eval.modality import image as images
from zoo.eval.modality import networks, thumbnail
from zoo.eval.plan import make_plan
from zoo.eval.report import html as report
from zoo.eval.studies import prefixes
from zoo.spec import Spec
from zoo.tokenizer import Tokenizer, as_items

# A tokenizer without weights, whose prefixes decode.
LEVELS = 256


@dataclass(frozen=True)
class CosineConfig:
    """Sizes of the transform."""

    size: int = 64
    coefficients: int = 64


class CosineTokenizer(Tokenizer[CosineConfig]):
    """The discrete cosine transform of an image, one id per quantised coefficient, low frequencies first, channels in turn."""

    Config = CosineConfig
    family = "cosine"
    modality = "image"
    identity = ("basis",)

    def __init__(self, config: CosineConfig | None = None, *, name: str = "cosine") -> None:
        super().__init__(config or CosineConfig(), name)
        size = self.config.size
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        basis = torch.cos(torch.pi / size * (columns + 0.5) * rows) * (2 / size) ** 0.5
        basis[0] /= 2**0.5
        self.basis = torch.nn.Parameter(basis, requires_grad=False)
        by_frequency = torch.argsort((rows + columns + rows / size).reshape(-1))
        self.order = (by_frequency[:, None] + size * size * torch.arange(3)).reshape(-1)[: self.config.coefficients]
        # The mean of an image spans 2 * size in this scaling, and other coefficients less.
        self.step = 2.5 * size / LEVELS
        self.fingerprint = self.compute_fingerprint()

    @property
    def spec(self) -> Spec:
        size = self.config.size
        return Spec(
            self.name,
            self.family,
            "image",
            LEVELS,
            1,
            ordered=True,
            fingerprint=self.fingerprint,
            image_size=(size, size),
            max_tokens=self.config.coefficients,
        )

    def encode(self, items: Any, *, fit: str = "crop", progress: bool = False) -> Any:
        ids, meta = [], []
        for index, item in enumerate(as_items(items, batch_rank=4)):
            with naming_item(index):
                image = media.prepare_image(item, size=(self.config.size, self.config.size), fit=fit)
            coefficients = (self.basis @ image.pixels @ self.basis.T).reshape(-1)[self.order]
            ids.append((coefficients / self.step + LEVELS // 2).round().clamp(0, LEVELS - 1).long())
            meta.append(image.meta)
        return self.tokens(ids, meta)

    def decode(self, tokens: Any, *, seed: int = 0, noise: float = 0.0, progress: bool = False) -> list[Tensor]:
        images = []
        for ids in self._check(tokens).unpadded():
            coefficients = torch.zeros(3 * self.config.size**2)
            coefficients[self.order[: len(ids)]] = (ids - LEVELS // 2) * self.step
            image = self.basis.T @ coefficients.reshape(3, self.config.size, -1) @ self.basis
            grain = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
            images.append(image + noise * grain)
        return images

    def embed(self, tokens: Any) -> Tensor:
        ids = self._check(tokens).ids
        return (ids * (ids >= 0))[..., None].float()

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        return set(keys) == {"basis"}

    @classmethod
    def wanted(cls, key: str) -> bool:
        return True

    @classmethod
    def upstream_config(cls, raw: Mapping[str, Any]) -> None:
        return None

    @classmethod
    def convert_checkpoint(cls, state: Mapping[str, Tensor], config: CosineConfig | None) -> tuple[Any, dict[str, Tensor]]:
        return config or CosineConfig(), dict(state)


def scene(size: int = 64, seed: int = 0) -> Tensor:
    """A picture in [0, 1] with a colour gradient, an edge and some grain."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    picture = torch.stack([rows, columns, 0.5 + 0.4 * torch.sin(7 * rows + 5 * columns + seed)])
    picture[:, (rows + columns > 0.7 + 0.1 * seed) & (columns < 0.5)] *= 0.4
    return (picture + 0.03 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def noisy(picture: Tensor, level: float) -> Tensor:
    return (picture + level * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("decibels", [10, 20, 37])
def test_psnr_of_a_known_error(decibels: int) -> None:
    dark = torch.full((3, 32, 48), 0.25)
    assert images.psnr(dark, dark + 10 ** (-decibels / 20)) == pytest.approx(decibels, abs=1e-3)
    assert images.psnr(dark, dark) == 100


def ssim_by_hand(one: Tensor, other: Tensor) -> float:
    """Wang et al. 2004, with the window reflected at the borders."""

    def blurred(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        channels = [scipy.ndimage.gaussian_filter(channel, 1.5, truncate=3.5, mode="mirror") for channel in picture]
        return np.stack(channels)

    x, y = one.double().numpy(), other.double().numpy()
    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean())


@pytest.mark.parametrize("level", [0, 0.02, 0.1, 0.4])
def test_ssim(level: float) -> None:
    picture, other = scene(), noisy(scene(), level)
    assert images.ssim(picture, other) == pytest.approx(ssim_by_hand(picture, other), abs=1e-4)


def test_ms_ssim_falls_with_noise() -> None:
    picture = scene(176)
    values = [images.ms_ssim(picture, noisy(picture, level)) for level in (0, 0.05, 0.2, 0.5)]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9


def test_what_is_undefined_for_small_images() -> None:
    small = scene(10)
    assert images.ssim(small, small) is None
    assert images.ssim(scene(11), scene(11)) is not None
    assert images.ms_ssim(scene(175), scene(175)) is None
    assert images.ms_ssim(scene(176), scene(176)) is not None


def test_frechet_distance_of_gaussians() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(6, 6))
    one, other = generator.normal(size=(500, 6)) @ mixing, 0.3 + generator.normal(size=(400, 6))
    covariances = np.cov(one.T), np.cov(other.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = one.mean(0) - other.mean(0)
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert networks.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert networks.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- networks


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no way out; the folder of PyTorch's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "torch"


@pytest.fixture(scope="session")
def alexnet() -> dict[str, Tensor]:
    """The trunk of an AlexNet with random weights, as torchvision names them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
        state = {}
        for layer, (outputs, inputs, kernel) in shapes.items():
            state[f"features.{layer}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2)
            state[f"features.{layer}.bias"] = torch.randn(outputs) * 0.1
        return state


def lpips_by_hand(state: dict[str, Tensor], one: Tensor, other: Tensor) -> float:
    """Equation 1 of arXiv 1801.03924 with the published heads."""
    import lpips

    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    strides = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
    pictures = [(2 * picture[None] - 1 - shift[:, None, None]) / scale[:, None, None] for picture in (one, other)]
    total = 0.0
    for index, (layer, (stride, padding)) in enumerate(strides.items()):
        if layer in (3, 6):
            pictures = [torch.nn.functional.max_pool2d(picture, 3, 2) for picture in pictures]
        weight, bias = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
        pictures = [torch.nn.functional.conv2d(picture, weight, bias, stride, padding).relu() for picture in pictures]
        unit = [picture / picture.square().sum(1, keepdim=True).sqrt() for picture in pictures]
        total += float(((unit[0] - unit[1]).square() * heads[f"lin{index}.model.1.weight"]).sum(1).mean())
    return total


def load(name: str, path: Path | None) -> Any:
    network = images.METRICS[name].network
    assert network is not None
    return network.load(path, torch.device("cpu"), False)


def test_lpips_from_a_given_trunk(alexnet: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(alexnet, tmp_path / "alexnet.pth")
    measure = load("lpips", tmp_path / "alexnet.pth")
    picture, other = scene(), noisy(scene(), 0.2)
    assert measure(picture, other) == pytest.approx(lpips_by_hand(alexnet, picture, other), rel=1e-4)
    assert measure(picture, picture) == 0
    assert measure(scene(24), scene(24)) is None


def test_a_wrong_trunk_is_named(alexnet: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(zoo.WeightsError, match="neither torchvision's AlexNet nor its VGG-16"):
        load("lpips", tmp_path / "other.pth")
    torch.save({key: tensor for key, tensor in alexnet.items() if "10" not in key}, tmp_path / "short.pth")
    with pytest.raises(zoo.WeightsError, match="lacks layers of alex: slice5"):
        load("lpips", tmp_path / "short.pth")
    with pytest.raises(zoo.WeightsError, match="does not exist"):
        load("rfid", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_similarity_by_a_network_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    if name == "dino":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision)).eval()
    else:
        text = {**sizes, "vocab_size": 9, "intermediate_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "intermediate_size": 32}, projection_dim=8)
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size=28, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path)
    measure = load(name, tmp_path)
    picture, other = scene(28), noisy(scene(28), 0.3)
    with torch.inference_mode():
        pixels = torch.stack([picture, other]).sub(0.5).div(0.25)
        if name == "dino":
            vectors = model(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            vectors = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    expected = vectors[0] @ vectors[1] / vectors[0].norm() / vectors[1].norm()
    assert measure(picture, other) == pytest.approx(float(expected), abs=1e-4)
    assert measure(picture, other) < 0.9999
    assert measure(picture, picture) == pytest.approx(1, abs=1e-5)
    with pytest.raises(zoo.InputError, match="is not a folder with an image model of transformers"):
        load(name, tmp_path / "elsewhere")
    weights = {key: tensor for key, tensor in model.state_dict().items() if "norm" not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(zoo.WeightsError, match="lacks weights"):
        load(name, tmp_path)


def test_inception_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with monkeypatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *arguments, **options: {})
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        original = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(original.state_dict(), tmp_path / "inception.pth")
    features = load("rfid", tmp_path / "inception.pth")(scene())
    levels = torch.from_numpy(np.rint(scene().numpy() * 255).astype(np.uint8))
    assert features.shape == (2048,)
    assert np.allclose(features, original(levels[None])[0][0].numpy(), atol=1e-5)
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "inception.pth")
    with pytest.raises(zoo.WeightsError, match="not the Inception network"):
        load("rfid", tmp_path / "inception.pth")


def plan_of(**options: Any) -> Any:
    settings = {"metrics": None, "networks": {}, "encode": {}, "decode": {}, "prefixes": None}
    return make_plan(CosineTokenizer(), **(settings | options))


def test_networks_that_are_not_there_are_skipped_with_a_reason(no_network: Path) -> None:
    plan = plan_of()
    assert list(plan.functions) == ["psnr", "ssim", "ms_ssim"]
    assert list(plan.skipped) == ["lpips", "dino", "clip", "rfid"]
    assert "--network lpips fetches torchvision's AlexNet" in plan.skipped["lpips"]
    assert "--network dino=PATH takes a folder" in plan.skipped["dino"]
    asked = plan_of(networks={"lpips": None, "dino": None}).skipped
    assert asked["lpips"] == "torchvision's AlexNet (233 MB) cannot be fetched: <urlopen error no route to host>"
    assert "facebook/dinov2-base on the Hub (346 MB) cannot be fetched" in asked["dino"]


def test_networks_in_the_cache_are_used(no_network: Path, alexnet: dict[str, Tensor]) -> None:
    (no_network / "checkpoints").mkdir(parents=True)
    torch.save(alexnet, no_network / "checkpoints" / "alexnet-owt-7be5be79.pth")
    assert "lpips" in plan_of().functions


# ---------------------------------------------------------------------------------------------------------------- baseline


def test_bits_of_a_layout() -> None:
    assert thumbnail.Layout((5, 6, 5)).bits(3, 4) == 12 * 16
    assert thumbnail.Layout((4, 3, 2), 2).bits(5, 4) == 20 * 4 + 3 * 2 * 5
    assert thumbnail.Layout((6, 6, 6), 4).bits(1, 1) == 18


@pytest.mark.parametrize("layout", thumbnail.LAYOUTS, ids=str)
def test_samples_take_no_more_levels_than_their_bits(layout: thumbnail.Layout) -> None:
    # A grid of the picture's own size is quantised and nothing else.
    if layout.subsampling == 1:
        picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
        coded = thumbnail.coded(picture, layout, 96, 96)
        assert [len(channel.unique()) for channel in coded] == [2**depth for depth in layout.depths]
        steps = torch.tensor([2**depth - 1 for depth in layout.depths])[:, None, None]
        assert (coded - picture).abs().mul(steps).max() <= 0.5001
    else:
        coded = thumbnail.coded(torch.linspace(0, 1, 96).expand(3, 8, 96), layout, 8, 96)
        assert len(coded.mean(0).mul(2**10).round().unique()) == 2 ** layout.depths[0]
        assert (coded - coded[:1]).abs().max() < 1e-5, "grey stays grey"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (200, 30)])
def test_the_largest_grid_is_taken(height: int, width: int) -> None:
    for layout in thumbnail.LAYOUTS:
        for bits in (16, 100, 1000, 4096):
            size = thumbnail.largest_size(layout, height, width, bits)
            if size is None:
                assert layout.bits(1, 1) > bits
                continue
            rows, columns = size
            assert layout.bits(rows, columns) <= bits
            assert abs(rows - columns * height / width) < 1 or abs(columns - rows * width / height) < 1
            assert layout.bits(rows + 1, math.ceil((rows + 1) * width / height)) > bits or rows == height
    assert thumbnail.largest_size(thumbnail.LAYOUTS[0], 8, 8, 10**6) == (8, 8)


def test_thumbnails_get_better_with_bits_and_stay_within_them() -> None:
    picture = scene()
    found = [thumbnail.thumbnail(picture, 2**power) for power in range(2, 13)]
    for power, small in enumerate(found, start=2):
        assert small.bits <= 2**power
        assert small.layout is None or small.bits == small.layout.bits(small.height, small.width)
    assert found[0].layout is None, "4 bits do not buy a pixel"
    errors = [float((small.image - picture).square().mean()) for small in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[2] / 3
    for layout in thumbnail.LAYOUTS:
        size = thumbnail.largest_size(layout, 64, 64, 1024)
        assert size is not None
        assert float((thumbnail.coded(picture, layout, *size) - picture).square().mean()) >= errors[8] - 1e-9


def test_sixteen_bits_are_one_pixel_of_high_colour() -> None:
    colour = torch.tensor([7 / 31, 44 / 63, 29 / 31])[:, None, None].expand(3, 40, 60)
    small = thumbnail.thumbnail(colour, 16)
    assert (str(small.layout), small.height, small.width, small.bits) == ("RGB 5-6-5", 1, 1, 16)
    assert torch.allclose(small.image, colour, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(4):
        levels = (scene(64 + 16 * index, index) * 255).byte().permute(1, 2, 0)[: 64 + 8 * index]
        path = tmp_path / "data" / f"item-{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(levels.numpy()).save(path)
    return tmp_path / "data"


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the page, whose plots take longer than small items do."""
    monkeypatch.setattr("zoo.eval.report.html.write", lambda *arguments: None)


def run(folder: Path, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    settings = {"metrics": ["psnr", "ssim"], "progress": False}
    tokenizer = tokenizer or CosineTokenizer(CosineConfig(size=48, coefficients=48))
    return reconstruct.run(tokenizer, folder, folder.parent / "report", **(settings | options))


def psnr_by_hand(one: Tensor, other: Tensor) -> float:
    return float(-10 * np.log10(np.mean((one.double().numpy() - other.double().clamp(-1, 1).numpy()) ** 2) / 4))


def test_curve_over_prefixes(folder: Path, no_report: None) -> None:
    tokenizer = CosineTokenizer(CosineConfig(size=48, coefficients=48))
    summary = run(folder, tokenizer)
    assert [point["tokens"] for point in summary["curve"]] == [1, 2, 4, 8, 16, 32, 48]
    assert [point["bits"] for point in summary["curve"]] == [8, 16, 32, 64, 128, 256, 384]
    assert [point["whole"] for point in summary["curve"]] == [False] * 6 + [True]

    pictures = [media.prepare_image(path, size=(48, 48)).pixels for path in sorted(folder.iterdir())]
    tokens = tokenizer.encode(pictures)
    for point in summary["curve"]:
        decoded = tokenizer.decode(tokens.truncate(round(point["tokens"])))
        expected = np.mean([psnr_by_hand(*pair) for pair in zip(pictures, decoded, strict=True)])
        assert point["metrics"]["psnr"]["ours"] == pytest.approx(expected, abs=1e-3)
        rivals = [thumbnail.thumbnail((picture + 1) / 2, round(point["bits"])).image * 2 - 1 for picture in pictures]
        expected = np.mean([psnr_by_hand(*pair) for pair in zip(pictures, rivals, strict=True)])
        assert point["metrics"]["psnr"]["baseline"] == pytest.approx(expected, abs=1e-3)
    last = summary["curve"][-1]["metrics"]["ssim"]["ours"]
    assert last == pytest.approx(summary["metrics"]["ssim"]["ours"]["mean"])

    out = folder.parent / "report"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(summary))
    rows = pyarrow.parquet.read_table(out / "prefixes.parquet").to_pylist()
    assert len(rows) == 4 * 7
    assert {row["tokens"]: row["bits"] for row in rows} == {1: 8, 2: 16, 4: 32, 8: 64, 16: 128, 32: 256, 48: 384}
    assert rows[6]["psnr"] == pytest.approx(psnr_by_hand(pictures[0], tokenizer.decode(tokens)[0]), abs=1e-3)
    items = pyarrow.parquet.read_table(out / "items.parquet").to_pylist()
    assert items[0]["ids"] == tokens.tolist()[0]
    assert (items[0]["width"], items[0]["height"], items[0]["bits"]) == (48, 48, 384)
    assert sorted(path.name for path in out.iterdir()) == ["items.parquet", "metrics.json", "prefixes.parquet"]


def test_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    summary = run(folder, metrics=["psnr", "ms_ssim", "lpips"], encode={"fit": "pad"}, decode={"seed": 3})
    assert (summary["items"], summary["failed"]) == (5, 1)
    assert summary["options"] == {"encode": {"fit": "pad"}, "decode": {"seed": 3, "noise": 0.0}}
    assert summary["metrics"]["ms_ssim"]["ours"] is None, "48 pixels are too few"
    assert summary["tokens"]["bits_per_pixel"] == pytest.approx(48 * 8 / 48**2)
    assert len(summary["tokens"]["position_entropy_bits"]) == 48
    html = (folder.parent / "report" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?://(?!www\.w3\.org)""", html), "it must need nothing else"
    assert 'type="range" min="0" max="6" value="6"' in html
    assert "the first 16 tokens, 128 bits" in html
    assert "fit pad, seed 3" in html
    assert "undefined for these items" in html
    [frames] = {len(json.loads(found)["frames"]) for found in re.findall(r'"application/json">(.*?)</script>', html)}
    assert frames == 7
    assert html.count('class="decoded"') == 4
    report.print_summary(summary, folder.parent / "report")
    printed = " ".join(capsys.readouterr().out.split())
    assert "48 × 48 pixels, 48 tokens or 384 bits per image" in printed
    assert "lpips skipped: needs a network that is not here" in printed


def test_a_set_without_a_readable_image(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"not an image")
    summary = run(folder, networks={"rfid": colours}, metrics=["psnr", "rfid"])
    assert (summary["items"], summary["failed"]) == (4, 4)
    assert summary["metrics"] == {name: {"ours": None, "baseline": None} for name in ("psnr", "rfid")}
    assert "item-3.png" in (folder.parent / "report" / "report.html").read_text()


def test_images_are_compared_as_the_tokenizer_sees_them(folder: Path, no_report: None) -> None:
    lossless = CosineTokenizer(CosineConfig(size=48, coefficients=3 * 48 * 48))
    lossless.step = 0.01
    for fit in ("crop", "pad", "stretch"):
        summary = run(folder, lossless, encode={"fit": fit}, prefixes=[], limit=2)
        item = pyarrow.parquet.read_table(folder.parent / "report" / "items.parquet").to_pylist()[1]
        prepared = media.prepare_image(item["file"], size=(48, 48), fit=fit).pixels
        estimate = lossless.decode(lossless.encode(prepared))[0]
        assert item["psnr"] == pytest.approx(psnr_by_hand(prepared, estimate), abs=1e-3)
        assert len(summary["curve"]) == 1


def test_chosen_prefixes(folder: Path, no_report: None) -> None:
    summary = run(folder, prefixes=[3, 47, 48, 1000])
    assert [point["tokens"] for point in summary["curve"]] == [3, 47, 48]
    with pytest.raises(zoo.InputError, match="at least 1 token"):
        run(folder, prefixes=[0])


def test_decoding_options_reach_the_decoder(folder: Path, no_report: None) -> None:
    clean, grainy = (run(folder, decode={"noise": noise}, prefixes=[]) for noise in (0.0, 1.0))
    assert grainy["metrics"]["psnr"]["ours"]["mean"] < clean["metrics"]["psnr"]["ours"]["mean"] - 3


def colours(picture: Tensor) -> np.ndarray[Any, Any]:
    """Features that a test can follow: mean and spread of the channels."""
    return torch.cat([picture.mean((1, 2)), picture.std((1, 2))]).numpy()


def test_a_metric_of_the_whole_set_survives_an_interruption(
    folder: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"metrics": ["psnr", "rfid"], "networks": {"rfid": colours}}
    expected = run(folder, **options)
    assert expected["metrics"]["rfid"]["ours"]["n"] == 4
    tokenizer = CosineTokenizer(CosineConfig(size=48, coefficients=48))
    pictures = [media.prepare_image(path, size=(48, 48)).pixels for path in sorted(folder.iterdir())]
    decoded = tokenizer.decode(tokenizer.encode(pictures).truncate(4))
    sets = [np.stack([colours((image.clamp(-1, 1) + 1) / 2) for image in some]) for some in (pictures, decoded)]
    assert expected["curve"][2]["metrics"]["rfid"]["ours"] == pytest.approx(networks.frechet_distance(*sets), rel=1e-4)

    measure, measured = reconstruct._measure, []

    def interrupted(*arguments: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arguments[1])
        return measure(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reconstruct, "_measure", interrupted)
        run(folder, **options)
    monkeypatch.setattr(reconstruct, "_measure", lambda *arguments: (measured.append(arguments[1]), measure(*arguments))[1])
    summary = run(folder, **options)
    assert len(measured) == 4
    assert [summary[key] for key in ("metrics", "curve")] == [expected[key] for key in ("metrics", "curve")]
    assert not list((folder.parent / "report").glob("items.part*"))
    assert run(folder, limit=1, **options)["metrics"]["rfid"]["ours"] is None, "a single image has no spread"


def test_reported_figures_stand_beside_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo.info("wavtokenizer-tiny").model_dump() | {
        "name": "cosine",
        "reported": [
            {"metric": "PSNR", "value": 18.47, "data": "ImageNet val", "source": "a paper"},
            {"metric": "PSNR, 16 tokens", "value": 15.5, "data": "ImageNet val", "source": "a paper"},
            {"metric": "gFID", "value": 1.86, "data": "ImageNet val", "source": "another paper"},
        ],
    }
    monkeypatch.setattr(zoo.registry, "entries", lambda: {"cosine": zoo.Entry.model_validate(entry)})
    summary = run(folder)
    assert [figure["value"] for figure in summary["reported"]] == [18.47, 15.5, 1.86]
    html = (folder.parent / "report" / "report.html").read_text()
    cells = [
        re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(<td>(?:PSNR|PSNR, 16 tokens|gFID)</td>.*?)</tr>", html)
    ]
    ours = f"{summary['metrics']['psnr']['ours']['mean']:.3f}"
    assert cells == [
        ["PSNR", "18.47", ours, "ImageNet val", "a paper"],
        ["PSNR, 16 tokens", "15.5", f"{summary['curve'][4]['metrics']['psnr']['ours']:.3f}", "ImageNet val", "a paper"],
        ["gFID", "1.86", "–", "ImageNet val", "another paper"],
    ]
    assert "Reported by others" in html


def test_a_continuous_tokenizer_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(CosineTokenizer().spec, vocab_size=0, frame=None)
    monkeypatch.setattr(CosineTokenizer, "spec", spec)
    with pytest.raises(zoo.InputError, match="latents instead of tokens"):
        plan_of()


def test_command_line(folder: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", lambda name, device=None: CosineTokenizer(name=name))
    out = folder.parent / "r"
    arguments = ["cosine", "--data", str(folder), "--out", str(out), "--metrics", "psnr", "--limit", "1", "--no-resume"]
    done = CliRunner().invoke(app, ["eval", *arguments, "--prefixes", "4,all", "--seed", "5", "--fit", "stretch"])
    assert done.exit_code == 0 and "report.html" in done.output
    summary = json.loads((out / "metrics.json").read_text())
    assert [point["tokens"] for point in summary["curve"]] == [4, 64]
    assert summary["options"] == {"encode": {"fit": "stretch"}, "decode": {"seed": 5, "noise": 0.0}}
    for wrong, reason in ((("--prefixes", "few"), "token counts such as"), (("--steps", "5"), "takes no steps to decode")):
        refused = CliRunner().invoke(app, ["eval", *arguments, *wrong])
        assert isinstance(refused.exception, zoo.InputError) and reason in str(refused.exception)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_metrics_on_a_gpu_are_those_of_the_cpu() -> None:
    picture, other = scene(176) * 2 - 1, noisy(scene(176), 0.1) * 2 - 1
    spec = CosineTokenizer().spec
    for name in ("psnr", "ssim", "ms_ssim"):
        function = images.METRICS[name].function
        values = [images.measure(function, spec, picture.to(device), other.to(device)) for device in ("cpu", "cuda")]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
    rivals = [images.baseline(picture.to(device), spec, 1024).cpu() for device in ("cpu", "cuda")]
    assert torch.allclose(*rivals, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_photographs_are_those_of_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {path.stem for path in Path(skimage.data.__file__).parent.iterdir()}
    files = {"immunohistochemistry": "ihc", "motorcycle": "motorcycle_left"}
    assert {files.get(name, name) for name in photographs.PHOTOGRAPHS} <= shipped, "nothing is downloaded"
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", ("chelsea", "motorcycle"))
    photographs.main(tmp_path / "photographs")
    written = sorted((tmp_path / "photographs").iterdir())
    assert [path.name for path in written] == ["chelsea.png", "motorcycle.png"]
    assert np.array_equal(np.asarray(Image.open(written[0])), skimage.data.chelsea())
    assert np.array_equal(np.asarray(Image.open(written[1])), skimage.data.stereo_motorcycle()[0])


def test_picture_of_prefixes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CosineTokenizer(CosineConfig(size=64, coefficients=48))
    sheet = prefixes.picture(tokenizer, folder / "item-2.png", lengths=(1, 16, 48, 99))
    across = (sheet.width - prefixes._GAP) // (prefixes._TILE + prefixes._GAP)
    assert across == 4, "1, 16 and all 48 tokens, and the original"
    tokens = tokenizer.encode(folder / "item-2.png")
    for column, length in enumerate((1, 16, 48)):
        left = prefixes._GAP + column * (prefixes._TILE + prefixes._GAP)
        tile = sheet.crop((left, prefixes._GAP, left + prefixes._TILE, prefixes._GAP + prefixes._TILE)).resize((64, 64))
        expected = tokenizer.decode(tokens.truncate(length))[0].clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 0)
        assert np.abs(np.asarray(tile) - expected.numpy()).mean() < 2

    monkeypatch.setattr(zoo, "load", lambda name, device=None: tokenizer)
    prefixes.main("cosine", folder / "item-0.png", tmp_path / "p.png", tokens="1,4", baseline=True)
    taller = Image.open(tmp_path / "p.png")
    assert (taller.width, taller.height > 1.8 * sheet.height) == (sheet.width, True)


def test_only_ordered_image_tokenizers_have_prefixes(folder: Path) -> None:
    from small_models import small_wavtokenizer

    with pytest.raises(zoo.InputError, match="no image tokenizer whose prefixes decode"):
        prefixes.picture(small_wavtokenizer(), folder / "item-0.png")
