"""Accuracy of a small trained vision-language model over the share of visual tokens that a method leaves it.

    zoo study compress --out eval/results/compress-vlm-tiny.json --plot eval/results/compress-vlm-tiny.png

The model is ``vlm-tiny``, the questions are about unseen scenes (`zoo.weights.data.scenes`), each about one object of five to
eight. A method that drops that object's tokens loses the answer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from zoo import compress
from zoo.errors import InputError
from zoo.eval.options import Out, command_line
from zoo.machine import device_name, usable_device
from zoo.media import replacing, write_json
from zoo.weights.data import scenes as vlm_data
from zoo.weights.recipes import vlm

KEEPS = (0.5, 0.22, 0.11, 0.05)
FULL = "full"
#: Scenes of other seeds than the training's.
HELD_OUT_SEED = 20_000
QUESTIONS_PER_SCENE = 4
BATCH = 64


class Example(NamedTuple):
    """A question about a scene.

    Attributes:
        pixels: of the scene, as the model takes them.
        words: ids of the question, padded in front.
        kind: of the question.
        answer: id of the word that answers it.
    """

    pixels: Float[Tensor, "3 side side"]
    words: list[int]
    kind: str
    answer: int


def examples(count: int, seed: int = HELD_OUT_SEED) -> list[Example]:
    """Questions about scenes, all kinds alike often."""
    found = []
    for index in range(-(-count // QUESTIONS_PER_SCENE)):
        scene = vlm_data.scene(seed, index)
        pixels = vlm_data.pixel_values(scene.pixels[None])[0]
        rng = np.random.default_rng((seed, index, 1))
        for question in vlm_data.draw_questions(rng, scene, QUESTIONS_PER_SCENE):
            found.append(Example(pixels, vlm_data.question_ids(question), question.kind, vlm_data.IDS[question.answer]))
    return found[:count]


def batches(questions: Sequence[Example], device: torch.device | str) -> Iterator[dict[str, Tensor]]:
    """Prompts of the form in which the model was trained: beginning, image, question; padded on the left."""
    pad, bos, image = (vlm_data.IDS[word] for word in ("<pad>", "<bos>", "<image>"))
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        rows = []
        for example in part:
            words = [word for word in example.words if word != pad]
            missing = len(example.words) - len(words)
            rows.append([pad] * missing + [bos] + [image] * vlm.PATCHES + words)
        ids = torch.tensor(rows, device=device)
        pixels = torch.stack([example.pixels for example in part]).to(device)
        yield {"input_ids": ids, "attention_mask": (ids != pad).long(), "pixel_values": pixels}


def answers(model: Any, questions: Sequence[Example]) -> Int[Tensor, " questions"]:
    """The first word that the model answers with."""
    found = []
    with torch.inference_mode():
        for prompt in batches(questions, model.device):
            found.append(model.generate(**prompt, max_new_tokens=1, do_sample=False)[:, -1].cpu())
    return torch.cat(found)


def accuracies(given: Int[Tensor, " questions"], questions: Sequence[Example]) -> dict[str, float]:
    """Share of right answers, over all questions and by kind."""
    right = given == torch.tensor([example.answer for example in questions])
    kinds = [example.kind for example in questions]
    by_kind = {
        kind: float(right[torch.tensor([own == kind for own in kinds])].double().mean()) for kind in dict.fromkeys(kinds)
    }
    return {"all": float(right.double().mean())} | {kind: by_kind[kind] for kind in vlm_data.KINDS if kind in by_kind}


def blind(questions: Sequence[Example]) -> dict[str, float]:
    """Share that the commonest answer to each kind of question gets right."""
    common = {}
    for kind in {example.kind for example in questions}:
        common[kind] = Counter(example.answer for example in questions if example.kind == kind).most_common(1)[0][0]
    return accuracies(torch.tensor([common[example.kind] for example in questions]), questions)


def run(
    model: Any,
    *,
    methods: Sequence[str] | None = None,
    keeps: Sequence[float] = KEEPS,
    questions: int = 2000,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
    command: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Ask the same questions under every method and share.

    Args:
        model: as `zoo.weights.recipes.vlm.load` gives it.
        methods: from `zoo.compress.METHODS`; all that need no training of their own by default.
        keeps: shares of visual tokens.
        questions: how many.
        json_path, plot_path: write the result and its plot there.
        command: what was typed, for the record.
        progress: show a progress bar.

    Returns:
        Accuracies with the shares of tokens that were left, the machine, and why anything was left out.

    Raises:
        InputError: an unknown method.
    """
    from tqdm.auto import tqdm

    names = [name for name, info in compress.METHODS.items() if not info.trained] if methods is None else list(methods)
    if unknown := [name for name in names if name not in compress.METHODS]:
        raise InputError(f"no method {unknown[0]!r}; there are {', '.join(compress.METHODS)}")
    asked = examples(questions)
    results = [{"method": FULL, "keep": 1.0, "accuracy": accuracies(answers(model, asked), asked)}]
    skipped: dict[str, str] = {}
    runs = [(name, keep) for name in names for keep in keeps]
    for name, keep in tqdm(runs, desc="accuracy", disable=not progress):
        try:
            with compress.apply(model, name, keep=keep) as handle:
                accuracy = accuracies(answers(model, asked), asked)
                stats = handle.stats
        except InputError as error:
            skipped[f"{name} {keep:g}"] = str(error)
            continue
        share = {"share": round(stats.share, 4), "final_share": round(stats.final_share, 4)}
        results.append({"method": name, "keep": keep, "accuracy": accuracy} | share)
    content = {
        "model": {"name": "vlm-tiny", "visual_tokens": vlm.PATCHES, "layers": model.config.text_config.num_hidden_layers},
        "questions": len(asked),
        "blind": blind(asked),
        "results": results,
        "skipped": skipped,
        "machine": {"device": device_name(model.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "command": command,
    }
    if json_path is not None:
        write_json(json_path, content)
    if plot_path is not None:
        plot(content, plot_path)
    return content


def plot(content: Mapping[str, Any], path: str | Path) -> None:
    """Accuracy over the share of tokens, a line per method; ``.png`` or ``.svg`` by the name."""
    from matplotlib.figure import Figure

    results = content["results"]
    names = list(dict.fromkeys(result["method"] for result in results[1:]))
    kinds = [kind for kind in results[0]["accuracy"] if kind != "all"]
    figure = Figure(figsize=(12.5, 6.4), layout="constrained")
    panels = figure.subplot_mosaic([["all", "all", *kinds[:2]], ["all", "all", *kinds[2:]]])
    for kind, axis in panels.items():
        for index, name in enumerate(names):
            points = [(1.0, results[0]["accuracy"][kind])]
            points += [(result["keep"], result["accuracy"][kind]) for result in results if result["method"] == name]
            style = {"linestyle": "-" if index < 10 else "--", "marker": "os^Dvp<>*Xh"[index % 11], "markersize": 4}
            axis.plot(*zip(*sorted(points), strict=True), label=name, color=f"C{index % 10}", linewidth=1.2, **style)
        axis.axhline(content["blind"][kind], color="#8a8f98", linestyle=":", label="blind guess")
        axis.set_xscale("log")
        axis.set_xticks(sorted({result["keep"] for result in results}))
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        axis.set_title(f"questions of {kind}" if kind != "all" else "all questions", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels["all"].set_xlabel("visual tokens kept (stages inside the language model: in its last layers)", fontsize=9)
    panels["all"].set_ylabel("right answers")
    panels["all"].legend(fontsize=8, loc="lower right", ncols=2)
    figure.suptitle(
        f"{content['model']['name']}, {content['model']['visual_tokens']} visual tokens, {content['questions']} questions "
        "about scenes that it was not trained on",
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix(".") or "png", dpi=100)


def table(content: Mapping[str, Any]) -> str:
    """Accuracies in Markdown, a row per method."""
    results = content["results"]
    keeps = sorted({result["keep"] for result in results[1:]}, reverse=True)
    lines = [f"| method | {' | '.join(f'{keep:.0%}' for keep in keeps)} |", "|---|" + "---|" * len(keeps)]
    for name in dict.fromkeys(result["method"] for result in results[1:]):
        found = {result["keep"]: f"{result['accuracy']['all']:.1%}" for result in results if result["method"] == name}
        lines.append(f"| {name} | {' | '.join(found.get(keep, '') for keep in keeps)} |")
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in results[0]["accuracy"].items())
    return "\n".join([*lines, "", f"With all tokens: {kinds}. A blind guess: {content['blind']['all']:.1%} of all."])


def embedded_weights() -> Path:
    """The file that comes with the package."""
    return Path(str(files("zoo.weights") / "vlm-tiny.safetensors"))


def main(
    out: Out,
    plot: Annotated[Path | None, typer.Option(help="write a plot, .png or .svg")] = None,
    weights: Annotated[Path | None, typer.Option(help="a file of the recipe; the package's own by default")] = None,
    method: Annotated[list[str] | None, typer.Option(help="may be given several times; all by default")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="share of visual tokens; may be given several times")] = None,
    questions: Annotated[int, typer.Option(min=1, help="about scenes that the model was not trained on")] = 2000,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure how many answers a small vision-language model gets right with fewer visual tokens."""
    target = usable_device(device)
    model: Any = vlm.load(weights or embedded_weights())
    content = run(
        model.to(target),
        methods=method or None,
        keeps=keep or KEEPS,
        questions=questions,
        json_path=out,
        plot_path=plot,
        command=command_line(),
        progress=sys.stderr.isatty(),
    )
    print(table(content))
