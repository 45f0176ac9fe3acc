"""Savings and costs of dropping visual tokens, and the distance that the model's predictions move.

Cost does not depend on the values of the weights, so the model is a LLaVA of random weights at a documented size. Drift can be
compared between methods on one model only: random weights look everywhere at once, which trained ones do not. Accuracy on a
trained model, though a tiny one, is what ``zoo study compress`` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo import compress
from zoo.bench.compress_reported import TABLES
from zoo.compress import kv
from zoo.compress.quecc import QueCCConfig, QueCCProjector
from zoo.compress.stats import prefill_flops
from zoo.errors import InputError
from zoo.machine import described
from zoo.media import replacing, write_json

NAME = "compress"
KEEPS = (0.5, 0.22, 0.11, 0.05)
STEPS = 8
#: Policies of the cache, which keep or read a share of the whole prompt.
POLICIES: dict[str, Callable[[float], kv.Policy]] = {
    "h2o": lambda keep: kv.H2O(heavy=keep / 2, recent=keep / 2),
    "double sparsity": lambda keep: kv.DoubleSparsity(tokens=keep),
    "tidal decode": lambda keep: kv.TidalDecode(tokens=keep, correction=4),
    "token select": lambda keep: kv.TokenSelect(tokens=keep, init=4, local=32, chunk=32),
}
FULL = "full"

_PAD, _BOS, _IMAGE, _FIRST_WORD = 0, 1, 2, 3
# Prompt lengths that the time of the language model is fitted to, as shares of the full one.
_FITTED = (0.1, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Size:
    """A LLaVA-1.5: CLIP tower, two-layer projector, Llama.

    Attributes:
        image, patch: pixels of a side.
        tower_layers, tower_width, tower_heads: of the tower; its multilayer perceptrons have four times the width.
        layers, width, hidden, heads, kv_heads, vocabulary: of the language model.
    """

    image: int = 336
    patch: int = 14
    tower_layers: int = 6
    tower_width: int = 256
    tower_heads: int = 4
    layers: int = 8
    width: int = 512
    hidden: int = 1408
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 1000

    @property
    def tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.image // self.patch) ** 2


SIZES = {
    "small": Size(),
    "1b": Size(tower_layers=24, tower_width=1024, tower_heads=16, layers=16, width=2048, hidden=5632, heads=16, kv_heads=16),
    "7b": Size(
        tower_layers=24,
        tower_width=1024,
        tower_heads=16,
        layers=32,
        width=4096,
        hidden=11008,
        heads=32,
        kv_heads=32,
        vocabulary=32064,
    ),
}


@dataclass(frozen=True)
class Result:
    """One method at one share of tokens.

    Attributes:
        method: name, ``full`` for the model as it is.
        keep: share of visual tokens asked for; of the whole prompt for policies of the cache.
        tokens: that each layer of the language model works on in the prompt, text included.
        prefill, decode: seconds of the prompt with its image, and of each token after it.
        cache_bytes: of keys and values when the last token is done.
        read_bytes: of them that the last step reads, by `zoo.compress.kv.Policy.entries_read` where a policy chooses.
        flops: of the prompt as PyTorch counts them, tower and projector included.
        formula_flops: of the language model's layers, by `zoo.compress.stats.prefill_flops`.
        method_flops: counted beyond the layers by the formula and what the full model does outside of them; below 0 where the
            tower has less to do.
        overhead: seconds that the method takes beyond its token counts' own, over the seconds saved by them.
        drift: KL divergence in nats of the next-token distribution from the full model's, mean over the steps.
    """

    method: str
    keep: float
    tokens: tuple[int, ...]
    prefill: float
    decode: float
    cache_bytes: int
    read_bytes: int
    flops: int
    formula_flops: int
    method_flops: int
    overhead: float | None
    drift: float


@dataclass
class Trace:
    """Clock readings of one call of ``generate``: its start, and the end of each pass through the model."""

    start: float = 0.0
    passes: list[float] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        return self.passes[0] - self.start

    @property
    def decode(self) -> float:
        return (self.passes[-1] - self.passes[0]) / max(1, len(self.passes) - 1)


def build(size: Size, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A LLaVA of random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.tower_width,
            intermediate_size=4 * size.tower_width,
            num_hidden_layers=size.tower_layers,
            num_attention_heads=size.tower_heads,
            image_size=size.image,
            patch_size=size.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=4096,
            pad_token_id=_PAD,
            bos_token_id=_BOS,
            eos_token_id=None,
        ),
        image_token_index=_IMAGE,
    )
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration(config)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(size: Size, device: str, batch: int, text: int) -> dict[str, Tensor]:
    """Prompts of a few words, an image and more words, ``text`` of them in all."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(_FIRST_WORD, size.vocabulary, (batch, text), generator=generator)
    words[:, 0] = _BOS
    image = torch.full((batch, size.tokens), _IMAGE)
    before = min(8, text // 2)
    ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1)
    coarse = torch.randn(batch, 3, 12, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(size.image, size.image), mode="bicubic")
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device),
    }


def run(
    *,
    size: str | Size = "small",
    methods: Sequence[str] | None = None,
    keeps: Sequence[float] = KEEPS,
    batch: int = 1,
    text: int = 60,
    steps: int = STEPS,
    threads: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    repetitions: int = 3,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure methods of `zoo.compress` and policies of the cache on one model.

    Times are processor seconds of all threads on a CPU, which other programs disturb less, and elapsed seconds elsewhere.

    Args:
        size: one of `SIZES`, or another.
        methods: from `zoo.compress.METHODS` and `POLICIES`; all by default.
        keeps: shares of tokens.
        batch: prompts at a time.
        text: words of a prompt.
        steps: tokens to generate: those that the full model chose, for all alike.
        threads: of PyTorch; its own choice if ``None``.
        device: where to run.
        dtype: of the model; float32 on a CPU and bfloat16 elsewhere by default.
        repetitions: measurements per figure, after one warm-up; the median counts.
        json_path, plot_path: write the result and its plot (``.png`` or ``.svg``) there.

    Returns:
        The results with the machine they were taken on, in the form that `print_tables` shows.

    Raises:
        InputError: an unknown size or method, a share out of range, or fewer than 2 steps.
    """
    chosen = [*compress.METHODS, *POLICIES] if methods is None else list(methods)
    if unknown := [name for name in chosen if name not in compress.METHODS and name not in POLICIES]:
        raise InputError(f"no method {unknown[0]!r}; there are {', '.join([*compress.METHODS, *POLICIES])}")
    if isinstance(size, str) and size not in SIZES:
        raise InputError(f"no size {size!r}; there are {', '.join(SIZES)}")
    if steps < 2:
        raise InputError(f"decoding takes at least 2 steps, not {steps}")
    if bad := [keep for keep in keeps if not 0 < keep <= 1]:
        raise InputError(f"shares of tokens lie in (0, 1], not {bad[0]}")
    if threads:
        torch.set_num_threads(threads)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = SIZES[size] if isinstance(size, str) else size
    with torch.inference_mode():
        bench = _Bench(sizes, device, dtype, batch, text, steps, repetitions)
        results, skipped = bench.results(chosen, keeps)
    content = {
        "name": NAME,
        "model": asdict(sizes) | {"tokens": sizes.tokens, "parameters": sum(p.numel() for p in bench.model.parameters())},
        "prompt": {"batch": batch, "text": text, "steps": steps},
        "machine": described(device)
        | {
            "dtype": str(dtype).removeprefix("torch."),
            "clock": "processor" if device == "cpu" else "elapsed",
        },
        "results": [asdict(result) for result in results],
        "skipped": skipped,
    }
    if json_path is not None:
        write_json(json_path, content)
    if plot_path is not None:
        plot(content, plot_path)
    return content


class _Bench:
    """A model, its prompts, and what the full model makes of them."""

    def __init__(
        self, size: Size, device: str, dtype: torch.dtype, batch: int, text: int, steps: int, repetitions: int
    ) -> None:
        self.size, self.device, self.steps, self.repetitions = size, device, steps, repetitions
        self.model = build(size, device, dtype)
        self.inputs = inputs(size, device, batch, text)
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(dtype)
        self.text_config = self.model.config.text_config
        self.length = self.inputs["input_ids"].shape[1]
        self.answer: Int[Tensor, "batch steps"] | None = None
        full = self._generate()
        self.answer = full.sequences[:, self.length :]
        self.expected = self._distributions(full)
        self.cost = self._cost_of_length()

    def results(self, methods: Sequence[str], keeps: Sequence[float]) -> tuple[list[Result], dict[str, str]]:
        """The full model and every method at every share, and why a method was left out."""
        self.full = self._measure(FULL, 1.0, nullcontext())
        found, skipped = [self.full], {}
        for name in methods:
            for keep in keeps:
                try:
                    found.append(self._measure(name, keep, self._attached(name, keep)))
                except InputError as error:
                    skipped[f"{name} {keep:g}"] = str(error)
        return found, skipped

    def _attached(self, name: str, keep: float) -> AbstractContextManager[Any]:
        """The method in the model."""
        if name in POLICIES:
            return kv.apply(self.model, POLICIES[name](keep))
        if name == "quecc":
            return compress.apply(self.model, name, **self._quecc(keep))
        return compress.apply(self.model, name, keep=keep)

    def _quecc(self, keep: float) -> dict[str, Any]:
        """A projector of random weights whose region is nearest to the share; its answers mean nothing, its cost does."""
        size = self.size
        side = size.image // size.patch
        kernel = min((k for k in range(1, side + 1) if side % k == 0), key=lambda k: abs(1 / k**2 - keep))
        depth = size.tower_layers
        layers = sorted({max(1, depth // 2), max(1, depth * 2 // 3), depth - 1 or 1, depth})
        config = QueCCConfig(
            size.tower_width, len(layers) * size.tower_width, size.width, size.tokens, kernel, size.tower_heads, size.width
        )
        projector = QueCCProjector(config).eval().to(self.device, self.inputs["pixel_values"].dtype)
        question = torch.zeros(size.width, device=self.device, dtype=self.inputs["pixel_values"].dtype)
        return {"projector": projector, "question": question, "layers": layers}

    def _measure(self, name: str, keep: float, attached: AbstractContextManager[Any]) -> Result:
        with attached as handle:
            out = self._generate()  # warms up as well
            counts = [self.length] * self.size.layers
            if isinstance(handle, compress.Handle):
                counts = handle.stats.tokens_per_layer()
            traces = [self._timed() for _ in range(self.repetitions)]
            with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
                self._generate(steps=1)
        drift = (self.expected.exp() * (self.expected - self._distributions(out))).sum(-1).mean()
        batch = len(self.inputs["input_ids"])
        formula = batch * prefill_flops(counts, self.text_config)
        full_formula = batch * prefill_flops([self.length] * self.size.layers, self.text_config)
        flops = counter.get_total_flops()
        outside = flops - formula - (0 if name == FULL else self.full.flops - full_formula)
        prefill = float(np.median([trace.prefill for trace in traces]))
        saved = sum(self.cost(self.length) - self.cost(count) for count in counts)
        return Result(
            method=name,
            keep=keep,
            tokens=tuple(counts),
            prefill=prefill,
            decode=float(np.median([trace.decode for trace in traces])),
            cache_bytes=cache_bytes(out.past_key_values),
            read_bytes=self._read_bytes(name, keep, cache_bytes(out.past_key_values)),
            flops=flops,
            formula_flops=formula,
            method_flops=outside if name != FULL else 0,
            overhead=(prefill - (self.full.prefill - saved)) / saved if saved > 0 and name != FULL else None,
            drift=max(0.0, float(drift)),
        )

    def _read_bytes(self, name: str, keep: float, stored: int) -> int:
        if name not in POLICIES:
            return stored
        policy, length = POLICIES[name](keep), self.length + self.steps - 1
        entries = sum(policy.entries_read(layer, self.length, length) for layer in range(self.size.layers))
        head_dim = self.size.width // self.size.heads
        prompts = self.inputs["input_ids"].shape[0]
        return round(2 * entries * prompts * self.size.kv_heads * head_dim * self.inputs["pixel_values"].element_size())

    def _generate(self, steps: int | None = None) -> Any:
        """Greedy tokens of the full model, and afterwards the same ones whatever the model prefers."""
        return self.model.generate(
            **self.inputs,
            max_new_tokens=steps or self.steps,
            do_sample=False,
            logits_processor=[] if self.answer is None else [_Forced(self.answer, self.length)],
            output_logits=True,
            return_dict_in_generate=True,
        )

    def _timed(self) -> Trace:
        with _tracing(self.model, self.device) as trace:
            self._generate()
        return trace

    @staticmethod
    def _distributions(out: Any) -> Float[Tensor, "batch steps vocabulary"]:
        return torch.stack(out.logits, dim=1).double().log_softmax(-1)

    def _cost_of_length(self) -> Callable[[int], float]:
        """Seconds that a layer of the language model takes for a prompt, a parabola through a few lengths."""
        decoder = self.model.model.language_model
        lengths = sorted({max(2, round(share * self.length)) for share in _FITTED})
        seconds = []
        for length in lengths:
            embeds = torch.randn(
                len(self.inputs["input_ids"]),
                length,
                self.size.width,
                device=self.device,
                dtype=self.inputs["pixel_values"].dtype,
            )
            readings = []
            for _ in range(self.repetitions + 1):
                started = _now(self.device)
                decoder(inputs_embeds=embeds, use_cache=True)
                readings.append(_now(self.device) - started)
            seconds.append(float(np.median(readings[1:])) / self.size.layers)
        coefficients = np.polyfit(lengths, seconds, 2)
        return lambda length: float(np.polyval(coefficients, length))


class _Forced:
    """Makes generation take given tokens: at a step of the answer, all others are impossible."""

    def __init__(self, answer: Int[Tensor, "batch steps"], length: int) -> None:
        self.answer, self.length = answer, length

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        step = input_ids.shape[1] - self.length
        wanted = self.answer[:, step : step + 1]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *arguments: Any, out_shape: Any = None, **keywords: Any
) -> int:
    """Operations of attention by its shapes ``[batch, heads, length, head_dim]``, all keys counted for all queries."""
    batch, heads, queries, head_dim = query
    return 2 * batch * heads * queries * key[2] * (head_dim + value[3])


# The counter knows the attention kernels of GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _tracing(model: Any, device: str) -> Iterator[Trace]:
    trace = Trace()
    hook = model.register_forward_hook(lambda *_: trace.passes.append(_now(device)))
    try:
        trace.start = _now(device)
        yield trace
    finally:
        hook.remove()


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


# ---------------------------------------------------------------------------------------------------------------- showing


def print_tables(content: Mapping[str, Any]) -> None:
    """The results and the published accuracies as tables."""
    from rich.console import Console
    from rich.table import Table

    machine, model, prompt = content["machine"], content["model"], content["prompt"]
    console = Console()
    console.print(
        f"LLaVA of random weights: {model['parameters'] / 1e6:.0f} M parameters, {model['tokens']} visual and {prompt['text']} "
        f"other tokens, batch {prompt['batch']}"
    )
    console.print(f"{_named(machine)}, torch {machine['torch']}, {machine['clock']} time")
    table = Table(title="measured")
    columns = (
        "method",
        "keep",
        "tokens first..last",
        "prefill ms",
        "decode ms",
        "cache MB",
        "GFLOP",
        "formula",
        "overhead",
        "KL",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for result in content["results"]:
        table.add_row(
            result["method"],
            f"{result['keep']:.0%}",
            f"{result['tokens'][0]}..{result['tokens'][-1]}",
            f"{1e3 * result['prefill']:.0f}",
            f"{1e3 * result['decode']:.1f}",
            f"{result['cache_bytes'] / 1e6:.2f}",
            f"{result['read_bytes'] / 1e6:.2f}",
            f"{result['flops'] / 1e9:.1f}",
            f"{result['formula_flops'] / 1e9:.1f}",
            "" if result["overhead"] is None else f"{result['overhead']:.1%}",
            f"{result['drift']:.2g}",
        )
    console.print(table)
    for name, reason in content["skipped"].items():
        console.print(f"left out: {name}: {reason}")
    for published in TABLES:
        table = Table(title=f"reported, not measured here: {published.model}, accuracy kept in %")
        counts = sorted({row.tokens for row in published.rows}, reverse=True)
        table.add_column("method")
        for count in counts:
            table.add_column(f"{count} of {published.tokens} tokens", justify="right")
        for method in dict.fromkeys(row.method for row in published.rows):
            figures = {row.tokens: f"{row.retention:.1f}" for row in published.rows if row.method == method}
            table.add_row(method, *(figures.get(count, "") for count in counts))
        console.print(table)
        console.print(published.source)


def _named(machine: Mapping[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, {machine['dtype']}"


def plot(content: Mapping[str, Any], path: str | Path) -> None:
    """Prefill time, cache and drift over the share of tokens, a line per method; ``.png`` or ``.svg`` by the name."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    colours = colormaps["tab20"]
    panels = figure.subplots(1, 3)
    results = content["results"]
    full = results[0]
    machine = content["machine"]
    figure.suptitle(
        f"random-weight LLaVA, {content['model']['parameters'] / 1e6:.0f} M parameters, {content['model']['tokens']} visual "
        f"tokens; {_named(machine)}",
        fontsize=9,
    )
    shown = (
        ("prefill", 1e3, f"prefill, {machine['clock']} ms"),
        ("read_bytes", 1e-6, "cache read per token, MB"),
        ("drift", 1.0, "KL, nats"),
    )
    names = list(dict.fromkeys(result["method"] for result in results[1:]))
    for axis, (quantity, unit, label) in zip(panels, shown, strict=True):
        for index, name in enumerate(names):
            points = sorted((result["keep"], unit * result[quantity]) for result in results if result["method"] == name)
            style = {
                "color": colours(index % colours.N),
                "marker": "os^Dv"[index // 10 + index % 3],
                "markersize": 4,
                "linewidth": 1.2,
            }
            axis.plot(*zip(*points, strict=True), label=name, linestyle="--" if name in POLICIES else "-", **style)
        if quantity != "drift":
            axis.axhline(unit * full[quantity], color="#8a8f98", linestyle=":", label=FULL)
            axis.set_ylim(bottom=0)
        axis.set_xscale("log")
        axis.set_xticks(sorted({result["keep"] for result in results[1:]}))
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.minorticks_off()
        axis.set_xlabel("tokens kept")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_yscale("symlog", linthresh=1e-6)
    panels[-1].set_ylim(bottom=0)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix(".") or "png", dpi=110)
