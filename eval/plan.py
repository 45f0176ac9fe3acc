"""Plan of a run for every item: the metrics that can run, the options, and the prefixes to decode."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import ArgumentError, InputError
from zoo.eval.modality.base import Measures, Metric, MetricFunction, measures_of
from zoo.media import FITS, INTERPOLATIONS
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens

#: The path of a network's weights, ``None`` for the public ones, or the network itself as a function.
NetworkSource = str | Path | MetricFunction | None

# Options that are checked before the first item, which an encoder would do at the first.
_CHOICES = {"fit": FITS, "interpolation": INTERPOLATIONS, "posterior": ("mode", "sample")}


@dataclass(frozen=True)
class Plan:
    """Way of reconstructing and measuring every item.

    Attributes:
        tokenizer: what is measured.
        modality: the module of its media.
        functions: what measures an item, by the metric's name.
        feature_functions: what extracts an item's features, for metrics of the whole set.
        skipped: why which metrics are left out.
        encode, decode: options of the tokenizer's methods.
        prefixes: token counts to decode besides whole sequences; ``None`` for powers of two.
    """

    tokenizer: Tokenizer[Any]
    modality: Measures
    functions: Mapping[str, MetricFunction]
    feature_functions: Mapping[str, MetricFunction]
    skipped: Mapping[str, str]
    encode: Mapping[str, Any]
    decode: Mapping[str, Any]
    prefixes: tuple[int, ...] | None

    @property
    def settings(self) -> dict[str, Any]:
        """The options in force, as plain values."""
        return options_in_force(self.tokenizer, self.encode, self.decode)

    @property
    def device(self) -> torch.device:
        """Device on which metrics compute."""
        return self.tokenizer.device if self.modality.ON_DEVICE else torch.device("cpu")

    def read(self, path: str) -> Any:
        """An item as the tokenizer takes it."""
        return self._placed(self.modality.read(path, self.tokenizer.spec, self.encode))

    def _placed(self, media: Any) -> Any:
        """Tensors in float32 where metrics compute; other media as they are."""
        return media.float().to(self.device) if isinstance(media, Tensor) else media

    def encoded(self, reference: Any) -> Tokens:
        """Its tokens."""
        tokens: Tokens = self.tokenizer.encode(reference, **self.encode).to("cpu")
        return tokens

    def tokens_of(self, ids: Sequence[int], reference: Any) -> Tokens:
        """Stored ids as tokens again, with what they remember of the original where they do not decode without it."""
        meta: list[Mapping[str, Any]] = []
        if getattr(self.modality, "NEEDS_META", False):
            known = inspect.signature(self.tokenizer.prepare).parameters
            options = {name: value for name, value in self.encode.items() if name in known}
            meta = [item.meta for item in self.tokenizer.prepare(reference, **options)]
        return self.tokenizer.tokens([torch.tensor(ids, dtype=torch.int64)], meta)

    def own_options(self, reference: Any) -> dict[str, Any]:
        """Options to decode an item with that are not given for all of them."""
        return {name: value for name, value in self.tokenizer.hints(reference).items() if name not in self.decode}

    def decoded(self, tokens: Tokens, reference: Any, lengths: Sequence[int], own: Mapping[str, Any]) -> list[Any]:
        """Reconstructions of one item from prefixes of its tokens, decoded as one batch with its own options."""
        if not lengths:
            return []
        # An empty file has no tokens, and no prefix either.
        whole = int(tokens.lengths[0])
        batch = Tokens.cat([tokens if length == whole else tokens.truncate(length) for length in lengths])
        media = self.tokenizer.decode(batch.to(self.tokenizer.device), **self.decode, **own)
        return [self.modality.comparable(self._placed(item), reference) for item in media]

    def prefix_lengths(self, length: int) -> list[int]:
        """The prefixes of a sequence to look at, all of them shorter than it; none where prefixes do not decode."""
        if not self.tokenizer.spec.ordered:
            return []
        wanted = self.prefixes if self.prefixes is not None else [2**power for power in range(length.bit_length())]
        return sorted({count for count in wanted if count < length})


def make_plan(
    tokenizer: Tokenizer[Any],
    *,
    metrics: Sequence[str] | None,
    networks: Mapping[str, NetworkSource],
    encode: Mapping[str, Any],
    decode: Mapping[str, Any],
    prefixes: Sequence[int] | None,
) -> Plan:
    """Check what a run was asked for, and load the networks that it takes; the arguments are those of `reconstruct.run`.

    Raises:
        InputError: a metric or an option is unknown, or the tokenizer cannot be measured.
        WeightsError: the weights given for a network are not what it needs.
    """
    spec = tokenizer.spec
    modality = measures_of(spec.modality)
    if spec.continuous:
        raise InputError(f"{spec.name} gives latents instead of tokens, so there is no rate to hold against its loss")
    if prefixes and not spec.ordered:
        raise InputError(f"prefixes of {spec.name} do not decode: its tokens are not ordered")
    if any(length < 1 for length in prefixes or ()):
        raise InputError("a prefix has at least 1 token")
    options_in_force(tokenizer, encode, decode)
    for name, choices in _CHOICES.items():
        if name in encode and encode[name] not in choices:
            raise ArgumentError(f"{name} must be one of {', '.join(choices)}, not {encode[name]!r}")
    functions, skipped = _choose_metrics(modality, metrics, networks, tokenizer.device)
    of_the_set = [name for name in functions if modality.METRICS[name].distance is not None]
    return Plan(
        tokenizer,
        modality,
        functions={name: function for name, function in functions.items() if name not in of_the_set},
        feature_functions={name: functions[name] for name in of_the_set},
        skipped=skipped,
        encode=encode,
        decode=decode,
        prefixes=None if prefixes is None else tuple(prefixes),
    )


def options_in_force(tokenizer: Tokenizer[Any], encode: Mapping[str, Any], decode: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which a tokenizer encodes and decodes: its own defaults, and the given ones.

    An option whose default is ``None`` is taken from the field of the tokenizer's configuration that has its name, if any.

    Raises:
        InputError: it has no option of that name.
    """
    found: dict[str, Any] = {}
    actions: tuple[tuple[Literal["encode", "decode"], Mapping[str, Any]], ...] = (("encode", encode), ("decode", decode))
    for action, given in actions:
        options = type(tokenizer).options(action)
        if unknown := [name for name in given if name not in options]:
            raise InputError(f"{tokenizer.name} takes no {', '.join(unknown)} to {action}")
        defaults = {
            name: getattr(tokenizer.config, name, None) if default is None else default
            for name, default in options.items()
            if name != "progress"
        }
        found[action] = {name: value for name, value in defaults.items() if isinstance(value, str | int | float)} | dict(given)
    return found


def _choose_metrics(
    modality: Measures, wanted: Sequence[str] | None, networks: Mapping[str, NetworkSource], device: torch.device
) -> tuple[dict[str, MetricFunction], dict[str, str]]:
    """What computes each metric, and why the others are left out."""
    for name in wanted or ():
        if name not in modality.METRICS:
            raise InputError(f"unknown metric {name!r}; there are {', '.join(modality.METRICS)}")
    with_network = [name for name, metric in modality.METRICS.items() if metric.network]
    for name in networks:
        if name not in with_network:
            raise InputError(f"{name!r} takes no network; {', '.join(with_network)} do")
    chosen: dict[str, MetricFunction] = {}
    skipped: dict[str, str] = {}
    for name in wanted if wanted is not None else modality.METRICS:
        function = _metric_function(name, modality.METRICS[name], networks, device)
        if isinstance(function, str):
            skipped[name] = function
        else:
            chosen[name] = function
    return chosen, skipped


def _metric_function(
    name: str, metric: Metric, networks: Mapping[str, NetworkSource], device: torch.device
) -> MetricFunction | str:
    """What computes a metric, or the reason why nothing can."""
    given = networks.get(name)
    if callable(given):
        return given
    if reason := metric.why_skipped():
        return reason
    if metric.function is not None:
        return metric.function
    network = metric.network
    assert network is not None
    if given is not None:
        return network.load(Path(given), device, False)
    fetch = name in networks and bool(network.source)
    try:
        return network.load(None, device, fetch)
    except OSError as error:
        if fetch:
            return f"{network.source} cannot be fetched: {error}"
    fetching = f"--network {name} fetches {network.source}, " if network.source else ""
    return f"needs a network that is not here: {fetching}--network {name}=PATH takes {network.accepts}"
