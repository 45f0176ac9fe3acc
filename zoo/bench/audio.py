"""Audio tokenizers against transformers' EnCodec, DAC and Mimi, or the package of the original code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo import registry
from zoo.bench.measure import Job, Work, random_model
from zoo.bench.quantized import Call, outline, quantized_model
from zoo.spec import Frame
from zoo.tokenizer import Tokenizer

UNIT = "second"
# ``ragged``: seconds of the shortest and of the longest clip of one more batch; ``quantize``: methods of `zoo.quantize`.
CASES: dict[str, Any] = {"batches": (1, 8), "seconds": (1, 10, 60), "ragged": (), "quantize": ()}

Works = tuple[Work | None, Work | None]


@dataclass(frozen=True)
class Contender:
    """A model under measurement: ``prepare(audio)`` gives its encode and decode as functions without arguments.

    Either is ``None`` where there is nothing to compare. ``ragged(clips)`` gives them for clips of different lengths, once for
    each way to take these, by name.
    """

    name: str
    prepare: Callable[[Tensor], Works]
    module: Tokenizer[Any] | None = None
    dtype: torch.dtype = torch.float32
    ragged: Callable[[Sequence[Tensor]], Mapping[str, Works]] | None = None


def jobs(
    entry: registry.Entry,
    device: str,
    peers: bool,
    batches: Sequence[int],
    seconds: Sequence[float],
    ragged: Sequence[float] = (),
    quantize: Sequence[str] = (),
) -> Iterator[Job]:
    """Everything to measure: every contender at every batch size and duration, in both directions."""
    rate = outline(entry).spec.sample_rate
    assert rate is not None
    for contender in _contenders(entry, device, peers, quantize):
        for batch in batches:
            for duration in seconds:
                works = contender.prepare(_audio(batch, duration, rate).to(device))
                for direction, work in zip(("encode", "decode"), works, strict=True):
                    case = f"{batch} x {duration:g} s"
                    yield Job(contender.name, direction, case, batch * duration, work, contender.module, contender.dtype)
            if not ragged or contender.ragged is None:
                continue
            low, high = ragged
            durations = torch.linspace(low, high, batch, dtype=torch.float64).tolist()
            clips = [_audio(1, duration, rate)[0].to(device) for duration in durations]
            for name, works in contender.ragged(clips).items():
                for direction, work in zip(("encode", "decode"), works, strict=True):
                    case = f"{batch} x {low:g} to {high:g} s"
                    yield Job(name, direction, case, sum(durations), work, contender.module, contender.dtype)


def smallest_call(
    entry: registry.Entry, batches: Sequence[int], seconds: Sequence[float], ragged: Sequence[float], quantize: Sequence[str]
) -> Call:
    """Decoding of the first case, with random ids."""
    spec = outline(entry).spec
    assert spec.token_rate is not None
    generator = torch.Generator().manual_seed(0)
    frame = spec.frame or Frame((spec.vocab_size,))
    shape = (batches[0], round(seconds[0] * spec.token_rate / frame.ids_per_frame))
    places = zip(frame.placed_sizes, frame.offsets, strict=True)
    ids = [torch.randint(size, shape, generator=generator) + offset for size, offset in places]
    return Call("decode", torch.stack(ids, dim=2).flatten(1).tolist(), {})


def _contenders(entry: registry.Entry, device: str, peers: bool, quantize: Sequence[str]) -> Iterator[Contender]:
    tokenizer = random_model(entry, device)
    yield _ours(entry.name, tokenizer)
    if "decoder" in tokenizer.spec.parts:
        tokenizer.set_precision("bf16")
        # Encoders stay in float32 and have nothing new to show.
        yield _ours(f"{entry.name}, bf16", tokenizer, encodes=False, dtype=torch.bfloat16)
        for method in quantize:
            packed = quantized_model(entry, device, method)
            for precision, suffix in (("fp32", ""), ("bf16", ", bf16")):
                packed.set_precision(precision)
                # PyTorch does not count the operations of packed products.
                yield replace(_ours(f"{entry.name}, {method}{suffix}", packed, encodes=False), module=None)
    if peers and entry.family in _PEERS:
        package, contenders = _PEERS[entry.family]
        if find_spec(package):
            yield from contenders(tokenizer, device)


def _ours(name: str, tokenizer: Tokenizer[Any], encodes: bool = True, dtype: torch.dtype = torch.float32) -> Contender:
    def prepare(audio: Sequence[Tensor] | Tensor) -> Works:
        items = [clip.cpu() for clip in audio]
        encode = (lambda: tokenizer.encode(items)) if encodes else None
        if "decoder" not in tokenizer.spec.parts:
            return encode, None
        tokens = tokenizer.encode(items)
        return encode, lambda: tokenizer.decode(tokens)

    return Contender(name, prepare, tokenizer, dtype, lambda clips: {name: prepare(clips)})


def _transformers_peers(tokenizer: Tokenizer[Any], device: str) -> Iterator[Contender]:
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    config = tokenizer.config
    same_encoder = EncodecConfig(
        num_filters=config.n_filters,
        hidden_size=config.latent_dim,
        upsampling_ratios=list(config.ratios),
        num_lstm_layers=config.lstm_layers,
        use_causal_conv=False,
        norm_type="weight_norm",
    )
    twin = EncodecModel(same_encoder).eval().to(device)
    codes = tokenizer.state_dict()["codebook.embed"]

    def search(audio: Tensor) -> Tensor:
        """The same encoder, and the search as the original code writes it."""
        latents = twin.encoder(audio[:, None]).transpose(1, 2).flatten(0, 1)
        return (latents.square().sum(1, keepdim=True) - 2 * latents @ codes.T + codes.square().sum(1)).argmin(1)

    yield Contender("EnCodec, same sizes", lambda audio: (lambda: search(audio), None))

    encodec = EncodecModel(EncodecConfig()).eval().to(device)

    def prepare_encodec(audio: Tensor) -> tuple[Work, Work]:
        encoded = encodec.encode(audio[:, None], bandwidth=6.0)
        return (
            lambda: encodec.encode(audio[:, None], bandwidth=6.0),
            lambda: encodec.decode(encoded.audio_codes, encoded.audio_scales),
        )

    yield Contender("EnCodec 6 kbit/s", prepare_encodec)

    dac = DacModel(DacConfig(sampling_rate=24_000)).eval().to(device)

    def prepare_dac(audio: Tensor) -> tuple[Work, Work]:
        quantized = dac.encode(audio[:, None]).quantized_representation
        return lambda: dac.encode(audio[:, None]), lambda: dac.decode(quantized)

    yield Contender("DAC", prepare_dac)

    mimi = MimiModel(MimiConfig()).eval().to(device)

    def prepare_mimi(audio: Tensor) -> tuple[Work, Work]:
        codes = mimi.encode(audio[:, None]).audio_codes
        return lambda: mimi.encode(audio[:, None]), lambda: mimi.decode(codes)

    yield Contender("Mimi", prepare_mimi)


def _snac_peer(tokenizer: Tokenizer[Any], device: str) -> Iterator[Contender]:
    model, _ = original_snac(tokenizer.config)
    model.to(device)

    def prepare(audio: Tensor) -> tuple[Work, Work]:
        codes = model.encode(audio[:, None])
        return lambda: model.encode(audio[:, None]), lambda: model.decode(codes)

    yield Contender("snac 1.2", prepare)


def original_snac(config: Any) -> tuple[Any, dict[str, Any]]:
    """The model of the package ``snac`` at the sizes of ours, with random weights, and its own configuration."""
    from snac import SNAC

    settings = asdict(config)
    settings["sampling_rate"] = settings.pop("sample_rate")
    return SNAC(**settings).eval().requires_grad_(False), settings


def _s3tokenizer_peer(tokenizer: Tokenizer[Any], device: str) -> Iterator[Contender]:
    encode = original_s3tokenizer(tokenizer, device)
    yield Contender("s3tokenizer 0.3", lambda audio: (lambda: encode(list(audio.cpu())), None))


def original_s3tokenizer(tokenizer: Tokenizer[Any], device: str = "cpu") -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """Encoding by the package ``s3tokenizer`` with our weights, which pads mel spectrograms to the longest of a batch.

    Args:
        tokenizer: ours.
        device: where to run.

    Returns:
        A function from recordings ``[samples]`` at 16 kHz to ids ``[batch, longest]`` and their numbers.
    """
    import s3tokenizer
    from s3tokenizer.model import ModelConfig, S3Tokenizer
    from s3tokenizer.model_v2 import ModelConfig as ModelConfigV2
    from s3tokenizer.model_v2 import S3TokenizerV2

    config = tokenizer.config
    rotary = config.memory > 0
    sizes = (ModelConfigV2 if rotary else ModelConfig)(
        n_mels=config.bands,
        n_audio_state=config.dim,
        n_audio_head=config.heads,
        n_audio_layer=config.depth,
        n_codebook_size=config.codebook_size,
    )
    name = "speech_tokenizer_v2_25hz" if rotary else f"speech_tokenizer_v1{'_25hz' if config.stride == 2 else ''}"
    model = (S3TokenizerV2 if rotary else S3Tokenizer)(name, sizes).eval()
    theirs = {
        "encoder.positions": "encoder.positional_embedding",
        "quantizer.weight": f"quantizer._codebook.{'project_down.weight' if rotary else 'embed'}",
        "quantizer.bias": "quantizer._codebook.project_down.bias",
    }
    state = {theirs.get(key, key.replace(".memory.", ".fsmn_block.")): value for key, value in tokenizer.state_dict().items()}
    model.load_state_dict(state, strict=True)
    model.to(device)

    def encode(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        mels, lengths = s3tokenizer.padding([s3tokenizer.log_mel_spectrogram(item, n_mels=config.bands) for item in items])
        found: tuple[Tensor, Tensor] = model.quantize(mels.to(device), lengths.to(device))
        return found

    return encode


def _transformers_class(tokenizer: Tokenizer[Any], device: str) -> Iterator[Contender]:
    """The library's own class at the same sizes: a batch padded to the longest, as it takes it, or clip by clip."""
    import transformers

    name = {"dac": "DacModel", "encodec": "EncodecModel", "mimi": "MimiModel"}[tokenizer.family]
    model = getattr(transformers, name)(tokenizer.sizes).eval().to(device)
    count, channels = tokenizer.spec.codebooks, cast(Any, tokenizer).channels

    def encode(audio: Tensor) -> Any:
        waveforms = audio[:, None].expand(-1, channels, -1)
        if tokenizer.family == "encodec":
            rate = min(model.config.target_bandwidths, key=lambda own: abs(own * 1000 - (tokenizer.spec.bit_rate or 0)))
            return model.encode(waveforms, bandwidth=rate)
        hop = tokenizer.spec.hop_length or 1
        return model.encode(torch.nn.functional.pad(waveforms, (0, -audio.shape[1] % hop)), count)

    def decode(encoded: Any) -> Any:
        scales = {"audio_scales": encoded.audio_scales} if tokenizer.family == "encodec" else {}
        return model.decode(audio_codes=encoded.audio_codes, **scales)

    def prepare(audio: Tensor) -> Works:
        encoded = encode(audio)
        return lambda: encode(audio), lambda: decode(encoded)

    def ragged(clips: Sequence[Tensor]) -> Mapping[str, Works]:
        each = [encode(clip[None]) for clip in clips]
        loop = (lambda: [encode(clip[None]) for clip in clips], lambda: [decode(own) for own in each])
        return {f"{name}, padded batch": prepare(pad_sequence(list(clips), batch_first=True)), f"{name}, clip by clip": loop}

    yield Contender(name, prepare, ragged=ragged)


#: The peers of a family, and the package that has them.
_PEERS: dict[str, tuple[str, Callable[[Tokenizer[Any], str], Iterator[Contender]]]] = {
    "wavtokenizer": ("transformers", _transformers_peers),
    "snac": ("snac", _snac_peer),
    "dac": ("transformers", _transformers_class),
    "encodec": ("transformers", _transformers_class),
    "mimi": ("transformers", _transformers_class),
    "s3tokenizer": ("s3tokenizer", _s3tokenizer_peer),
}


def items(tokenizer: Tokenizer[Any], count: int) -> list[Tensor]:
    """Input of a comparison of two releases: five seconds of noise each."""
    assert tokenizer.spec.sample_rate is not None
    return list(_audio(count, 5, tokenizer.spec.sample_rate))


def _audio(batch: int, seconds: float, rate: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, round(seconds * rate), generator=generator) * 0.1
