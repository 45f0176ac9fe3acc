"""Models whose checkpoint is spread over several places: from the Hub, from files of the user's, in part."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import zoo
from hub_server import HubServer
from zoo import registry, state_dict
from zoo.codecs.seed import Seed
from zoo.state_dict import read_state

CASES = Path(__file__).parent / "golden" / "seed"
COMPONENTS = ["unet", "vae", "text_encoder", "image_normalizer", "scheduler", "image_noising_scheduler"]
TOKENIZER, PIPELINE, COPY = "lab/seed-tokenizer", "lab/unclip", "else/unclip"


def recorded() -> dict[str, Tensor]:
    return load_file(CASES / "unclip_tiny_a" / "io.safetensors")


def picture() -> Any:
    return load_file(CASES / "v2_tiny_a" / "io.safetensors")["image_u8"][0].numpy()


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pipeline_files() -> dict[str, bytes]:
    """The files of a diffusers pipeline, as they lie in a repository."""
    config = json.loads((CASES / "unclip_tiny_a" / "config.json").read_text())
    state = load_file(CASES / "unclip_tiny_a" / "weights.safetensors")
    files = {"model_index.json": b"{}"}
    for component in COMPONENTS:
        if component.endswith("scheduler"):
            settings = {"_class_name": config[component]["class"], "_diffusers_version": "0.20.2"}
            settings |= {key: value for key, value in config[component].items() if key != "class"}
            files[f"{component}/scheduler_config.json"] = json.dumps(settings).encode()
            continue
        own = {key.removeprefix(f"{component}."): value for key, value in state.items() if key.startswith(f"{component}.")}
        extra = {"architectures": ["CLIPTextModel"], "torch_dtype": "float16"} if component == "text_encoder" else {}
        files[f"{component}/config.json"] = json.dumps(config[component] | extra).encode()
        name = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
        files[f"{component}/{name}"] = save(own)
    return files


@pytest.fixture
def vision_file(tmp_path: Path) -> Path:
    """The vision transformer as a pickle of its own, with a block and a head too many."""
    state = load_file(CASES / "v2_tiny_a" / "weights.safetensors")
    own = {key.removeprefix("visual_encoder."): tensor for key, tensor in state.items() if key.startswith("visual_encoder.")}
    last = {key.replace("blocks.2.", "blocks.3."): tensor for key, tensor in own.items() if key.startswith("blocks.2.")}
    path = tmp_path / "eva.pth"
    path.write_bytes(pickled({"model": own | last | {"head.weight": torch.zeros(3, 64)}}))
    return path


@pytest.fixture
def published(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub with tokenizer and pipeline, and a catalogue entry in three pieces, one of which is nowhere."""
    state = load_file(CASES / "v2_tiny_a" / "weights.safetensors")
    main = {key: tensor for key, tensor in state.items() if not key.startswith("visual_encoder.")}
    server.repo(TOKENIZER).commit({"quantizer.pt": pickled(main | {"temp": torch.zeros(())})})
    server.repo(PIPELINE).commit(pipeline_files())
    config = asdict(Seed.checkpoint.config(json.loads((CASES / "v2_tiny_a" / "config.json").read_text())))
    del config["diffusion"]
    config |= {"steps": 6}
    entry = {
        "name": "in-pieces",
        "family": "seed",
        "modality": "image",
        "description": "for tests",
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "weights": {
            "source": "hub",
            "repo": TOKENIZER,
            "file": "quantizer.pt",
            "format": "pt",
            "pieces": {
                "vision": {"part": "encoder", "file": "eva.pth", "prefix": "visual_encoder.", "note": "ask the author"},
                "unclip": {
                    "part": "decoder",
                    "repo": PIPELINE,
                    "components": COMPONENTS,
                    "config_field": "diffusion",
                    "note": "was withdrawn",
                },
            },
        },
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": "seed.md",
    }
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    return server


def load(**options: Any) -> zoo.Tokenizer:
    return zoo.load("in-pieces", **options)


def draws_the_golden_image(tokenizer: zoo.Tokenizer) -> bool:
    known = recorded()
    [image] = tokenizer.decode(known["tokens"], latents=known["latents"], noise=known["noise"])
    return bool((image - known["image_raw"][0]).abs().max() < 4e-4)


def test_all_pieces(published: HubServer, vision_file: Path) -> None:
    tokenizer = load(files={"vision": vision_file})
    assert tokenizer.encode(picture()).ids.equal(recorded()["tokens"])
    assert draws_the_golden_image(tokenizer)
    assert tokenizer.config.diffusion["scheduler"]["_class_name"] == "PNDMScheduler"


def test_only_what_a_part_needs_is_downloaded(published: HubServer, vision_file: Path) -> None:
    encoder = load(parts="encoder", files={"vision": vision_file})
    assert not any("unet" in path for _, path, _ in published.requests)
    tokens = encoder.encode(picture())
    with pytest.raises(zoo.WeightsError, match=r"in-pieces with parts=\('encoder', 'decoder'\), or all of it"):
        encoder.decode(tokens)
    published.requests.clear()
    decoder = load(parts=["decoder"])
    assert any("unet" in path for _, path, _ in published.requests)
    assert draws_the_golden_image(decoder)
    assert decoder.fingerprint == encoder.fingerprint
    with pytest.raises(zoo.WeightsError, match="encoding needs the encoder"):
        decoder.encode(picture())
    assert len(decoder.decode(tokens, steps=1)) == 1, "tokens of the one are the other's"


def test_a_piece_that_is_nowhere_is_missed_before_anything_is_downloaded(published: HubServer) -> None:
    with pytest.raises(
        zoo.WeightsError, match=r"needs eva\.pth: ask the author\. Then pass files=\{'vision': .*leave the encoder"
    ):
        load()
    assert published.requests == []


def test_a_repository_that_was_withdrawn(published: HubServer, vision_file: Path, tmp_path: Path) -> None:
    del published.repos[PIPELINE]
    with pytest.raises(zoo.NotOnHubError, match=f"no repository {PIPELINE}.* was withdrawn.* files=.'unclip'") as caught:
        load(parts="decoder")
    assert caught.value.missing == "repository"
    published.repo(COPY).commit(pipeline_files())
    assert draws_the_golden_image(load(parts="decoder", files={"unclip": f"hf-hub:{COPY}"}))
    for name, content in pipeline_files().items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert draws_the_golden_image(load(parts="decoder", files={"unclip": tmp_path / "copy"}))
    (tmp_path / "copy" / "vae" / "config.json").unlink()
    with pytest.raises(zoo.WeightsError, match="no folder of a diffusers pipeline with a vae"):
        load(parts="decoder", files={"unclip": tmp_path / "copy"})


def test_places_and_parts_that_do_not_exist(published: HubServer, vision_file: Path, tmp_path: Path) -> None:
    with pytest.raises(zoo.InputError, match="has the pieces main, unclip, vision; ears in files= is none"):
        load(files={"vision": vision_file, "ears": vision_file})
    with pytest.raises(zoo.InputError, match="has the parts encoder, features, decoder; 'heart' is none"):
        load(parts=("encoder", "heart"))
    with pytest.raises(zoo.InputError, match="no parts to choose from"):
        zoo.load("wavtokenizer-tiny", parts="encoder")
    with pytest.raises(zoo.InputError, match="files="):
        zoo.load("wavtokenizer-tiny", files={"main": vision_file})
    with pytest.raises(zoo.InputError, match="files="):
        zoo.load(f"local-dir:{tmp_path}", files={"main": vision_file})
    with pytest.raises(zoo.CorruptWeightsError, match="does not exist"):
        load(files={"vision": tmp_path / "nowhere.pth"})


def test_a_file_of_something_else(published: HubServer, tmp_path: Path) -> None:
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(zoo.KeysError, match="in-pieces: the files hold no encoder"):
        load(files={"vision": tmp_path / "other.safetensors"})


def test_a_folder_stands_for_the_file_in_it(published: HubServer, vision_file: Path) -> None:
    encoder = load(parts="encoder", files={"vision": vision_file.parent})
    assert encoder.encode(picture()).ids.equal(recorded()["tokens"])


def test_converted_once_all_of_it_comes_from_one_file(published: HubServer, vision_file: Path) -> None:
    zoo.convert("in-pieces", files={"vision": vision_file})
    vision_file.unlink()
    published.requests.clear()
    published.repos.clear()
    whole = load()
    assert whole.encode(picture()).ids.equal(recorded()["tokens"]) and draws_the_golden_image(whole)
    assert draws_the_golden_image(load(parts="decoder"))
    assert published.requests == []


def test_converted_in_part(published: HubServer, vision_file: Path) -> None:
    path = zoo.convert("in-pieces", parts="encoder", files={"vision": vision_file})
    assert path.name.endswith("-encoder.safetensors")
    assert not any(key.startswith("decoder.") for key in read_state(path))
    vision_file.unlink()
    assert load(parts="encoder", local_files_only=True).encode(picture()).ids.equal(recorded()["tokens"])
    with pytest.raises(zoo.WeightsError, match=r"needs eva\.pth"):
        load()


def test_pulled(published: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo"):
        zoo.pull("in-pieces", parts="encoder")
    assert "eva.pth is not on the Hub: ask the author" in caplog.text
    assert not any("unet" in path for _, path, _ in published.requests)
    zoo.pull("in-pieces")
    assert draws_the_golden_image(load(parts="decoder", local_files_only=True))


def test_the_first_piece_counts(published: HubServer, vision_file: Path, tmp_path: Path) -> None:
    """SEED-1's two files may hold the same tensors; those of the later stage of training are meant."""
    state = torch.load(vision_file)["model"]
    torch.save({f"visual_encoder.{key}": tensor * 0 for key, tensor in state.items()}, tmp_path / "second.pth")
    entry = registry.get("in-pieces")
    second = registry.Piece(part="encoder", file="second.pth", note="somewhere")
    pieces = entry.weights.pieces | {"second": second}
    changed = entry.model_copy(update={"weights": entry.weights.model_copy(update={"pieces": pieces})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "get", lambda name: changed)
        encoder = load(parts="encoder", files={"vision": vision_file, "second": tmp_path / "second.pth"})
    assert encoder.encode(picture()).ids.equal(recorded()["tokens"])


def test_half_precision_is_read_as_such(published: HubServer, vision_file: Path) -> None:
    half = load(dtype=torch.bfloat16, files={"vision": vision_file})
    whole = load(files={"vision": vision_file})
    assert half.decoder.unet.dtype == half.encoder.vision.network.pos_embed.dtype == torch.bfloat16
    assert half.codebook.codes.dtype == torch.float32
    assert half.fingerprint == whole.fingerprint


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_large_files_are_mapped_in_pieces(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a mapping stays in memory until all of its tensors are gone, so there are several."""
    state = {f"t{number}": torch.randn(1000) for number in range(7)} | {"unwanted": torch.randn(1000)}
    path = tmp_path / f"large{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = read_state(path, lambda key: key != "unwanted")
    monkeypatch.setattr(state_dict, "_MAPPED_AT_ONCE", 8000)
    found = read_state(path, lambda key: key != "unwanted")
    assert found.keys() == whole.keys() == state.keys() - {"unwanted"}
    assert all(torch.equal(found[key], state[key]) for key in found)
    distances = sorted(tensor.data_ptr() for tensor in found.values())
    span, packed = distances[-1] - distances[0], sorted(tensor.data_ptr() for tensor in whole.values())
    assert span != packed[-1] - packed[0], "one mapping after all"
