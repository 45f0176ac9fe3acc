"""Effect of a voice on speech whose tokens hold none: decoding in the right voice and in a wrong one, and conversion.

    zoo study voices vectok-tiny --data held-out-espeak/ --out voices.json

Recordings are named ``<speaker>-<number>``, at least two of each of at least two speakers. Every one is decoded with a voice
from itself, from another recording of its speaker, and from one of another speaker, and held against the original: the voice
matters if the wrong one costs something. Then it is converted to the other speaker, through tokens and by kNN-VC. A conversion
has arrived if its mean speech vector is nearer to the other speaker's than to its own; what it says is still there if its STOI
against the original is high.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import zoo
from zoo.errors import InputError
from zoo.eval.modality.audio import log_mel_l1, stoi
from zoo.eval.options import Data, Device, Name, Out
from zoo.eval.studies.record import write_result
from zoo.media import AUDIO_EXTENSIONS, expand_paths, read_audio

Speakers = Mapping[str, Sequence[Path]]
Figures = dict[str, float | None]


def speakers_in(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Recordings by speaker.

    Raises:
        InputError: there are fewer than two speakers with two recordings each.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        found[path.stem.rpartition("-")[0]].append(path)
    several = {speaker: own for speaker, own in found.items() if len(own) > 1}
    if len(several) < 2:
        raise InputError("at least two speakers with two recordings each are needed, named <speaker>-<number>")
    return several


def measure(tokenizer: Any, speakers: Speakers, progress: bool = False) -> dict[str, Any]:
    """Mean figures over all recordings, by where the voice comes from.

    Returns:
        ``own``, ``same`` and ``other``: STOI and log-mel distance of what is decoded with a voice from the recording, from
        another one of the speaker and from another speaker; ``tokens`` and ``knn``: STOI of the conversion by either
        decoder, and the share of conversions that have ``arrived``; ``tokens_per_second`` and ``bits_per_second``; and
        ``voice_bytes``, which a voice takes beside them.
    """
    rate = tokenizer.spec.sample_rate
    names = list(speakers)
    # A speaker's voice is everything that was recorded of him.
    voices = {name: tokenizer.voice(list(recordings)) for name, recordings in speakers.items()}
    figures: dict[str, list[Figures]] = defaultdict(list)
    tokens = seconds = 0.0
    sizes = []
    with tqdm(total=sum(map(len, speakers.values())), disable=not progress, unit="recording") as bar:
        for number, name in enumerate(names):
            rival = names[(number + 1) % len(names)]
            for index, path in enumerate(speakers[name]):
                reference = read_audio(path, sample_rate=rate, mono=True).waveform
                encoded, [own] = tokenizer.encode_with_voices(reference)
                tokens, seconds = tokens + int(encoded.lengths[0]), seconds + reference.shape[1] / rate
                sizes.append(own.nbytes)
                others = speakers[rival]
                prompts = {
                    "own": own,
                    "same": speakers[name][(index + 1) % len(speakers[name])],
                    "other": others[index % len(others)],
                }
                for kind, prompt in prompts.items():
                    figures[kind].append(_likeness(reference, tokenizer.decode(encoded, prompt=prompt)[0], rate))
                for kind, decoder in (("tokens", "inverse"), ("knn", "knn")):
                    converted = tokenizer.convert(reference, voice=voices[rival], decoder=decoder)[0]
                    arrived = _is_nearer(tokenizer.vectors(converted)[0], voices[rival].vectors, voices[name].vectors)
                    figures[kind].append({"stoi": _likeness(reference, converted, rate)["stoi"], "arrived": float(arrived)})
                bar.update()
    bits = tokens * tokenizer.spec.bits_per_token
    return {kind: _means(rows) for kind, rows in figures.items()} | {
        "recordings": len(figures["own"]),
        "speakers": len(speakers),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "bits_per_second": bits / seconds,
        "voice_bytes": float(np.mean(sizes)),
    }


def _likeness(reference: Float[Tensor, "1 samples"], estimate: Float[Tensor, "1 samples"], rate: int) -> Figures:
    pair = reference[0].cpu(), estimate[0].cpu()
    return {"stoi": stoi(*pair, rate), "log_mel_l1": log_mel_l1(*pair, rate)}


def _is_nearer(
    vectors: Float[Tensor, "_ dim"], to_these: Float[Tensor, "_ dim"], than_to_those: Float[Tensor, "_ dim"]
) -> bool:
    mean, near, far = (part.mean(0) for part in (vectors, to_these, than_to_those))
    return bool((mean - near).norm() < (mean - far).norm())


def _means(rows: Sequence[Figures]) -> Figures:
    """The mean of each figure over the rows in which it is defined."""
    found: Figures = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        found[name] = float(np.mean(values)) if values else None
    return found


def main(name: Name, data: Data, out: Out, device: Device = None) -> None:
    """Measure what a voice does to speech whose tokens hold none."""
    tokenizer = zoo.load(name, device=device)
    if not tokenizer.spec.prompted:
        raise InputError(f"decoding {tokenizer.name} takes no voice")
    found = measure(tokenizer, speakers_in(expand_paths(data, AUDIO_EXTENSIONS)), progress=sys.stderr.isatty())
    write_result({"tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint} | found, out, tokenizer.device)
