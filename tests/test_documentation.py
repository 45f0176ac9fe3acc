"""What the documents show runs as shown."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.eval.photographs import write_photographs

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "eval" / "samples"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    shutil.copy(SAMPLES / "speech-3.flac", tmp_path / "recordings")
    shutil.copy(SAMPLES / "speech-3.flac", tmp_path / "b.flac")
    import soundfile

    soundfile.write("a.wav", *soundfile.read(SAMPLES / "speech-4.flac"))
    write_photographs(tmp_path / "photographs")
    shutil.copy(tmp_path / "photographs" / "coffee.png", "photo.png")
    return tmp_path


def test_readme_python(folder: Path) -> None:
    found = blocks("README.md", "python")
    assert len(found) >= 2
    namespace: dict[str, object] = {}
    for block in found:
        exec(block, namespace)


def test_readme_commands(folder: Path) -> None:
    [block] = blocks("README.md", "sh")
    for line in block.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "zoo"
        subprocess.run([sys.executable, "-m", "zoo", *arguments], check=True, capture_output=True)
    assert (folder / "report" / "report.html").exists()
    assert list((folder / "decoded").iterdir())
    assert list((folder / "reconstructed").iterdir())


def test_contributing_walkthrough(folder: Path) -> None:
    plugin, use = blocks("CONTRIBUTING.md", "python")
    [catalogue] = blocks("CONTRIBUTING.md", "yaml")
    (folder / "plugin").mkdir()
    (folder / "plugin" / "__init__.py").touch()
    (folder / "plugin" / "mulaw.py").write_text(plugin)
    (folder / "mulaw.yaml").write_text(catalogue)
    (folder / "use.py").write_text(use)
    subprocess.run([sys.executable, "use.py"], check=True)


def test_every_model_is_in_the_readme() -> None:
    """By its name, or as the end of one; what has no weights is in its family's card."""
    import zoo

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in zoo.list(published=True):
        stem = name.removesuffix("-v2")
        ends = [stem[i:] for i, letter in enumerate(stem) if letter == "-"]
        assert f"`{stem}`" in readme or any(f"`{end}`" in readme for end in ends), name
    for name in zoo.list(published=False):
        entry = zoo.info(name)
        assert f"`{entry.family}`" in readme, entry.family
