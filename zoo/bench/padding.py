"""`zoo bench padding`: frames of an item that a library's class changes when it takes the item in a padded batch.

Small models of each class with random weights, the same ones in the class and in our tokenizer. The class gets a batch of
recordings of different lengths, padded with zeros to the longest. What it gives each item alone counts as right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoo.hub import load_upstream
from zoo.machine import device_name
from zoo.media import write_json

#: Frames of the recordings, and samples over a whole number of frames.
LENGTHS = ((64, 0), (41, 7), (23, 0), (8, 3))
#: Latents closer than this share of their deviation count as the same.
CLOSE = 1e-3


@dataclass(frozen=True)
class Kind:
    """A class of a library.

    Attributes:
        name: of the row.
        family: of our tokenizer.
        build: makes a small model.
        encode: waveforms ``[batch, channels, samples]`` to codes or latents ``[batch, frames, numbers]``.
        hop: samples of a frame.
        whole: whether the class is given whole frames, as its feature extractor pads.
        channels: of the waveforms.
    """

    name: str
    family: str
    build: Callable[[], Any]
    encode: Callable[[Any, Tensor], Tensor]
    hop: int
    whole: bool = True
    channels: int = 1


@dataclass(frozen=True)
class Row:
    """Frames of one class: of all items of the batch, and those that differ from the item's own.

    Attributes:
        name: of the class.
        frames: of all items.
        library: of these, how many differ in the library's padded batch.
        ours: how many in ours.
    """

    name: str
    frames: int
    library: int
    ours: int


def run(names: Sequence[str] | None = None, *, json_path: str | Path | None = None) -> dict[str, Any]:
    """The table, as plain values.

    Args:
        names: of the rows; all by default.
        json_path: write the result there.
    """
    rows = [measured(kind) for kind in kinds() if names is None or kind.name in names]
    content = {"device": device_name(torch.device("cpu")), "rows": [vars(row) for row in rows]}
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_table(content: Mapping[str, Any]) -> None:
    """The result of `run`, as a table."""
    table = Table(title="frames that differ from those of the item alone")
    for column in ("class", "frames", "its padded batch", "ours"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in content["rows"]:
        table.add_row(row["name"], *(str(row[key]) for key in ("frames", "library", "ours")))
    Console().print(table)


@torch.inference_mode()
def measured(kind: Kind) -> Row:
    """The frames of one class that differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.build().eval()
        _fill(model)
        waves = [torch.randn(kind.channels, frames * kind.hop + more) * 0.3 for frames, more in LENGTHS]
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    if "model_type" not in config:
        config["_class_name"] = type(model).__name__
    tokenizer = load_upstream(kind.family, config, model.state_dict())

    def prepared(wave: Tensor, length: int) -> Tensor:
        return F.pad(wave, (0, length - wave.shape[1]))

    lengths = [-(-wave.shape[1] // kind.hop) * kind.hop if kind.whole else wave.shape[1] for wave in waves]
    alone = [kind.encode(model, prepared(wave, length)[None])[0] for wave, length in zip(waves, lengths, strict=True)]
    batch = kind.encode(model, torch.stack([prepared(wave, max(lengths)) for wave in waves]))
    own_alone, own = [_values(tokenizer.encode(wave))[0] for wave in waves], _values(tokenizer.encode(waves))
    return Row(
        kind.name,
        sum(len(values) for values in alone),
        sum(_differing(values, padded[: len(values)]) for values, padded in zip(alone, batch, strict=True)),
        sum(_differing(values, padded) for values, padded in zip(own_alone, own, strict=True)),
    )


def _values(encoded: Any) -> list[Tensor]:
    """Codes or latents ``[frames, numbers]`` of each item."""
    if hasattr(encoded, "values"):
        return [latents.T for latents in encoded.values]
    frames = (encoded.lengths // encoded.ids_per_frame).tolist()
    return [codes[:count] for codes, count in zip(encoded.codes(), frames, strict=True)]


def _differing(left: Tensor, right: Tensor) -> int:
    if not left.is_floating_point():
        return int((left != right).any(1).sum())
    return int(((left - right).abs().amax(1) > CLOSE * left.std()).sum())


def _fill(model: nn.Module) -> None:
    """Give a model of a library numbers that its codes depend on: codebooks start at zero, and scales near it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("inited", "initialized", "inv_freq")):
            continue
        if tensor.ndim == 2 and any(part in name for part in ("codebook", "embed")):
            tensor.copy_(0.3 * torch.randn_like(tensor))
        elif name.endswith(("cluster_size", "cluster_usage")):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif name.endswith(("scale", "gamma")):
            tensor.fill_(0.5)
        elif name.endswith("original0"):
            tensor.mul_(2)
        elif name.endswith(("alpha", "beta")):
            tensor.copy_(0.2 * torch.randn_like(tensor) + (0 if name.endswith("beta") else 0.5))
        elif tensor.ndim > 1 and "norm" not in name and not name.endswith(("original0", "weight_g")):
            tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)


def kinds() -> list[Kind]:
    """The classes, small."""
    import diffusers
    import transformers as library

    ratios = [8, 5, 4, 2]
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32}
    causal: dict[str, Any] = {"hidden_size": 32, "num_filters": 4, "upsample_groups": 32, "num_hidden_layers": 2, **attention}
    speech = library.HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0,
    )  # fmt: skip
    sound = {"model_type": "dac", "encoder_hidden_size": 2, "decoder_hidden_size": 64}
    sound |= {"downsampling_ratios": ratios, "upsampling_ratios": ratios, "hidden_size": 16}

    def encodec(is_causal: bool) -> Any:
        sizes: dict[str, Any] = {
            "num_filters": 4,
            "hidden_size": 8,
            "target_bandwidths": [6.0],
            "upsampling_ratios": ratios,
        }
        return library.EncodecModel(library.EncodecConfig(**sizes, use_causal_conv=is_causal))

    return [
        Kind(
            "DacModel",
            "dac",
            lambda: library.DacModel(library.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=9)),
            lambda model, x: model.encode(x).audio_codes.mT,
            512,
        ),
        Kind("EncodecModel, causal", "encodec", lambda: encodec(True), _encodec_codes, 320, whole=False),
        Kind("EncodecModel, not causal", "encodec", lambda: encodec(False), _encodec_codes, 320, whole=False),
        Kind(
            "MimiModel",
            "mimi",
            lambda: library.MimiModel(
                library.MimiConfig(**causal, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=8)
            ),
            lambda model, x: model.encode(x).audio_codes.mT,
            1920,
            whole=False,
        ),
        Kind(
            "XcodecModel",
            "xcodec",
            lambda: library.XcodecModel(
                library.XcodecConfig(
                    acoustic_model_config=sound,
                    semantic_model_config=speech.to_dict(),
                    target_bandwidths=[4.0],
                )
            ),
            lambda model, x: model.encode(x).audio_codes.mT,
            320,
        ),
        Kind(
            "AutoencoderOobleck",
            "oobleck",
            lambda: diffusers.AutoencoderOobleck(
                encoder_hidden_size=8, channel_multiples=[1, 1, 1, 1, 1], decoder_channels=8, decoder_input_channels=4
            ),
            lambda model, x: model.encode(x).latent_dist.mode().mT,
            2048,
            channels=2,
        ),
        Kind(
            "PocketTTSAudioTokenizerModel",
            "pocket_tts",
            lambda: library.PocketTTSAudioTokenizerModel(library.PocketTTSAudioTokenizerConfig(**causal)),
            lambda model, x: model.encode(x).latents,
            1920,
            whole=False,
        ),
    ]


def _encodec_codes(model: Any, x: Tensor) -> Tensor:
    codes: Tensor = model.encode(x, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0].mT
    return codes
