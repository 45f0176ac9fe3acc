"""MAGNET: boundaries of words predicted per script, pooled, worked on and spread over the bytes again (arXiv 2407.08818).

Ahia et al., "MAGNET: Improving the multilingual fairness of language models with adaptive gradient-based tokenization", after
Nawrot et al. (2023). Bytes go through causal layers of a post-norm Transformer-XL. A predictor of the script marks the bytes
that end a word, and the mean of a closed word's bytes goes through further layers. Each byte then gets the vector of the last
word that is closed, so that nothing looks ahead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import regex
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.errors import ArgumentError, InputError, KeysError, WeightsError, naming_item
from zoo.media.bytes import MAX_BYTES
from zoo.precision import Float32Module, undisturbed
from zoo.spec import Spec
from zoo.tokenizer import Prepared
from zoo.tokenizer.byte_text import FIRST_SENTINEL, ByteTextTokenizer
from zoo.tokenizer.text import Specials
from zoo.tokens import Tokens

#: Bytes of an item that the network takes: attention's memory grows with the square.
LONGEST = 8192

Bytes = Float[Tensor, "batch length dim"]


@dataclass(frozen=True)
class MagnetConfig:
    """Sizes of a model.

    Attributes:
        vocabulary: ids: ByT5's 0 to 258, then one for each script.
        dim, heads, head_dim, hidden: of all layers.
        layers: before pooling, on words, and after spreading.
        scripts: names or codes of Unicode's, in the order of their ids from 259 on.
        priors: expected share of bytes that end a word, by script.
        temperature: of sampled boundaries.
    """

    vocabulary: int = 264
    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    layers: tuple[int, int, int] = (2, 3, 2)
    scripts: tuple[str, ...] = ("latin",)
    priors: tuple[float, ...] = (0.2,)
    temperature: float = 0.5

    first_script = FIRST_SENTINEL

    def __post_init__(self) -> None:
        if len(self.scripts) != len(self.priors) or not self.scripts:
            raise InputError(f"{len(self.scripts)} scripts do not go with {len(self.priors)} priors")


class MagnetOutput(NamedTuple):
    """Rows of one script, stage by stage.

    Attributes:
        before: states after the byte layers.
        boundary_logits: of the script's predictor.
        boundaries: bytes that end a word.
        pooled: the null vector, then the mean of each word.
        words: pooled states after the word layers.
        spread: the vector that each byte gets.
        logits: of the next byte.
    """

    before: Bytes
    boundary_logits: Float[Tensor, "batch length"]
    boundaries: Float[Tensor, "batch length"]
    pooled: Float[Tensor, "batch words dim"]
    words: Float[Tensor, "batch words dim"]
    spread: Bytes
    logits: Float[Tensor, "batch length vocabulary"]


class RelativeAttention(nn.Module):
    """Causal attention with relative positions, and the norm after it."""

    def __init__(self, config: MagnetConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.shape = (config.heads, config.head_dim)
        self.qkv_net = nn.Linear(config.dim, 3 * inner)
        self.r_net = nn.Linear(config.dim, inner)
        self.o_net = nn.Linear(inner, config.dim)
        self.layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Bytes, positions: Float[Tensor, "length dim"], content: Tensor, place: Tensor) -> Bytes:
        query, key, value = (part.unflatten(-1, self.shape).transpose(1, 2) for part in self.qkv_net(x).chunk(3, dim=-1))
        relative = self.r_net(positions).unflatten(-1, self.shape).transpose(0, 1)
        length = x.shape[1]
        order = torch.arange(length, device=x.device, dtype=torch.int64)
        distance = order[:, None] - order
        by_place = ((query + place[:, None]) @ relative.transpose(1, 2)).gather(
            -1, distance.clamp(min=0).expand(len(x), self.shape[0], -1, -1)
        )
        scores = ((query + content[:, None]) @ key.transpose(2, 3) + by_place) / math.sqrt(self.shape[1])
        attention = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        return self.layer_norm(x + self.o_net((attention @ value).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear maps around GELU, and the norm after them."""

    def __init__(self, config: MagnetConfig) -> None:
        super().__init__()
        # Number 2 is dropout, which has no parameters.
        self.CoreNet = nn.Sequential(
            nn.Linear(config.dim, config.hidden), nn.GELU(), nn.Identity(), nn.Linear(config.hidden, config.dim)
        )
        self.layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Bytes) -> Bytes:
        return self.layer_norm(x + self.CoreNet(x))


class Layer(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, config: MagnetConfig) -> None:
        super().__init__()
        self.dec_attn, self.pos_ff = RelativeAttention(config), FeedForward(config)

    def forward(self, x: Bytes, positions: Float[Tensor, "length dim"], content: Tensor, place: Tensor) -> Bytes:
        return self.pos_ff(self.dec_attn(x, positions, content, place))


class BoundaryPredictor(nn.Module):
    """Whether a byte ends a word, by script."""

    def __init__(self, config: MagnetConfig) -> None:
        super().__init__()
        self.boundary_predictor = nn.Sequential(nn.Linear(config.dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1))

    def forward(self, x: Bytes) -> Float[Tensor, "batch length"]:
        return self.boundary_predictor(x)[..., 0]


class Magnet(Float32Module):
    """The network, under the original's keys."""

    def __init__(self, config: MagnetConfig) -> None:
        super().__init__()
        self.config = config
        self.word_emb = nn.Embedding(config.vocabulary, config.dim)
        self.r_w_bias = nn.Parameter(torch.zeros(config.heads, config.head_dim))
        self.r_r_bias = nn.Parameter(torch.zeros(config.heads, config.head_dim))
        self.null_group = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.layers = nn.ModuleList(nn.ModuleList(Layer(config) for _ in range(count)) for count in config.layers)
        self.down_ln = nn.LayerNorm(config.dim)
        self.script_to_bp_layers = nn.ModuleDict({script: BoundaryPredictor(config) for script in config.scripts})
        self.final_cast = nn.Linear(config.dim, config.vocabulary)

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch bytes vocabulary"]:
        """Logits of the next byte; the first id of each row is its script's, and is no byte.

        Raises:
            InputError: a row does not begin with the id of a script.
        """
        logits = torch.zeros(len(ids), ids.shape[1] - 1, self.config.vocabulary, device=ids.device, dtype=torch.float32)
        for number, script in enumerate(self.config.scripts):
            rows = ids[:, 0] == self.config.first_script + number
            if rows.any():
                logits[rows] = self.run(ids[rows, 1:], script).logits
        known = (ids[:, 0] >= self.config.first_script) & (ids[:, 0] < self.config.first_script + len(self.config.scripts))
        if not known.all():
            raise InputError(f"row {int((~known).nonzero()[0])} does not begin with the id of a script")
        return logits

    def run(
        self, ids: Int[Tensor, "batch length"], script: str, noise: Float[Tensor, "batch length"] | None = None
    ) -> MagnetOutput:
        """Rows of one script.

        Args:
            ids: of bytes, without the script's.
            script: one of the configuration.
            noise: uniform numbers for sampled boundaries, as in the original's training; ``None`` for the most likely ones.
        """
        before = self._stack(0, self.word_emb(ids))
        boundary_logits = self.script_to_bp_layers[script](before)
        if noise is None:
            boundaries = (boundary_logits > 0).to(before.dtype)
        else:
            boundaries, _ = sampled(boundary_logits, noise, self.config.temperature)
        pooled = pool(before, boundaries, self.null_group)
        words = self._stack(1, self.down_ln(pooled))
        spread = words.gather(1, boundaries.cumsum(1).long()[..., None].expand(-1, -1, words.shape[-1]))
        logits = self.final_cast(self._stack(2, spread + before))
        return MagnetOutput(before, boundary_logits, boundaries, pooled, words, spread, logits)

    def _stack(self, number: int, x: Bytes) -> Bytes:
        frequency = 10000.0 ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32) / x.shape[-1])
        angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * frequency
        positions = torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)
        for layer in self.layers[number]:  # type: ignore[attr-defined]  # a list of lists
            x = layer(x, positions, self.r_w_bias, self.r_r_bias)
        return x


def sampled(
    logits: Float[Tensor, "*batch"], noise: Float[Tensor, "*batch"], temperature: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Boundaries drawn by a relaxed Bernoulli distribution: 0 or 1 with the gradient of the relaxed ones, and those.

    Args:
        logits: of boundaries.
        noise: uniform in [0, 1].
        temperature: of the relaxation.
    """
    limits = torch.finfo(noise.dtype)
    uniform = noise.clamp(limits.tiny, 1 - limits.eps)
    soft = ((uniform.logit() + logits) / temperature).sigmoid()
    hard = (soft > 0.5).to(soft.dtype)
    return hard + soft - soft.detach(), soft


def pool(
    x: Bytes, boundaries: Float[Tensor, "batch length"], null: Float[Tensor, "1 1 dim"]
) -> Float[Tensor, "batch words dim"]:
    """The null vector, and the mean of each word's bytes, up to the largest number of closed words in a row.

    A row with fewer has its open word and zeros behind them, where no byte looks.

    Args:
        x: states of bytes.
        boundaries: 1 at the last byte of a word.
        null: in front of the first word.
    """
    word = boundaries.cumsum(1) - boundaries
    numbers = torch.arange(int(boundaries.detach().sum(1).max()), device=x.device, dtype=torch.int64)
    # The difference of the numbers carries the gradient of straight-through boundaries.
    distance = numbers[None, None] - word[..., None]
    member = torch.where(distance.detach().abs() < 0.5, 1 - distance, torch.zeros_like(distance))
    mean = torch.einsum("blw,bld->bwd", member / (member.sum(1, keepdim=True) + 1e-9), x)
    return torch.cat([null.expand(len(x), -1, -1), mean], dim=1)


def boundary_loss(boundaries: Float[Tensor, "batch length"], prior: float) -> Float[Tensor, ""]:
    """Binomial loss of the number of boundaries under a script's prior, per byte, mean over rows."""
    length = boundaries.shape[1]
    # Straight-through boundaries are off a whole number by a rounding.
    chance = torch.tensor(prior, device=boundaries.device, dtype=torch.float32)
    distribution = torch.distributions.Binomial(length, probs=chance, validate_args=False)
    return -(distribution.log_prob(boundaries.sum(1)) / length).mean()


# -------------------------------------------------------------------------------------------------------------- tokenizer


class MagnetTokenizer(ByteTextTokenizer[MagnetConfig]):
    """Byte ids behind the id of a script, and the words that this script's predictor finds.

    Ids are ByT5's, so that every text comes back. `words` gives the ends of the words that are closed, and `embed` their
    vectors. Bytes behind the last one belong to a word that is still open and has no vector yet.
    """

    Config = MagnetConfig
    family = "magnet"
    identity = ("network.word_emb.weight", "network.null_group")

    def __init__(self, config: MagnetConfig | None = None, *, name: str = "magnet") -> None:
        super().__init__(config or MagnetConfig(), name)
        self.network = Magnet(self.config)
        self._letters = [_letters_of(script) for script in self.config.scripts]

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=self.config.vocabulary,
            dim=self.config.dim,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    def exact_parts(self) -> tuple[str, ...]:
        """The network: the ends of words depend on it."""
        return ("network",)

    def encode(
        self,
        items: Any,
        *,
        specials: Specials = "upstream",
        script: str | None = None,
        max_bytes: int = MAX_BYTES,
        progress: bool = False,
    ) -> Tokens:
        """Texts to ids.

        Args:
            items: as `zoo.tokenizer.text.TextTokenizer.encode`.
            specials: ``"upstream"``, the id of the script in front, or ``"none"``.
            script: one of the configuration; by default that of most of an item's letters, the first one if there are none.
            max_bytes, progress: as there.

        Raises:
            ItemError: as there.
            ArgumentError: there is no such script.
        """
        prepared = self.prepare(items, max_bytes=max_bytes)
        return self.encode_prepared(prepared, specials=specials, script=script, progress=progress)

    def encode_prepared(
        self, items: Sequence[Prepared], *, specials: Specials = "upstream", script: str | None = None, progress: bool = False
    ) -> Tokens:
        """Encode what `prepare` gave, to ids."""
        if script is not None and script not in self.config.scripts:
            raise ArgumentError(f"script is one of {', '.join(self.config.scripts)}, not {script!r}")
        tokens = super().encode_prepared(items, specials="none", progress=progress)
        self.markers_of(specials)
        if specials == "none":
            return tokens
        found = []
        for item, ids in zip(items, tokens.unpadded(), strict=True):
            number = (
                self._script(item.tensors["octets"].numpy().tobytes()) if script is None else self.config.scripts.index(script)
            )
            found.append(torch.cat([torch.tensor([self.config.first_script + number], dtype=torch.int64), ids]))
        return self.tokens(found, tokens.meta)

    def _script(self, octets: bytes) -> int:
        """Number of the script that most letters of a text are of."""
        text = octets.decode(errors="ignore")
        counts = [len(letters.findall(text)) for letters in self._letters]
        return counts.index(max(counts))

    def words(self, tokens: Any) -> list[Int[Tensor, " _"]]:
        """Ends of the words of each item that are closed, as offsets in its bytes.

        Raises:
            MismatchError, ItemError: as `decode`; or an item is too long for the network or its script is unknown.
        """
        return [(output.boundaries[0] > 0).nonzero()[:, 0].cpu() + 1 for output in self._outputs(tokens)]

    def embed(self, tokens: Any) -> Float[Tensor, "batch words dim"]:
        """The vectors of the words that are closed, as the layers on words take them; zero where an item has no more.

        Raises:
            MismatchError, ItemError: as `words`.
        """
        rows = [self.network.down_ln(output.pooled[0, 1:]) for output in self._outputs(tokens)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @undisturbed
    def _outputs(self, tokens: Any) -> list[MagnetOutput]:
        found = []
        for index, ids in enumerate(self.check(tokens).unpadded()):
            with naming_item(index):
                found.append(self._output(ids))
        return found

    def _output(self, ids: Int[Tensor, " length"]) -> MagnetOutput:
        """The network's output for one item."""
        first = self.config.first_script
        if len(ids) and int(ids[0]) >= first:
            number, ids = int(ids[0]) - first, ids[1:]
            if number >= len(self.config.scripts):
                raise InputError(f"id {number + first} stands for no script")
        else:
            number = self._script(self.octets(ids.cpu(), {}).tobytes())
        if len(ids) > LONGEST:
            raise InputError(f"{len(ids)} bytes are more than the {LONGEST} that the network takes: cut the text")
        return self.network.run(ids[None].to(self.device), self.config.scripts[number])


def _letters_of(script: str) -> regex.Pattern[str]:
    """A pattern of the letters of one of Unicode's scripts.

    Raises:
        InputError: there is none of that name.
    """
    try:
        return regex.compile(rf"\p{{Script={script}}}")
    except regex.error as error:
        raise InputError(f"{script!r} is none of Unicode's scripts") from error


# ---- checkpoints of the original

_PREDICTOR = re.compile(r"script_to_bp_layers\.([^.]+)\.")
#: A buffer that the original stores and computes.
_COMPUTED = "pos_emb.inv_freq"


def _recognises(keys: Collection[str]) -> bool:
    return "null_group" in keys and any(_PREDICTOR.match(key) for key in keys)


def _config(raw: Mapping[str, Any]) -> MagnetConfig:
    """Settings of the original: ``scripts`` has, by name, each script's ``id`` and ``prior``.

    Raises:
        WeightsError: they cannot be used.
    """
    try:
        scripts = sorted(raw["scripts"].items(), key=lambda item: item[1]["id"])
        before, words, behind = (int(count) for count in re.findall(r"\d+", raw["model_config"]))
        return MagnetConfig(
            vocabulary=raw["n_token"],
            dim=raw["d_model"],
            heads=raw["n_head"],
            head_dim=raw["d_head"],
            hidden=raw["d_inner"],
            layers=(before, words, behind),
            scripts=tuple(name for name, _ in scripts),
            priors=tuple(facts["prior"] for _, facts in scripts),
            temperature=raw.get("temp", 0.5),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the configuration cannot be used: {error!r}") from error


def _convert(state: Mapping[str, Tensor], config: MagnetConfig | None) -> tuple[MagnetConfig, dict[str, Tensor]]:
    if config is None:
        raise KeysError("the tensors of MAGNET do not tell the order and the priors of its scripts: pass config.json")
    vocabulary, dim = shape_of(state, "word_emb.weight", rank=2)
    heads, head_dim = shape_of(state, "r_w_bias", rank=2)
    before, words, behind = (len(layer_numbers(state, f"layers.{number}")) for number in range(3))
    names = {match[1] for key in state if (match := _PREDICTOR.match(key))}
    if names != set(config.scripts):
        raise KeysError(f"there are predictors of {', '.join(sorted(names))}, not of {', '.join(config.scripts)}")
    found = replace(config, vocabulary=vocabulary, dim=dim, heads=heads, head_dim=head_dim, layers=(before, words, behind))
    require_agreement(found, config)
    return found, renamed(state, lambda key: f"network.{key}", "MAGNET", CHECKPOINT.wanted)


CHECKPOINT = Checkpoint(recognises=_recognises, convert=_convert, config=_config, wanted=lambda key: key != _COMPUTED)
MagnetTokenizer.checkpoint = CHECKPOINT

TOKENIZER = MagnetTokenizer
