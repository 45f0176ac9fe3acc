"""Image tokenizers: encoding, and decoding (of prefixes, where they are ordered), against the original's way of computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.bench.measure import Job, Work, random_model
from zoo.bench.quantized import Call, outline, quantized_model
from zoo.tokenizer import Tokenizer

UNIT = "image"
# ``lengths`` in tokens, of ordered tokenizers; ``steps`` of sampling decoders; ``quantize``: methods of `zoo.quantize`.
CASES: dict[str, Any] = {"batches": (1,), "lengths": (16, 256), "steps": 20, "quantize": ()}


def jobs(
    entry: registry.Entry,
    device: str,
    peers: bool,
    batches: Sequence[int],
    lengths: Sequence[int],
    steps: int,
    quantize: Sequence[str] = (),
) -> Iterator[Job]:
    """Everything to measure, ours in float32 first, then the original's way, then in bfloat16 and quantized."""
    tokenizer: Any = random_model(entry, device)
    packed: dict[str, Any] = {method: quantized_model(entry, device, method) for method in quantize}
    options = _options(tokenizer, steps)
    prefixes = _prefixes(tokenizer, lengths)
    for batch in batches:
        images = pictures(batch, *(tokenizer.spec.image_size or (256, 256)))
        tokens = tokenizer.encode(images)

        def encoding(images: Tensor = images, **options: Any) -> Work:
            return lambda: tokenizer.encode(images, **options)

        def decoding(k: int | None, tokens: Any = tokens, model: Any = tokenizer) -> Work:
            prefix = tokens if k is None else tokens.truncate(k)
            return lambda: model.decode(prefix, **options)

        cases = {k: f"{batch}" if k is None else f"{batch} x {k} tokens" for k in prefixes}
        name = entry.name
        yield Job(name, "encode", f"{batch}", batch, encoding(), tokenizer)
        for k, case in cases.items():
            yield Job(name, "decode", case, batch, decoding(k), tokenizer)
        if peers and entry.family == "flextok":
            for k, case in cases.items():
                assert k is not None
                yield Job(f"{name}, dense", "decode", case, batch, dense_decoding(tokenizer, tokens, k, steps))
        if peers and entry.family in ("tokenflow", "seed"):
            plain = f"{name}, NCHW"
            yield Job(plain, "encode", f"{batch}", batch, in_plain_layout(tokenizer, encoding()))
            for k, case in cases.items():
                yield Job(plain, "decode", case, batch, in_plain_layout(tokenizer, decoding(k)))
        if peers and entry.family in _LIBRARIES:
            library, encode, decode = _LIBRARIES[entry.family](tokenizer, images)
            yield Job(f"{name}, {library}", "encode", f"{batch}", batch, encode)
            yield Job(f"{name}, {library}", "decode", f"{batch}", batch, decode)
        tokenizer.set_precision("bf16")
        reduced = f"{name}, bf16"
        yield Job(
            reduced,
            "encode",
            f"{batch}",
            batch,
            encoding(precision="bf16"),
            tokenizer,
            torch.bfloat16,
        )
        for k, case in cases.items():
            yield Job(reduced, "decode", case, batch, decoding(k), tokenizer, torch.bfloat16)
        tokenizer.set_precision("fp32")
        for method, model in packed.items():
            for precision, suffix in (("fp32", ""), ("bf16", ", bf16")):
                model.set_precision(precision)
                for k, case in cases.items():
                    yield Job(f"{name}, {method}{suffix}", "decode", case, batch, decoding(k, model=model))


def smallest_call(
    entry: registry.Entry, batches: Sequence[int], lengths: Sequence[int], steps: int, quantize: Sequence[str]
) -> Call:
    """Decoding of the first case, with random ids."""
    tokenizer = outline(entry)
    # Where images of any size are taken, a square of 16 x 16 ids.
    length = _prefixes(tokenizer, lengths)[0] or tokenizer.spec.max_tokens or 256
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokenizer.spec.vocab_size, (batches[0], length), generator=generator)
    return Call("decode", ids.tolist(), _options(tokenizer, steps))


def _options(tokenizer: Any, steps: int) -> dict[str, Any]:
    """Options of `decode`."""
    return {"steps": steps} if "steps" in type(tokenizer).options("decode") else {}


def _prefixes(tokenizer: Any, lengths: Sequence[int]) -> list[int | None]:
    """Lengths of the prefixes to decode; the whole where there is no order."""
    return [k for k in lengths if k <= (tokenizer.spec.max_tokens or 0)] if tokenizer.spec.ordered else [None]


def items(tokenizer: Tokenizer[Any], count: int) -> list[Tensor]:
    """Input of a comparison of two releases: random images of the tokenizer's size."""
    return list(pictures(count, *(tokenizer.spec.image_size or (256, 256))))


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Random images in [-1, 1]."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def in_plain_layout(module: nn.Module, work: Work) -> Work:
    """The same work with convolutions in PyTorch's usual layout, channels before rows and columns."""

    def contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.contiguous() for value in inputs)

    def plain() -> object:
        hooks = [part.register_forward_pre_hook(contiguous) for part in module.modules() if isinstance(part, nn.Conv2d)]
        try:
            return work()
        finally:
            for hook in hooks:
                hook.remove()

    return plain


def dense_decoding(tokenizer: Any, tokens: Any, k: int, steps: int) -> Work:
    """FlexTok decoding as the original computes it, with the same weights.

    Two passes over all registers at every step, the timestep's modulation computed in each of them and for each item, and the
    usual memory layout. Dense masks and copies of the original are left out, so this is its lower bound.
    """
    decoder, config = tokenizer.decoder, tokenizer.config
    codes = tokenizer.fsq.codes(tokens.ids.to(tokenizer.device))
    keep = torch.full((len(tokens),), k, device=tokenizer.device)
    null = torch.ones(len(tokens), dtype=torch.bool, device=tokenizer.device)
    factor = config.vae.factor
    rows, columns = config.image_size[0] // factor, config.image_size[1] // factor

    def work() -> Tensor:
        x = torch.zeros(len(tokens), config.latent_channels, rows, columns, device=tokenizer.device)
        for step in range(steps, 0, -1):
            t = torch.full((len(tokens),), step / steps, device=tokenizer.device)
            conditional = decoder(x, decoder.timestep(t), decoder.dense_condition(codes, keep))
            unconditional = decoder(x, decoder.timestep(t), decoder.dense_condition(codes, keep, null))
            x = x - (unconditional + 7.5 * (conditional - unconditional)) / steps
        autoencoder = tokenizer.vae.decoder
        image: Tensor = autoencoder.network(autoencoder.post_quant_conv(x / config.scaling_factor))
        return image

    return work


# ---- the classes of transformers and diffusers, with the same weights


Library = tuple[str, Work, Work]


def _with_weights(model: Any, tokenizer: Any) -> Any:
    """A library's model with the weights of our halves."""
    for ours, theirs in ((tokenizer.encoder, model.encoder), (tokenizer.decoder, model.decoder)):
        theirs.load_state_dict(ours.network.state_dict())
    for ours, name in ((tokenizer.encoder, "quant_conv"), (tokenizer.decoder, "post_quant_conv")):
        if getattr(model, name) is not None:
            getattr(model, name).load_state_dict(getattr(ours, name).state_dict())
    return model.to(next(tokenizer.parameters()).device).eval().requires_grad_(False)


def _vq_library(tokenizer: Any, images: Tensor) -> Library:
    config, device = tokenizer.config, tokenizer.device
    images = images.to(device)
    grid = tuple(side // config.factor for side in images.shape[2:])
    if config.network == "vqmodel":
        from diffusers import VQModel

        # With this switch the class decodes ids instead of searching for them once more.
        model = _with_weights(VQModel(**{**config.library, "lookup_from_codebook": True}), tokenizer)
        model.quantize.embedding.weight.copy_(tokenizer.quantizer.weight)
        ids = model.quantize(model.encode(images).latents)[2][2]
        shape = (len(images), *grid, config.code_dim)
        return (
            "diffusers",
            lambda: model.quantize(model.encode(images).latents),
            lambda: model.decode(ids, force_not_quantize=True, shape=shape),
        )
    if config.network == "janus":
        from transformers import JanusVQVAE
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig

        model = JanusVQVAE(JanusVQVAEConfig(**{**config.library, "num_patches": grid[0]}))
    else:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        model = Emu3VQVAE(Emu3VQVAEConfig(**config.library))
    model = _with_weights(model, tokenizer)
    model.quantize.embedding.weight.copy_(tokenizer.quantizer.weight)
    ids = torch.zeros(len(images), *grid, dtype=torch.int64, device=device)
    if config.network == "janus":
        return "transformers", lambda: model.encode(images), lambda: model.decode(ids.flatten(1))
    sizes = torch.tensor([images.shape[2:]] * len(images))
    return "transformers", lambda: model.encode(images, sizes), lambda: model.decode(ids)


def autoencoder_of_diffusers(sizes: Any, vae: Any) -> Any:
    """diffusers' ``AutoencoderKL`` with copies of the weights of a `zoo.nn.vae.VAE` of these sizes."""
    from diffusers import AutoencoderKL

    levels = len(sizes.widths)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.widths,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.groups,
        use_quant_conv=sizes.quant_convs,
        use_post_quant_conv=sizes.quant_convs,
    )
    return _with_weights(model, vae)


def _kl_library(tokenizer: Any, images: Tensor) -> Library:
    model = autoencoder_of_diffusers(tokenizer.config.vae, tokenizer.vae)
    images = images.to(tokenizer.device)
    latents = model.encode(images).latent_dist.mode()
    return "diffusers", lambda: model.encode(images).latent_dist.mode(), lambda: model.decode(latents)


_LIBRARIES: dict[str, Callable[[Any, Tensor], Library]] = {"vq_images": _vq_library, "autoencoder_kl": _kl_library}
