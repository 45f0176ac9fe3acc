"""The tokenizer: images of any size to 32 tokens, tokens to an image embedding, and the embedding to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.seed.checkpoint import CHECKPOINT
from zoo.codecs.seed.config import SeedConfig
from zoo.codecs.seed.diffusion import SOLVERS, Diffusion, evaluations
from zoo.codecs.seed.embedding import Codebook, Embedding, Features, States
from zoo.codecs.seed.encoder import Encoder
from zoo.errors import ArgumentError, InputError, ItemError, WeightsError
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, precision_named
from zoo.tokenizer.image import Images, ImageTokenizer
from zoo.tokens import Tokens

AnyTokens = Tokens | Tensor | Sequence[Tensor]

# Weights of the losses of the second stage (arXiv 2307.08041, section 3.1.2; the original's ``legacy`` quantizer).


@dataclass(frozen=True)
class Drawing:
    """Settings of drawing images: see `Seed.decode`."""

    steps: int
    guidance: float
    noise_level: int
    solver: str | None


@dataclass(frozen=True)
class Noises:
    """The random numbers of each item, on the CPU: of the latents, of the embedding, of the negative embedding."""

    latents: Float[Tensor, "batch channels rows columns"]
    positive: Float[Tensor, "batch dim"]
    negative: Float[Tensor, "batch dim"]


class Seed(ImageTokenizer[SeedConfig, Tokens]):
    """The semantic image tokenizer of arXiv 2307.08041 and 2310.01218.

    Images of any size and mode are resized to the model's size, by default without keeping their proportions, as the original
    does. Each gives `SeedConfig.queries` ids in a causal order: an id depends on the image and the queries before it. Only the
    whole sequence decodes: to an image embedding, and that, by a diffusion model from seeded noise, to an image that shows the
    same things.

    Ids are exact in float32 weights. ``dtype=`` or ``to(...)`` also round the billion weights of the vision transformer, and
    some ids change then; what follows it, Q-Former to codebook, stays in float32 in any case.
    """

    Config = SeedConfig
    family = "seed"
    checkpoint = CHECKPOINT
    identity = ("codebook.codes",)

    # The proportions of a picture are lost: about a tenth of the ids differ if it is resized bilinearly, as demo scripts do.
    fit: ClassVar[str] = "stretch"
    interpolation: ClassVar[str] = "bicubic"
    # Images at a time. On a CPU, encoding one by one costs little and makes ids independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 32), "decode": Budget(1, 8)}

    def __init__(self, config: SeedConfig | None = None, *, name: str = "seed") -> None:
        super().__init__(config or SeedConfig(), name)
        if "encoder" in self.config.parts:
            self.encoder = Encoder(self.config)
        if self.config.codes:
            self.codebook = Codebook(self.config)
            self.embedding = Embedding(self.config)
        if "features" in self.config.parts:
            self.features_decoder = Features(self.config)
        if "decoder" in self.config.parts:
            self.decoder = Diffusion(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=self.config.codes,
            dim=self.config.code_dim,
            fingerprint=self.fingerprint,
            image_size=(self.config.image_size, self.config.image_size),
            decoded_size=self.decoder.image_size if "decoder" in self.config.parts else None,
            max_tokens=self.config.queries,
            parts=self.config.parts,
        )

    # ---- encode

    def causal_embedding(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        encoder_precision: str = "fp32",
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
    ) -> States:
        """Vectors that the tokens are made of: the Q-Former's output ``[batch, queries, dim]``; arguments as in `encode`."""
        self.require("encoder", "encoding")
        dtype = precision_named(encoder_precision)
        prepared = self.prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        batches = torch.stack([item.tensors["pixels"] for item in prepared]).split(self.budget("encode"))
        return torch.cat([self._states(pixels.to(self.device), dtype) for pixels in batches])

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Int[Tensor, " queries"]]:
        return list(self.codebook.nearest(self.encoder.summary.to_codes(self._states(images, dtype))))

    @torch.no_grad()
    def _states(self, images: Images, dtype: torch.dtype) -> States:
        with exact_float32(self.device):
            states: Tensor = self.encoder(images, dtype)
        return states

    def require(self, part: str, purpose: str) -> None:
        super().require(part, purpose)
        if part != "decoder" and not self.config.codes:
            raise WeightsError(f"{purpose} needs tokens, and {self.name} is a diffusion decoder by itself")

    # ---- tokens to embeddings

    def embed(self, tokens: AnyTokens) -> Float[Tensor, "batch length dim"]:
        """The codebook vectors of the ids, zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.codebook(ids.clamp(min=0)).detach() * (ids >= 0)[..., None]

    @torch.no_grad()
    def image_embedding(self, tokens: AnyTokens) -> Float[Tensor, "batch ..."]:
        """The embedding that images are drawn from.

        SEED-2: ``[batch, 1024]``, in the space of OpenCLIP ViT-H/14's image embeddings, not normalised. SEED-1: ``[batch, 77,
        768]``, in the space of the text states of Stable Diffusion 1.4. Needs neither encoder nor decoder.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, or an item has not all of its tokens.
        """
        ids = self._whole(tokens).ids.to(self.device)
        with exact_float32(self.device):
            return torch.cat([self.embedding(self.codebook(few)) for few in ids.split(self.budget("encode"))])

    @torch.no_grad()
    def features(self, tokens: AnyTokens) -> States:
        """A reconstruction of what `causal_embedding` gave, ``[batch, queries, dim]``, as the original's retrieval uses it.

        Raises:
            WeightsError: this part is not loaded.
            InputError: as in `image_embedding`.
        """
        self.require("features", "reconstructing features")
        ids = self._whole(tokens).ids.to(self.device)
        with exact_float32(self.device):
            wide = [self.embedding.from_codes(self.codebook(few)) for few in ids.split(self.budget("encode"))]
            return torch.cat([self.features_decoder(states) for states in wide])

    def _whole(self, tokens: AnyTokens) -> Tokens:
        """Tokens of whole images."""
        if not self.config.codes:
            raise WeightsError(f"{self.name} is a diffusion decoder by itself and has no tokens; it draws image embeddings")
        tokens = self.check(tokens)
        for index, length in enumerate(tokens.lengths.tolist()):
            if length != self.config.queries:
                raise ItemError(f"an image has {self.config.queries} tokens, not {length}", index)
        return tokens

    # ---- images

    def decode(
        self,
        tokens: AnyTokens,
        *,
        size: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: AnyTokens | None = None,
        noise_level: int | None = None,
        solver: str | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        negative_noise: Tensor | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Float[Tensor, "3 _ _"]]:
        """Tokens to images that show the same things: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, queries]`` or a list of ``[queries]``.
            size: ``None`` for the diffusion model's size, ``"original"`` for that of the encoded image.
            steps: of the solver; the configuration's by default.
            guidance: scale of the classifier-free guidance, 1 for none; the configuration's by default.
            negative: tokens of what to move away from, one item for all or one for each; nothing in particular by default.
            noise_level: of the noise that the image embedding gets, 0 to 999. 0 is a little noise, too.
            solver: ``PNDMScheduler``, ``DDIMScheduler`` or ``DPMSolverMultistepScheduler`` in place of the configuration's.
            seed: of the noise, for all items or one for each. An item gives the same image in any batch.
            generator: draws the noise of one item after another instead.
            latents: the initial noise itself, ``[batch, channels, rows, columns]``.
            noise, negative_noise: what the embedding and the negative one get, ``[batch, dim]``.
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id, a length or an option is out of range.
            WeightsError: the decoder was not loaded.
        """
        self.require_known_size(size)
        self.require("decoder", "decoding")
        tokens = self._whole(tokens)
        images = self.decode_embedding(
            self.image_embedding(tokens),
            steps=steps,
            guidance=guidance,
            negative=None if negative is None else self.image_embedding(negative),
            noise_level=noise_level,
            solver=solver,
            seed=seed,
            generator=generator,
            latents=latents,
            noise=noise,
            negative_noise=negative_noise,
            progress=progress,
        )
        if size is None or not tokens.meta:
            return images
        return [_restore(image, meta, max_pixels) for image, meta in zip(images, tokens.meta, strict=True)]

    def decode_embedding(
        self,
        embeddings: Float[Tensor, "batch ..."],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative: Float[Tensor, "negatives ..."] | None = None,
        noise_level: int | None = None,
        solver: str | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        negative_noise: Tensor | None = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "3 _ _"]]:
        """Images of image embeddings, those of `image_embedding` or of a language model; options as in `decode`.

        Raises:
            InputError: the embeddings or an option do not fit.
            WeightsError: the decoder was not loaded.
        """
        self.require("decoder", "drawing images")
        drawing = self._drawing(steps, guidance, noise_level, solver)
        embeddings = self._check_embeddings(embeddings)
        if negative is not None:
            negative = self._check_embeddings(negative)
            if len(negative) not in (1, len(embeddings)):
                raise InputError(f"{len(negative)} negative items do not fit {len(embeddings)} items")
            negative = negative.expand(len(embeddings), *negative.shape[1:])
        noises = self._noises(len(embeddings), seed, generator, latents, noise, negative_noise)
        images: list[Tensor] = []
        limit = self.budget("decode")
        total = len(embeddings) * evaluations(self.decoder.scheduler, drawing.steps, drawing.solver)
        with progress_bar("decode", total, progress, unit="step") as advance:
            for start in range(0, len(embeddings), limit):
                part = slice(start, start + limit)
                away = None if negative is None else negative[part]
                chosen = Noises(noises.latents[part], noises.positive[part], noises.negative[part])
                images += self._draw(embeddings[part], away, chosen, drawing, advance)
        return images

    @torch.no_grad()
    def _draw(
        self, embeddings: Tensor, negative: Tensor | None, noises: Noises, drawing: Drawing, advance: Any
    ) -> list[Float[Tensor, "3 height width"]]:
        with exact_float32(self.device):
            positive = self._condition(embeddings, noises.positive, drawing)
            final = self.decoder.sample(
                noises.latents.to(self.device),
                positive,
                None if negative is None else self._condition(negative, noises.negative, drawing),
                steps=drawing.steps,
                guidance=drawing.guidance,
                solver=drawing.solver,
                on_step=lambda: advance(len(embeddings)),
            )
            # One by one: the autoencoder works at the full resolution and needs the most memory.
            return [self.decoder.images(latents[None])[0] for latents in final]

    def _condition(self, embeddings: Tensor, noise: Tensor, drawing: Drawing) -> Tensor:
        """What the UNet is told of embeddings."""
        if not self.decoder.by_class:
            return embeddings
        return self.decoder.noised(embeddings, noise.to(self.device), drawing.noise_level)

    def _drawing(self, steps: int | None, guidance: float | None, noise_level: int | None, solver: str | None) -> Drawing:
        """The options of drawing, checked and completed."""
        config = self.config
        drawing = Drawing(
            config.steps if steps is None else steps,
            config.guidance if guidance is None else guidance,
            config.noise_level if noise_level is None else noise_level,
            solver,
        )
        levels = (self.decoder.noising or {}).get("num_train_timesteps", 1000)
        if not 1 <= drawing.steps <= self.decoder.scheduler.get("num_train_timesteps", 1000):
            raise ArgumentError(f"steps must be at least 1 and no more than the model was trained with, not {drawing.steps}")
        if not 0 <= drawing.noise_level < levels:
            raise ArgumentError(f"noise_level must lie in [0, {levels - 1}], not {drawing.noise_level}")
        if solver is not None and solver not in SOLVERS:
            raise ArgumentError(f"solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
        return drawing

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        dim = self.config.embedding_dim
        expected = (dim,) if self.decoder.by_class else (*self.decoder.prompt_states.shape[:1], dim)
        if not len(embeddings) or tuple(embeddings.shape[1:]) != expected or not embeddings.is_floating_point():
            raise InputError(
                f"image embeddings must be floats [batch, {', '.join(map(str, expected))}], not {list(embeddings.shape)}"
            )
        if not torch.isfinite(embeddings).all():
            raise InputError("the image embeddings hold NaN or infinite values")
        return embeddings.to(self.device, torch.float32)

    def _noises(
        self,
        count: int,
        seed: int | Sequence[int],
        generator: torch.Generator | None,
        latents: Tensor | None,
        noise: Tensor | None,
        negative_noise: Tensor | None,
    ) -> Noises:
        """The given random numbers, and the others drawn, each item's from its own seed."""
        shapes = (self.decoder.latent_shape, (self.config.embedding_dim,), (self.config.embedding_dim,))
        given = (latents, noise, negative_noise)
        for name, tensor, shape in zip(("latents", "noise", "negative_noise"), given, shapes, strict=True):
            if tensor is not None and tuple(tensor.shape) != (count, *shape):
                raise InputError(f"{name} must be {[count, *shape]}, not {list(tensor.shape)}")
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds do not fit {count} items")
        drawn = []
        for own in seeds:
            source = generator or torch.Generator().manual_seed(own)
            drawn.append([torch.randn(shape, generator=source, device=source.device, dtype=torch.float32) for shape in shapes])
        columns = [torch.stack(column) for column in zip(*drawn, strict=True)]
        return Noises(*(own if tensor is None else tensor.float() for tensor, own in zip(given, columns, strict=True)))

    # ---- speed

    def set_precision(self, precision: str) -> None:
        """Precision of the products that draw images, ``"fp32"`` or ``"bf16"``. Tokens and embeddings stay as they are."""
        dtype = precision_named(precision)
        if "decoder" in self.config.parts:
            self.decoder.to(dtype)

    def compute_fingerprint(self) -> str:
        """Identity of the codebook; empty for a diffusion decoder by itself, to which no tokens belong."""
        return super().compute_fingerprint() if self.config.codes else ""

    def compile_modules(self) -> None:
        """Compile the blocks of the vision transformer, the UNet and the image decoder; the first calls are slow."""
        if "encoder" in self.config.parts:
            for block in self.encoder.vision.network.blocks:
                block.compile()
        if "decoder" in self.config.parts:
            self.decoder.unet.compile()
            self.decoder.vae.compile()


def _restore(image: Float[Tensor, "3 height width"], meta: Mapping[str, Any], max_pixels: int) -> Float[Tensor, "3 _ _"]:
    """The image in the size that it had; what went in as it was comes out in another size all the same."""
    return media.restore_image(image, {**meta, "fit": "stretch"} if meta.get("fit") == "none" else meta, max_pixels)
