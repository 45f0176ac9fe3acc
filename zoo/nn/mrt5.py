"""MrT5's delete gate: an encoder of bytes that learns what to drop (arXiv 2410.20771, ICLR 2025).

    encoder = MrT5Encoder.from_upstream(config, state)
    ids, mask = byte_ids([b"a text", b"another"])
    encoded = encoder(ids, mask, deletion="hard")
    encoded.hidden, encoded.attention_mask, encoded.positions

A ByT5 encoder (T5 v1.1 over bytes) with one gate, in front of the self-attention of one block. Soft deletion adds the gate to
the scores of attention, for training; hard deletion removes tokens, for speed. A kept token has gate 0 under hard deletion and
its own value, between the threshold and 0, under soft deletion, so the two agree where the gates are saturated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.errors import InputError, KeysError, listing
from zoo.precision import Float32Module

Hidden = Float[Tensor, "batch length dim"]
Gate = Float[Tensor, "batch length"]
Real = Bool[Tensor, "batch length"]
Positions = Int[Tensor, "batch length"]
PerHead = Float[Tensor, "batch heads length head_dim"]
#: What is added to scores of attention before the softmax.
Bias = Float[Tensor, "#batch #heads #queries length"]

DELETIONS = ("hard", "soft", "none")
GATES = ("scaled_sigmoid", "log_sigmoid")
PAD, EOS, FIRST_BYTE = 0, 1, 3
# What upstream adds for tokens that are gone.
_MASKED = -1e9
#: Gate of padding where gates have no lower bound.
_PADDING_GATE = -30.0
_FEED_FORWARD = {"gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True), "relu": ("relu", False)}


def _gelu_tanh(x: Tensor) -> Tensor:
    """A function of the module, so that models can be pickled."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": _gelu_tanh, "silu": F.silu, "relu": F.relu}


@dataclass(frozen=True)
class MrT5Config:
    """Sizes, in upstream's names; defaults are those of mrt5-small.

    Attributes:
        d_kv: width of a head.
        delete_gate_layer: block whose attention the gate stands before, from 0.
        sigmoid_mask_scale: value of a gate that deletes, below 0.
        deletion_threshold: gates above it keep their token; ``None`` for half of ``sigmoid_mask_scale``.
        use_softmax1: attention may sum to less than 1.
        gate_layer_norm: the gate normalises its input.
        deletion_type: ``"scaled_sigmoid"``, as checkpoints have it: gates from ``sigmoid_mask_scale`` to 0; ``"log_sigmoid"``:
            gates without a lower bound.
    """

    vocab_size: int = 384
    d_model: int = 1472
    num_layers: int = 12
    num_heads: int = 6
    d_kv: int = 64
    d_ff: int = 3584
    feed_forward_proj: str = "gated-gelu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    delete_gate_layer: int = 3
    sigmoid_mask_scale: float = -30.0
    deletion_threshold: float | None = None
    use_softmax1: bool = False
    gate_layer_norm: bool = True
    deletion_type: str = "scaled_sigmoid"

    def __post_init__(self) -> None:
        if not 0 <= self.delete_gate_layer < self.num_layers:
            raise InputError(f"there is no block {self.delete_gate_layer} for the gate among {self.num_layers}")
        if self.sigmoid_mask_scale >= 0:
            raise InputError(f"sigmoid_mask_scale is below 0, not {self.sigmoid_mask_scale}")
        if self.deletion_type not in GATES:
            raise InputError(f"deletion_type is one of {', '.join(GATES)}, not {self.deletion_type!r}")
        if self.feed_forward_proj not in _FEED_FORWARD:
            raise InputError(f"feed_forward_proj is one of {', '.join(_FEED_FORWARD)}, not {self.feed_forward_proj!r}")

    @property
    def threshold(self) -> float:
        """Gates above it keep their token."""
        return self.sigmoid_mask_scale / 2 if self.deletion_threshold is None else self.deletion_threshold


class MrT5Output(NamedTuple):
    """Output of the encoder for a batch.

    Attributes:
        hidden: of the tokens that are left, padded to the longest row.
        attention_mask: which of them are tokens.
        decoder_bias: what the decoder's cross-attention adds to its scores.
        positions: where in the input they stood.
        gate_logits: of all tokens, above 0 for keeping; with noise in training.
        gate: of all tokens, from ``sigmoid_mask_scale`` (delete) to 0 (keep).
        keep: which tokens hard deletion keeps.
    """

    hidden: Float[Tensor, "batch kept dim"]
    attention_mask: Bool[Tensor, "batch kept"]
    decoder_bias: Float[Tensor, "batch kept"]
    positions: Int[Tensor, "batch kept"]
    gate_logits: Float[Tensor, "batch length"]
    gate: Float[Tensor, "batch length"]
    keep: Bool[Tensor, "batch length"]

    @property
    def kept_lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each row that are left."""
        return self.attention_mask.sum(1)


class DeleteGate(nn.Module):
    """One number per token: near 0 keeps it, near ``scale``, or far below 0 without one, deletes it.

    Args:
        dim: width of the tokens.
        scale: of a gate that deletes, below 0.
        layer_norm: normalise the input.
        eps: of the normalisation.
        kind: one of `GATES`.
    """

    def __init__(
        self, dim: int, scale: float = -30.0, layer_norm: bool = True, eps: float = 1e-6, kind: str = "scaled_sigmoid"
    ) -> None:
        super().__init__()
        self.scale, self.kind = scale, kind
        self.norm: nn.Module = nn.RMSNorm(dim, eps=eps) if layer_norm else nn.Identity()
        self.linear = nn.Linear(dim, 1)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.ones_(self.linear.bias)  # training starts from keeping everything

    def forward(self, x: Hidden, real: Real, noise: bool = False) -> tuple[Gate, Gate]:
        """Logits, above 0 for keeping, and gates; padding is deleted.

        Args:
            x: the residual stream.
            real: which tokens are no padding.
            noise: add Gumbel noise to the logits, for training.
        """
        logits = self.linear(self.norm(x))[..., 0]
        if noise:
            smallest = 3e-4 if x.dtype == torch.float16 else 1e-10
            uniform = torch.rand_like(logits).clamp(smallest, 1 - smallest)
            logits = logits - (-uniform.log()).log()
        if self.kind == "log_sigmoid":
            return logits, F.logsigmoid(logits).masked_fill(~real, _PADDING_GATE)
        gate = self.scale * torch.sigmoid(-logits)
        return logits, gate.masked_fill(~real, self.scale)


def gathered_positions(keep: Real) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Positions of the kept tokens of each row, padded to the longest row, and which of them are no padding.

    A row that keeps nothing keeps its first token.
    """
    keep = keep.clone()
    keep[:, 0] |= ~keep.any(dim=1)
    counts = keep.sum(dim=1)
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return order, torch.arange(order.shape[1], device=keep.device, dtype=torch.int64) < counts[:, None]


def softmax1(scores: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
    """A softmax with one more score of 0 in the sum, so that attention may go nowhere."""
    largest = scores.amax(dim=-1, keepdim=True).clamp(min=0)
    exponentials = (scores - largest).exp()
    return exponentials / (exponentials.sum(dim=-1, keepdim=True) + (-largest).exp())


def relative_buckets(
    distance: Int[Tensor, "*shape"], buckets: int, max_distance: int, *, causal: bool = False
) -> Int[Tensor, "*shape"]:
    """T5's buckets of key position minus query position: exact when near, logarithmic when far.

    Half of them are for each direction, or all for keys before the query if attention is ``causal``.
    """
    half = buckets if causal else buckets // 2
    exact = half // 2
    if causal:
        distance = distance.clamp(max=0)
    size = distance.abs()
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    return half * (distance > 0) + torch.where(size < exact, size, (exact + far.long()).clamp(max=half - 1))


class SelfAttention(nn.Module):
    """T5's: no scaling of products; positions come as a bias. Keys and values may be those of other tokens."""

    def __init__(self, config: MrT5Config) -> None:
        super().__init__()
        self.heads, self.use_softmax1 = config.num_heads, config.use_softmax1
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x: Hidden, bias: Bias) -> Hidden:
        return self.attend(x, *self.keys_and_values(x), bias)

    def keys_and_values(self, x: Hidden) -> tuple[PerHead, PerHead]:
        """Keys and values of tokens, head by head."""
        return self._split(self.k(x)), self._split(self.v(x))

    def _split(self, x: Float[Tensor, "batch length inner"]) -> PerHead:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(
        self,
        x: Float[Tensor, "batch queries dim"],
        key: PerHead,
        value: PerHead,
        bias: Bias,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attention of tokens to given keys."""
        query = self._split(self.q(x))
        if self.use_softmax1:
            scores = query.float() @ key.float().transpose(-1, -2) + bias.float()
            mixed = softmax1(scores).to(value.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """One hidden layer, gated by another one in T5 v1.1."""

    def __init__(self, config: MrT5Config) -> None:
        super().__init__()
        activation, gated = _FEED_FORWARD[config.feed_forward_proj]
        self.activation = _ACTIVATIONS[activation]
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Hidden) -> Hidden:
        if self.gate is None:
            return self.wo(self.activation(self.wi(x)))
        return self.wo(self.activation(self.gate(x)) * self.wi(x))


class Block(nn.Module):
    """Self-attention and feed-forward, each normalised before."""

    def __init__(self, config: MrT5Config) -> None:
        super().__init__()
        eps = config.layer_norm_epsilon
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(config.d_model, eps=eps) for _ in range(2))
        self.attention, self.feed_forward = SelfAttention(config), FeedForward(config)

    def forward(self, x: Hidden, bias: Bias) -> Hidden:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class MrT5Encoder(Float32Module):
    """Encoder of MrT5. It computes in float32, whatever the rest of a model does: the kept tokens depend on it."""

    def __init__(self, config: MrT5Config | None = None) -> None:
        super().__init__()
        self.config = config = config or MrT5Config()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.delete_gate = DeleteGate(
            config.d_model,
            config.sigmoid_mask_scale,
            config.gate_layer_norm,
            config.layer_norm_epsilon,
            config.deletion_type,
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        mask: Real | Int[Tensor, "batch length"] | None = None,
        deletion: str = "hard",
        keep: Real | None = None,
    ) -> MrT5Output:
        """Encode bytes.

        Args:
            ids: of bytes, as `byte_ids` makes them.
            mask: which of them are tokens; all that are no padding if ``None``.
            deletion: ``"hard"`` removes tokens, ``"soft"`` weakens attention to them, ``"none"`` is the encoder without a gate.
                In training mode the gate has Gumbel noise.
            keep: tokens that hard deletion keeps, instead of those that the gate does.

        Raises:
            InputError: there is no token, an id is outside the vocabulary, or ``deletion`` is something else.
        """
        if deletion not in DELETIONS:
            raise InputError(f"deletion is one of {', '.join(DELETIONS)}, not {deletion!r}")
        self._check(ids)
        real = ids != PAD if mask is None else mask.bool()
        x, bias = self._below_gate(ids, real)
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64).expand(ids.shape)
        logits, gate = self.delete_gate(x, real & (ids != PAD), noise=self.training)
        keep = gate > self.config.threshold if keep is None else keep
        visible, gate_bias = real, torch.zeros_like(x[..., 0])
        if deletion == "soft":
            gate_bias = gate
        elif deletion == "hard":
            positions, filled = gathered_positions(keep)
            # A row of which nothing is kept sees its first token, whatever that is.
            visible = filled & (real.gather(1, positions) | ~keep.any(dim=1, keepdim=True))
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            bias = self._positions_bias(positions)
            gate_bias = torch.zeros_like(x[..., 0])
        bias = bias + _masking(gate_bias, visible)
        for block in self.blocks[self.config.delete_gate_layer :]:
            x = block(x, bias)
        decoder_bias = gate_bias.masked_fill(~visible, _MASKED) if deletion == "hard" else gate_bias
        return MrT5Output(self.norm(x), visible, decoder_bias, positions, logits, gate, keep)

    def gates(self, ids: Int[Tensor, "batch length"], mask: Real | None = None) -> Gate:
        """The gates alone, for which the blocks behind them need not run. Arguments and errors as for `forward`."""
        self._check(ids)
        real = ids != PAD if mask is None else mask.bool()
        gate: Gate = self.delete_gate(self._below_gate(ids, real)[0], real & (ids != PAD))[1]
        return gate

    def _below_gate(self, ids: Int[Tensor, "batch length"], real: Real) -> tuple[Hidden, Bias]:
        """What the gate sees, and the bias of positions."""
        x = self.embedding(ids)
        bias = self._positions_bias(torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64)[None])
        masked = bias + _masking(torch.zeros_like(x[..., 0]), real)
        for block in self.blocks[: self.config.delete_gate_layer]:
            x = block(x, masked)
        return x, bias

    def _check(self, ids: Int[Tensor, "batch length"]) -> None:
        if not ids.numel():
            raise InputError("there are no bytes to encode")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(f"id {low if low < 0 else high} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")

    def _positions_bias(self, positions: Int[Tensor, "rows length"]) -> Float[Tensor, "rows heads length length"]:
        """The bias of each pair of tokens, from where in the input they stood."""
        distance = positions[:, None, :] - positions[:, :, None]
        buckets = relative_buckets(
            distance, self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        )
        return self.relative_bias(buckets).permute(0, 3, 1, 2)

    @classmethod
    def from_upstream(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MrT5Encoder:
        """The encoder of an official checkpoint, such as stanfordnlp/mrt5-small.

        Args:
            config: upstream's ``config.json``.
            state: upstream's tensors; those of the decoder and the tied copies of the embedding are dropped.

        Raises:
            KeysError: tensors are missing or unexpected, or have other shapes.
        """
        known = {field.name for field in fields(MrT5Config)}
        sizes = {key: value for key, value in config.items() if key in known}
        if "shared.weight" in state:
            sizes["vocab_size"] = len(state["shared.weight"])
        encoder = cls(MrT5Config(**sizes))
        renamed = {encoder_key(key): tensor for key, tensor in state.items() if not key.startswith(_DROPPED)}
        expected = encoder.state_dict()
        if missing := sorted(expected.keys() - renamed.keys()):
            raise KeysError(f"missing: {listing(missing)}")
        if surplus := sorted(renamed.keys() - expected.keys()):
            raise KeysError(f"unexpected: {listing(surplus)}")
        if wrong := [key for key, tensor in expected.items() if renamed[key].shape != tensor.shape]:
            raise KeysError(f"wrong shapes: {listing(wrong)}")
        encoder.load_state_dict(renamed)
        return encoder.eval()


def _masking(gate_bias: Gate, visible: Real) -> Float[Tensor, "batch 1 1 length"]:
    """The gate's bias of keys, and that of tokens which nobody sees."""
    # A row without a token attends to everything, since nothing is left to be right about.
    return gate_bias.masked_fill(~visible, torch.finfo(gate_bias.dtype).min)[:, None, None]


# The decoder's part of a checkpoint, and copies of the embedding.
_DROPPED = ("decoder.", "lm_head.", "encoder.embed_tokens.")
_OUR_NAMES = (
    (r"^shared\.", "embedding."),
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", "relative_bias."),
    (r"^encoder\.block\.\d+\.delete_gate\.layer_norm\.", "delete_gate.norm."),
    (r"^encoder\.block\.\d+\.delete_gate\.feed_forward\.", "delete_gate.linear."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attention."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.attention_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.feed_forward.gate."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.feed_forward.wi."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.", r"blocks.\1.feed_forward."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.feed_forward_norm."),
    (r"^encoder\.final_layer_norm\.", "norm."),
)


def encoder_key(key: str) -> str:
    """Our name of an upstream tensor of the encoder; of any other the name itself."""
    for pattern, replacement in _OUR_NAMES:
        key, count = re.subn(pattern, replacement, key)
        if count:
            break
    return key


def byte_ids(texts: Sequence[bytes]) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Ids of ByT5, byte + 3 with an end behind them, padded with 0, and which of them are no padding.

    Raises:
        InputError: there are no texts.
    """
    if not texts:
        raise InputError("there is nothing to encode")
    rows = [torch.tensor([*(byte + FIRST_BYTE for byte in text), EOS], dtype=torch.int64) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return ids, ids != PAD


# -------------------------------------------------------------------------------------------------------------- training


def deletion_loss(gate: Gate, real: Real) -> Float[Tensor, ""]:
    """Mean gate of the tokens that are no padding; times a weight and added to the loss, it pays for deleting."""
    return (gate * real).sum() / real.sum()


def deletion_rate(keep: Real, real: Real) -> Float[Tensor, ""]:
    """Share of the tokens that hard deletion removes."""
    return 1 - (keep & real).sum() / real.sum()


@dataclass
class DeletionController:
    """Weight of `deletion_loss` that leads to a wanted rate of deletion, by a smoothed proportional and an integral term.

    Attributes:
        target: wanted rate, in [0, 1].
        proportional, integral: gains.
    """

    target: float
    proportional: float = 0.5
    integral: float = 1e-5
    _p: float = 0.0
    _i: float = 0.0

    @property
    def weight(self) -> float:
        """The weight for the next step; 0 before the first one."""
        return max(0.0, self._p + self._i)

    def update(self, rate: float) -> float:
        """The weight after a step that deleted this share."""
        error = self.target - rate
        self._p = 0.9 * self._p + 0.1 * self.proportional * error
        self._i += self.integral * error
        return self.weight
