"""The site is built from documents, catalogue and docstrings; what is wrong in them stops the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.modality import modalities

pytest.importorskip("mkdocstrings", reason='needs pip install "tokenizer-zoo[docs]"')

ROOT = Path(__file__).parent.parent
SITE = ROOT / "cards" / "site"


def test_the_site_builds(tmp_path: Path) -> None:
    built = subprocess.run([sys.executable, SITE / "build.py", tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    for name in zoo.list(published=True):
        page = (site / "media" / f"{zoo.info(name).modality}.html").read_text(encoding="utf-8")
        assert f"<code>{name}</code>" in page, name
    for name in modalities():
        assert (site / "media" / f"{name}.html").exists(), name
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in zoo.__all__:
        assert re.search(rf'<h2[^>]*>\s*(<span[^>]*>)?zoo\.{name}\b|id="zoo\.errors\.{name}"', reference), name
    for card in (ROOT / "cards").glob("*.md"):
        assert (site / "cards" / f"{card.stem}.html").exists(), card


@pytest.mark.parametrize(
    ("page", "complaints"),
    [
        ("::: zoo.spec", ()),
        (
            "[page](nowhere.md) [heading](index.md#nothing) [object][zoo.lost] [folder](api/)\n\n::: zoo.zt",
            ("nowhere.md", "#nothing", "zoo.lost", "api/", "zoo.forgotten"),
        ),
        ("::: zoo.spec.Nothing", ("zoo.spec.Nothing",)),
    ],
)
def test_a_fault_stops_the_build(tmp_path: Path, page: str, complaints: tuple[str, ...]) -> None:
    """Links to pages, headings, folders and objects; names in docstrings; objects to show."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# Page\n\n{page}\n")
    package = tmp_path / "python" / "zoo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("list = sorted\n")
    (package / "spec.py").write_text('"""Promises: `zoo.spec`."""\n')
    (package / "zt.py").write_text(f'"""A format: `{"zoo.forgotten" if complaints else "zoo.spec"}`."""\n')
    shutil.copy(SITE / "docstrings.py", tmp_path)
    before, _, pages = (SITE / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")
    (tmp_path / "mkdocs.yml").write_text(before.replace("../site", "site") + "\n#" + pages.partition("\n#")[2])
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tmp_path / "mkdocs.yml"]
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert (built.returncode == 0) == (not complaints), built.stderr
    for complaint in complaints:
        assert complaint in built.stdout + built.stderr
