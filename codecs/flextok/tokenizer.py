"""The tokenizer: images of any size to ordered tokens, and prefixes of them to images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo import media
from zoo.codecs.flextok.checkpoint import CHECKPOINT
from zoo.codecs.flextok.config import GUIDANCE_METHODS, FlexTokConfig
from zoo.codecs.flextok.decoder import Decoder
from zoo.codecs.flextok.encoder import Encoder
from zoo.codecs.flextok.flow import Guidance, flow_loss, prefix_ladder, sample, seeded_noise
from zoo.errors import ArgumentError, InputError, ItemError, naming_item
from zoo.moved import warn
from zoo.nn import vae
from zoo.nn.fsq import FSQ
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared, precision_named
from zoo.tokenizer.graphs import Graphs
from zoo.tokenizer.image import Images, ImageTokenizer
from zoo.tokens import Tokens

LatentTensor = Float[Tensor, "batch channels rows columns"]


class FlexTok(ImageTokenizer[FlexTokConfig, Tokens]):
    """The ordered image tokenizer of arXiv 2502.13967.

    Images of any size and mode are resized and cropped to the model's size. Each gives `FlexTokConfig.registers` ids, coarse
    to fine, and ``tokens.truncate(k)`` decodes for every k. Encoding is deterministic and runs in float32, whatever the dtype
    of the model, autocast or TF32 settings, unless `encode` is asked for less. Decoding is a generative process from seeded
    noise: the fewer tokens, the more of the picture is made up.
    """

    Config = FlexTokConfig
    family = "flextok"
    checkpoint = CHECKPOINT
    identity = ("encoder.registers", "encoder.to_codes.weight", "encoder.to_codes.bias")

    # Images at a time. On a CPU, encoding one by one costs nothing and makes ids independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {
        "encode": Budget(1, 32),
        "decode": Budget(8, 128),
        "autoencoder": Budget(1, 16),
    }

    def __init__(self, config: FlexTokConfig | None = None, *, name: str = "flextok") -> None:
        super().__init__(config or FlexTokConfig(), name)
        self.vae = vae.VAE(self.config.vae)
        self.encoder = Encoder(self.config)
        self.fsq = FSQ(self.config.levels)
        self.decoder = Decoder(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=self.fsq.vocab_size,
            dim=len(self.config.levels),
            ordered=True,
            fingerprint=self.fingerprint,
            image_size=self.config.image_size,
            max_tokens=self.config.registers,
        )

    # ---- encode

    def encode(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        tokens: int | None = None,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        encoder_precision: str = "fp32",
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> Tokens:
        """Images to tokens, all of them or the first few.

        Args:
            items, interpolation: as for `ImageTokenizer.encode`.
            fit: how the image comes to the model's size: ``crop`` (shorter side resized, centre cropped; the default),
                ``stretch``, ``pad`` (grey bars), or ``none``: as it is, no larger than that and a multiple of the cells.
            tokens: number of tokens to compute; all by default.
            posterior: ``mode`` takes the mean of the autoencoder's posterior, ``sample`` draws from it as the original does.
            generator: of the draws.
            encoder_precision: ``bf16`` computes encoder and autoencoder in bfloat16: quicker, but some ids change.
            range: what black and white are in floating point; see `zoo.media.prepare_image`.
            max_pixels: refuse larger images.
            progress: show a progress bar.

        Raises:
            InputError: an item is empty, unreadable, too large, not finite or of the wrong kind; names the item.
        """
        prepared = self.prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        return self.encode_prepared(
            prepared,
            tokens=tokens,
            posterior=posterior,
            generator=generator,
            encoder_precision=encoder_precision,
            progress=progress,
        )

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        tokens: int | None = None,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        encoder_precision: str = "fp32",
        progress: bool = False,
    ) -> Tokens:
        """Encode what `prepare` gave; arguments and errors as for `encode`."""
        count = self.config.registers if tokens is None else tokens
        if not 1 <= count <= self.config.registers:
            raise ArgumentError(f"tokens must lie in [1, {self.config.registers}], not {tokens}")
        sample, dtype = vae.is_sampled(posterior), precision_named(encoder_precision)
        encode = partial(self.encode_images, dtype=dtype, count=count, sample=sample, generator=generator)
        return self.encode_batches(items, encode, progress)

    def require_size(self, height: int, width: int) -> None:
        (most_high, most_wide), (cell_height, cell_width) = self.config.image_size, self.config.cell
        if height % cell_height or width % cell_width or not 0 < height <= most_high or not 0 < width <= most_wide:
            raise InputError(
                f"an image of {width} x {height} does not fit: at most {most_wide} x {most_high}, and a multiple of "
                f"{cell_width} x {cell_height}"
            )

    def encode_images(
        self,
        images: Images,
        dtype: torch.dtype,
        count: int | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Sequence[Int[Tensor, " length"]]:
        height, width = images.shape[2:]
        shape = (len(images), *self._latent_shape((height, width)))
        noise = vae.posterior_noise(shape, generator, images.device) if sample else None
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            z = self.encoder(self.latents(images, noise), count or self.config.registers)
        return list(self.fsq.ids(z))

    def latents(self, images: Images, noise: LatentTensor | None = None) -> LatentTensor:
        """Scaled latents of images in [-1, 1]: the posterior's mean, or with ``noise`` its sample."""
        mean, log_variance = self.vae.encoder(images)
        latents: Tensor = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.config.scaling_factor * latents

    def _latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        factor = self.config.vae.factor
        return self.config.latent_channels, image_size[0] // factor, image_size[1] // factor

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        size: str | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        guidance_method: str | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | None = None,
        noise: LatentTensor | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Float[Tensor, "3 _ _"]]:
        """Tokens, or prefixes of them, to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``;
                lengths from 1 to the number of registers, mixed as they come.
            size: ``None`` for the model's size, ``"original"`` for that of the encoded image (what ``crop`` cut off is grey).
            steps: of Euler's method; the configuration's by default.
            guidance: scale, 1 for none, or a function from t in (0, 1] to the scale; the configuration's by default.
            guidance_method: ``apg`` or ``cfg``; the configuration's by default.
            seed: of the initial noise, for all items or one for each. An item gives the same image in any batch.
            generator: draws the noise of one item after another instead, as the original code does.
            noise: the initial noise itself, ``[batch, channels, rows, columns]``.
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id, a length or an option is out of range.
        """
        tokens = self.check(tokens)
        self.require_known_size(size)
        sizes = self._sizes_of(tokens)
        options = self._sampling(steps, guidance, guidance_method)
        images: dict[int, Tensor] = {}
        with progress_bar("decode", len(tokens) * options["steps"], progress, unit="step") as advance:
            noises = self._noises(tokens, sizes, seed, generator, noise)
            for batch in self._decode_batches(tokens, sizes):
                latents = self._sample(tokens[batch], torch.stack([noises[i] for i in batch]), advance, options)
                for index, image in zip(batch, self.decode_scaled(latents), strict=True):
                    restored = size == "original" and bool(tokens.meta)
                    images[index] = media.restore_image(image, tokens.meta[index], max_pixels) if restored else image
        return [images[i] for i in range(len(tokens))]

    def decode_latents(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        noise: LatentTensor,
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        guidance_method: str | None = None,
    ) -> LatentTensor:
        """The scaled latents that the flow makes of tokens and initial noise; options as in `decode`."""
        tokens = self.check(tokens)
        return self._sample(tokens, noise.float(), lambda done: None, self._sampling(steps, guidance, guidance_method))

    def decode_progressive(
        self, tokens: Tokens | Tensor | Sequence[Tensor], ks: Sequence[int] | None = None, **options: Any
    ) -> dict[int, list[Float[Tensor, "3 _ _"]]]:
        """Images of growing prefixes, from the same noise: ``{k: [image, ...]}``.

        Args:
            tokens: as in `decode`.
            ks: lengths of the prefixes; 1, 2, 4, … and the longest sequence by default.
            options: as in `decode`.

        Raises:
            InputError: a k is below 1 or beyond the longest sequence.
        """
        tokens = self.check(tokens)
        longest = int(tokens.lengths.max())
        chosen = list(prefix_ladder(longest)) if ks is None else list(ks)
        if outside := [k for k in chosen if not 1 <= k <= longest]:
            raise ArgumentError(f"prefixes must have 1 to {longest} tokens, not {outside[0]}")
        seeds = options.pop("seed", 0)
        if not isinstance(seeds, int):
            options["seed"] = [seed for _ in chosen for seed in seeds]
        else:
            options["seed"] = seeds
        if options.get("noise") is not None:
            options["noise"] = options["noise"].repeat(len(chosen), 1, 1, 1)
        # All prefixes go in together, so that those of similar length share passes.
        images = self.decode(Tokens.cat([tokens.truncate(k) for k in chosen]), **options)
        return {k: images[i * len(tokens) : (i + 1) * len(tokens)] for i, k in enumerate(chosen)}

    def check(self, tokens: Any) -> Tokens:
        tokens = super().check(tokens)
        for index, length in enumerate(tokens.lengths.tolist()):
            if length > self.config.registers:
                raise ItemError(f"{length} tokens are more than the model's {self.config.registers}", index)
        return tokens

    def _sizes_of(self, tokens: Tokens) -> list[tuple[int, int]]:
        """Size that each item was encoded at: its own where it was taken as it is."""
        sizes = [self.config.image_size] * len(tokens)
        for index, meta in enumerate(tokens.meta):
            if meta.get("fit") == "none":
                with naming_item(index):
                    self.require_size(meta["height"], meta["width"])
                sizes[index] = meta["height"], meta["width"]
        return sizes

    def _sampling(self, steps: int | None, guidance: Guidance | None, method: str | None) -> dict[str, Any]:
        """The options of `flow.sample`, checked and completed."""
        steps = self.config.steps if steps is None else steps
        if steps < 1:
            raise ArgumentError(f"steps must be at least 1, not {steps}")
        method = method or self.config.guidance_method
        if method not in GUIDANCE_METHODS:
            raise ArgumentError(f"guidance_method must be one of {', '.join(GUIDANCE_METHODS)}, not {method!r}")
        return {"steps": steps, "guidance": self.config.guidance if guidance is None else guidance, "method": method}

    def _noises(
        self,
        tokens: Tokens,
        sizes: Sequence[tuple[int, int]],
        seed: int | Sequence[int],
        generator: torch.Generator | None,
        noise: LatentTensor | None,
    ) -> list[Float[Tensor, "channels _rows _columns"]]:
        """Initial noise of each item."""
        shapes = [self._latent_shape(size) for size in sizes]
        if noise is not None:
            if noise.ndim != 4 or len(noise) != len(tokens) or any(noise.shape[1:] != shape for shape in shapes):
                raise InputError(f"noise must be {[len(tokens), *shapes[0]]}, not {list(noise.shape)}")
            return list(noise.float())
        if generator is not None:
            return [torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32) for shape in shapes]
        seeds = [seed] * len(tokens) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(tokens):
            raise InputError(f"{len(seeds)} seeds do not fit {len(tokens)} items")
        return [seeded_noise([own], shape)[0] for own, shape in zip(seeds, shapes, strict=True)]

    def _decode_batches(self, tokens: Tokens, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Items of one size, sorted by length, a few at a time."""
        limit = self.budget("decode")
        lengths = tokens.lengths.tolist()
        order = sorted(range(len(tokens)), key=lambda i: (sizes[i], lengths[i]))
        batches: list[list[int]] = []
        for index in order:
            if batches and len(batches[-1]) < limit and sizes[batches[-1][0]] == sizes[index]:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    @torch.no_grad()
    def _sample(self, tokens: Tokens, noise: LatentTensor, advance: Any, options: Mapping[str, Any]) -> LatentTensor:
        codes = self.fsq.codes(tokens.ids.to(self.device).clamp(min=0))
        with exact_float32(self.device):
            return sample(
                self.decoder,
                noise.to(self.device),
                codes,
                tokens.lengths.tolist(),
                on_step=lambda: advance(len(tokens)),
                **options,
            )

    @torch.no_grad()
    def decode_scaled(self, latents: LatentTensor) -> list[Float[Tensor, "3 height width"]]:
        """Images of scaled latents, such as `decode_latents` makes, by the autoencoder alone; nominally in [-1, 1]."""
        batch = self.budget("autoencoder")
        with exact_float32(self.device):
            return [image for part in (latents / self.config.scaling_factor).split(batch) for image in self.vae.decoder(part)]

    # ---- graphs

    def graphs(self) -> Graphs:
        plain = copy.deepcopy(self).cpu().float()
        return self.graphs_of(
            EncoderGraph(plain), "it decodes by a flow of many steps from drawn noise, whose loop and guidance are no graph"
        )

    # ---- embed, speed

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The quantizer's codes of the ids, in [-1, 1], zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.fsq.codes(ids.clamp(min=0)) * (ids >= 0)[..., None]

    def training_loss(self, latents: LatentTensor, **options: Any) -> Float[Tensor, " batch"]:
        """Former name of ``items`` of `zoo.codecs.flextok.training.losses`; it goes with the next release."""
        warn("FlexTok.training_loss", "zoo.codecs.flextok.training.losses")
        return flow_loss(self.decoder, latents, self.fsq(self.encoder(latents)), **options)

    def compile_modules(self) -> None:
        """Compile the blocks of the decoder and the autoencoder's decoder; the first calls are slow."""
        for block in self.decoder.blocks:
            block.compile(dynamic=True)
        self.vae.decoder.compile(dynamic=True)


class EncoderGraph(nn.Module):
    """Images of the model's size to ids."""

    def __init__(self, tokenizer: FlexTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Images) -> Int[Tensor, "batch length"]:
        found: Tensor = self.tokenizer.fsq.ids(self.tokenizer.encoder(self.tokenizer.latents(pixels)))
        return found
