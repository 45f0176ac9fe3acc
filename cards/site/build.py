"""Build the site into a folder: lay out pages from README, cards, the catalogue and docstrings, of which MkDocs makes HTML.

The pages mirror the checkout, so that links between documents hold in both. A broken link or reference stops the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe

from zoo.registry import Entry, entries, family_class

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent.parent
_WHERE = {"embedded": "in the package", "hub": "Hub", "local": "fetched by hand", "none": "never published"}

#: Packages whose public names get a page, and modules shown whole on the same page.
API: Mapping[str, tuple[str, ...]] = {
    "zoo": (),
    "zoo.tokenizer": (
        "zoo.tokenizer.image.ImageTokenizer",
        "zoo.tokenizer.audio.AudioTokenizer",
        "zoo.tokenizer.shape.ShapeTokenizer",
        "zoo.tokenizer.bytes.FileTokenizer",
        "zoo.checkpoint.Checkpoint",
    ),
    "zoo.media": (),
    "zoo.compress": (),
    "zoo.engine": (),
    "zoo.quantization": (),
    "zoo.modality": ("zoo.modality",),
    "zoo.eval": ("zoo.eval.reconstruct", "zoo.eval.modality.base"),
}


def main(target: Path) -> int:
    """Lay out everything in ``docs`` below a folder, and build ``site`` beside it. Returns the status of MkDocs."""
    docs = target / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(SITE, docs, ignore=shutil.ignore_patterns("__pycache__"))
    lay_out_packages(docs / "python" / "zoo")
    lay_out_pages(docs / "pages", docs / "python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(docs / "mkdocs.yml")]
    # MkDocs' theme advertises its successor otherwise.
    return subprocess.run(command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode


def lay_out_packages(package: Path) -> None:
    """The sources under the names that they are installed by."""
    for folder, target in {"zoo": package, "codecs": package / "codecs", "eval": package / "eval"}.items():
        for source in (ROOT / folder).rglob("*.py"):
            copy = target / source.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def lay_out_pages(pages: Path, sources: Path) -> None:
    """Documents of the checkout with their pictures, the API's pages, and what pages ask for filled in."""
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "eval" / "README.md", *(ROOT / "cards").glob("*.md")]:
        copy = pages / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        # A folder has no page of its own; its index has.
        copy.write_text(text.replace("](cards/)", "](cards/index.md)"), encoding="utf-8")
        for picture in re.findall(r"\]\(([^)]+\.png)\)", text):
            shown = copy.parent / picture
            shown.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.parent / picture, shown)
    (pages / "cards" / "index.md").write_text(card_index(), encoding="utf-8")
    (pages / "api").mkdir()
    loader = griffe.GriffeLoader(search_paths=[sources])
    loader.load("zoo", try_relative_path=False)
    loader.resolve_aliases(external=False)
    for package, whole in API.items():
        page = pages / "api" / f"{package.removeprefix('zoo.')}.md"
        page.write_text("\n\n".join(api_page(loader, package, whole)) + "\n", encoding="utf-8")
    errors = "# Errors\n\n::: zoo.errors\n    options: {show_root_heading: false}\n"
    (pages / "api" / "errors.md").write_text(errors, encoding="utf-8")
    for page in pages.rglob("*.md"):
        page.write_text(filled_in(page.read_text(encoding="utf-8")), encoding="utf-8")


def api_page(loader: griffe.GriffeLoader, package: str, whole: tuple[str, ...]) -> Iterator[str]:
    """One heading for each public name of a package, where it lives; errors have a page of their own."""
    module = loader.modules_collection[package]
    yield f"# {package}"
    yield module.docstring.value.splitlines()[0] if module.docstring else ""
    for name in sorted(module.exports or (), key=str.lower):
        member = module[str(name)]
        target = member.final_target if member.is_alias else member
        if target.path.startswith("zoo.errors.") or target.path in whole:
            continue
        if target.path in API:
            about = target.docstring.value.splitlines()[0]
            yield f"## {package}.{name}\n\n{about} See [its page]({name}.md)."
        elif target.is_module:
            yield f"## {package}.{name}\n\n::: {target.path}\n    options: {{show_root_heading: false, heading_level: 3}}"
        else:
            yield f"::: {target.path}\n    options: {{heading: {package}.{name}, toc_label: {name}}}"
    for path in whole:
        yield f"::: {path}\n    options: {{heading: {path}}}"


def card_index() -> str:
    """All cards by their first line."""
    lines = ["# Cards", "", "What each family and method is, what it needs, where its limits are, and what was measured."]
    for card in sorted((ROOT / "cards").glob("*.md")):
        title = card.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({card.name})")
    return "\n".join([*lines[:3], "", *lines[3:], ""])


# ---- what pages ask for: {{ models(image) }}


def models(modality: str) -> str:
    """The catalogue's models of one kind of media whose weights were published."""
    rows = ["| name | what | weights | licence of the weights | card |", "|---|---|---|---|---|"]
    for entry in entries().values():
        if entry.modality == modality and entry.published:
            rows.append(model_row(entry))
    return "\n".join(rows)


def model_row(entry: Entry) -> str:
    what = " ".join(entry.description.split()).replace("|", "\\|")
    card = f"[{entry.family}](../cards/{entry.card})"
    return f"| `{entry.name}` | {what} | {_WHERE[entry.weights.source]} | {entry.licence.weights} | {card} |"


def options(modality: str) -> str:
    """The options of every family of one kind of media, with their defaults."""
    families = dict.fromkeys(entry.family for entry in entries().values() if entry.modality == modality)
    rows = ["| family | `encode` | `decode` |", "|---|---|---|"]
    for family in families:
        cls = family_class(family)
        cells = (", ".join(written(cls.options(action))) for action in ("encode", "decode"))
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(rows)


def written(defaults: Mapping[str, Any]) -> Iterator[str]:
    """Options with their defaults, as code; ``progress``, which all have, is left out."""
    for name, default in defaults.items():
        if name != "progress":
            large = isinstance(default, int) and default >= 10_000
            yield f"`{name}={format(default, '_') if large else repr(default)}`"


def section(title: str) -> str:
    """A section of CONTRIBUTING.md, without its heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"CONTRIBUTING.md has no section {title!r}")
    return found[1].strip()


_FILLERS: Mapping[str, Callable[[str], str]] = {"models": models, "options": options, "section": section}


def filled_in(page: str) -> str:
    """A page with what it asks for."""
    return re.sub(r"\{\{ (\w+)\((.*?)\) \}\}", lambda asked: _FILLERS[asked[1]](asked[2]), page)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
