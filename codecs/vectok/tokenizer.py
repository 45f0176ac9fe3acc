"""The tokenizer: speech to tokens and voices, tokens and a voice to speech."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.vectok.analysis import Analyser
from zoo.codecs.vectok.checkpoint import CHECKPOINT
from zoo.codecs.vectok.config import HiFiGANSizes, LogMelSizes, VecTokConfig
from zoo.codecs.vectok.inverse import InverseKMeans
from zoo.codecs.vectok.logmel import LogMelVectors
from zoo.codecs.vectok.recording import Recording, vectors_fingerprint
from zoo.codecs.vectok.synthesis import Restorer, Synthesiser
from zoo.codecs.vectok.units import BPE, Units
from zoo.codecs.vectok.vocoder import HiFiGAN, ISTFTVocoder
from zoo.codecs.vectok.voice import FEWEST_PROMPT_FRAMES, Voice, Voices, match, mixture, stretch, to_loudness, trim_silence
from zoo.codecs.vectok.wavlm import WavLM
from zoo.errors import ArgumentError, InputError, MismatchError, naming_item
from zoo.latents import Latents
from zoo.precision import exact_float32
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.audio import AudioTokenizer, Rate
from zoo.tokens import Tokens

Prompt = Any


# What of the parts encoding and decoding begin and end with.
_SIDES = {"encoder": "vectors", "decoder": "vocoder"}


class VecTok(AudioTokenizer[VecTokConfig, Tokens | Latents]):
    """The speech tokenizer of arXiv 2310.07246: about 16 to 20 tokens per second say what was said, a prompt says by whom.

    Speech of any rate and channel count is averaged to mono and resampled; the tokens remember the original rate and length.
    Encoding always runs in float32. Decoding requires a voice: ``prompt=`` of `decode`, or else the first voice of the
    checkpoint. A recording's own voice does not travel inside its tokens: `encode_with_voices` returns it beside them, and
    `reconstruct` uses it.

    The mean of a recording's vectors is taken away, so an id depends on the whole recording, though never on the batch.
    Recordings beyond `WINDOW` vectors are encoded and decoded in windows that overlap by `OVERLAP` on either side: attention
    within a window is all that approximates.

    Without units (``parts`` of the configuration) this is a continuous tokenizer: `encode` gives `zoo.Latents` of speech
    vectors, `decode` is the vocoder, and `convert` is kNN-VC.
    """

    Config = VecTokConfig
    family = "vectok"
    checkpoint = CHECKPOINT
    identity = ("units.centroids", "units.pairs")

    # Vectors of the windows that long recordings are encoded and decoded in, and of each margin that is dropped again.
    WINDOW: ClassVar[dict[str, int]] = {"encode": 1_500, "decode": 1_000}
    OVERLAP: ClassVar[int] = 50
    # Vectors in flight. On a CPU, encoding one by one costs nothing and makes ids independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 24_000), "decode": Budget(1_000, 32_000)}
    # Of a longer recording, the vectors are computed twice rather than kept until their mean is known.
    KEPT_FRAMES: ClassVar[int] = 45_000

    def __init__(self, config: VecTokConfig | None = None, *, name: str = "vectok") -> None:
        super().__init__(config or VecTokConfig(), name)
        config = self.config
        if "vectors" in config.parts:
            self.analysis: WavLM | LogMelVectors
            if isinstance(config.vectors, LogMelSizes):
                self.analysis = LogMelVectors(config.vectors, config.sample_rate)
            else:
                self.analysis = WavLM(config.vectors)
        if config.has_units:
            self.units = Units(config)
        if "inverse" in config.parts:
            self.inverse = InverseKMeans(config.inverse, config.vector_dim)
        if "vocoder" in config.parts:
            self.vocoder: HiFiGAN | ISTFTVocoder
            if isinstance(config.vocoder, HiFiGANSizes):
                self.vocoder = HiFiGAN(config.vocoder, config.vector_dim)
            else:
                self.vocoder = ISTFTVocoder(config.vocoder, config.vector_dim)
        if config.voices:
            self.stored_voices = Voices(config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            prompted=self.config.has_units,
            vocab_size=self.config.vocab_size if self.config.has_units else 0,
            dim=self.config.vector_dim,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            # Of tokens there is no fixed number per second.
            hop_length=None if self.config.has_units else self.config.hop_length,
            parts=tuple(part for part, brings in _SIDES.items() if brings in self.config.parts),
        )

    @property
    def device(self) -> torch.device:
        """Device of the tensors; units alone have no parameters."""
        return next(chain(self.parameters(), self.buffers())).device

    def compute_fingerprint(self) -> str:
        """Identity of the units and pairs, which ids depend on; without units, that of the vectors."""
        return super().compute_fingerprint() if self.config.has_units else self.vectors_fingerprint

    @property
    def vectors_fingerprint(self) -> str:
        """Identity of what makes the speech vectors, equal in all models that read the same layer; empty without it."""
        if "vectors" not in self.config.parts:
            return ""
        return vectors_fingerprint(self.analysis)

    # ---- encode

    def prepare(self, items: Any) -> list[Prepared]:
        """Speech as the network takes it: ``waveform`` ``[1, samples]`` at its rate, normalised; ``amount`` counts samples."""
        self.require("vectors", "encoding")
        return [
            self._with_waveform(item, self.analysis.normalise(item.tensors["waveform"][0])) for item in super().prepare(items)
        ]

    @staticmethod
    def _with_waveform(item: Prepared, waveform: Float[Tensor, " samples"]) -> Prepared:
        return Prepared({"waveform": waveform[None]}, item.meta, len(waveform))

    def encode_prepared(self, items: Sequence[Prepared], *, progress: bool = False) -> Tokens | Latents:
        """Encode what `prepare` gave, to tokens, or to `zoo.Latents` ``[dim, vectors]`` where the model has no units."""
        meta = [item.meta for item in items]
        if not self.config.has_units:
            return self.wrap([vectors.T for vectors in self._vectors(items, True, progress)], meta)
        return self.tokens([self.units.bpe.encode(units) for units in self._units(items, progress)], meta)

    def encode_with_voices(self, items: Any, *, progress: bool = False) -> tuple[Tokens, list[Voice]]:
        """Tokens as `encode` gives them, and beside them each item's own voice: its first vectors, 3 s by default.

        The voices take ``voice.nbytes`` (300 kB for 3 s of WavLM's vectors) and are saved apart from the tokens.

        Raises:
            InputError, WeightsError: as `encode` does.
        """
        self.require("units", "encoding to tokens")
        prepared = self.prepare(items)
        ids: dict[int, Tensor] = {}
        voices: dict[int, Voice] = {}
        for index, recording in self._recordings(prepared, progress=progress):
            first = next(recording.windows())
            own = first.vectors[first.kept][: self.config.prompt_frames].clone()
            voices[index] = Voice(own, fingerprint=self.vectors_fingerprint)
            ids[index] = self.units.bpe.encode(self._quantize(recording))
        order = range(len(prepared))
        return self.tokens([ids[i] for i in order], [item.meta for item in prepared]), [voices[i] for i in order]

    def vectors(self, items: Any, *, pad: bool = True, progress: bool = False) -> list[Float[Tensor, "_frames dim"]]:
        """Speech vectors of each item, ``ceil(samples / hop_length)`` of them, 50 per second.

        Args:
            items: as for `encode`.
            pad: append silence so that the last samples count; kNN-VC does not, and loses up to 399 samples.
            progress: show a progress bar.

        Raises:
            InputError, WeightsError: as `encode` does; or, without padding, an item is too short for a single vector.
        """
        return self._vectors(self.prepare(items), pad, progress)

    def unit_ids(self, items: Any, *, progress: bool = False) -> list[Int[Tensor, " _frames"]]:
        """Units of each item, 50 per second, before byte-pair encoding.

        Raises:
            InputError, WeightsError: as `encode` does.
        """
        self.require("units", "finding units")
        return self._units(self.prepare(items), progress)

    def _vectors(self, prepared: Sequence[Prepared], pad: bool, progress: bool) -> list[Float[Tensor, "_frames dim"]]:
        found = {index: recording.vectors() for index, recording in self._recordings(prepared, pad=pad, progress=progress)}
        return [found[index] for index in range(len(prepared))]

    def _units(self, prepared: Sequence[Prepared], progress: bool) -> list[Int[Tensor, " _frames"]]:
        found = {index: self._quantize(recording) for index, recording in self._recordings(prepared, progress=progress)}
        return [found[index] for index in range(len(prepared))]

    @torch.no_grad()
    def _quantize(self, recording: Recording) -> Int[Tensor, " frames"]:
        """Units of a recording, from its vectors less their mean."""
        with exact_float32(self.device):
            mean = recording.mean()
            return torch.cat([self.units.nearest(window.vectors - mean)[window.kept] for window in recording.windows()])

    def _recordings(
        self, prepared: Sequence[Prepared], *, pad: bool = True, progress: bool = False
    ) -> Iterator[tuple[int, Recording]]:
        analyser = Analyser(
            self.analysis,
            self.device,
            self.config.hop_length,
            window=self.WINDOW["encode"],
            overlap=self.OVERLAP,
            together=self.budget("encode"),
            kept=self.KEPT_FRAMES,
        )
        return analyser.recordings([item.tensors["waveform"][0] for item in prepared], pad=pad, progress=progress)

    # ---- voices

    @property
    def voices(self) -> dict[str, Voice]:
        """The voices of the checkpoint by name; `decode` takes a name as its prompt, and the first one without any."""
        if not self.config.voices:
            return {}
        vectors = self.stored_voices.vectors
        return {
            name: Voice(v, fingerprint=self.vectors_fingerprint) for name, v in zip(self.config.voices, vectors, strict=True)
        }

    def voice(self, items: Any, *, trigger_level: float | None = None, progress: bool = False) -> Voice:
        """The voice of a speaker from one or several recordings: at least a second, three or more for a good one.

        Args:
            items: as for `encode`, all of one speaker; minutes of them serve kNN-VC best.
            trigger_level: cut silence off both ends first, by torchaudio's voice activity detection; kNN-VC's level is 7.
            progress: show a progress bar.

        Raises:
            InputError: as `encode` does, or there is less than a second in all.
        """
        prepared = self.prepare(items)
        if trigger_level is not None:
            rate = self.config.sample_rate
            prepared = [
                self._with_waveform(item, trim_silence(item.tensors["waveform"][0], rate, trigger_level)) for item in prepared
            ]
        vectors = torch.cat(self._vectors(prepared, True, progress))
        fewest = min(FEWEST_PROMPT_FRAMES, self.config.prompt_frames)
        if len(vectors) < fewest:
            seconds = [frames * self.config.hop_length / self.config.sample_rate for frames in (len(vectors), fewest)]
            raise InputError(f"a voice needs at least {seconds[1]:g} s of speech, there are {seconds[0]:g} s")
        hop = self.config.hop_length
        padded = [F.pad(item.tensors["waveform"][0], (0, -item.amount % hop)) for item in prepared]
        energy = torch.cat([waveform.view(-1, hop).square().mean(1) for waveform in padded])
        return Voice(vectors, energy.to(vectors.device), self.vectors_fingerprint)

    def set_voices(self, voices: Mapping[str, Voice]) -> None:
        """Make these the voices of the checkpoint, the first one the default; all are cut to the length of the shortest.

        Raises:
            InputError: a voice is of another model.
        """
        prompts = {name: self._one_prompt(voice) for name, voice in voices.items()}
        frames = min(map(len, prompts.values()), default=0)
        self.config = replace(self.config, voices=tuple(prompts), voice_frames=frames)
        self.stored_voices = Voices(self.config)
        if prompts:
            self.stored_voices.vectors = torch.stack([prompt[:frames] for prompt in prompts.values()])

    def set_bpe(self, bpe: BPE) -> None:
        """Take other pairs; ids and fingerprint are others then.

        Raises:
            InputError: it is for another number of units.
        """
        self.require("units", "byte-pair encoding")
        if bpe.num_units != self.config.num_units:
            raise InputError(f"pairs of {bpe.num_units} units do not fit the model's {self.config.num_units}")
        self.units.set_bpe(bpe)
        self.config = replace(self.config, merges=len(bpe.pairs), vocab_size=bpe.vocab_size)
        self.fingerprint = self.compute_fingerprint()

    def _prompts(self, prompt: Prompt, count: int) -> list[Float[Tensor, "_prompt dim"]]:
        """A prompt for each of ``count`` items."""
        listed = prompt if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int | float)) else None
        if listed is None:
            return [self._one_prompt(prompt)] * count
        if len(listed) != count:
            raise InputError(f"{len(listed)} prompts do not fit {count} items")
        prompts = []
        for index, one in enumerate(listed):
            with naming_item(index):
                prompts.append(self._one_prompt(one))
        return prompts

    def _one_prompt(self, prompt: Prompt) -> Float[Tensor, "prompt dim"]:
        return self._as_voice(prompt).prompt().to(self.device)

    def _as_voice(self, prompt: Prompt) -> Voice:
        """The voice that a prompt means: a `Voice`, a stored one's name, vectors, speech, or the default."""
        stored = self.voices
        if prompt is None and not stored:
            raise InputError(
                "decoding needs a voice, and this checkpoint has none of its own: pass a recording, speech vectors or a Voice "
                "as prompt= (encode_with_voices gives each item's own)"
            )
        if prompt is None:
            return next(iter(stored.values()))
        if isinstance(prompt, str) and prompt in stored:
            return stored[prompt]
        if isinstance(prompt, str | os.PathLike) and os.fspath(prompt).endswith(".safetensors"):
            prompt = Voice.load(prompt)
        width = self.config.vector_dim
        if isinstance(prompt, Tensor) and prompt.ndim == 2 and prompt.is_floating_point() and prompt.shape[1] == width:
            prompt = Voice(prompt)
        if not isinstance(prompt, Voice):
            return self.voice(prompt)
        own = self.vectors_fingerprint
        if prompt.fingerprint and own and prompt.fingerprint != own:
            raise MismatchError("this voice was made of another model's speech vectors")
        if prompt.vectors.shape[1] != width or not len(prompt) or not prompt.vectors.isfinite().all():
            raise InputError(f"a prompt must be finite vectors [frames, {width}], not {list(prompt.vectors.shape)}")
        return prompt

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Latents | Tensor | Sequence[Tensor],
        *,
        prompt: Prompt = None,
        trim: bool = True,
        sample_rate: Rate = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Tokens and a voice to speech: a list of float tensors ``[1, samples]``, nominally in [-1, 1], not clipped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``.
                Latents, and without units bare ones ``[dim, vectors]``, go to the vocoder as they are.
            prompt: who speaks: a `Voice` or its file, the name of a voice of the checkpoint, speech vectors ``[frames, dim]``,
                or a recording as `encode` takes it; or a list with one of them for each item. Of more than 500 vectors the
                loudest count. By default the first of the checkpoint's `voices`, which is nobody's in the recording.
            trim: cut to the length of the encoded audio; otherwise whole vectors.
            sample_rate: resample the result; ``"original"`` gives back each item's own rate and number of samples.
            progress: show a progress bar.

        Raises:
            MismatchError: tokens or voice belong to another checkpoint.
            InputError: an id is out of range, an item is empty, or there is no voice.
            WeightsError: the model lacks a part that this needs.
        """
        self.require("vocoder", "decoding")
        if isinstance(tokens, Latents) or not self.config.has_units:
            if prompt is not None:
                raise InputError("a prompt goes with tokens; speech vectors have a voice already")
            latents = self._check_latents(tokens)
            waves = self.vocode([values.T for values in latents.values], progress=progress)
            return self.restored([wave[None] for wave in waves], latents.meta, trim, sample_rate)
        self.require("inverse", "decoding tokens")
        checked = self._check_tokens(tokens)
        prompts = self._prompts(prompt, len(checked))
        units = [self.units.expand(ids.to(self.device)) for ids in checked.unpadded()]
        waves = self._synthesiser.from_units(self._restorer, units, prompts, progress=progress)
        return self.restored([wave[None] for wave in waves], checked.meta, trim, sample_rate)

    @property
    def _restorer(self) -> Restorer:
        return Restorer(self.inverse, self.units.vectors, self.WINDOW["decode"], self.OVERLAP)

    @property
    def _synthesiser(self) -> Synthesiser:
        return Synthesiser(self.vocoder, self.device, self.WINDOW["decode"], self.budget("decode"))

    @torch.no_grad()
    def inverse_vectors(self, units: Sequence[Int[Tensor, " _"]], prompt: Prompt = None) -> list[Float[Tensor, "_frames dim"]]:
        """Speech vectors of sequences of units in the voice of a prompt, as `decode` computes them before the vocoder.

        Raises:
            InputError, WeightsError: as `decode` does.
        """
        self.require("inverse", "restoring vectors")
        with exact_float32(self.device):
            found = [
                torch.cat(list(self._restorer.windows(item.to(self.device), one)))
                for item, one in zip(units, self._prompts(prompt, len(units)), strict=True)
            ]
        return [vectors.float() for vectors in found]

    def vocode(
        self, vectors: Sequence[Float[Tensor, "_frames dim"]] | Float[Tensor, "frames dim"], *, progress: bool = False
    ) -> list[Float[Tensor, " _samples"]]:
        """Speech vectors to sound, ``hop_length`` samples for each vector; any length, in bounded memory.

        Raises:
            WeightsError: the model has no vocoder.
        """
        self.require("vocoder", "making sound")
        return self._synthesiser.from_vectors([vectors] if isinstance(vectors, Tensor) else vectors, progress=progress)

    def _check_latents(self, latents: Any) -> Latents:
        spec, own = self.spec, self.vectors_fingerprint
        if isinstance(latents, Tokens):
            raise InputError(f"{spec.name} has no units: it decodes latents of speech vectors, not tokens")
        if not isinstance(latents, Latents):
            latents = Latents(tuple(latents), spec.name, own)
        if latents.fingerprint and own and latents.fingerprint != own:
            raise MismatchError(
                f"these latents were made by {latents.tokenizer} ({latents.fingerprint}), this is {spec.name} ({own})"
            )
        latents.check(self.config.vector_dim, "vectors")
        return latents

    def reconstruct(self, items: Any) -> list[Float[Tensor, "1 _"]]:
        """Encode and decode again, each item in its own voice."""
        if not self.config.has_units:
            return super().reconstruct(items)
        tokens, voices = self.encode_with_voices(items)
        return self.decode(tokens, prompt=voices)

    def hints(self, item: Any) -> dict[str, Any]:
        """The recording's own voice, which its tokens do not hold."""
        return {"prompt": self.encode_with_voices(item)[1][0]} if self.config.has_units else {}

    # ---- other voices

    def convert(
        self,
        items: Any,
        *,
        voice: Prompt,
        decoder: str | None = None,
        neighbours: int | None = None,
        seconds: float | None = None,
        loudness: float | None = None,
        sample_rate: Rate = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Say the same in another voice, given by a single recording (zero-shot voice conversion).

        With a clean recording of the same speaker as the voice, a noisy one comes out cleaner, and a narrow-band one wider with
        a wide-band one. Both rely on units that leave out noise and channel: the paper's denoising and bandwidth extension.

        Args:
            items: as for `encode`.
            voice: whose voice: as ``prompt`` of `decode`, a list for one each.
            decoder: ``"inverse"`` goes through tokens and the inverse k-means model; ``"knn"`` replaces every speech vector by
                the mean of its nearest ones in the voice (kNN-VC, arXiv 2305.18975), all of whose vectors count then. By
                default the former where the model has it.
            neighbours: of a vector in kNN-VC; the configuration's, 4, by default.
            seconds: with ``"knn"``: change the duration to this.
            loudness: of the result, in LUFS; kNN-VC's own default is -16.
            sample_rate: as for `decode`.
            progress: show progress bars.

        Raises:
            InputError, MismatchError, WeightsError: as `encode` and `decode` do.
        """
        chosen = decoder or ("inverse" if "inverse" in self.config.parts else "knn")
        if chosen not in ("inverse", "knn"):
            raise ArgumentError(f"decoder must be 'inverse' or 'knn', not {decoder!r}")
        if chosen == "inverse" and (seconds is not None or neighbours is not None):
            raise InputError("seconds and neighbours go with decoder='knn': tokens have durations of their own")
        if chosen == "knn":
            waves, meta = self._convert_by_neighbours(items, voice, neighbours or self.config.neighbours, seconds, progress)
        else:
            self.require("units", "converting through tokens")
            tokens = self.encode(items, progress=progress)
            assert isinstance(tokens, Tokens)
            waves, meta = self.decode(tokens, prompt=voice, progress=progress), tokens.meta
        single = [wave[0] for wave in waves]
        if loudness is not None:
            single = [to_loudness(wave, self.config.sample_rate, loudness) for wave in single]
        return self.restored([wave[None] for wave in single], meta, seconds is None, sample_rate)

    def _convert_by_neighbours(
        self, items: Any, voice: Prompt, neighbours: int, seconds: float | None, progress: bool
    ) -> tuple[list[Float[Tensor, "1 _"]], Sequence[Mapping[str, Any]]]:
        self.require("vocoder", "converting")
        if neighbours < 1 or (seconds is not None and seconds <= 0):
            raise ArgumentError("neighbours and seconds must be positive")
        prepared = self.prepare(items)
        voices = voice if isinstance(voice, list) else [voice] * len(prepared)
        if len(voices) != len(prepared):
            raise InputError(f"{len(voices)} voices do not fit {len(prepared)} items")
        targets = [self._as_voice(one).vectors.to(self.device) for one in voices]
        samples = None if seconds is None else int(seconds * self.config.sample_rate)
        matched = []
        for queries, target in zip(self._vectors(prepared, True, progress), targets, strict=True):
            if samples is not None:
                queries = stretch(queries, samples / self.config.hop_length)
            matched.append(match(queries, target, neighbours))
        waves = self.vocode(matched, progress=progress)
        ends = [samples or item.amount for item in prepared]
        return [wave[None, :end] for wave, end in zip(waves, ends, strict=True)], [item.meta for item in prepared]

    def anonymise(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        seed: int | Sequence[int] = 0,
        pool: Sequence[Voice] | None = None,
        sample_rate: Rate = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Decode in a voice that is nobody's: vectors of one speaker of a pool, moved to a random mean among all of them.

        Args:
            tokens: as for `decode`. They hold little of the speaker, and the speaker's vectors are not asked for.
            seed: of the choice, one for all items or one for each.
            pool: at least two voices, the speaker's not among them; those of the checkpoint by default.
            sample_rate, progress: as for `decode`.

        Raises:
            InputError: the pool has fewer than two voices, or the seeds do not fit; and as `decode` does.
        """
        voices = list(self.voices.values()) if pool is None else [self._as_voice(voice) for voice in pool]
        if len(voices) < 2:
            raise InputError(f"a pool of {len(voices)} voices hides nobody: pass at least two as pool=")
        checked = self._check_tokens(tokens)
        seeds = [seed] * len(checked) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(checked):
            raise InputError(f"{len(seeds)} seeds do not fit {len(checked)} items")
        prompts = [mixture([voice.to(self.device) for voice in voices], own) for own in seeds]
        return self.decode(checked, prompt=prompts, sample_rate=sample_rate, progress=progress)

    # ---- embed, speed

    def embed(self, tokens: Tokens | Latents | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """Mean of the centroids of each token's units, or the latents as sequences; zero where an item has ended."""
        if isinstance(tokens, Latents) or not self.config.has_units:
            rows = [values.T.to(self.device) for values in self._check_latents(tokens).values]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ids = self._check_tokens(tokens).ids.to(self.device)
        return self.units.embed(ids.clamp(min=0)) * (ids >= 0)[..., None]

    def compile_modules(self) -> None:
        """Compile the blocks of the inverse model, and the vocoder or its blocks; the first calls are slow."""
        modules = list(self.inverse.layers) if "inverse" in self.config.parts else []
        if "vocoder" in self.config.parts:
            modules += [self.vocoder] if isinstance(self.vocoder, HiFiGAN) else list(self.vocoder.blocks)
        for module in modules:
            module.compile(dynamic=True)
