"""Names become tokenizers through the real Hub client, and everything that can go wrong says what to do next."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save

import zoo
from hub_server import Fault, HubServer
from small_models import SMALL, small_wavtokenizer, upstream_state
from zoo import download, hub, registry
from zoo.hub.loading import _warn_non_commercial as warn_non_commercial

REPO = "lab/wavtokenizer"
FILE = "model.ckpt"
NAME = "catalogue-model"


@pytest.fixture(scope="module")
def tokenizer() -> zoo.Tokenizer:
    return small_wavtokenizer()


@pytest.fixture(scope="module")
def checkpoint(tokenizer: zoo.Tokenizer) -> bytes:
    """A Lightning checkpoint with the passengers that official ones carry."""
    passengers = {"multiperioddisc.emb.weight": torch.zeros(2), "feature_extractor.encodec.decoder.x": torch.zeros(2)}
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": upstream_state(tokenizer) | passengers, "optimizer_states": [{}]}, buffer)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A fresh Hub, caches and catalogue; the client is pointed at it as ``HF_ENDPOINT`` would."""
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **weights: object) -> None:
    """Put one model into the user's catalogue."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(SMALL).items()}
    entry = {
        "name": NAME,
        "family": "wavtokenizer",
        "modality": "audio",
        "description": "a test model",
        "config": config,
        "weights": {"source": "hub", "repo": REPO, "file": FILE, "format": "ckpt", **weights},
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": "wavtokenizer.md",
    }
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(path))


def load(**options: object) -> zoo.Tokenizer:
    return zoo.load(NAME, **options)


@pytest.fixture
def published(server: HubServer, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub with the model in its repository and in the catalogue."""
    server.repo(REPO).commit({FILE: checkpoint})
    catalogue(tmp_path, monkeypatch)
    return server


def same(left: zoo.Tokenizer, right: zoo.Tokenizer) -> bool:
    audio = torch.sin(torch.arange(5000) / 20)
    return left.encode(audio).equal(right.encode(audio)) and torch.equal(
        left.reconstruct(audio)[0], right.reconstruct(audio)[0]
    )


def test_download_then_cache(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    first = load()
    assert first.name == NAME
    assert same(first, tokenizer)
    assert same(load(), tokenizer)
    assert len(published.downloads(FILE)) == 1


def test_interrupted_transfer_goes_on_where_it_stopped(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    # The client writes in pieces of 10 MiB, so the file has to be larger for any of it to survive.
    piece = 10 << 20
    buffer = io.BytesIO()
    torch.save({"state_dict": upstream_state(tokenizer) | {"dac.padding": torch.zeros(4 << 20)}}, buffer)
    published.repo(REPO).commit({FILE: buffer.getvalue()})
    published.faults[FILE] = Fault(drop_after=piece + 50_000)
    assert same(load(), tokenizer)
    assert published.downloads(FILE) == [None, f"bytes={piece}-"]


def test_offline_with_and_without_cache(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    with pytest.raises(zoo.OfflineError, match=f"zoo pull {NAME}"):
        load(local_files_only=True)
    zoo.pull(NAME)
    assert same(load(local_files_only=True), tokenizer)


def test_no_network(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    catalogue(tmp_path, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client backs off between its attempts
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(zoo.OfflineError, match="cannot be reached"):
        load()


def test_wrong_revision(published: HubServer) -> None:
    with pytest.raises(zoo.NotOnHubError, match="no revision 'v9'"):
        load(revision="v9")


def test_pinned_revision(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    commit = published.repo(REPO).branches["main"]
    published.repo(REPO).commit({FILE: b"something else"})
    assert same(load(revision=commit), tokenizer)


def test_missing_file(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repo(REPO).commit({"other.txt": b"x"})
    catalogue(tmp_path, monkeypatch)
    with pytest.raises(zoo.NotOnHubError, match=r"no file model\.ckpt") as caught:
        load()
    assert caught.value.missing == "file"


def test_missing_repository(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(tmp_path, monkeypatch)
    with pytest.raises(zoo.NotOnHubError, match="no repository"):
        load()


def test_gated_repository(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    published.repo(REPO).gated_for = "secret"
    with pytest.raises(zoo.GatedRepoError, match="accept its licence"):
        load()
    assert same(load(token="secret"), tokenizer)


def test_server_error(published: HubServer) -> None:
    published.faults[FILE] = Fault(status=418)
    with pytest.raises(zoo.DownloadError, match="try again"):
        load()


def test_corrupt_content_is_refused_removed_and_fetched_again(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    published.faults[FILE] = Fault(corrupt=True)
    with pytest.raises(zoo.ChecksumError, match="load it again"):
        load()
    published.faults.clear()
    assert same(load(), tokenizer)


def test_checksum_of_the_catalogue(published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(zoo.ChecksumError, match="0000"):
        load()


def test_size_of_the_catalogue(published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(tmp_path, monkeypatch, size=12)
    with pytest.raises(zoo.ChecksumError, match="not 12"):
        load()


def test_disk_full(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(zoo.DiskFullError, match="free some space"):
        load()


@pytest.mark.parametrize("fault", [Fault(drip=20, pause=0.05), Fault(silent_after=100)], ids=["a trickle", "silence"])
def test_transfers_that_stall(fault: Fault, published: HubServer, tokenizer: zoo.Tokenizer, monkeypatch: Any) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    published.faults[FILE] = fault
    with pytest.raises(zoo.DownloadError, match=rf"{FILE}: the download stalled: \d+ bytes"):
        load()
    published.faults.clear()
    assert same(load(), tokenizer)


def test_slow_but_steady_transfers_go_on(published: HubServer, tokenizer: zoo.Tokenizer, monkeypatch: Any) -> None:
    """Many periods long, each with just enough."""
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(download, "STALL_BYTES", 50)
    size = len(published.repo(REPO).commits[published.repo(REPO).branches["main"]][FILE])
    published.faults[FILE] = Fault(drip=size // 20, pause=0.1)
    assert same(load(), tokenizer)


def test_transfers_of_others_are_left_alone(published: HubServer, monkeypatch: Any) -> None:
    """The client is shared by the process; only what the zoo downloads has its limit."""
    import huggingface_hub

    load()
    monkeypatch.setattr(download, "STALL_SECONDS", 0.0)
    published.repo(REPO).commit({"other.txt": b"x" * 100})
    assert Path(huggingface_hub.hf_hub_download(REPO, "other.txt")).read_bytes() == b"x" * 100


READ_ONLY = OSError(errno.EROFS, "Read-only file system")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("cause", "kind"), [(READ_ONLY, zoo.NotWritableError), (FULL, zoo.DiskFullError)])
def test_disks_that_cannot_be_written(
    cause: OSError, kind: type, published: HubServer, tokenizer: zoo.Tokenizer, tmp_path: Path, monkeypatch: Any
) -> None:
    """For the client's cache, our own, and folders of the user's; each error names what was to be written."""
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(kind, match=f"{FILE}.*HF_HOME"):
            load()
    load()
    latents = zoo.Latents((torch.zeros(4, 2),), "a", "")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        for write, name in (
            (lambda: zoo.convert(NAME), "converted"),
            (lambda: tokenizer.save_pretrained(tmp_path / "saved"), "saved"),
            (lambda: latents.save(tmp_path / "latents.safetensors"), "latents"),
        ):
            with pytest.raises(kind, match=name):
                write()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and "hf" not in path.parts]


def test_a_cache_that_cannot_be_written_serves_what_is_in_it(
    published: HubServer, tokenizer: zoo.Tokenizer, monkeypatch: Any
) -> None:
    """Neither the marker of a checked file nor its removal is needed for the answer."""
    zoo.pull(NAME)

    def refuse(*_: object, **__: object) -> None:
        raise READ_ONLY

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(download, "cache_root", lambda: Path("/nowhere"))
    assert same(load(local_files_only=True), tokenizer)
    with pytest.raises(zoo.ChecksumError, match=r"could not be removed \(Read-only"):
        download.verify(Path(zoo.pull(NAME)), "0" * 64, None)


def test_pickle_with_code_in_it(published: HubServer) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 1",)

    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "hook": Runs()}, buffer)
    published.repo(REPO).commit({FILE: buffer.getvalue()})
    with pytest.raises(zoo.UnsafePickleError, match="could run code"):
        load()


def test_truncated_checkpoint(published: HubServer, checkpoint: bytes) -> None:
    published.repo(REPO).commit({FILE: checkpoint[: len(checkpoint) // 2]})
    with pytest.raises(zoo.CorruptWeightsError, match="damaged"):
        load()


def test_missing_and_unexpected_tensors(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    for change, reason in (
        ({"head.out.bias": None}, "missing: head.out.bias"),
        ({"backbone.extra": torch.zeros(1)}, "unexpected: backbone.extra"),
        ({"something.else": torch.zeros(1)}, "unexpected in a WavTokenizer checkpoint: something.else"),
        ({"backbone.convnext.0.gamma": torch.zeros(5)}, "wrong shapes: backbone.convnext.0.gamma"),
    ):
        state = {key: value for key, value in (upstream_state(tokenizer) | change).items() if value is not None}
        buffer = io.BytesIO()
        torch.save({"state_dict": state}, buffer)
        published.repo(REPO).commit({FILE: buffer.getvalue()})
        with pytest.raises(zoo.KeysError, match=reason):
            load()


def test_weights_that_do_not_fit_the_catalogue(published: HubServer) -> None:
    buffer = io.BytesIO()
    other = small_wavtokenizer(config=type(SMALL)(**(vars(SMALL) | {"num_layers": 1})))
    torch.save({"state_dict": upstream_state(other)}, buffer)
    published.repo(REPO).commit({FILE: buffer.getvalue()})
    with pytest.raises(zoo.KeysError, match="num_layers is 1 in the tensors and 2 in the configuration"):
        load()


def test_convert_once_then_load_without_the_original(published: HubServer, tokenizer: zoo.Tokenizer) -> None:
    path = zoo.convert(NAME)
    assert path.suffix == ".safetensors"
    published.requests.clear()
    converted = load()
    assert same(converted, tokenizer)
    assert converted.fingerprint == tokenizer.fingerprint
    assert published.requests == []


def test_push_and_load_again(server: HubServer, tokenizer: zoo.Tokenizer) -> None:
    url = tokenizer.push_to_hub("user/mine", token="secret")
    assert url.startswith(server.endpoint)
    loaded = zoo.load("hf-hub:user/mine")
    assert same(loaded, tokenizer)
    assert loaded.name == tokenizer.name
    assert (
        "library_name: tokenizer-zoo"
        in server.repo("user/mine").commits[server.repo("user/mine").branches["main"]]["README.md"].decode()
    )


def test_public_conversion_is_recognised_by_its_keys(server: HubServer, tokenizer: zoo.Tokenizer) -> None:
    for prefix in ("encoder_model.", ""):
        state = {}
        for key, tensor in upstream_state(tokenizer).items():
            key = key.replace("feature_extractor.encodec.encoder.model", f"{prefix}encoder.layers").replace(
                ".conv.conv.", ".conv."
            )
            key = key.replace("feature_extractor.encodec.quantizer.vq.layers.0._codebook", f"{prefix}quantizer.codebook")
            key = key.replace("head.out", "head.linear")
            if key.startswith(f"{prefix}encoder.layers") and key.endswith("conv.weight"):
                state[key.replace("weight", "parametrizations.weight.original0")] = tensor.flatten(1).norm(dim=1)[:, None, None]
                key = key.replace("weight", "parametrizations.weight.original1")
                tensor = tensor * 3
            state[key] = tensor
        server.repo("lab/conversion").commit({"model.safetensors": save(state), "config.json": b'{"model_type": "other"}'})
        loaded = zoo.load("hf-hub:lab/conversion")
        audio = torch.sin(torch.arange(5000) / 20)
        assert loaded.encode(audio).tolist() == tokenizer.encode(audio).tolist()
        assert loaded.fingerprint == tokenizer.fingerprint


def test_foreign_repository(server: HubServer) -> None:
    server.repo("lab/else").commit({"model.safetensors": save({"a": torch.zeros(1)})})
    with pytest.raises(zoo.WeightsError, match="no family recognises"):
        zoo.load("hf-hub:lab/else")


def test_local_folder_round_trip(tokenizer: zoo.Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = zoo.load(f"local-dir:{tmp_path / 'saved'}", dtype=torch.bfloat16)
    assert loaded.fingerprint == tokenizer.fingerprint
    audio = torch.sin(torch.arange(5000) / 20)
    assert loaded.encode(audio).equal(tokenizer.encode(audio)), "bfloat16 must not reach the encoder"
    again = loaded.save_pretrained(tmp_path / "again")
    assert zoo.load(f"local-dir:{again}").fingerprint == tokenizer.fingerprint
    assert not list((tmp_path / "saved").glob(".*")), "temporary files remain"


def test_local_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(zoo.WeightsError, match=r"holds no model\.safetensors"):
        zoo.load(f"local-dir:{tmp_path}")
    with pytest.raises(zoo.WeightsError, match=r"there is no .*nowhere"):
        zoo.load(f"local-dir:{tmp_path / 'nowhere'}")


def test_single_local_file(tokenizer: zoo.Tokenizer, tmp_path: Path) -> None:
    own = tmp_path / "trained.safetensors"
    hub.write_saved_file(tokenizer, own)
    loaded = zoo.load(f"local-dir:{own}")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.name == tokenizer.name
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    with pytest.raises(zoo.WeightsError, match="load_upstream opens"):
        zoo.load(f"local-dir:{pickled}")
    foreign = tmp_path / "else.safetensors"
    foreign.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(zoo.WeightsError, match="no family recognises"):
        zoo.load(f"local-dir:{foreign}")


def test_non_commercial_weights_are_mentioned_once(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = registry.get(NAME)
    restricted = entry.model_copy(update={"licence": registry.Licence(code="MIT", weights="CC-BY-NC-4.0", non_commercial=True)})
    monkeypatch.setattr(registry, "get", lambda name: restricted)
    warn_non_commercial.cache_clear()
    load()
    load()
    assert [record.message for record in caplog.records if "CC-BY-NC" in record.message] == [
        f"{NAME}: the weights are under CC-BY-NC-4.0, which forbids commercial use"
    ]


def test_endpoint_variable_in_a_fresh_process(published: HubServer, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": published.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"import zoo; print(zoo.load({NAME!r}).fingerprint)"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == load().fingerprint


# Outside of pytest, which checks the types of arguments itself.
WRONG_KINDS = """
import pathlib, zoo
vocabulary = zoo.Vocabulary.build(9, {"img": zoo.load("flextok-tiny")})
names = (None, 3, pathlib.Path("flextok-tiny"))
for call in (*(lambda name=name: zoo.load(name) for name in names), lambda: vocabulary.to_text([1])):
    try:
        call()
    except zoo.InputError as error:
        print(error)
"""


def test_arguments_of_another_kind() -> None:
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True, check=True)
    *names, tokens = done.stdout.splitlines()
    assert len(names) == 3 and all(line.startswith("the name of a tokenizer is a string, not ") for line in names)
    assert tokens == "tokens must be zoo.Tokens, which know their checkpoint, not list"
