"""The tokenizer: images to tokens, scale after scale, and whole scales of them to images and to meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.tokenflow.checkpoint import CHECKPOINT
from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.decoder import PixelDecoder, SemanticDecoder
from zoo.codecs.tokenflow.encoder import Encoder
from zoo.codecs.tokenflow.quantizer import MultiScaleQuantizer
from zoo.errors import ArgumentError, ItemError
from zoo.precision import exact_float32
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.image import Image, Images, ImageTokenizer
from zoo.tokens import Tokens

LatentTensor = Float[Tensor, "batch channels grid grid"]


class TokenFlow(ImageTokenizer[TokenFlowConfig, Tokens]):
    """The image tokenizer with two codebooks of arXiv 2412.03069.

    Images of any size and mode are resized and cropped to the model's square. Each gives the ids of all scales, coarse to fine
    and row by row within a scale; ``tokens.segments`` says where the scales end, and any number of whole scales decodes.
    Encoding is deterministic and runs in float32, whatever the dtype of the model, autocast or TF32 settings, unless `encode`
    is asked for less.
    """

    Config = TokenFlowConfig
    family = "tokenflow"
    checkpoint = CHECKPOINT
    identity = ("quantizer.semantic", "quantizer.pixels")

    # Images at a time. On a CPU, one by one costs nothing and makes results independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 16), "decode": Budget(1, 16)}

    def __init__(self, config: TokenFlowConfig | None = None, *, name: str = "tokenflow") -> None:
        super().__init__(config or TokenFlowConfig(), name)
        self.quantizer = MultiScaleQuantizer(self.config)
        if "encoder" in self.config.parts:
            self.encoder = Encoder(self.config)
        if "decoder" in self.config.parts:
            self.decoder = PixelDecoder(self.config)
        if "semantic_decoder" in self.config.parts:
            self.semantic_decoder = SemanticDecoder(self.config)

    @property
    def spec(self) -> Spec:
        config = self.config
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=config.codebook_size,
            dim=config.code_dim,
            fingerprint=self.fingerprint,
            image_size=(config.image_size, config.image_size),
            max_tokens=config.scale_ends[-1],
            parts=config.parts,
        )

    def compute_fingerprint(self) -> str:
        """Identity of the codebooks and of the scales: one file serves two image sizes, whose tokens do not mix."""
        digest = hashlib.sha256(f"{super().compute_fingerprint()} {self.config.scales}".encode())
        return digest.hexdigest()[:16]

    # ---- encode

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Int[Tensor, " length"]]:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            latents = self.encoder(images)
        return list(self.quantizer.ids(latents))

    def segments(self, length: int) -> list[int]:
        """Ends of the scales within a sequence of that length."""
        return [end for end in self.config.scale_ends if end <= length]

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        scales: int | None = None,
        size: str | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Image]:
        """Tokens to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Only the pixel decoder runs. The original's levels of 8 bits are ``127.5 x + 128``, clamped to 0..255 and rounded down,
        which is what `zoo.media.write_image` writes.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``;
                any number of whole scales, mixed as they come.
            scales: number of scales to decode, coarse first.
            size: ``None`` for the model's size, ``"original"`` for that of the encoded image (what ``crop`` cut off is grey).
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id or an option is out of range, or an item does not end with a scale.
            WeightsError: the decoder was not loaded.
        """
        self.require("decoder", "decoding to images")
        self.require_known_size(size)
        checked = self.check(tokens, scales)
        return self.restored(self.decode_batches(checked, progress), checked, size, max_pixels)

    def decode_images(self, values: Int[Tensor, "batch length"]) -> Images:
        images: Tensor = self.decoder(self.quantizer.latents(values)[:, self.config.semantic_code_dim :])
        return images

    def semantic(self, items: Any, *, scales: int | None = None) -> Float[Tensor, "batch patches features"]:
        """Features of every patch, row by row, in the space of the teacher: what the semantic decoder makes of the tokens.

        Args:
            items: tokens that `encode` returned, or what `encode` takes.
            scales: number of scales to use, coarse first.

        Raises:
            InputError, WeightsError: as `encode` and `decode`.
        """
        self.require("semantic_decoder", "decoding to features")
        return self._map_tokens(self._decode_semantic, items, scales)

    def features(self, items: Any, *, scales: int | None = None) -> LatentTensor:
        """The sum of all scales, as models that understand images are fed it: ``.flatten(2).mT`` is their sequence.

        The first `TokenFlowConfig.semantic_code_dim` channels are the semantic ones.

        Args:
            items: tokens that `encode` returned, or what `encode` takes.
            scales: number of scales to use, coarse first.

        Raises:
            InputError, WeightsError: as `encode` and `decode`.
        """
        return self._map_tokens(self.quantizer.latents, items, scales)

    def ar_inputs(
        self, tokens: Tokens | Tensor | Sequence[Tensor], *, refine: int | None = None
    ) -> Float[Tensor, "batch positions dim"]:
        """Inputs of a language model that predicts scale after scale, for every token but that of the first scale.

        For tokens of k scales these are the inputs of scales 2 to k + 1, or k if it is the last; zero where an item has ended.

        Args:
            tokens: as in `decode`.
            refine: number of a scale, counted from 0, that is to be predicted once more: its inputs contain its own codes.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an item does not end with a scale, or ``refine`` is not among the scales after the first.
        """
        tokens = self.check(tokens)
        ends = self.config.scale_ends
        if refine is not None and not (1 <= refine < len(ends) and int(tokens.lengths.max()) >= ends[refine]):
            raise ArgumentError(f"refine must be the number of a scale that the tokens hold, after the first, not {refine}")
        inputs = self._run(self.quantizer.next_scale_inputs, tokens.ids, refine)
        reach = [ends[min(ends.index(length) + 1, len(ends) - 1)] - 1 for length in tokens.lengths.tolist()]
        positions = torch.arange(inputs.shape[1], dtype=torch.int64, device=inputs.device)
        return inputs * (positions < torch.tensor(reach, dtype=torch.int64, device=inputs.device)[:, None])[..., None]

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of the ids, semantic and pixel part each of length 1; zero where an item has ended."""
        return self._run(self.quantizer.vectors, self.check(tokens).ids)

    def check(self, tokens: Any, scales: int | None = None) -> Tokens:
        tokens = super().check(tokens)
        ends = self.config.scale_ends
        for index, length in enumerate(tokens.lengths.tolist()):
            if length not in ends:
                raise ItemError(f"{length} tokens are no whole number of scales, which end at {ends}", index)
        if scales is None:
            return tokens
        if not 1 <= scales <= len(ends):
            raise ArgumentError(f"scales must lie in [1, {len(ends)}], not {scales}")
        return tokens.truncate(ends[scales - 1])

    def _map_tokens(self, function: Callable[..., Tensor], items: Any, scales: int | None) -> Tensor:
        """A function of ids over tokens, or over what images encode to, a few items at a time."""
        tokens = self.check(items if isinstance(items, Tokens) else self.encode(items), scales)
        return torch.cat([self._run(function, ids) for ids in tokens.ids.split(self.budget("decode"))])

    # Not in inference mode: what comes out may be fed to a model in training.
    @torch.no_grad()
    def _run(self, function: Callable[..., Tensor], ids: Int[Tensor, "batch length"], *arguments: Any) -> Tensor:
        with exact_float32(self.device):
            return function(ids.to(self.device), *arguments)

    def _decode_semantic(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch patches features"]:
        features: Tensor = self.semantic_decoder(self.quantizer.latents(ids)[:, : self.config.semantic_code_dim])
        return features

    # ---- speed

    def compile_modules(self) -> None:
        """Compile both decoders; the first calls are slow."""
        if "decoder" in self.config.parts:
            self.decoder.compile(dynamic=True)
        if "semantic_decoder" in self.config.parts:
            self.semantic_decoder.compile(dynamic=True)
