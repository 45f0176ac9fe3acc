"""Files to classify made from nothing: pictures of simple things as TIFF and PNG, spoken commands as WAV.

Pictures have 32 x 32 pixels, PNG is stored without compression, and commands are one second of 8-bit samples at 8 kHz, said by
espeak-ng. Everything is seeded. The held-out voices never enter the training set, nor do the held-out pictures:

    zoo study held-out-files held-out-files/

writes them, in a folder for each class, for ``zoo eval byteformer-tiny --data``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float, UInt8
from numpy.random import Generator

from zoo.codecs.byteformer.encodings import audio_file, image_file
from zoo.media import resample, write_bytes
from zoo.weights.data import audio as audio_data
from zoo.weights.data import image as image_data
from zoo.weights.data.image import Outline, Palette, Plane

SIZE = 32
SAMPLE_RATE = 8_000

#: What is on a picture, and what is said.
THINGS = ("disc", "ring", "square", "triangle", "cross", "stripes", "checks", "clouds")
COMMANDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
LABELS = THINGS + COMMANDS
#: Kinds of files, by their extension.
KINDS = {"tiff": "TIFF", "png": "PNG", "wav": "WAV"}

#: Accents and voices that only evaluation uses.
HELD_OUT_LANGUAGES = ("en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
HELD_OUT_VARIANTS = ("f5", "m8", "steph", "adam")
_LANGUAGES = ("en-us", "en-gb", "en-gb-x-rp", "en-029", "en-us-nyc")
# Voices without voice: half of the commands cannot be told apart in them.
_VARIANTS = [variant for variant in audio_data.VARIANTS if variant not in ("whisper", "croak")]
_HELD_OUT_SEED = 1_000_003

Pixels = UInt8[np.ndarray, "32 32 3"]
Clip = Float[np.ndarray, " _"]


# ---------------------------------------------------------------------------------------------------------------- pictures


def _outline(rng: Generator, thing: str, radius: float) -> Outline:
    """A thing of about that radius, turned at random."""
    shape: Outline
    if thing == "disc":
        shape = image_data.ellipse(radius, radius * rng.uniform(0.75, 1))
    elif thing == "ring":
        disc, width = image_data.ellipse(radius, radius), radius * rng.uniform(0.12, 0.22)
        return lambda x, y: np.abs(disc(x, y) + width) - width
    elif thing == "square":
        shape = image_data.rectangle(radius * 0.85, radius * rng.uniform(0.65, 0.85))
    elif thing == "triangle":
        angles = np.array([0, 2.1, 4.2]) + rng.uniform(-0.3, 0.3, 3)
        shape = image_data.polygon((1.15 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32))
    else:
        width = radius * rng.uniform(0.2, 0.32)
        upright, level = image_data.rectangle(width, radius), image_data.rectangle(radius, width)

        def shape(x: Plane, y: Plane) -> Plane:
            return np.minimum(upright(x, y), level(x, y))

    return image_data.turned(shape, rng.uniform(0, 2 * np.pi))


def _cover(rng: Generator, thing: str) -> Plane:
    """How much of each pixel the thing takes, from 0 to 1."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    if thing == "clouds":
        sharpness = rng.uniform(0.2, 0.6)
        return np.clip(0.5 + sharpness * image_data.noise(rng, SIZE, SIZE), 0, 1)
    if thing in ("stripes", "checks"):
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 12)
        along, across = (
            np.sin((np.cos(a) * columns + np.sin(a) * rows) * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi))
            for a in (angle, angle + np.pi / 2)
        )
        return np.clip(0.5 + 2 * (along if thing == "stripes" else along * across), 0, 1)
    radius = rng.uniform(6, 13)
    x, y = rng.uniform(min(radius, SIZE / 2 - 1), SIZE - 1 - min(radius, SIZE / 2 - 1), 2)
    return np.clip(0.5 - _outline(rng, thing, radius)(columns - np.float32(x), rows - np.float32(y)), 0, 1)


def picture(rng: Generator, thing: str) -> Pixels:
    """A thing in one colour before another one, both of them a little uneven."""
    palette = Palette.draw(rng)
    ground = rng.uniform(0, 1)
    figure = ground + rng.uniform(0.25, 0.8) * (1 if ground < rng.uniform(0.2, 0.8) else -1)
    colours = [palette.colour(rng, brightness)[:, None, None] for brightness in (ground, figure)]
    uneven = [1 + abs(rng.normal(0, 0.08)) * image_data.noise(rng, SIZE, SIZE) for _ in colours]
    cover = _cover(rng, thing)
    pixels = colours[0] * uneven[0] * (1 - cover) + colours[1] * uneven[1] * cover
    pixels = pixels + abs(rng.normal(0, 0.02)) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.ascontiguousarray(image_data.to_bytes(pixels).transpose(1, 2, 0))


# ---------------------------------------------------------------------------------------------------------------- commands


def say(word: str, voice: str, words_per_minute: int, pitch: int) -> Clip:
    """A word at 8 kHz without the silence around it, at most a second."""
    spoken = audio_data.speak(audio_data.Utterance(word, voice, words_per_minute, pitch))
    clip = resample(spoken[None], audio_data.SAMPLE_RATE, SAMPLE_RATE)[0].numpy()
    loud = np.flatnonzero(np.abs(clip) > 0.02 * np.abs(clip).max())
    return clip[loud[0] : loud[-1] + 1][:SAMPLE_RATE]


def spoken_commands(count: int, seed: int, workers: int = 2) -> Iterator[tuple[str, Clip]]:
    """``count`` random voices and manners of saying a command, all commands in turn, and which one it is."""
    rng = random.Random(seed)
    wanted = [
        (
            COMMANDS[index % len(COMMANDS)],
            f"{rng.choice(_LANGUAGES)}+{rng.choice(_VARIANTS)}",
            rng.randint(110, 210),
            rng.randint(15, 85),
        )
        for index in range(count)
    ]
    with ThreadPoolExecutor(workers) as pool:
        yield from zip((words[0] for words in wanted), pool.map(lambda words: say(*words), wanted), strict=True)


def staged(clip: Clip, rng: Generator) -> Clip:
    """A second in which the word is said at some time, pace, distance and loudness, with noise around it."""
    stretch = rng.uniform(0.85, 1.15)
    length = min(SAMPLE_RATE, int(len(clip) * stretch))
    word = np.interp(np.arange(length) / stretch, np.arange(len(clip)), clip)
    tilt = rng.uniform(-0.5, 0.5)
    word = word + tilt * np.append(0, word[:-1])
    staged = np.zeros(SAMPLE_RATE)
    start = rng.integers(SAMPLE_RATE - length + 1)
    staged[start : start + length] = word / np.abs(word).max()
    staged += rng.standard_normal(SAMPLE_RATE) * 10 ** rng.uniform(-3.5, -1.5)
    return (staged / np.abs(staged).max() * 10 ** rng.uniform(-0.5, -0.05)).astype(np.float32)


def wav_file(clip: Clip) -> bytes:
    """A WAV file of 8-bit samples."""
    return audio_file(torch.from_numpy(clip), "WAV", sample_type="uint8", sample_rate=SAMPLE_RATE)


# ---------------------------------------------------------------------------------------------------------------- held out


def held_out(pictures: int = 25) -> Iterator[tuple[str, str, bytes]]:
    """Files that nothing is trained on: class, extension and content.

    Args:
        pictures: of each class, each of them in both formats. Of each command there are 24: twelve voices at two paces.
    """
    for index, thing in enumerate(THINGS):
        for number in range(pictures):
            pixels = picture(np.random.default_rng((_HELD_OUT_SEED, index, number)), thing)
            for extension in ("tiff", "png"):
                yield thing, extension, image_file(pixels, KINDS[extension])
    rng = np.random.default_rng(_HELD_OUT_SEED)
    for word in COMMANDS:
        for language in HELD_OUT_LANGUAGES:
            for variant in HELD_OUT_VARIANTS:
                for pace in (135, 175):
                    yield word, "wav", wav_file(staged(say(word, f"{language}+{variant}", pace, 50), rng))


def write_held_out(folder: str | Path) -> list[Path]:
    """Write the held-out files, in a folder for each class; returns their paths.

    Raises:
        MissingExtraError: espeak-ng is not installed.
    """
    written: list[Path] = []
    for label, extension, content in held_out():
        written.append(write_bytes(Path(folder) / label / f"{len(written):04d}.{extension}", content))
    return written


def main(folder: Annotated[Path, typer.Argument(help="where to write the files")]) -> None:
    """Write the held-out pictures and spoken commands, in a folder for each class."""
    print(f"{len(write_held_out(folder))} files in {folder}")
