"""QueCC (arXiv 2411.03312): a trained projector that turns a grid of patches into a few tokens, given the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.compress.anatomy import Anatomy
from zoo.compress.method import HANDLE, Compat, Encoding, Method, Reduced
from zoo.errors import InputError, KeysError

_PREFIX = "model.mm_projector."


@dataclass(frozen=True)
class QueCCConfig:
    """Sizes of the projector; the defaults are the paper's for LLaVA-1.5-7B with 36 tokens.

    Attributes:
        dim: width of the vision tower.
        multi_dim: width of the tower's several layers side by side; 4 layers in the paper.
        text_dim: width of the question's embedding.
        tokens: patches that come in, a square grid.
        kernel: side of the region that becomes one token; it divides the grid's.
        heads: of the attention.
        llm_dim: width of the language model.
    """

    dim: int = 1024
    multi_dim: int = 4096
    text_dim: int = 4096
    tokens: int = 576
    kernel: int = 4
    heads: int = 8
    llm_dim: int = 4096

    def __post_init__(self) -> None:
        side = round(self.tokens**0.5)
        if side * side != self.tokens:
            raise InputError(f"{self.tokens} patches do not tile a square grid")
        if self.kernel < 1 or side % self.kernel:
            raise InputError(f"regions of {self.kernel} x {self.kernel} patches do not tile a grid of {side} x {side}")
        if self.dim % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {self.dim}")

    @property
    def side(self) -> int:
        """Rows and columns of the grid that comes in."""
        return round(self.tokens**0.5)

    @property
    def tokens_out(self) -> int:
        """Tokens that go to the language model."""
        return (self.side // self.kernel) ** 2


def _projection(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6))


class QueCC(nn.Module):
    """Patches to tokens: a strided convolution makes queries, and each attends to its own region (section 4).

    Parameters have the names of the original code.

    Args:
        config: sizes.
    """

    def __init__(self, config: QueCCConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or QueCCConfig()
        self.clip_attn = nn.MultiheadAttention(config.dim, config.heads, batch_first=True)
        self.q_proj = _projection(config.dim, config.dim)
        self.k_proj = _projection(config.multi_dim, config.dim)
        self.v_proj = _projection(config.multi_dim, config.dim)
        self.q_downsample = nn.Conv2d(config.dim, config.dim, config.kernel, stride=config.kernel, groups=config.dim)
        self.text_projection = nn.Sequential(nn.Linear(config.text_dim, config.dim), nn.LayerNorm(config.dim, eps=1e-6))

    def queries(
        self, single: Float[Tensor, "batch patches dim"], text: Float[Tensor, "batch 1 text_dim"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """One query per region, as a map.

        Args:
            single: features of one layer of the tower, row-major, without [CLS].
            text: embedding of the question.
        """
        side = self.config.side
        if single.shape[1] != self.config.tokens:
            raise InputError(f"{single.shape[1]} patches, where QueCC was made for {self.config.tokens}")
        query = self.q_proj(single + self.text_projection(text))
        return self.q_downsample(query.transpose(1, 2).unflatten(2, (side, side)))

    def attend(
        self, queries: Float[Tensor, "batch dim rows columns"], multi: Float[Tensor, "batch patches multi_dim"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens members"]]:
        """Attention of each query to its region.

        The input projections of keys and values are applied to queries and to weighted sums instead: there are
        ``kernel ** 2`` times fewer of these, and the bias of the keys falls out of the softmax.

        Args:
            queries: from `queries`.
            multi: features of several layers of the tower side by side, row-major, without [CLS].

        Returns:
            Tokens in raster order, and the attention averaged over heads; members of a region row-major.
        """
        heads, attention = self.config.heads, self.clip_attn
        head_dim = self.config.dim // heads
        weight_q, weight_k, weight_v = attention.in_proj_weight.chunk(3)
        bias_q, _, bias_v = attention.in_proj_bias.chunk(3)
        keys, values = self._regions(self.k_proj(multi)), self._regions(self.v_proj(multi))

        query = queries.flatten(2).transpose(1, 2)
        query = nn.functional.linear(query, weight_q, bias_q).unflatten(2, (heads, head_dim)) * head_dim**-0.5
        query = torch.einsum("bnhe,hed->bnhd", query, weight_k.unflatten(0, (heads, head_dim)))
        shares = (query @ keys.transpose(2, 3)).softmax(-1)
        value = torch.einsum("bnhd,hed->bnhe", shares @ values, weight_v.unflatten(0, (heads, head_dim)))
        return attention.out_proj(value.flatten(2) + bias_v), shares.mean(2)

    def _regions(self, patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch tokens members dim"]:
        """Patches of every region, regions and patches row-major."""
        count, kernel = self.config.side // self.config.kernel, self.config.kernel
        regions = patches.unflatten(1, (count, kernel, count, kernel)).transpose(2, 3)
        return regions.flatten(3, 4).flatten(1, 2)

    def forward(
        self,
        single: Float[Tensor, "batch patches dim"],
        multi: Float[Tensor, "batch patches multi_dim"],
        text: Float[Tensor, "batch 1 text_dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens in raster order.

        Args:
            single: features of one layer of the tower (hidden state -2 in the paper), row-major, without [CLS].
            multi: features of several layers (hidden states 12, 16, 22 and 23) side by side.
            text: embedding of the question, see `question_embedding`.

        Raises:
            InputError: another number of patches than the configuration's.
        """
        return self.attend(self.queries(single, text), multi)[0]


class QueCCProjector(nn.Sequential):
    """`QueCC` and LLaVA's two-layer GELU projector; what a checkpoint of the original code holds.

    Args:
        config: sizes.
    """

    def __init__(self, config: QueCCConfig | None = None) -> None:
        config = config or QueCCConfig()
        super().__init__(
            QueCC(config), nn.Linear(config.dim, config.llm_dim), nn.GELU(), nn.Linear(config.llm_dim, config.llm_dim)
        )
        self.config = config

    def forward(  # type: ignore[override]  # a chain of modules takes one tensor, this one three
        self,
        single: Float[Tensor, "batch patches dim"],
        multi: Float[Tensor, "batch patches multi_dim"],
        text: Float[Tensor, "batch 1 text_dim"],
    ) -> Float[Tensor, "batch tokens llm_dim"]:
        """Tokens for the language model; arguments and errors as for `QueCC.forward`."""
        tokens = self[0](single, multi, text)
        for layer in list(self)[1:]:
            tokens = layer(tokens)
        return tokens

    @classmethod
    def from_upstream(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> QueCCProjector:
        """The projector of an original checkpoint.

        Args:
            config: the model's ``config.json``; ``mm_vision_output_token_count`` (patches that come in, despite the name) and
                ``mm_vision_token_compression_kernel_size`` are read, widths are the weights'.
            weights: state dict, with or without the prefix ``model.mm_projector.``; other keys of a whole model are left out.

        Raises:
            InputError: a compression type that isn't QueCC's, or a stride that isn't the kernel's.
            KeysError: tensors missing, unexpected or of the wrong shape.
        """
        kind = config.get("mm_vision_token_compression_type", "quecc")
        if kind != "quecc":
            raise InputError(f"mm_vision_token_compression_type is {kind!r}, not 'quecc'")
        kernel = int(config["mm_vision_token_compression_kernel_size"])
        if int(config.get("mm_vision_token_compression_stride", kernel)) != kernel:
            raise InputError("QueCC needs a stride equal to its kernel: regions and queries must be the same patches")
        if any(key.startswith(_PREFIX) for key in weights):
            weights = {key.removeprefix(_PREFIX): value for key, value in weights.items() if key.startswith(_PREFIX)}
        wanted = {"0.q_proj.0.weight", "0.k_proj.0.weight", "0.text_projection.0.weight", "1.weight"}
        if missing := wanted - set(weights):
            raise KeysError(f"no QueCC projector: missing {', '.join(sorted(missing))}")
        sizes = QueCCConfig(
            dim=weights["0.q_proj.0.weight"].shape[0],
            multi_dim=weights["0.k_proj.0.weight"].shape[1],
            text_dim=weights["0.text_projection.0.weight"].shape[1],
            tokens=int(config["mm_vision_output_token_count"]),
            kernel=kernel,
            heads=int(config.get("num_heads", 8)),
            llm_dim=weights["1.weight"].shape[0],
        )
        with torch.device("meta"):
            projector = cls(sizes)
        try:
            projector.load_state_dict(dict(weights), strict=True, assign=True)
        except RuntimeError as error:
            raise KeysError(f"QueCC projector: {error}") from error
        return projector.eval()


def query_text(prompt: str, *, placeholder: str = "<image>", compat: Literal["official"] | None = None) -> str:
    """The question in a chat prompt: what follows the last image and a line break, up to the answer.

    Args:
        prompt: with ``placeholder`` where the images are. Without one it is a prompt without image, whose question is the
            word "image", as in training.
        placeholder: of an image.
        compat: ``"official"`` cuts the last character where no ``ASSISTANT`` follows, as the original code does.
    """
    if placeholder not in prompt:
        return "image"
    text = prompt[prompt.rindex(placeholder) + len(placeholder) :]
    end = text.find("ASSISTANT")
    if end < 0 and compat is None:
        end = len(text)
    return text[text.find("\n") + 1 : end].strip()


class QueCCMethod(Method):
    """A trained QueCC projector in the place of a LLaVA model's own.

    Args:
        keep: must be left out: the number of tokens is the projector's.
        projector: trained together with the language model; on its own device and in its own precision.
        tokenizer: of the model, to find the question in a prompt and to embed it.
        question: for all images, instead of the prompt's: a text, or its embedding ``[text_dim]`` to save the language
            model's pass over it, see `question_embeddings`.
        layers: hidden states of the tower side by side, 0 being the embeddings' output; the paper's are 12, 16, 22 and 23 of 24
            layers.
        compat: ``"official"``, see `query_text`.
    """

    needs_cls = True
    reduces = True
    completes = True

    def __init__(
        self,
        keep: float | None = None,
        *,
        projector: QueCCProjector,
        tokenizer: Any = None,
        question: str | Tensor | None = None,
        layers: Sequence[int] = (12, 16, 22, 23),
        compat: Compat | None = None,
    ) -> None:
        if keep is not None:
            raise InputError(f"QueCC gives {projector.config.tokens_out} tokens per image: leave keep out")
        if tokenizer is None and not isinstance(question, Tensor):
            raise InputError("QueCC needs the model's tokenizer, or the question's embedding, to know what is asked")
        self.projector, self.tokenizer, self.question = projector, tokenizer, question
        self.layers, self.compat = tuple(layers), compat

    def bind(self, anatomy: Anatomy) -> None:
        """Checks that the projector fits the model.

        Raises:
            InputError: LLaVA-NeXT, which QueCC was not made for, or other widths, patches or layers than the model's.
        """
        super().bind(anatomy)
        sizes, depth = self.projector.config, len(anatomy.tower_layers)
        if anatomy.views:
            raise InputError("QueCC takes images of one view, not those of LLaVA-NeXT")
        if not all(1 <= layer <= depth for layer in self.layers):
            raise InputError(f"hidden states {list(self.layers)} of a tower with {depth} layers")
        width, llm_dim = anatomy.tower.config.hidden_size, anatomy.language.config.hidden_size
        wanted = (width, width * len(self.layers), llm_dim, anatomy.patches, llm_dim)
        given = (sizes.dim, sizes.multi_dim, sizes.text_dim, sizes.tokens, sizes.llm_dim)
        if given != wanted:
            names = "dim, multi_dim, text_dim, tokens, llm_dim"
            raise InputError(f"a QueCC projector with {names} of {given} does not fit a model with {wanted}")
        self.anatomy = anatomy
        self.states = tuple(layer - 1 for layer in self.layers)

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Leaves the model's own projector nothing to do; `complete` makes the tokens once the question is known."""
        encoding.single = features
        none = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        return Reduced(features[:, :0], None, none)

    def complete(self, embeds: Tensor, visual: Tensor, input_ids: Tensor | None, encoding: Encoding) -> Tensor:
        """Puts the tokens into the first placeholders of each image."""
        single = encoding.single
        assert single is not None
        multi = torch.cat([encoding.hidden[layer][:, 1:] for layer in self.states], -1)
        patches, count = single.shape[1], self.projector.config.tokens_out
        images = visual.nonzero().unflatten(0, (-1, patches))
        beams = len(images) // len(single)
        if beams * len(single) != len(images) or len(visual) % beams:
            raise InputError(f"placeholders for {len(images)} images, but only {len(single)} have been encoded")
        rows = images[:, 0, 0]
        first = (rows % beams == 0).nonzero()[:, 0]
        text = self._embeddings(visual, input_ids, rows[first].tolist())
        # the projector is no part of the model, whose device and precision may have changed since
        own = next(self.projector.parameters())
        tokens = self.projector(single.to(own), multi.to(own), text.to(own)).to(embeds)
        embeds = embeds.clone()
        # beams repeat the images of a row as a block
        order = torch.empty_like(rows)
        order[rows.argsort(stable=True)] = _repeat_blocks(rows[first], beams)
        embeds[images[:, :count, 0], images[:, :count, 1]] = tokens[order]
        return embeds

    def _embeddings(self, visual: Tensor, input_ids: Tensor | None, rows: list[int]) -> Float[Tensor, "images 1 text_dim"]:
        """The question of each image, as the language model sees it."""
        if isinstance(self.question, Tensor):
            return self.question.view(1, 1, -1).expand(len(rows), -1, -1)
        if self.question is not None:
            questions = [self.question] * len(rows)
        elif input_ids is None:
            raise InputError("a prompt of embeddings has no question to find; give apply(..., question=...)")
        else:
            questions = [self._question(input_ids[row], visual[row]) for row in rows]
        distinct = sorted(set(questions))
        embedded = question_embeddings(self.anatomy.model, self.tokenizer, distinct)
        return embedded[[distinct.index(question) for question in questions]][:, None]

    def _question(self, ids: Tensor, visual: Tensor) -> str:
        """What a row asks, from the ids behind its last image."""
        last = int(visual.nonzero()[-1])
        after = self.tokenizer.decode(ids[last + 1 :], skip_special_tokens=True)
        return query_text("<image>" + after, compat=self.compat)


def _repeat_blocks(rows: Tensor, beams: int) -> Tensor:
    """Indices of the images of each row, repeated ``beams`` times row by row."""
    _, counts = rows.unique_consecutive(return_counts=True)
    blocks = torch.arange(len(rows), device=rows.device).split(counts.tolist())
    return torch.cat([block.repeat(beams) for block in blocks])


@torch.no_grad()
def question_embeddings(model: Any, tokenizer: Any, questions: Sequence[str]) -> Float[Tensor, "questions text_dim"]:
    """Embed questions without an image in a LLaVA's language model: the last token's state after the final norm.

    Args:
        model: in which a method may be; it does not take part.
        tokenizer: called on a text, with ``input_ids`` in its answer, special tokens included.
        questions: texts; of an empty one the beginning-of-sequence token is left.
    """
    handle = getattr(model, HANDLE, None)
    language = model.model.language_model
    device = language.get_input_embeddings().weight.device
    ids = [torch.as_tensor(tokenizer(question)["input_ids"]).flatten() for question in questions]
    if not all(len(part) for part in ids):
        raise InputError("the tokenizer gives an empty question no token, not even one for the beginning of the sequence")
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    lengths = torch.tensor([len(part) for part in ids], device=device)
    mask = torch.arange(padded.shape[1], device=device) < lengths[:, None]
    with nullcontext() if handle is None else handle.bypassed():
        states = language(input_ids=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return states[torch.arange(len(ids), device=device), lengths - 1]
