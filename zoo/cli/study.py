"""``zoo study NAME``: single questions and their measurements, and the media that they are asked about.

A study is a module with a typed ``main``, whose options become those of the command. Only the module asked for is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

#: Module and purpose of every study, in the order in which they are listed.
STUDIES: dict[str, tuple[str, str]] = {
    "prefixes": ("zoo.eval.studies.prefixes", "a photograph decoded from more and more of its tokens, as one picture"),
    "shape-prefixes": ("zoo.eval.studies.shape_prefixes", "shapes decoded from more and more of their tokens, as one picture"),
    "precision": ("zoo.eval.studies.precision", "what bfloat16 costs an image tokenizer"),
    "quantize": ("zoo.eval.studies.quantize", "what quantization costs a model, by number format and way of rounding"),
    "binary": ("zoo.eval.studies.binary", "every binarization method on a model: quality, robustness, size and speed"),
    "compress": ("zoo.eval.studies.compress", "right answers of a vision-language model over the visual tokens left to it"),
    "probe": ("zoo.eval.studies.probe", "what the two halves of a TokenFlow's tokens say about a picture's kind"),
    "consistency": ("zoo.eval.studies.consistency", "whether pictures that are drawn anew show what went in"),
    "voices": ("zoo.eval.studies.voices", "what a voice does to speech whose tokens hold none"),
    "binary-speed": ("zoo.bench.binary", "time of packed signs and of binary layers"),
    "search-speed": ("zoo.bench.search", "time of the search for a number format"),
    "byte-speed": ("zoo.bench.byte_model", "time of the bytes of a language model"),
    "photographs": ("zoo.eval.photographs", "write the photographs that scikit-image ships"),
    "solids": ("zoo.eval.solids", "write closed meshes"),
    "held-out-speech": ("zoo.weights.data.audio", "write speech that no embedded model was trained on"),
    "held-out-files": (
        "zoo.weights.data.files",
        "write files that no embedded model was trained on, by class",
    ),
}


class _Studies(TyperGroup):
    """The table above as a group of commands: listing reads the table, running one imports its module."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            width = max(map(len, STUDIES)) + 2
            for name, (_, purpose) in STUDIES.items():
                print(f"{name:{width}}{purpose}")
            ctx.exit()
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(STUDIES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=STUDIES[cmd_name][1]) if cmd_name in STUDIES else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, command_of(name) if name else None, rest


def command_of(name: str) -> Any:
    """The command of a study, from the signature of its ``main``."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(import_module(STUDIES[name][0]).main)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Studies,
    help="Answer one question by a measurement, or write the media that it takes.",
    subcommand_metavar="NAME [ARGS]...",
)
