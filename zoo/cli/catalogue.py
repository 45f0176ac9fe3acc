"""The commands about the catalogue: what there is, and getting it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from zoo import registry
from zoo.cli.console import note, print_json, print_lines
from zoo.cli.files import require_writable
from zoo.cli.options import Json, Name, Parts, Places, parts_of, places_of
from zoo.errors import ArgumentError, RegistryError
from zoo.modality import modality as modality_named


def list_models(
    pattern: Annotated[str, typer.Argument(help="shell pattern")] = "*",
    modality: Annotated[str | None, typer.Option(help="audio, image, ...")] = None,
    family: Annotated[str | None, typer.Option(help="codec family")] = None,
    embedded: Annotated[bool | None, typer.Option(help="only models that come with the package, or only the others")] = None,
    everything: Annotated[bool, typer.Option("--all", help="also configurations whose weights were never published")] = False,
    as_json: Json = False,
) -> None:
    """List the models of the catalogue."""
    if modality is not None:
        modality_named(modality)
    families = sorted({registry.get(name).family for name in registry.names()})
    if family is not None and family not in families:
        raise RegistryError(f"there is no family {family!r}; there are {', '.join(families)}")
    matching = partial(registry.names, pattern, modality=modality, family=family, embedded=embedded)
    chosen = [registry.get(name) for name in matching(published=None if everything else True)]
    if as_json:
        print_json([entry.model_dump() for entry in chosen])
        return
    elsewhere = {"embedded": "in the package", "none": "not published", "local": "fetched by hand"}
    rows = [("name", "modality", "weights", "description")]
    for entry in chosen:
        place = elsewhere.get(entry.weights.source, entry.weights.repo or "")
        rows.append((entry.name, entry.modality, place, entry.description))
    print_lines(rows)
    if not chosen:
        note(f"no model matches {pattern!r}")
    if hidden := 0 if everything else len(matching(published=False)):
        note(f"and {hidden} configurations whose weights were never published: zoo list --all")


def info(name: Annotated[str, typer.Argument(help="a name in the catalogue")], as_json: Json = False) -> None:
    """Show one model: sizes, weights, licences, published figures."""
    entry = registry.get(name)
    if as_json:
        print_json(entry.model_dump())
        return
    from rich.console import Console
    from rich.table import Table

    weights = entry.weights
    where = {
        "embedded": f"in the package: {weights.file}",
        "hub": f"{weights.repo} / {weights.file} @ {weights.revision}",
        "local": f"{weights.file}: {weights.note}",
        "none": f"never published{f': {weights.note}' if weights.note else ''}",
    }[weights.source]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("name", entry.name)
    table.add_row("", entry.description)
    table.add_row("family", f"{entry.family} ({entry.modality})")
    table.add_row("config", ", ".join(f"{key} {value}" for key, value in entry.config.items()))
    table.add_row("weights", where)
    for mirror in weights.mirrors:
        table.add_row("", f"also hf-hub:{mirror.repo} ({mirror.note})" if mirror.note else f"also hf-hub:{mirror.repo}")
    for piece, described in weights.pieces.items():
        place = f"{described.repo} / {described.file or ', '.join(described.components)}" if described.repo else described.file
        table.add_row("", f"and {piece}: {place}{f' ({described.note})' if described.note else ''}")
    table.add_row("licence", f"code {entry.licence.code}, weights {entry.licence.weights}")
    if entry.licence.note:
        table.add_row("", entry.licence.note)
    if entry.licence.non_commercial:
        table.add_row("", "[yellow]the weights must not be used commercially[/yellow]")
    if entry.paper:
        table.add_row("paper", f"{entry.paper.title}, {entry.paper.url}")
    for figure in entry.reported:
        table.add_row("reported", f"{figure.metric} {figure.value:g} on {figure.data} ({figure.source})")
    table.add_row("card", f"zoo cards {entry.family}")
    Console().print(table)


def cards(family: Annotated[str | None, typer.Argument(help="codec family; all of them if left out")] = None) -> None:
    """Show model cards."""
    from importlib import resources

    from rich.console import Console
    from rich.markdown import Markdown

    found = {Path(card.name).stem: card for card in resources.files("zoo.cards").iterdir() if card.name.endswith(".md")}
    if family is None:
        for known in sorted(found):
            print(known)
        return
    if family not in found:
        raise RegistryError(f"there is no card called {family!r}; there are {', '.join(sorted(found))}")
    Console().print(Markdown(found[family].read_text(encoding="utf-8")))


def _require_choice(entry: registry.Entry, parts: list[str] | None, revision: str | None) -> None:
    """Refuse a revision or parts that an entry does not have, which only what is on the Hub would look at."""
    from zoo.hub import pieces

    if revision is not None and entry.weights.source != "hub":
        raise ArgumentError(f"{entry.name} is not fetched from the Hub: it has no revision {revision!r}")
    available = pieces.parts_of(registry.check_config(entry))
    if unknown := [part for part in parts or () if part not in available]:
        has = f"the parts {', '.join(available)}" if available else "no parts to choose from"
        raise ArgumentError(f"{entry.name} has {has}; {unknown[0]!r} is none of them")


def export(
    name: Name,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of encoder.onnx, decoder.onnx and export.json")],
    tolerate: Annotated[bool, typer.Option(help="write graphs that give some other ids as well")] = False,
    parts: Parts = None,
    places: Places = None,
    as_json: Json = False,
) -> None:
    """Write a tokenizer as ONNX, and compare what onnxruntime makes of it with the tokenizer."""
    from zoo import hub, onnx_export

    require_writable(out, folder=True)
    tokenizer = hub.load(name, parts=parts_of(parts), files=places_of(places))
    description = onnx_export.export(tokenizer, out, tolerate=tolerate)
    if as_json:
        print_json(description)
        return
    for line in onnx_export.summary(description):
        note(line)


def pull(
    names: Annotated[list[str], typer.Argument(help="names in the catalogue")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    parts: Parts = None,
) -> None:
    """Download weights, for use without a network."""
    from zoo import hub

    for name in names:
        _require_choice(registry.get(name), parts_of(parts), revision)
        print(hub.pull(name, parts=parts_of(parts), revision=revision))


def convert(
    names: Annotated[list[str], typer.Argument(help="names in the catalogue")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    parts: Parts = None,
    places: Places = None,
) -> None:
    """Write cleaned safetensors beside the cache, which later loads use: smaller, quicker, no pickle."""
    from zoo import hub

    for name in names:
        _require_choice(registry.get(name), parts_of(parts), revision)
        print(hub.convert(name, parts=parts_of(parts), files=places_of(places), revision=revision))
