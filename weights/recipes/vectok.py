"""The recipe of ``vectok-tiny``: train a small Vec-Tok on speech made by this package, on a CPU, in a quarter of an hour.

    python -m zoo.weights.recipes.vectok --out weights/vectok-tiny.safetensors --minutes 14

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The corpus is
espeak-ng speech in many voices and languages (`audio_data`), or your own recordings as well with ``--data``.

Speech vectors are log-mel frames, standardised by their statistics, in the place of WavLM's. Then follow, each from what the
ones before have made: k-means on mini-batches; byte pairs; the inverse model (``inverse``), which learns to turn corrupted
units and a prompt back into vectors; and the vocoder (``vocoder``). It starts from the spectral
part of the decoder of ``wavtokenizer-tiny``. In its last third it hears the inverse model's vectors as well as true ones, as
kNN-VC's vocoder hears matched ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import zoo
from zoo.codecs.vectok import BPE, InverseSizes, ISTFTSizes, LogMelSizes, VecTok, VecTokConfig
from zoo.codecs.vectok.logmel import LogMelVectors
from zoo.codecs.vectok.training import MiniBatchKMeans, choose_centres, corrupt, draw_prompt, inverse_loss
from zoo.codecs.vectok.units import with_context
from zoo.codecs.vectok.vocoder import ISTFTVocoder
from zoo.codecs.wavtokenizer import WavTokenizer
from zoo.media import AUDIO_EXTENSIONS, expand_paths, read_audio, resample
from zoo.nn.losses import MelLoss, STFTLoss
from zoo.weights.data import audio as audio_data
from zoo.weights.recipes import trainer

TINY = VecTokConfig(
    vector_dim=80,
    vectors=LogMelSizes(),
    context=5,
    inverse=InverseSizes(width=128, heads=4, ffn_dim=384, layers=3, depthwise_kernel=15),
    # Sizes of wavtokenizer-tiny's decoder.
    vocoder=ISTFTSizes(width=192, ffn_dim=512, blocks=8),
)

# Spectral magnitude below which nothing is learned, about 70 dB under full scale: espeak-ng's pauses are digital silence.
AUDIBLE = 1e-2
# Shortest and longest prompt in training.
_PROMPT = (75, 125)

#: espeak-ng's voices that come with the model, the first of which speaks where no prompt is given, and what they say.
VOICES = ("paul", "linda", "max", "belinda", "robert", "f2")
_VOICE_TEXT = "My youngest sister has forgotten the usual noise of the old engine, but she will never forget the sea."

Vectors = Float[Tensor, "frames dim"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        speech_hours: size of the corpus.
        augmented: share of the recordings that are put into a room, with a microphone and a noise.
        kmeans_batches, kmeans_batch: mini-batches of the k-means, and their size.
        inverse_steps, vocoder_steps: lengths of the schedules in optimiser steps.
        inverse_minutes, vocoder_minutes: times after which they have to be at their ends, however many steps were done;
            ``None`` for no limit.
        inverse_batch, inverse_frames: crops per step and their vectors.
        vocoder_batch, vocoder_frames: the same for the vocoder.
        restored_from: share of the vocoder's schedule after which half of its vectors are the inverse model's.
        warmup: steps of rising learning rate.
    """

    speech_hours: float = 1.1
    augmented: float = 0.4
    kmeans_batches: int = 120
    kmeans_batch: int = 8192
    inverse_steps: int = 2_000
    inverse_minutes: float | None = None
    inverse_batch: int = 16
    inverse_frames: int = 128
    inverse_rate: float = 1.5e-3
    vocoder_steps: int = 3_000
    vocoder_minutes: float | None = None
    vocoder_batch: int = 16
    vocoder_frames: int = 32
    vocoder_rate: float = 1e-3
    restored_from: float = 0.6
    warmup: int = 50
    seed: int = 3407


@dataclass(frozen=True)
class Utterance:
    """A recording of the corpus.

    Attributes:
        waveform: at the model's rate, a whole number of hops long.
        vectors: its speech vectors.
        units: what they are rounded to.
        restored: what the inverse model makes of them in the recording's own voice.
    """

    waveform: Float[Tensor, " samples"]
    vectors: Vectors
    units: Int[Tensor, " frames"] | None = None
    restored: Vectors | None = None


# ------------------------------------------------------------------------------------------------------------------ corpus


def recordings(recipe: Recipe, folders: Sequence[Path], sample_rate: int) -> Iterator[Float[Tensor, " _"]]:
    """Speech and the user's own recordings, at one rate and with a peak of at most one."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with tqdm(total=round(recipe.speech_hours * 3600), desc="espeak-ng", unit="s", mininterval=10) as bar:
        for speech in audio_data.speech_corpus(recipe.speech_hours * 3600, recipe.seed):
            bar.update(round(len(speech) / audio_data.SAMPLE_RATE))
            if torch.rand((), generator=generator) < recipe.augmented:
                speech = audio_data.augment(speech, generator)
            else:
                level = 10 ** (-12 / 20 * float(torch.rand((), generator=generator)))
                speech = speech / speech.abs().max().clamp(min=1e-4) * level
            yield resample(speech[None], audio_data.SAMPLE_RATE, sample_rate)[0]
    for path in expand_paths(folders, AUDIO_EXTENSIONS):
        yield read_audio(path, sample_rate=sample_rate, mono=True).waveform[0]


@torch.no_grad()
def make_corpus(recipe: Recipe, folders: Sequence[Path], model: VecTok) -> list[Utterance]:
    """The recordings that are long enough for a crop and a prompt, and their vectors, by whose statistics the model
    standardises."""
    config = model.config
    analysis = model.analysis
    assert isinstance(analysis, LogMelVectors)
    shortest = (recipe.inverse_frames + _PROMPT[1]) * config.hop_length
    waveforms = [
        waveform[: len(waveform) // config.hop_length * config.hop_length]
        for waveform in recordings(recipe, folders, config.sample_rate)
        if len(waveform) >= shortest
    ]
    analysis.mean, analysis.std = torch.zeros(config.vector_dim), torch.ones(config.vector_dim)
    raw = [analysis(waveform[None])[0] for waveform in waveforms]
    analysis.std, analysis.mean = torch.std_mean(torch.cat(raw), dim=0)
    # What is shipped is rounded, and units must not depend on that.
    analysis.std, analysis.mean = analysis.std.half().float(), analysis.mean.half().float()
    vectors = [(found - analysis.mean) / analysis.std for found in raw]
    return [Utterance(*pair) for pair in zip(waveforms, vectors, strict=True)]


# ------------------------------------------------------------------------------------------------------------------- units


@torch.no_grad()
def fit_units(recipe: Recipe, model: VecTok, corpus: Sequence[Utterance]) -> list[Utterance]:
    """Centroids by k-means on mini-batches, the vectors that stand for them, and byte pairs; the corpus with its units."""
    config, units = model.config, model.units
    generator = torch.Generator().manual_seed(recipe.seed)
    centred = [utterance.vectors - utterance.vectors.mean(0) for utterance in corpus]
    points = torch.cat([with_context(vectors, config.context) for vectors in centred])
    start = points[torch.randperm(len(points), generator=generator)[: 20 * config.num_units]]
    kmeans = MiniBatchKMeans(choose_centres(start, config.num_units, generator), reseed_below=0.05)
    for _ in tqdm(range(recipe.kmeans_batches), desc="k-means", mininterval=10):
        kmeans.update(points[torch.randint(len(points), (recipe.kmeans_batch,), generator=generator)])
    units.centroids = kmeans.centres.half().float()

    found = [units.nearest(vectors) for vectors in centred]
    ids = torch.cat(found)
    counts = torch.bincount(ids, minlength=config.num_units).clamp(min=1)
    assert units.embedding is not None
    sums = torch.zeros(config.num_units, config.vector_dim).index_add_(0, ids, torch.cat(centred))
    units.embedding.copy_(sums / counts[:, None])
    model.set_bpe(BPE.train([sequence.tolist() for sequence in found], config.num_units, config.vocab_size))
    return [replace(utterance, units=own) for utterance, own in zip(corpus, found, strict=True)]


@torch.no_grad()
def restored(model: VecTok, corpus: Sequence[Utterance]) -> list[Utterance]:
    """The corpus with what the inverse model makes of its units, each in its own voice."""
    model.eval()
    made = []
    for utterance in tqdm(corpus, desc="inverse", mininterval=10):
        assert utterance.units is not None
        own = utterance.vectors[: model.config.prompt_frames]
        made.append(replace(utterance, restored=model.inverse_vectors([utterance.units], prompt=own)[0].clone()))
    return made


# ------------------------------------------------------------------------------------------------------------------ stages


class Stage(trainer.Stage):
    """A part of the model on its schedule."""

    name: str

    def __init__(self, module: nn.Module, recipe: Recipe, steps: int, minutes: float | None, rate: float) -> None:
        self.module, self.recipe = module.requires_grad_(True), recipe
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.8, 0.99), fused=True)
        rng = torch.Generator().manual_seed(recipe.seed)
        super().__init__(self.name, steps, minutes, [optimizer], {"module": module}, rng)

    def update(self) -> dict[str, float]:
        # Dropout draws from the global generator: a step draws the same whenever it is taken.
        torch.manual_seed(self.recipe.seed + self.step)
        self.module.train()
        self.set_rates(self.recipe.warmup, min_lr_ratio=0.02)
        losses = self.losses()
        self.optimizer_step(torch.stack(list(losses.values())).sum(), self.module.parameters())
        return {name: loss.item() for name, loss in losses.items()}

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """The terms of the loss of a batch."""

    def draw(self, count: int) -> int:
        """A whole number below ``count``."""
        return int(torch.randint(count, (1,), generator=self.rng))


class InverseStage(Stage):
    """Units, some of them hidden or wrong, and a prompt from beside them, to vectors."""

    name = "inverse"

    def __init__(self, recipe: Recipe, model: VecTok, corpus: Sequence[Utterance]) -> None:
        super().__init__(model.inverse, recipe, recipe.inverse_steps, recipe.inverse_minutes, recipe.inverse_rate)
        self.inverse, self.units, self.corpus = model.inverse, model.units, corpus

    def losses(self) -> dict[str, Tensor]:
        prompts, embedded, targets = [], [], []
        length = int(torch.randint(_PROMPT[0], _PROMPT[1] + 1, (1,), generator=self.rng))
        for _ in range(self.recipe.inverse_batch):
            prompt, units, target = self.example(length)
            ids, hidden = corrupt(units, len(self.units.centroids), self.rng)
            prompts.append(prompt)
            embedded.append(self.inverse.masked(F.embedding(ids, self.units.vectors.detach()), hidden))
            targets.append(target)
        # The fused kernel's backward pass is slow on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = torch.stack(self.inverse(prompts, embedded)).float()
        target = torch.stack(targets)
        return {"vectors": inverse_loss(predicted, target), "l1": F.l1_loss(predicted, target)}

    def example(self, length: int) -> tuple[Float[Tensor, "prompt dim"], Int[Tensor, " frames"], Vectors]:
        """A prompt of ``length`` vectors, and units and vectors of a crop beside it."""
        utterance = self.corpus[self.draw(len(self.corpus))]
        assert utterance.units is not None
        frames, size = len(utterance.vectors), self.recipe.inverse_frames
        start = self.draw(frames - size + 1)
        if max(start, frames - start - size) < length:
            start = 0
        crop = slice(start, start + size)
        # Batch normalisation must see no padding, so all prompts of a batch are of one length.
        prompt = draw_prompt(frames, crop, self.rng, shortest=length, longest=length)
        return utterance.vectors[prompt], utterance.units[crop], utterance.vectors[crop]


class VocoderStage(Stage):
    """Vectors to sound, in the end also from the vectors that the inverse model makes."""

    name = "vocoder"

    def __init__(self, recipe: Recipe, model: VecTok, corpus: Sequence[Utterance]) -> None:
        super().__init__(model.vocoder, recipe, recipe.vocoder_steps, recipe.vocoder_minutes, recipe.vocoder_rate)
        self.corpus, self.hop = corpus, model.config.hop_length
        rate = model.config.sample_rate
        self.mel = MelLoss(rate, ((512, 128, 60), (1024, 256, 80), (2048, 512, 100)), floor=AUDIBLE)
        self.stft = STFTLoss(floor=AUDIBLE)

    def losses(self) -> dict[str, Tensor]:
        vectors, waveforms = zip(*(self.example() for _ in range(self.recipe.vocoder_batch)), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            estimate = self.module(torch.stack(vectors))
        target = torch.stack(waveforms)
        return {"mel": self.mel(target, estimate), "stft": self.stft(target, estimate)}

    def example(self) -> tuple[Vectors, Float[Tensor, " samples"]]:
        """Vectors and samples of a crop."""
        utterance = self.corpus[self.draw(len(self.corpus))]
        size = self.recipe.vocoder_frames
        start = self.draw(len(utterance.vectors) - size + 1)
        chosen = utterance.vectors
        if self.progress >= self.recipe.restored_from and torch.rand((), generator=self.rng) < 0.5:
            assert utterance.restored is not None
            chosen = utterance.restored
        return chosen[start : start + size], utterance.waveform[start * self.hop : (start + size) * self.hop]


@torch.no_grad()
def start_vocoder(vocoder: ISTFTVocoder, trained: WavTokenizer) -> None:
    """Take over the blocks and the spectral head of a WavTokenizer's decoder; the first layer stays as it is.

    Its frames are 320 samples as well, at 24 kHz: to these weights our speech sounds faster and higher than it is, and they
    know already how spectra of consecutive frames fit together.
    """
    source = trained.state_dict()
    vocoder.load_state_dict({key: _taken_over(key, source, tensor) for key, tensor in vocoder.state_dict().items()})


def _taken_over(key: str, source: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """The tensor of a WavTokenizer that has the part of one of the vocoder's; its own where there is none of its size."""
    part, _, rest = key.partition(".")
    name = {"norm": f"backbone.norm.{rest}", "last_norm": f"backbone.final_layer_norm.{rest}", "head": f"head.out.{rest}"}.get(
        part, ""
    )
    if part == "blocks":
        index, layer, *kind = rest.split(".")
        renamed = {"conv": "dwconv", "fc1": "pwconv1", "fc2": "pwconv2", "scale": "gamma"}.get(layer, layer)
        name = ".".join(["backbone.convnext", index, renamed, *kind])
    if ".norm." in name:
        # There it depends on the bandwidth, of which the model has one.
        name = name.replace("norm.weight", "norm.scale").replace("norm.bias", "norm.shift")
    found = source[name].reshape(-1, *source[name].shape[2:]) if ".norm." in name else source.get(name, own)
    return found if found.shape == own.shape else own


class Training(trainer.Training[VecTok]):
    """Units and both stages in a row.

    Args:
        recipe: of the whole training.
        folders: of the user's own recordings.
        config: of the model.
    """

    stages = 2

    def __init__(self, recipe: Recipe, folders: Sequence[Path], config: VecTokConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        model = VecTok(config, name="vectok-tiny").requires_grad_(False)
        assert isinstance(model.vocoder, ISTFTVocoder)
        trained = zoo.load("wavtokenizer-tiny")
        assert isinstance(trained, WavTokenizer)
        start_vocoder(model.vocoder, trained)
        self.corpus = fit_units(recipe, model, make_corpus(recipe, folders, model))
        super().__init__(recipe, model)

    def make_stage(self, index: int) -> Stage:
        if index == 0:
            return InverseStage(self.recipe, self.model, self.corpus)
        return VocoderStage(self.recipe, self.model, restored(self.model, self.corpus))

    def snapshot(self) -> VecTok:
        made = trainer.shipped(self.model)
        made.set_voices({name: made.voice(spoken) for name, spoken in voices(made.config.sample_rate)})
        made.stored_voices.vectors = trainer.as_stored(made.stored_voices.vectors)
        made.fingerprint = made.compute_fingerprint()
        return made


def voices(sample_rate: int) -> Iterator[tuple[str, Float[Tensor, " samples"]]]:
    """The voices that come with the model, by name: one sentence in each of them."""
    for name in VOICES:
        spoken = audio_data.speak(audio_data.Utterance(_VOICE_TEXT, f"en-gb+{name}", words_per_minute=160, pitch=50))
        yield name, resample(spoken[None] / spoken.abs().max() * 0.7, audio_data.SAMPLE_RATE, sample_rate)[0]


def train(
    recipe: Recipe, out: Path, folders: Sequence[Path] = (), config: VecTokConfig = TINY, checkpoint_seconds: float = 90.0
) -> VecTok:
    """Train to the end of the last schedule; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    return trainer.run(recipe, out, lambda: Training(recipe, folders, config), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of your own recordings")
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    if options.minutes is not None:
        recipe = replace(recipe, inverse_minutes=0.45 * options.minutes, vocoder_minutes=0.55 * options.minutes)
    train(recipe, options.out, options.data)


if __name__ == "__main__":
    main()
