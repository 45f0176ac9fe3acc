"""Training audio made from nothing: espeak-ng speech in many voices and languages, and synthesised music.

Everything is seeded, so the same call makes the same corpus. The held-out voices and sentences never enter it;

    zoo study held-out-speech held-out-espeak/

writes them as files for ``zoo eval --data``.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from zoo.errors import MissingExtraError
from zoo.media import resample, write_audio

SAMPLE_RATE = 24_000

LANGUAGES = (
    ["en-us"] * 6 + ["en-gb"] * 5 + ["en-gb-x-rp", "en-029", "en-us-nyc"] * 2
    + ["de", "fr-fr", "es", "it", "pt", "pt-br", "nl", "sv", "pl", "cs", "fi", "hu", "ro", "tr", "el", "da"]
    + ["ca", "sk", "hr", "eo"]
)  # fmt: skip
VARIANTS = [
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "f1",
    "f2",
    "f3",
    "f4",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Annie",
    "Diogo",
    "Gene",
    "Henrique",
    "Hugo",
    "Jacky",
    "Lee",
    "Marco",
    "Mario",
    "Michael",
    "Mike",
    "anika",
    "antonio",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "grandma",
    "grandpa",
    "gustave",
    "iven",
    "iven2",
    "john",
    "linda",
    "marcelo",
    "max",
    "michel",
    "miguel",
    "norbert",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph2",
    "travis",
    "victor",
    "whisper",
    "croak",
    "zac",
]

#: ``language+variant`` voices that only evaluation uses; neither the language nor the variant occurs in training.
HELD_OUT_VOICES = ("en-gb-scotland+f5", "en-gb-x-gbclan+m8", "en-gb-x-gbcwmd+steph", "en-gb-scotland+adam")
#: Sentences that only evaluation uses.
HELD_OUT_TEXTS = (
    "The birch canoe slid on the smooth planks while seagulls argued over the harbour wall.",
    "Seven quiet engineers measured the bridge before the autumn storms arrived.",
    "Please leave the yellow umbrella beside the kitchen door when you come home.",
    "A fresh loaf of bread and a jug of cold water were all that the travellers wanted.",
)

_SUBJECTS = [
    "the old captain",
    "my youngest sister",
    "a curious fox",
    "the village doctor",
    "every third student",
    "our noisy neighbour",
    "the winter sun",
    "a thousand voices",
    "the clever machine",
    "his grandmother",
    "the committee",
    "an orange cat",
    "the pianist",
    "somebody from Oxford",
    "the fisherman",
    "those boys",
    "the judge",
    "a young pharaoh",
    "nobody",
    "the chef",
]
_VERBS = [
    "watches",
    "has forgotten",
    "would rather choose",
    "carefully measured",
    "never understood",
    "is looking for",
    "threw away",
    "just discovered",
    "enjoys",
    "painted",
    "can't hear",
    "borrowed",
    "will judge",
    "pushed",
    "wishes to show",
    "thought about",
    "sings to",
    "joins",
    "should have closed",
    "measures",
]
_OBJECTS = [
    "the broken clock",
    "fresh strawberries",
    "a vague idea",
    "the garden gate",
    "his favourite book",
    "the usual noise",
    "thirty-five boxes",
    "the shadow of the tower",
    "a cup of warm tea",
    "the value of gold",
    "zebras and giraffes",
    "the whole truth",
    "a beige jacket",
    "the oil in the engine",
    "her youthful voice",
    "their treasure",
    "an empty house",
    "the weather in June",
    "both sides",
    "the picture",
]
_ENDINGS = [
    "before dawn",
    "without a sound",
    "in the middle of the night",
    "as usual",
    "near the river",
    "for no good reason",
    "with great joy",
    "while it rains",
    "on Thursday",
    "after the show",
    "under the bridge",
    "once again",
    "if you please",
    "at half past four",
    "by the way",
]


@dataclass(frozen=True)
class Utterance:
    """Order for espeak-ng: a text and how to say it."""

    text: str
    voice: str
    words_per_minute: int
    pitch: int


def sentence(rng: random.Random) -> str:
    """A grammatical English sentence of little sense."""
    parts = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_ENDINGS)]
    return " ".join(parts).capitalize() + rng.choice([".", "?", "!", ", " + rng.choice(_ENDINGS) + "."])


def utterance(rng: random.Random) -> Utterance:
    """A random thing to say in a random voice; languages other than English read out numbers, which every one of them can."""
    language = rng.choice(LANGUAGES)
    if language.startswith("en"):
        text = " ".join(sentence(rng) for _ in range(rng.randint(2, 4)))
    else:
        text = ", ".join(str(rng.choice([rng.randint(0, 99), rng.randint(100, 9_999_999)])) for _ in range(rng.randint(3, 6)))
    variant = rng.choice(VARIANTS)
    return Utterance(text, f"{language}+{variant}", rng.randint(110, 210), rng.randint(15, 85))


def speak(spoken: Utterance) -> Float[Tensor, " samples"]:
    """Run espeak-ng and return 24 kHz audio.

    Raises:
        MissingExtraError: espeak-ng is not installed.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise MissingExtraError("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    command = [program, "-v", spoken.voice, "-s", str(spoken.words_per_minute), "-p", str(spoken.pitch), "--stdout"]
    result = subprocess.run([*command, spoken.text], capture_output=True, check=True)
    # espeak-ng cannot know the length when it writes the header to a pipe.
    samples, rate = soundfile.read(io.BytesIO(result.stdout), dtype="float32")
    return resample(torch.from_numpy(samples)[None], rate, SAMPLE_RATE)[0]


def speech_corpus(seconds: float, seed: int, workers: int = 2) -> Iterator[Float[Tensor, " samples"]]:
    """At least ``seconds`` of speech; vocal tracts are lengthened or shortened by resampling."""
    rng = random.Random(seed)
    made = 0.0
    with ThreadPoolExecutor(workers) as pool:
        while made < seconds:
            wanted = [utterance(rng) for _ in range(32)]
            for audio in pool.map(speak, wanted):
                stretch = rng.uniform(0.84, 1.2)
                audio = resample(audio[None], SAMPLE_RATE, round(SAMPLE_RATE * stretch / 100) * 100)[0]
                made += len(audio) / SAMPLE_RATE
                yield audio


def music(rng: np.random.Generator, seconds: float = 6.0) -> Float[Tensor, " samples"]:
    """A few bars: plucked strings (Karplus and Strong 1983), frequency-modulated tones, organ chords and noise drums."""
    length = int(seconds * SAMPLE_RATE)
    mix = np.zeros(length, np.float32)
    beat = rng.uniform(0.18, 0.5)
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.5 else [0, 2, 3, 5, 7, 8, 10])
    root = rng.uniform(40, 60)
    voices = rng.choice(["pluck", "fm", "organ"], size=rng.integers(1, 4))
    for start in np.arange(0, seconds - 0.3, beat):
        first = int(start * SAMPLE_RATE)
        for kind in voices:
            if rng.random() < 0.25:
                continue
            midi = root + scale[rng.integers(7)] + 12 * rng.integers(0, 3)
            frequency = 440 * 2 ** ((midi - 69) / 12)
            tone = _TONES[kind](rng, frequency, min(length - first, int(rng.uniform(0.3, 1.2) * SAMPLE_RATE)))
            mix[first : first + len(tone)] += tone * rng.uniform(0.2, 1.0)
        if rng.random() < 0.5:
            burst = rng.standard_normal(min(length - first, 4000)) * np.exp(-np.arange(min(length - first, 4000)) / 700)
            mix[first : first + len(burst)] += burst.astype(np.float32) * 0.3
    return torch.from_numpy(mix)


def _pluck(rng: np.random.Generator, frequency: float, length: int) -> np.ndarray:
    period = int(SAMPLE_RATE / frequency)
    ring = rng.uniform(-1, 1, period)
    tone = np.empty(length)
    for start in range(0, length, period):
        part = min(period, length - start)
        tone[start : start + part] = ring[:part]
        ring = 0.498 * (ring + np.roll(ring, 1))
    return tone.astype(np.float32)


def _fm(rng: np.random.Generator, frequency: float, length: int) -> np.ndarray:
    time = np.arange(length) / SAMPLE_RATE
    decay = np.exp(-time * rng.uniform(1, 6))
    modulator = rng.uniform(0.5, 5) * decay * np.sin(2 * math.pi * frequency * rng.choice([1, 2, 3, 1.41]) * time)
    return (decay * np.sin(2 * math.pi * frequency * time + modulator)).astype(np.float32)


def _organ(rng: np.random.Generator, frequency: float, length: int) -> np.ndarray:
    time = np.arange(length) / SAMPLE_RATE
    harmonics = np.arange(1, max(2, min(12, int(11_000 / frequency))))
    weights = rng.uniform(0, 1, len(harmonics)) / harmonics
    envelope = np.minimum(1, time * 40) * np.minimum(1, time[::-1] * 20)
    partials = weights[:, None] * np.sin(2 * math.pi * frequency * harmonics[:, None] * time)
    return (envelope * partials.sum(0)).astype(np.float32)


_TONES = {"pluck": _pluck, "fm": _fm, "organ": _organ}


def augment(crop: Float[Tensor, " samples"], rng: torch.Generator) -> Float[Tensor, " samples"]:
    """A room, a microphone and a level: exponential reverberation, a spectral tilt, noise, and a peak of -1 to -12 dBFS."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    length = len(crop)
    spectrum = torch.fft.rfft(crop, 2 * length)
    if uniform(0.0, 1.0) < 0.5:
        time = torch.arange(length) / SAMPLE_RATE
        tail = torch.randn(length, generator=rng) * torch.exp(-time * uniform(12.0, 60.0)) * uniform(0.01, 0.08)
        tail[: int(uniform(0.002, 0.02) * SAMPLE_RATE)] = 0
        tail[0] = 1
        spectrum = spectrum * torch.fft.rfft(tail, 2 * length)
    frequency = torch.linspace(0, 1, len(spectrum)).clamp(min=1e-3)
    wave = uniform(0.0, 2 * math.pi)
    decibels = uniform(-4.0, 4.0) * torch.log2(frequency / 0.05).clamp(-3, 5) / 2 + uniform(0.0, 4.0) * torch.sin(
        uniform(2.0, 9.0) * torch.log(frequency) + wave
    )
    crop = torch.fft.irfft(spectrum * 10 ** (decibels / 20), 2 * length)[:length]
    if uniform(0.0, 1.0) < 0.4:
        crop = crop + torch.randn(length, generator=rng) * crop.abs().max() * 10 ** (uniform(-60.0, -28.0) / 20)
    return crop / crop.abs().max().clamp(min=1e-4) * 10 ** (uniform(-12.0, -1.0) / 20)


def write_held_out(folder: str | Path) -> list[Path]:
    """Write every held-out sentence in every held-out voice into a folder, as FLAC files; returns their paths.

    Raises:
        MissingExtraError: espeak-ng is not installed.
    """
    return [
        write_audio(
            Path(folder) / f"{voice}-{number}.flac",
            speak(Utterance(text, voice, words_per_minute=160, pitch=50))[None],
            SAMPLE_RATE,
        )
        for voice in HELD_OUT_VOICES
        for number, text in enumerate(HELD_OUT_TEXTS, start=1)
    ]


def main(folder: Annotated[Path, typer.Argument(help="where to write the files")]) -> None:
    """Write the held-out espeak-ng speech as FLAC files."""
    for path in write_held_out(folder):
        print(path)
