"""What the documents show runs as shown."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
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
    found = [block for block in blocks("README.md", "python") if "zoo.export" not in block]
    assert len(found) >= 2
    namespace: dict[str, object] = {}
    for block in found:
        exec(block, namespace)


@pytest.mark.slow  # two graphs are traced and translated
def test_readme_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes are symbols while a graph is traced, and no integers.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="the extra onnx is not installed")
    [block] = [block for block in blocks("README.md", "python") if "zoo.export" in block]
    exec(block, {})


def test_readme_commands(folder: Path) -> None:
    [block] = blocks("README.md", "sh")
    for line in block.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "zoo"
        subprocess.run([sys.executable, "-m", "zoo", *arguments], check=True, capture_output=True)
    assert (folder / "report" / "report.html").exists()
    assert list((folder / "decoded").iterdir())
    assert list((folder / "reconstructed").iterdir())


@pytest.mark.parametrize("script", ["use_mulaw.py", "use_verse.py", "use_first.py", "use_format.py"])
def test_contributing_walkthrough(folder: Path, script: str) -> None:
    """The first line of each block names its file."""
    (folder / "plugin").mkdir()
    (folder / "plugin" / "__init__.py").touch()
    found = blocks("CONTRIBUTING.md", "python") + blocks("CONTRIBUTING.md", "yaml")
    files = {block.splitlines()[0].removeprefix("# "): block for block in found}
    for name, block in files.items():
        (folder / name).write_text(block, encoding="utf-8")
    assert script in files
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_script_of_contributing_is_run() -> None:
    scripts = {block.splitlines()[0].removeprefix("# ") for block in blocks("CONTRIBUTING.md", "python")}
    [marker] = test_contributing_walkthrough.pytestmark  # type: ignore[attr-defined]
    assert {name for name in scripts if name.startswith("use_")} == set(marker.args[1])


def test_a_tokenizer_takes_under_40_lines() -> None:
    """Of code, without a private name."""
    [block] = [block for block in blocks("CONTRIBUTING.md", "python") if block.startswith("# plugin/mulaw.py")]
    lines = [line for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) < 40
    assert not re.findall(r"\b_[a-z]\w*", block)


def test_names_of_the_readme_are_there() -> None:
    """After ``import zoo`` alone, in a process where nothing else has been imported."""
    names = re.findall(r"`zoo((?:\.[A-Za-z_]+)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {".streams", ".media.genome.read", ".text.mixture"} <= set(names)
    script = "import zoo, operator\nfor name in " + repr(sorted(set(names))) + ": operator.attrgetter(name[1:])(zoo)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_model_is_in_the_readme() -> None:
    """By its name, or as the end of one; what has no weights is in its family's card."""
    import zoo

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in zoo.list(published=True):
        stem = name.removesuffix("-v2")
        ends = [stem[i:] for i, letter in enumerate(stem) if letter == "-"]
        assert f"`{name}`" in readme or f"`{stem}`" in readme or any(f"`{end}`" in readme for end in ends), name
    for name in zoo.list(published=False):
        entry = zoo.info(name)
        assert f"`{entry.family}`" in readme, entry.family
