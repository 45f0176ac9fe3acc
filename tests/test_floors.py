"""The floors of the house and the arrows between them: which modules may import which.

Every import counts: at the top of a module, inside functions, under ``TYPE_CHECKING``, and `import_module` of a constant name.
Two things don't: the packages above an imported module, which Python imports along with it, and modules that a table names and
somebody imports when asked (families in the catalogue, the homes of a modality, the public names of a package). These tables
are the joints of the house: a line more in them is how it grows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Floor(NamedTuple):
    """Modules that lie on one floor, and the floors that they may import beside their own."""

    modules: tuple[str, ...]
    below: tuple[str, ...]


# From the ground up. A module lies where the longest prefix of its name says.
FLOORS = {
    "ground": Floor(
        (
            "zoo.derived",
            "zoo.documents",
            "zoo.download",
            "zoo.errors",
            "zoo.folders",
            "zoo.indexing",
            "zoo.machine",
            "zoo.memory",
            "zoo.modality",
            "zoo.moved",
            "zoo.onnx_weights",
            "zoo.precision",
            "zoo.progress",
            "zoo.spec",
            "zoo.state_dict",
            "zoo.streams",
            "zoo.utf8",
        ),
        (),
    ),
    "media": Floor(("zoo.media",), ("ground",)),
    "catalogue": Floor(("zoo.registry",), ("ground",)),
    "kernels": Floor(("zoo.kernels",), ("ground", "media")),
    "layers": Floor(("zoo.nn", "zoo.quantizers"), ("ground", "kernels")),
    "tokens": Floor(("zoo.tokens", "zoo.latents", "zoo.zt"), ("ground", "media", "kernels")),
    "quantize": Floor(("zoo.quantization",), ("ground", "media", "kernels")),
    "saving": Floor(("zoo.saving",), ("ground", "media", "catalogue", "quantize")),
    "tokenizer": Floor(
        ("zoo.tokenizer", "zoo.checkpoint", "zoo.vocabulary"),
        ("ground", "media", "tokens", "saving"),
    ),
    "compress": Floor(("zoo.compress",), ("ground", "media", "layers", "tokens", "tokenizer")),
    "text": Floor(("zoo.text",), ("ground",)),
    "codecs": Floor(("zoo.codecs",), ("ground", "media", "kernels", "layers", "tokens", "tokenizer")),
    "hub": Floor(
        ("zoo.hub", "zoo.hub.pieces"),
        ("ground", "media", "catalogue", "quantize", "saving", "tokenizer"),
    ),
    "engine": Floor(("zoo.engine",), ("ground", "tokens", "tokenizer", "hub")),
    "export": Floor(("zoo.onnx_export",), ("ground", "media", "tokenizer", "hub")),
    "front": Floor(
        ("zoo",),
        ("ground", "catalogue", "tokens", "quantize", "tokenizer", "compress", "text", "hub", "engine", "export"),
    ),
    "bench": Floor(
        ("zoo.bench",),
        (
            "ground",
            "media",
            "catalogue",
            "kernels",
            "quantize",
            "tokens",
            "saving",
            "tokenizer",
            "compress",
            "text",
            "hub",
            "engine",
        ),
    ),
    "weights": Floor(
        ("zoo.weights",),
        ("ground", "media", "layers", "tokenizer", "codecs", "hub", "front"),
    ),
    "eval": Floor(
        ("zoo.eval",),
        (
            *("ground", "media", "catalogue", "layers", "quantize", "tokens", "tokenizer", "compress", "hub"),
            *("front", "bench", "weights"),
        ),
    ),
    "command line": Floor(
        ("zoo.cli", "zoo.__main__"),
        ("ground", "media", "catalogue", "tokens", "tokenizer", "hub", "engine", "export", "front", "bench", "eval"),
    ),
}


def module_of(path: Path) -> str:
    """The name under which a source file is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    named = parts if parts[0] == "zoo" else ("zoo", *parts)
    return ".".join(named[:-1] if named[-1] == "__init__" else named)


@cache
def sources() -> dict[str, Path]:
    folders = ("zoo", "codecs", "eval", "weights")
    return {module_of(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def floor_of(module: str) -> str:
    """The floor of a module: the one with the longest prefix of its name. ``zoo`` is the front alone, no prefix."""
    found = [
        (len(prefix), name)
        for name, floor in FLOORS.items()
        for prefix in floor.modules
        if module == prefix or (prefix != "zoo" and module.startswith(f"{prefix}."))
    ]
    assert found, f"{module} lies on no floor: give it one in tests/test_floors.py"
    return max(found)[1]


def imports(source: str, module: str, package: bool) -> Iterator[str]:
    """Modules of the house that a source text imports, whenever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            origin = ".".join([*here, *([node.module] if node.module else [])])
            submodules = {alias.name: f"{origin}.{alias.name}" for alias in node.names}
            named = [full if full in sources() else origin for full in submodules.values()]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = [str(node.args[0].value)] if called == "import_module" else []
        else:
            continue
        yield from (name for name in named if name.split(".")[0] == "zoo")


@cache
def arrows() -> frozenset[tuple[str, str]]:
    found = set()
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        found |= {(module, other) for other in imports(text, module, path.name == "__init__.py")}
    return frozenset(found)


def allowed(module: str, imported: str) -> bool:
    here, there = floor_of(module), floor_of(imported)
    if here == there == "codecs":
        # A family is a module or a package right below `zoo.codecs`, and imports no other.
        return module.split(".")[:3] == imported.split(".")[:3]
    return here == there or there in FLOORS[here].below


def circle(found: set[tuple[str, str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    graph: dict[str, set[str]] = {}
    for module, imported in found:
        graph.setdefault(module, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_arrows_point_down() -> None:
    """The table itself allows no circle between floors."""
    seen: set[str] = set()
    for name, floor in FLOORS.items():
        assert set(floor.below) <= seen, name
        seen.add(name)


def test_every_module_has_a_floor() -> None:
    for module in sources():
        floor_of(module)
    for floor in FLOORS.values():
        for prefix in floor.modules:
            assert prefix in sources(), f"no module {prefix}"


def test_every_import_is_an_arrow_of_the_table() -> None:
    wrong = {arrow for arrow in arrows() if not allowed(*arrow)}
    assert not wrong, "\n".join(f"{a} ({floor_of(a)}) imports {b} ({floor_of(b)})" for a, b in sorted(wrong))


def test_the_map_shows_the_table() -> None:
    """CONTRIBUTING.md draws the same floors in the same order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = {}
    for row in text.partition("| floor |")[2].partition("\n\n")[0].splitlines()[2:]:
        name, modules, about, below = (cell.strip() for cell in row.strip("|").split("|"))
        assert about, name
        drawn[name] = Floor(tuple(modules.replace("`", "").split(", ")), tuple(below.split(", ")) if below else ())
    assert drawn == FLOORS
    assert list(drawn) == list(FLOORS)


def test_no_circle() -> None:
    assert circle(set(arrows())) == []


def test_the_reader_of_imports_sees_all_kinds() -> None:
    text = """
import zoo.spec as spec
import torch, zoo.tokens
from zoo import media, load
from zoo.errors import InputError
from . import norm
from ..zt import pack
if TYPE_CHECKING:
    from zoo.hub import pull
def later():
    from zoo.kernels.codebook import nearest
    import_module("zoo.latents")
    importlib.import_module("zoo.vocabulary")
    import_module(name)
"""
    found = sorted(imports(text, "zoo.nn.vit", package=False))
    seen = ["zoo", "zoo.errors", "zoo.hub", "zoo.kernels.codebook", "zoo.latents", "zoo.media", "zoo.nn.norm", "zoo.spec"]
    assert found == [*seen, "zoo.tokens", "zoo.vocabulary", "zoo.zt"]
    assert sorted(imports("from . import norm", "zoo.nn", package=True)) == ["zoo.nn.norm"]


def test_codecs_know_no_other_and_nobody_knows_them() -> None:
    """Of a wrong import the rules say so."""
    assert not allowed("zoo.codecs.vat.tokenizer", "zoo.codecs.seed")
    assert allowed("zoo.codecs.vat.tokenizer", "zoo.codecs.vat.config")
    for module in ("zoo.hub", "zoo.cli.media", "zoo.bench.audio", "zoo.tokenizer.base", "zoo.eval.plan", "zoo"):
        assert not allowed(module, "zoo.codecs.vat")
    assert not allowed("zoo.kernels.lowbit", "zoo.quantization.formats")
    assert not allowed("zoo.media.files", "zoo")
    assert circle({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")})
