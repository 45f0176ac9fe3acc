"""A model's data never runs code: every field of every file that a repository can hold, with the name of a module that would
leave a mark."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.abc
import json
import operator
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import zoo
from hub_server import HubServer
from test_pieces import pipeline_files
from zoo import registry

CASES = Path(__file__).parent / "golden"
EMBEDDED = sorted(zoo.list("*-tiny", embedded=True))
TRAP = "trapmark"
# What a file could write to have a module imported, by an import, an entry point, hydra or other libraries' loaders.
NAMES = (
    TRAP,
    f"{TRAP}.inner",
    f"{TRAP}.inner.TOKENIZER",
    f"{TRAP}:TOKENIZER",
    f".{TRAP}",
    f"zoo.codecs.{TRAP}",
    f"{TRAP}/inner",
)
# Fields by which libraries choose classes.
FIELDS = (
    *("_target_", "_class_name", "class", "class_path", "target", "auto_map", "architectures", "model_type", "custom_pipeline"),
    *("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "_attn_implementation", "module"),
    *("family", "kind", "format", "trust_remote_code", "quantization_config", "_name_or_path", "torch_dtype", "library_name"),
)


class Watch(importlib.abc.MetaPathFinder):
    """Notes every module of the trap that anybody looks for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if TRAP in name:
            self.asked.append(name)


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A folder whose modules leave a mark when they are imported: on the search path, and the working directory."""
    place = tmp_path / "place"
    plant(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)
    watching = Watch()
    monkeypatch.setattr(sys, "meta_path", [watching, *sys.meta_path])
    yield watching
    assert watching.asked == []
    assert not list(tmp_path.rglob("MARK"))
    assert not [name for name in sys.modules if TRAP in name]


def plant(folder: Path) -> None:
    """Modules that leave a mark, under every name by which something in the folder could ask for them."""
    code = "import pathlib\npathlib.Path(__file__).with_name('MARK').touch()\nclass TOKENIZER: family = 'trapmark'\n"
    (folder / TRAP).mkdir(parents=True)
    for path in (f"{TRAP}/__init__.py", f"{TRAP}/inner.py", f"modeling_{TRAP}.py", "pipeline.py", "setup.py", "conftest.py"):
        (folder / path).write_text(code)


def leaves(document: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values that are no containers."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield from leaves(value, (*where, key))
    elif isinstance(document, list):
        for position, value in enumerate(document[:2]):
            yield from leaves(value, (*where, position))
    else:
        yield where


def mappings(document: Any) -> Iterator[dict[str, Any]]:
    """The document and every mapping in it."""
    if isinstance(document, dict):
        yield document
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from mappings(value)


def poisoned(document: Any) -> Iterator[Any]:
    """The document with fields that name the trap: every text, some of the numbers, one after the other; and fields that other
    libraries heed, in every mapping."""
    places = list(leaves(document))
    values = {place: functools.reduce(operator.getitem, place, document) for place in places}
    numbers = [place for place in places if not isinstance(values[place], str)]
    texts = [place for place in places if isinstance(values[place], str)]
    for number, place in enumerate(texts + random.Random(0).sample(numbers, min(8, len(numbers)))):
        for name in NAMES if place[-1] in ("family", "_class_name", "kind") else (NAMES[number % len(NAMES)],):
            changed = copy.deepcopy(document)
            functools.reduce(operator.getitem, place[:-1], changed)[place[-1]] = name
            yield changed
    for name in NAMES:
        changed = copy.deepcopy(document)
        for mapping in list(mappings(changed)):
            for field in FIELDS:
                mapping.setdefault(field, {"AutoModel": name} if field == "auto_map" else name)
        yield changed


def attempt(load: Any, *arguments: Any, **options: Any) -> None:
    """Loads, or refuses with an error of ours."""
    with contextlib.suppress(zoo.ZooError):
        load(*arguments, **options)


def saved_config(name: str) -> dict[str, Any]:
    with safe_open(Path(__file__).parents[1] / "weights" / f"{name}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["zoo"])


QUANTIZED = {"some.layer": {"kind": "float", "method": "fp8", "format": "e4m3fn"}}


@pytest.mark.parametrize("name", EMBEDDED)
def test_saved_configurations(name: str, watch: Watch, tmp_path: Path) -> None:
    """Through ``config.json`` of a folder and the metadata of a file; the tensors are too few, so models are only outlined."""
    folder, path = tmp_path / "model", tmp_path / "model.safetensors"
    plant(folder)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    for number, config in enumerate(poisoned(saved_config(name) | {"quantization": QUANTIZED})):
        text = json.dumps(config)
        if number % 2:
            (folder / "config.json").write_text(text)
            attempt(zoo.load, f"local-dir:{folder}")
        else:
            save_file({"a": torch.zeros(1)}, path, metadata={"zoo": text, f"{TRAP}.format": TRAP})
            attempt(zoo.load, f"local-dir:{path}")


def upstream_configs() -> list[Path]:
    families = {entry.family for entry in registry.entries().values()}
    return [path for family in sorted(families) for path in sorted((CASES / family).glob("*/config.json"))[:2]]


@pytest.mark.parametrize("path", upstream_configs(), ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_upstream_configurations(path: Path, watch: Watch, tmp_path: Path) -> None:
    family = path.parts[-3]
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    for number, config in enumerate(poisoned(json.loads(path.read_text()))):
        if number % 8 == 0:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
            attempt(zoo.load_upstream, family, tmp_path / "config.yaml", weights)
        else:
            attempt(zoo.load_upstream, family, config, weights)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "scheduler", "image_noising_scheduler"])
def test_components_of_diffusers_pipelines(component: str, watch: Watch) -> None:
    """With the weights, so that every component is built: the class of a scheduler is chosen by its name."""
    case = CASES / "seed" / "unclip_tiny_a"
    config, state = json.loads((case / "config.json").read_text()), load_file(case / "weights.safetensors")
    for changed in poisoned(config[component]):
        attempt(zoo.load_upstream, "seed", config | {component: changed}, state)


def test_diffusers_cannot_be_asked_for_other_classes_in_saved_models(tmp_path: Path) -> None:
    case = CASES / "seed" / "unclip_tiny_a"
    folder = zoo.load_upstream("seed", case / "config.json", case / "weights.safetensors").save_pretrained(tmp_path / "saved")
    sound = json.loads((folder / "config.json").read_text())
    zoo.load(f"local-dir:{folder}")
    for name in ("StableDiffusionPipeline", "pipelines", "DDPMScheduler.from_pretrained", "__loader__", "logging"):
        changed = copy.deepcopy(sound)
        changed["config"]["diffusion"]["scheduler"]["_class_name"] = name
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(zoo.WeightsError, match=r"scheduler .* is not supported"):
            zoo.load(f"local-dir:{folder}")


def test_repositories_and_the_files_that_are_fetched(server: HubServer, watch: Watch, tmp_path: Path) -> None:
    """A repository with code in it, each of its configurations naming that: only data is ever asked for."""
    code = f"import {TRAP}\n".encode()
    named = {field: TRAP for field in FIELDS} | {"auto_map": {"AutoModel": f"modeling_{TRAP}.Model"}}
    text = json.dumps(named).encode()
    beside = {file: text for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")}
    beside |= {"model_index.json": json.dumps(named | {"unet": [TRAP, "Model"]}).encode(), f"modeling_{TRAP}.py": code}
    weights = save({"a": torch.zeros(1)}, {"zoo": text.decode(), "format": TRAP})
    for number, family in enumerate(("zoo", "_diffusers_version", "model_type")):
        config = json.dumps(named | {family: 1, "config": {}, "name": "a", "fingerprint": ""}).encode()
        files = {"model.safetensors": weights, "diffusion_pytorch_model.safetensors": weights, "config.json": config}
        server.repo(f"lab/trap-{number}").commit(beside | files)
        with pytest.raises(zoo.ZooError):
            zoo.load(f"hf-hub:lab/trap-{number}")
    asked = {path.rsplit("/", 1)[1] for _, path, _ in server.requests if "/resolve/" in path}
    assert asked <= {"config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"}


def test_pieces_from_repositories(server: HubServer, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pipeline_files() | {f"{TRAP}.py": b"raise SystemExit"}
    for name in [name for name in files if name.endswith(".json")]:
        config = json.loads(files[name])
        files[name] = json.dumps(config | {"_class_name": TRAP, "auto_map": {"AutoModel": f"{TRAP}.Model"}}).encode()
    server.repo("lab/unclip").commit(files)
    entry = {
        "name": "unclip",
        "family": "seed",
        "modality": "image",
        "description": "for tests",
        "config": {"codes": 0, "parts": ["decoder"], "embedding_dim": 32},
        "weights": {
            "source": "hub",
            "repo": "lab/unclip",
            "file": "vae/diffusion_pytorch_model.safetensors",
            "pieces": {
                "pipeline": {
                    "repo": "lab/unclip",
                    "components": ["unet", "vae", "text_encoder", "scheduler"],
                    "config_field": "diffusion",
                }
            },
        },
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": "seed.md",
    }
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    with pytest.raises(zoo.WeightsError):
        zoo.load("unclip")
    assert not [path for _, path, _ in server.requests if path.endswith(".py")]


# ------------------------------------------------------------------------------------------------------- whose family it is


@pytest.mark.parametrize(
    "family",
    [
        *NAMES,
        *(
            "os",
            "zoo",
            "zoo.codecs",
            "zoo.codecs.wavtokenizer",
            "wavtokenizer.tokenizer",
            "Wavtokenizer",
            "ｗavtokenizer",
            "__init__",
        ),
        *(
            "",
            ".",
            "..",
            " wavtokenizer",
            "wavtokenizer\n",
            "../wavtokenizer",
            "wavtokenizer\0",
            "x" * 100_000,
            None,
            3,
            ["seed"],
            {},
        ),
    ],
    ids=lambda family: repr(family)[:30],
)
def test_families_that_nobody_registered_are_refused(family: Any, watch: Watch, tmp_path: Path) -> None:
    saved = {"zoo": 1, "family": family, "name": "a", "fingerprint": "", "config": {}}
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"zoo": json.dumps(saved)})
    with pytest.raises(zoo.RegistryError) as caught:
        zoo.load(f"local-dir:{tmp_path / 'model.safetensors'}")
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 1000
    if isinstance(family, str):
        with pytest.raises(zoo.RegistryError):
            zoo.load_upstream(family, None, {})


PLUGIN = """
    from dataclasses import dataclass
    import torch
    from zoo.spec import Spec
    from zoo.tokenizer import Tokenizer

    @dataclass(frozen=True)
    class Config:
        channels: int = 4

    class Plain(Tokenizer[Config]):
        Config = Config
        family = "plain"
        modality = "audio"
        identity = ("levels",)

        def __init__(self, config=None, *, name="plain"):
            super().__init__(config or Config(), name)
            self.levels = torch.nn.Parameter(torch.arange(float(self.config.channels)))

        spec = property(lambda self: Spec(self.name, self.family, "audio", self.config.channels, 1))
        encode = decode = embed = lambda self, items: None
        recognises = classmethod(lambda cls, keys: set(keys) == {"levels"})
        wanted = classmethod(lambda cls, key: True)
        upstream_config = classmethod(lambda cls, raw: None)
        convert_checkpoint = classmethod(lambda cls, state, config: (config or Config(len(state["levels"])), dict(state)))

    TOKENIZER = Plain
"""
ENTRY = {
    "name": "plain-4",
    "family": "outside.plain",
    "modality": "audio",
    "description": "for tests",
    "config": {},
    "weights": {"source": "none"},
    "licence": {"code": "MIT", "weights": "MIT"},
    "card": "plain.md",
}


@pytest.mark.parametrize("how", ["register", "register_family", "ZOO_REGISTRY"])
def test_plug_ins_of_the_users_own_process(how: str, tmp_path: Path) -> None:
    """Saved and loaded by the same name in fresh processes; refused, without being imported, in one that registered nothing."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "plain.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([ENTRY]))
    registering = {
        "register": "zoo.register('catalogue.yaml')",
        "register_family": "zoo.register_family('outside.plain')",
        "ZOO_REGISTRY": "__import__('os').environ['ZOO_REGISTRY'] = 'catalogue.yaml'",
    }[how]
    code = f"""
        import sys, zoo
        def refused(load):
            try:
                load()
            except zoo.RegistryError as error:
                assert "outside.plain" in str(error) and "register_family" in str(error), error
                return "outside" not in sys.modules
        if len(sys.argv) == 1:
            from outside.plain import Plain
            Plain().save_pretrained("saved")
        else:
            assert refused(lambda: zoo.load("local-dir:saved"))
            assert refused(lambda: zoo.load_upstream("outside.plain", None, {{}}))
            {registering}
            loaded = zoo.load("local-dir:saved")
            assert type(loaded).__module__ == "outside.plain" and loaded.config.channels == 4
            import torch
            assert zoo.load_upstream("outside.plain", None, {{"levels": torch.ones(7)}}).config.channels == 7
    """
    for arguments in ([], ["again"]):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["family"] == "outside.plain"


def test_registering_a_catalogue_or_a_family_imports_nothing(watch: Watch, tmp_path: Path, monkeypatch: Any) -> None:
    """The module is imported when one of its models is loaded, not when somebody lists what there is."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[1:])
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setattr(registry, "_plugins", [])
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([ENTRY | {"family": f"{TRAP}.inner"}]))
    assert zoo.register(tmp_path / "catalogue.yaml") == ["plain-4"]
    assert "plain-4" in zoo.list()
    zoo.register_family(TRAP)


@pytest.mark.parametrize("module", ["nowhere.at_all", "", ".", "a..b", "../plain", "wavtokenizer", "os.nothing"])
def test_modules_that_cannot_be_registered(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", [])
    with pytest.raises(zoo.RegistryError):
        zoo.register_family(module)
    assert registry._plugins == []


def test_plug_ins_that_fail_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_plugins", [])
    (tmp_path / "broken_plugin.py").write_text("raise OSError('no disk')")
    (tmp_path / "empty_plugin.py").write_text("")
    for module, reason in (("broken_plugin", "no disk"), ("empty_plugin", "TOKENIZER")):
        zoo.register_family(module)
        with pytest.raises(zoo.RegistryError, match=f"{module}.*cannot be imported.*{reason}"):
            zoo.load_upstream(module, None, {})
