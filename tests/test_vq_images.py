"""Vector-quantised image autoencoders against the classes of transformers and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from hub_server import HubServer
from small_models_adapters_image import HALF, VQ, picture, save, small_vq
from zoo import registry
from zoo.checkpoint import require_complete
from zoo.codecs.vq_images import VQImages, VQImagesConfig

SIZES = [(32, 32), (33, 47)]
PREPROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make() for kind, make in VQ.items()}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, VQImages]:
    return {kind: small_vq(kind) for kind in VQ}


def cells(image: Tensor, factor: int = 4) -> Tensor:
    """A batch of the image, continued to whole cells."""
    return F.pad(image[None], (0, -image.shape[2] % factor, 0, -image.shape[1] % factor), mode="replicate")


@torch.no_grad()
def ids_of(kind: str, model: Any, image: Tensor) -> Tensor:
    """The ids that the class gives a whole number of cells; Janus' with the search of its original code."""
    if kind == "emu3":
        return model.encode(image, torch.tensor([image.shape[2:]])).image_tokens[0].flatten()
    if kind == "janus":
        vectors = F.normalize(model.quant_conv(model.encoder(image)), dim=1).double()
        return torch.einsum("bchw,kc->bhwk", vectors, F.normalize(model.quantize.embedding.weight.double())).argmax(3).flatten()
    return model.quantize(model.encode(image).latents)[2][2]


@torch.no_grad()
def image_of(kind: str, model: Any, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    if kind == "emu3":
        return model.decode(ids.view(1, *grid))[0]
    if kind == "janus":
        return model.decode(ids[None])[0]
    latents = model.quantize.get_codebook_entry(ids, (1, *grid, 4))
    if kind == "amused":
        return model.decode(ids, force_not_quantize=True, shape=(1, *grid, 4)).sample[0]
    return model.decode(latents, force_not_quantize=True).sample[0]


@pytest.mark.parametrize("kind", VQ)
def test_equals_the_class(kind: str, models: dict[str, Any], tokenizers: dict[str, VQImages]) -> None:
    model, tokenizer = models[kind], tokenizers[kind]
    for size in SIZES:
        image = picture(*size)
        whole = cells(image)
        expected = ids_of(kind, model, whole)
        assert len(expected.unique()) >= 8
        tokens = tokenizer.encode(image)
        assert torch.equal(tokens.ids[0], expected)
        assert tokens.meta[0]["rows"] == whole.shape[2] // 4
        if kind == "janus" and size != SIZES[0]:
            continue
        decoded = image_of(kind, model, expected, (whole.shape[2] // 4, whole.shape[3] // 4))
        [found] = tokenizer.decode(tokens)
        assert found.shape == image.shape
        assert (found - decoded[:, : size[0], : size[1]]).abs().max() < 1e-4
        [found] = tokenizer.decode(tokens, size=None)
        assert (found - decoded).abs().max() < 1e-4


def test_janus_searches_as_the_original_does(models: dict[str, Any]) -> None:
    model = VQ["janus"]()
    image = picture(32, 32)
    with torch.no_grad():
        raw = model.encode(image[None]).image_tokens
        assert (raw != ids_of("janus", model, image[None])).any()
        model.quantize.embedding.weight.copy_(F.normalize(model.quantize.embedding.weight))
        raw = model.encode(image[None]).image_tokens
    config = model.config.to_dict() | {PREPROCESSOR: HALF}
    tokenizer = zoo.load_upstream("vq_images", config, model.state_dict())
    assert torch.equal(tokenizer.encode(image).ids[0], raw)
    assert torch.allclose(tokenizer.embed(tokenizer.encode(image)).norm(dim=2), torch.ones(1, 64))


@pytest.mark.parametrize("kind", VQ)
def test_every_image_gets_what_it_gets_alone(kind: str, tokenizers: dict[str, VQImages]) -> None:
    tokenizer = tokenizers[kind]
    images = [picture(20, 24), picture(5, 9, 1), picture(20, 24, 2), picture(1, 1, 3), picture(9, 5, 4)]
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens)
    for index, image in enumerate(images):
        alone = tokenizer.encode(image)
        assert torch.equal(alone.unpadded()[0], tokens.unpadded()[index])
        assert decoded[index].shape == image.shape
        assert torch.equal(tokenizer.decode(alone)[0], decoded[index])
    swapped = tokenizer.decode(tokens.unpadded()[4], grid=(3, 2))
    assert torch.equal(swapped[0][:, :9, :5], decoded[4])
    with pytest.raises(zoo.InputError, match=r"no square: pass grid"):
        tokenizer.decode(tokens.unpadded()[4])
    with pytest.raises(zoo.InputError, match=r"6 ids are no grid of 2 x 2"):
        tokenizer.decode(tokens.unpadded()[4], grid=(2, 2))


def test_pixels_are_normalised_as_the_processor_does(models: dict[str, Any]) -> None:
    from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

    model = models["emu3"]
    levels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    # The means of CLIP, which the class has by default.
    processor = Emu3ImageProcessor(do_resize=False)
    pixels = torch.as_tensor(np.stack(processor(levels, return_tensors="np")["pixel_values"])).float()
    expected = ids_of("emu3", model, pixels.reshape(1, 3, 24, 32))
    raw = model.config.to_dict() | {PREPROCESSOR: processor.to_dict()}
    tokenizer = zoo.load_upstream("vq_images", raw, model.state_dict())
    tokens = tokenizer.encode(levels)
    assert torch.equal(tokens.ids[0], expected)
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    decoded = (image_of("emu3", model, expected, (6, 8)) * std + mean) * 2 - 1
    assert (tokenizer.decode(tokens)[0] - decoded).abs().max() < 1e-4
    for change, reason in (
        ({"do_rescale": False}, "scaled to"),
        ({"image_mean": None}, "cannot be used"),
        ({"image_std": [0.5, 0.5, 0.0]}, "positive"),
        ({"image_std": [0.5]}, "three numbers"),
    ):
        with pytest.raises(zoo.WeightsError, match=reason):
            zoo.load_upstream("vq_images", raw | {PREPROCESSOR: processor.to_dict() | change}, model.state_dict())
    with pytest.raises(zoo.WeightsError, match=f"needs {PREPROCESSOR}"):
        zoo.load_upstream("vq_images", model.config.to_dict(), model.state_dict())


def test_the_original_configuration_of_emu3(models: dict[str, Any], tokenizers: dict[str, VQImages]) -> None:
    original = {
        "model_type": "Emu3VisionVQ",
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
        "z_channels": 4,
        "double_z": False,
        "embed_dim": 4,
        "codebook_size": 300,
        "dropout": 0.0,
        "temporal_downsample_factor": 4,
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
        PREPROCESSOR: HALF,
    }
    assert VQImages.checkpoint.config(original) == tokenizers["emu3"].config


# ------------------------------------------------------------------------------------------------------------------- files


def entry(name: str, repo: str, file: str, config: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "family": "vq_images",
        "modality": "image",
        "description": "for tests",
        "config": settings,
        "weights": {"source": "hub", "repo": repo, "file": file, "config": config},
        "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
        "card": "vq_images.md",
    }


def test_a_repository_with_code_in_it(
    models: dict[str, Any],
    tokenizers: dict[str, VQImages],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save(models["emu3"], tmp_path / "emu3")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("raise SystemExit")
    server.repo("lab/emu3").commit({path.name: path.read_bytes() for path in folder.iterdir()})
    image = picture(16, 12)
    expected = tokenizers["emu3"].encode(image).ids
    for address in ("hf-hub:lab/emu3", f"local-dir:{folder}"):
        assert torch.equal(zoo.load(address).encode(image).ids, expected)

    folder = save(models["movq"], tmp_path / "movq")
    server.repo("lab/pipeline").commit({f"movq/{path.name}": path.read_bytes() for path in folder.iterdir()})
    entries = [
        entry("one", "lab/emu3", "model.safetensors", "config.json", {"network": "emu3", "library": {"base_channels": 32}}),
        entry("two", "lab/pipeline", "movq/diffusion_pytorch_model.safetensors", "movq/config.json", {"network": "vqmodel"}),
    ]
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump(entries))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    assert torch.equal(zoo.load("one").encode(image).ids, expected)
    assert "used: library: codebook_size is 300, not 32768, channel_multiplier is [1, 2, 2], not" in caplog.text
    for parts, absent in (("encoder", "decoder"), ("decoder", "encoder")):
        half = zoo.load("one", parts=parts)
        assert half.spec.parts == (parts,) and not any(key.startswith(absent) for key in half.state_dict())
    assert torch.equal(zoo.load("two").encode(image).ids, tokenizers["movq"].encode(image).ids)
    fetched = {path.rpartition("/")[2] for _, path, _ in server.requests if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", PREPROCESSOR, "diffusion_pytorch_model.safetensors"}

    saved = zoo.load("one").save_pretrained(tmp_path / "saved")
    again = zoo.load(f"local-dir:{saved}")
    assert torch.equal(again.encode(image).ids, expected) and again.config == tokenizers["emu3"].config


def test_janus_inside_a_language_model(
    models: dict[str, Any],
    tokenizers: dict[str, VQImages],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = {f"model.vqmodel.{key}": tensor for key, tensor in models["janus"].state_dict().items()}
    for name in ("model.language_model.layers.0.mlp.weight", "model.vision_model.post_layernorm.weight", "lm_head.weight"):
        state[name] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "janus", "vq_config": models["janus"].config.to_dict(), "text_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / PREPROCESSOR).write_text(json.dumps(HALF))
    files = ["model.safetensors", "config.json", PREPROCESSOR]
    server.repo("lab/janus").commit({name: (tmp_path / name).read_bytes() for name in files})
    settings = {"network": "janus", "library": dict(tokenizers["janus"].config.library)}
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry("small", "lab/janus", files[0], files[1], settings)]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    image = picture(32, 32)
    expected = tokenizers["janus"].encode(image).ids
    for tokenizer in (zoo.load("small"), zoo.load("hf-hub:lab/janus")):
        assert torch.equal(tokenizer.encode(image).ids, expected)
        assert tokenizer.fingerprint == tokenizers["janus"].fingerprint
    path = zoo.hub.convert("small")
    assert load_file(path).keys() == tokenizers["janus"].state_dict().keys()
    assert torch.equal(zoo.load("small").encode(image).ids, expected)
    half = zoo.load("small", parts="encoder")
    assert half.fingerprint == tokenizers["janus"].fingerprint and torch.equal(half.encode(image).ids, expected)
    with pytest.raises(zoo.WeightsError, match="needs the decoder"):
        half.decode(half.encode(image))
    other = zoo.load("small", parts="decoder")
    assert torch.equal(other.decode(half.encode(image))[0], tokenizers["janus"].decode(half.encode(image))[0])
    with pytest.raises(zoo.WeightsError, match="needs the encoder"):
        other.encode(image)


@pytest.mark.parametrize("kind", VQ)
def test_files_that_do_not_fit(kind: str, models: dict[str, Any], tmp_path: Path) -> None:
    folder = save(models[kind], tmp_path / kind)
    path = next(folder.glob("*.safetensors"))
    whole = load_file(path)
    key = next(key for key in whole if key.startswith("decoder.") and whole[key].ndim == 4)
    changes = {
        "missing": {name: tensor for name, tensor in whole.items() if name != key},
        "unexpected": whole | {"encoder.surplus": torch.zeros(1)},
        "unexpected in a": whole | {"surplus": torch.zeros(1)},
        "wrong shapes": whole | {key: torch.zeros(3, 3)},
    }
    for reason, state in changes.items():
        save_file(state, path)
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load(f"local-dir:{folder}")
    save_file(whole, path)
    (folder / "config.json").unlink()
    with pytest.raises(zoo.WeightsError, match=r"needs its config\.json"):
        zoo.load(f"local-dir:{folder}")


def test_a_folder_without_the_normalisation(models: dict[str, Any], tmp_path: Path) -> None:
    folder = save(models["janus"], tmp_path)
    (folder / PREPROCESSOR).unlink()
    with pytest.raises(zoo.WeightsError, match=PREPROCESSOR):
        zoo.load(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": "vqgan"}, "network must be one of"),
        ({"library": {"codebook_dim": 8}}, "no settings codebook_dim"),
        ({"library": {"in_channels": 4}}, "must be 3"),
        ({"library": {"num_res_blocks": "two"}, "network": "emu3"}, "cannot be used"),
        ({"library": {"double_latent": True}, "network": "janus"}, "double_latent"),
        ({"parts": ("quantizer",)}, "parts must be"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(zoo.WeightsError, match=reason):
        VQImagesConfig(**change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"), [("emu3-vision", 271), ("janus-vq", 72), ("movq-kandinsky22", 68), ("amused-vq", 146)]
)
def test_official_sizes(name: str, millions: int) -> None:
    config = registry.check_config(registry.get(name))
    with torch.device("meta"):
        outline = VQImages(config, name=name)
    assert round(sum(tensor.numel() for tensor in outline.parameters()) / 1e6) == millions
    require_complete(VQImages, config, outline.state_dict())
