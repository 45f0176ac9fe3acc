"""TokenFlow against the original code's outputs, and the promises that the original does not make."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import zoo
from full_size import write_random_safetensors
from zoo import registry
from zoo.checkpoint import as_ours
from zoo.codecs.tokenflow import TokenFlow, TokenFlowConfig, training
from zoo.codecs.tokenflow.config import PARTS
from zoo.codecs.tokenflow.quantizer import MultiScaleQuantizer
from zoo.nn.patch_discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "tokenflow"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
CLIP, SIGLIP = "clipb_interp_enhanced", "siglip"
BOTH = pytest.mark.parametrize("case", [CLIP, SIGLIP])


def fresh(case: str) -> TokenFlow:
    loaded = zoo.load_upstream("tokenflow", CASES / case / "config.json", CASES / case / "weights.safetensors")
    assert isinstance(loaded, TokenFlow)
    return loaded


@cache
def model(case: str = CLIP) -> TokenFlow:
    return fresh(case)


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


@cache
def meta(case: str) -> dict[str, Any]:
    return json.loads((CASES / case / "config.json").read_text())["meta"]


@cache
def encoded(case: str = CLIP) -> zoo.Tokens:
    """The case's images, as arrays of 8 bits."""
    return model(case).encode([image.numpy() for image in recorded(case)["image_u8"]])


@cache
def latents(case: str = CLIP) -> Tensor:
    return torch.cat([recorded(case)["sem_latent"], recorded(case)["pix_latent"]], dim=1)


@cache
def decoded(case: str = CLIP) -> list[Tensor]:
    return model(case).decode(encoded(case))


def images(case: str = CLIP) -> Tensor:
    return (recorded(case)["image_u8"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


# ------------------------------------------------------------------------------------------------------------ golden cases


@BOTH
def test_golden_latents(case: str) -> None:
    io, tolerance, tokenizer = recorded(case), meta(case)["tolerance"], model(case)
    semantic_dim = tokenizer.config.semantic_code_dim
    taken: dict[str, Tensor] = {}
    hook = tokenizer.encoder.pixels.conv_out.register_forward_hook(lambda module, inputs, output: taken.update(z=output))
    with torch.inference_mode():
        assert difference(tokenizer.encoder.semantic(images(case)), io["sem_feat"]) < tolerance["sem_feat_abs"]
        found = tokenizer.encoder(images(case))
    hook.remove()
    assert difference(found[:, :semantic_dim], io["sem_latent"]) < tolerance["sem_latent_abs"]
    assert difference(found[:, semantic_dim:], io["pix_latent"]) < tolerance["pix_latent_abs"]
    assert difference(taken["z"][:1], io["pix_z"]) < tolerance["pix_z_abs"]


@BOTH
def test_golden_quantizer(case: str) -> None:
    io, tokenizer = recorded(case), model(case)
    assert torch.equal(tokenizer.quantizer.ids(latents(case)), io["indices"])
    used = tuple(io["drop_scales_used"].tolist())
    assert torch.equal(tokenizer.quantizer.ids(latents(case), used), io["drop_indices"])


@BOTH
def test_golden_tokens(case: str) -> None:
    io, tokens = recorded(case), encoded(case)
    assert torch.equal(tokens.ids, io["indices"])
    assert tokens.segments == model(case).config.scale_ends
    assert tokens.segments[-1] == meta(case)["robustness"]["T"] == model(case).spec.max_tokens
    side = model(case).config.image_size
    assert tokens.meta == ({"width": side, "height": side, "fit": "crop"},) * len(tokens)


@BOTH
def test_golden_decoding(case: str) -> None:
    io, tolerance, tokenizer = recorded(case), meta(case)["tolerance"], model(case)
    assert difference(tokenizer.features(encoded(case)), io["quant_final"]) < tolerance["quant_final_abs"]
    assert difference(tokenizer.semantic(encoded(case)), io["sem_recon"]) < tolerance["sem_recon_abs"]
    pixels = torch.stack(decoded(case))
    if case == CLIP:
        assert difference(pixels, io["pix_recon"]) < tolerance["pix_recon_abs"]
    else:
        assert difference(pixels[..., ::2, ::2], io["pix_recon_s2"]) < tolerance["pix_recon_abs"]
        assert difference(pixels[..., -96:, -96:], io["pix_recon_br"]) < tolerance["pix_recon_abs"]


@BOTH
def test_golden_random_ids_and_prefixes(case: str) -> None:
    io, tolerance, tokenizer = recorded(case), meta(case)["tolerance"], model(case)
    shown, crop = io["rand_sem"].shape[1], io["rand_pix_crop"].shape[-1]
    scales = meta(case)["robustness"]["prefix_scales"]
    prefix = encoded(case)[0].truncate(meta(case)["robustness"]["prefix_tokens"])
    assert len(prefix.segments) == scales
    random = tokenizer.tokens(list(io["rand_indices"]))
    for tokens, name in ((random, "rand"), (prefix, "prefix")):
        features, [pixels] = tokenizer.semantic(tokens), tokenizer.decode(tokens)
        assert difference(features[:, :shown], io[f"{name}_sem"]) < tolerance["sem_recon_abs"]
        assert difference(pixels[None, :, :crop, :crop], io[f"{name}_pix_crop"]) < tolerance["pix_recon_abs"]
    assert torch.equal(tokenizer.features(encoded(case)[0], scales=scales), tokenizer.features(prefix))


@BOTH
def test_golden_file_of_the_image(case: str, tmp_path: Path) -> None:
    """Images are written with the rounding that the original evaluates with."""
    levels = recorded(case)["pix_recon_u8_crop"][0]
    crop = len(levels)
    image = decoded(case)[0]
    written = zoo.media.write_image(tmp_path / "image.png", image)
    found = torch.from_numpy(np.array(Image.open(written)))
    assert difference(found[:crop, :crop].int(), levels.int()) <= meta(case)["tolerance"]["u8_abs"]
    rounded = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    # Values in the middle between two levels go either way.
    assert (found != rounded).float().mean() < 1e-4


def test_golden_inputs_of_a_language_model() -> None:
    io, tokenizer, tokens = recorded(CLIP), model(), encoded()
    ends = tokenizer.config.scale_ends
    inputs = tokenizer.ar_inputs(tokens)
    assert difference(inputs[:1], io["ar_inputs"]) < 1e-6
    refined = tokenizer.ar_inputs(tokens[0], refine=4)
    block = slice(ends[3] - 1, ends[4] - 1)
    assert difference(refined[:, block], io["ar_refine_block"]) < 1e-6
    refined[:, block] = io["ar_inputs"][:, block]
    assert difference(refined, io["ar_inputs"]) < 1e-6
    # While images are generated the inputs of the next scale are wanted, and no more than those.
    early = tokenizer.ar_inputs(zoo.Tokens.cat([tokens[0].truncate(ends[2]), tokens[1].truncate(ends[0])]))
    assert difference(early[0], inputs[0, : ends[3] - 1]) < 1e-6
    assert difference(early[1, : ends[1] - 1], inputs[1, : ends[1] - 1]) < 1e-6
    assert early[1, ends[1] - 1 :].abs().max() == 0


@BOTH
def test_golden_losses_of_the_quantizer(case: str) -> None:
    io, tokenizer, relative = recorded(case), model(case), meta(case)["tolerance"]["losses_rel"]
    with torch.no_grad():
        quantized = tokenizer.quantizer(latents(case), entropy=True)
        dropped = tokenizer.quantizer(latents(case), tuple(io["drop_scales_used"].tolist()))
    assert torch.equal(quantized.ids, io["indices"])
    assert quantized.codebook.item() == pytest.approx(io["train_vq_loss"].item(), rel=relative)
    assert 0.25 * quantized.commitment.item() == pytest.approx(io["train_commit_loss"].item(), rel=relative)
    assert 0.1 * quantized.entropy.item() == pytest.approx(io["train_entropy_loss"].item(), rel=relative)
    assert torch.equal(dropped.ids, io["drop_indices"])
    assert difference(dropped.latents[:1], io["drop_quant_final"]) < 2e-5


@pytest.mark.parametrize(("name", "scales"), [("vq", (5,)), ("ms", (1, 2, 4, 6, 8))])
def test_golden_gradients_of_the_quantizer(name: str, scales: tuple[int, ...]) -> None:
    io, weights = recorded("losses"), load_file(CASES / "losses" / "weights.safetensors")
    config = TokenFlowConfig(image_size=16 * scales[-1], scales=scales, codebook_size=48, semantic_code_dim=6, pixel_code_dim=4)
    quantizer = MultiScaleQuantizer(config)
    quantizer.load_state_dict(
        {"semantic": weights["quantize.embedding_vqkd.weight"], "pixels": weights["quantize.embedding_vqgan.weight"]}
    )
    given = io["vq_z"] if name == "vq" else torch.cat([io["ms_h_sem"], io["ms_h_pix"]], dim=1)
    z = given.clone().requires_grad_()
    quantized = quantizer(z, entropy=True)
    assert torch.equal(quantized.ids.flatten(), io[f"{name}_indices"].flatten())
    assert difference(quantized.latents, io["vq_zq" if name == "vq" else "ms_quant_final"]) < 1e-5
    weight = 0.1 if name == "vq" else 0.05
    total = quantized.codebook + 0.25 * quantized.commitment + 0.1 * quantized.entropy
    total = total + weight * (quantized.latents * io[f"{name}_w"]).sum()
    assert total.item() == pytest.approx(io[f"{name}_total"].item(), rel=1e-5)
    total.backward()
    expected = io["vq_grad_z"] if name == "vq" else torch.cat([io["ms_grad_h_sem"], io["ms_grad_h_pix"]], dim=1)
    assert difference(z.grad, expected) < 1e-5
    assert difference(quantizer.semantic.grad, io[f"{name}_grad_sem_codebook"]) < 1e-5
    assert difference(quantizer.pixels.grad, io[f"{name}_grad_pix_codebook"]) < 1e-5


def test_golden_semantic_loss() -> None:
    io = recorded("losses")
    features = io["sem_rec"].clone().requires_grad_()
    loss = training.semantic_loss(features, io["sem_target"])
    loss.backward()
    assert loss.item() == pytest.approx(io["sem_loss"].item(), rel=1e-5)
    assert difference(features.grad, io["sem_grad"]) < 1e-5


def test_golden_discriminator() -> None:
    io, weights = recorded("losses"), load_file(CASES / "losses" / "weights.safetensors")
    discriminator = PatchDiscriminator(channels=8, layers=3)
    prefix = "discriminator."
    discriminator.load_state_dict({key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)})
    discriminator.eval()
    assert difference(discriminator(io["gan_real"]), io["gan_logits_real_eval"]) < 1e-5
    discriminator.train()
    real, fake = discriminator(io["gan_real"]), discriminator(io["gan_fake"])
    assert difference(real, io["gan_logits_real"]) < 1e-5
    assert difference(fake, io["gan_logits_fake"]) < 1e-5
    running = [buffer.flatten() for buffer in discriminator.buffers() if buffer.is_floating_point()]
    assert difference(torch.cat(running), io["gan_running_after"]) < 1e-5
    assert discriminator_loss(real, fake).item() == pytest.approx(io["gan_hinge_d_loss"].item(), rel=1e-5)
    assert generator_loss(fake).item() == pytest.approx(io["gan_hinge_gen_loss"].item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ training step


def test_training_step() -> None:
    """Every parameter learns, and each term is what it says."""
    tokenizer, io = fresh(CLIP).train().requires_grad_(True), recorded(CLIP)
    teacher = torch.randn(io["sem_recon"].shape, generator=torch.Generator().manual_seed(0))
    discriminator = PatchDiscriminator(channels=8)
    losses = training.losses(
        tokenizer,
        images(),
        teacher=teacher,
        perceptual=lambda left, right: (left - right).abs().mean(dim=(1, 2, 3)),
        discriminator=discriminator,
    )
    assert difference(losses.outputs["images"], io["pix_recon"]) < 1e-3
    assert losses["pixels"].item() == pytest.approx(F.mse_loss(io["pix_recon"], images()).item(), rel=1e-3)
    assert losses["perceptual"].item() == pytest.approx(F.l1_loss(io["pix_recon"], images()).item(), rel=1e-3)
    cosine = F.cosine_similarity(io["sem_recon"], teacher, dim=-1).mean().item()
    assert losses["semantic"].item() == pytest.approx(1 - cosine, rel=1e-3)
    assert losses["codebook"].item() == pytest.approx(io["train_vq_loss"].item(), rel=1e-3)
    assert losses["commitment"].item() == pytest.approx(io["train_commit_loss"].item(), rel=1e-3)
    assert losses["entropy"].item() == pytest.approx(io["train_entropy_loss"].item(), rel=1e-3)
    assert losses["adversarial"].item() == pytest.approx(-0.5 * discriminator(losses.outputs["images"]).mean().item(), rel=1e-3)
    losses.total.backward()
    still = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_the_former_way_to_the_losses() -> None:
    tokenizer = fresh(CLIP)
    with pytest.warns(DeprecationWarning, match="training_losses is zoo.codecs.tokenflow.training.losses now"):
        former = tokenizer.training_losses(images())
    found = training.losses(tokenizer, images())
    assert former.pixels == former["pixels"] == found["pixels"] and former.images.shape == images().shape
    with pytest.raises(AttributeError, match="no loss 'sound'"):
        _ = former.sound
    assert len(found) == 7 and found.total.item() == pytest.approx(sum(term.item() for term in found.values()), rel=1e-5)


def test_ids_follow_the_codebook_as_it_learns() -> None:
    tokenizer = fresh(CLIP)
    before = tokenizer.quantizer.ids(latents())
    with torch.no_grad():
        tokenizer.quantizer.semantic.copy_(tokenizer.quantizer.semantic.flip(0))
        tokenizer.quantizer.pixels.copy_(tokenizer.quantizer.pixels.flip(0))
    assert torch.equal(tokenizer.quantizer.ids(latents()), tokenizer.config.codebook_size - 1 - before)


def test_a_scale_is_dropped_at_times() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = (1, 2, 4, 8)
    drawn = [training.drop_scale(scales, 0.5, generator) for _ in range(300)]
    assert set(drawn) == {scales, (1, 4, 8), (1, 2, 8), (1, 2, 4)}
    assert 100 < drawn.count(scales) < 200
    assert training.drop_scale((4,), 1.0) == (4,)


def test_a_new_model_has_usable_weights() -> None:
    torch.manual_seed(0)
    tokenizer = TokenFlow(SMALL)
    assert all(torch.isfinite(tensor).all() for tensor in tokenizer.state_dict().values())
    for codebook in (tokenizer.quantizer.semantic, tokenizer.quantizer.pixels):
        assert (codebook.norm(dim=1) - 1).abs().max() < 1e-5


def test_a_single_scale_is_a_model_too() -> None:
    torch.manual_seed(0)
    tokenizer = TokenFlow(replace(SMALL, scales=(4,))).eval()
    tokens = tokenizer.encode(torch.rand(3, 32, 32))
    assert tokens.segments == (16,)
    assert tokenizer.ar_inputs(tokens).shape == (1, 0, 12)
    assert tokenizer.decode(tokens)[0].shape == (3, 32, 32)


# ---------------------------------------------------------------------------------------------------- official checkpoints


SMALL = TokenFlowConfig(
    image_size=32,
    patch_size=8,
    scales=(1, 2, 4),
    semantic_dim=32,
    semantic_depth=1,
    semantic_heads=2,
    semantic_hidden=64,
    codebook_size=64,
    semantic_code_dim=8,
    pixel_code_dim=4,
    encoder_stem=32,
    encoder_widths=(32, 32, 32, 64),
    encoder_blocks=1,
    latent_channels=16,
    decoder_widths=(64, 32, 32, 32),
    decoder_blocks=1,
    semantic_decoder_depth=1,
    semantic_decoder_heads=4,
    feature_dim=24,
)


def manifest_of(entry: registry.Entry) -> dict[str, Any]:
    assert entry.weights.file is not None
    name = entry.weights.file.removesuffix(".pt").replace("_", "-", 1)
    return json.loads((MANIFESTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [n for n in registry.names("tokenflow-*") if not registry.get(n).embedded])
def test_manifest_maps_both_ways(name: str) -> None:
    """Every tensor of the official file is used or knowingly dropped, and every tensor of ours is filled."""
    entry = registry.get(name)
    manifest = manifest_of(entry)
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    assert TokenFlow.checkpoint.recognises(official)
    wanted = {key: tensor for key, tensor in official.items() if TokenFlow.checkpoint.wanted(key)}
    dropped = {"quantize.codebook_used", "scaling_layer.shift", "scaling_layer.scale"}
    pooling = ("encoder_vqkd.vision_model.post_layernorm.", "encoder_vqkd.vision_model.head.")
    assert all(key in dropped or key.startswith(pooling) for key in official.keys() - wanted.keys())
    config = registry.check_config(entry)
    found, state = as_ours(TokenFlow, wanted, config)
    assert found == config
    with torch.device("meta"):
        ours = TokenFlow(config).state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: tensor.shape for key, tensor in ours.items()}
    if entry.name != "tokenflow-b-224":
        assert TokenFlow.checkpoint.config(manifest["config"]) == config
        assert as_ours(TokenFlow, wanted, None)[0] == config
    if config.teacher == "siglip":
        # Newer versions of transformers have one level less in their names; the last layer is not needed.
        renamed = {key.replace("vision_model.", ""): tensor for key, tensor in wanted.items()}
        assert as_ours(TokenFlow, renamed, config)[1].keys() == state.keys()
        assert not any(key.startswith("encoder.semantic.blocks.26.") for key in state)


@pytest.mark.parametrize(
    ("name", "tokens", "bits"),
    [("tokenflow-b-224", 561, 8_415), ("tokenflow-b-256", 817, 12_255), ("tokenflow-xl-384", 2227, 33_405)],
)
def test_counts_of_the_official_models(name: str, tokens: int, bits: int) -> None:
    config = registry.check_config(registry.get(name))
    with torch.device("meta"):
        spec = TokenFlow(config).spec
    assert (spec.max_tokens, spec.bits_per_item, spec.dim) == (tokens, bits, 40)


def test_every_manifest_has_an_entry() -> None:
    known = [manifest_of(registry.get(name)) for name in registry.names("tokenflow-*") if not registry.get(name).embedded]
    for path in MANIFESTS.glob("tokenflow-*.json"):
        assert json.loads(path.read_text()) in known


@BOTH
def test_contradictory_upstream_config(case: str) -> None:
    raw = json.loads((CASES / case / "config.json").read_text())
    state = load_file(CASES / case / "weights.safetensors")
    for argument, value in (
        ("codebook_size", 99),
        ("z_channels", 64),
        ("encoder_ch_mult", [4] * len(raw["model"]["encoder_ch_mult"])),
        ("decoder_ch_mult", [4] * len(raw["model"]["decoder_ch_mult"])),
    ):
        wrong = {"model": raw["model"] | {argument: value}}
        with pytest.raises(zoo.KeysError, match="does not fit its configuration"):
            zoo.load_upstream("tokenflow", wrong, state)


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("teacher", "vitamin_xlarge_256", "teacher must be one of"),
        ("codebook_l2_norm", False, "codebook_l2_norm must be true"),
        ("kmeans", True, "kmeans must be false"),
        ("infer_interpolate", False, "need infer_interpolate"),
        ("image_size", 256, "another grid"),
        ("z_channels", "many", "cannot be used|does not fit"),
    ],
)
def test_other_configurations_are_refused(argument: str, value: Any, reason: str) -> None:
    raw = json.loads((CASES / CLIP / "config.json").read_text())
    with pytest.raises(zoo.WeightsError, match=reason):
        zoo.load_upstream("tokenflow", {"model": raw["model"] | {argument: value}}, CASES / CLIP / "weights.safetensors")


@pytest.mark.parametrize(
    ("case", "key"),
    [
        (CLIP, "quantize.embedding_vqgan.weight"),
        (CLIP, "encoder.mid.1.q.weight"),
        (CLIP, "encoder_vqkd.positional_embedding"),
        (CLIP, "encoder_vqkd.transformer.resblocks.1.attn.in_proj_bias"),
        (CLIP, "decoder_vqkd.blocks.2.attn.v_bias"),
        (CLIP, "decoder_vqkd.cls_token"),
        (CLIP, "decode_task_layer.2.weight"),
        (SIGLIP, "encoder_vqkd.vision_model.encoder.layers.1.self_attn.k_proj.weight"),
        (SIGLIP, "encoder_vqkd.vision_model.embeddings.patch_embedding.weight"),
        (SIGLIP, "post_quant_conv.bias"),
    ],
)
def test_incomplete_checkpoints_are_refused(case: str, key: str) -> None:
    state = load_file(CASES / case / "weights.safetensors")
    del state[key]
    with pytest.raises(zoo.KeysError, match="missing"):
        zoo.load_upstream("tokenflow", CASES / case / "config.json", state)


def test_unexpected_tensors_are_refused() -> None:
    state = load_file(CASES / CLIP / "weights.safetensors")
    for extra in ("loss.discriminator.main.0.weight", "decoder.conv_blocks.9.res.0.conv1.weight", "encoder.unknown"):
        with pytest.raises(zoo.KeysError, match=r"unexpected|missing"):
            zoo.load_upstream("tokenflow", CASES / CLIP / "config.json", state | {extra: torch.zeros(1)})


@pytest.mark.parametrize("level", ["model", "state_dict", None])
def test_files_of_the_original(level: str | None, tmp_path: Path) -> None:
    """Which level the official files have around their tensors is not known; the original's loader takes several."""
    state = load_file(CASES / CLIP / "weights.safetensors")
    torch.save({level: state} if level else state, tmp_path / "tokenflow.pt")
    loaded = zoo.load_upstream("tokenflow", CASES / CLIP / "config.json", tmp_path / "tokenflow.pt")
    assert loaded.fingerprint == model().fingerprint


def test_stored_length_of_codes_does_not_matter() -> None:
    state = load_file(CASES / CLIP / "weights.safetensors")
    for name, factor in (("vqkd", 7.0), ("vqgan", 0.25)):
        state[f"quantize.embedding_{name}.weight"] = state[f"quantize.embedding_{name}.weight"].float() * factor
    scaled = zoo.load_upstream("tokenflow", CASES / CLIP / "config.json", state)
    assert isinstance(scaled, TokenFlow)
    assert torch.equal(scaled.quantizer.ids(latents()), recorded(CLIP)["indices"])
    assert difference(scaled.quantizer.codes(), model().quantizer.codes()) < 1e-6


def test_positions_are_resized_by_the_factor_of_the_original() -> None:
    """Cubic convolution (a = -0.75) at (target + 0.5) * 14 / 16.1 - 0.5, edges continued."""

    def cubic(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = torch.zeros(16, 14)
    for target in range(16):
        source = (target + 0.5) * 14 / 16.1 - 0.5
        for tap in range(-3, 18):
            matrix[target, min(max(tap, 0), 13)] += cubic(source - tap)
    for key, ours in (
        ("encoder_vqkd.positional_embedding", "encoder.semantic.positions"),
        ("decoder_vqkd.pos_embed", "semantic_decoder.positions"),
    ):
        table = load_file(CASES / CLIP / "weights.safetensors")[key].float().reshape(197, -1)
        grid = torch.einsum("yi,xj,ijd->yxd", matrix, matrix, table[1:].unflatten(0, (14, 14)))
        expected = torch.cat([table[:1], grid.flatten(0, 1)])
        assert difference(model().state_dict()[ours], expected) < 1e-5


def test_one_file_serves_two_sizes_whose_tokens_do_not_mix() -> None:
    """At the size that its positions are made for, a CLIP checkpoint needs no resizing."""
    raw = json.loads((CASES / CLIP / "config.json").read_text())["model"]
    native = raw | {"image_size": 112, "infer_interpolate": False}
    native["shrunk"] = raw["shrunk"] | {"scale_rq_layers": [1, 2, 4, 6, 8, 10, 12, 14]}
    smaller = zoo.load_upstream("tokenflow", native, CASES / CLIP / "weights.safetensors")
    assert smaller.spec.image_size == (112, 112) and smaller.spec.max_tokens == 561
    table = load_file(CASES / CLIP / "weights.safetensors")["encoder_vqkd.positional_embedding"]
    assert torch.equal(smaller.state_dict()["encoder.semantic.positions"], table.float())
    tokens = smaller.encode(images()[0])
    assert smaller.decode(tokens)[0].shape == (3, 112, 112)
    with pytest.raises(zoo.MismatchError):
        model().decode(tokens)


def test_nothing_is_fetched_to_build_or_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    TokenFlow(SMALL)
    fresh(CLIP)


def test_contradictory_sizes() -> None:
    for wrong, reason in (
        ({"scales": (1, 4, 2)}, "increase"),
        ({"scales": ()}, "increase"),
        ({"image_size": 48}, "another grid"),
        ({"encoder_widths": (32, 32)}, "differ in length"),
        ({"encoder_stem": 20}, "multiples of 32"),
        ({"semantic_heads": 3}, "do not divide"),
        ({"parts": ("decoder", "vocoder")}, "parts are encoder, decoder, semantic_decoder, not 'vocoder'"),
    ):
        with pytest.raises(ValueError, match=reason):
            TokenFlowConfig(**(vars(SMALL) | wrong))


# ------------------------------------------------------------------------------------------------------------- the contract


def test_an_item_gets_what_it_gets_alone() -> None:
    tokenizer, tokens = model(), encoded()
    for index in range(2):
        assert tokenizer.encode(recorded(CLIP)["image_u8"][index].numpy()).equal(tokens[index])
    ends = tokenizer.config.scale_ends
    mixed = zoo.Tokens.cat([tokens[0].truncate(ends[1]), tokens[1], tokens[0].truncate(ends[5])])
    together = tokenizer.decode(mixed)
    features, meaning, vectors = tokenizer.features(mixed), tokenizer.semantic(mixed), tokenizer.embed(mixed)
    for index, item in enumerate(mixed):
        assert torch.equal(tokenizer.decode(item)[0], together[index])
        assert torch.equal(tokenizer.features(item)[0], features[index])
        assert torch.equal(tokenizer.semantic(item)[0], meaning[index])
        length = int(item.lengths[0])
        assert torch.equal(tokenizer.embed(item)[0], vectors[index, :length])
        assert vectors[index, length:].abs().sum() == 0


def test_several_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setitem(TokenFlow.at_once, "encode", Budget(4, 4))
    monkeypatch.setitem(TokenFlow.at_once, "decode", Budget(4, 4))
    tokens = model().encode(images())
    assert tokens.tolist() == encoded().tolist()
    monkeypatch.undo()
    batched = torch.stack(model().decode(encoded()))
    assert difference(batched, recorded(CLIP)["pix_recon"]) < 1e-3


def test_embeddings_are_codes_and_their_sum_is_the_features() -> None:
    tokenizer, tokens = model(), encoded()
    config, vectors = tokenizer.config, tokenizer.embed(tokens)
    state = tokenizer.state_dict()
    raw = torch.cat([state["quantizer.semantic"], state["quantizer.pixels"]], dim=1)[tokens.ids]
    semantic, pixels = raw.split((config.semantic_code_dim, config.pixel_code_dim), dim=-1)
    expected = torch.cat([part / part.norm(dim=-1, keepdim=True) for part in (semantic, pixels)], dim=-1)
    assert difference(vectors, expected) < 1e-6
    assert vectors.shape[-1] == tokenizer.spec.dim
    total, start = torch.zeros_like(recorded(CLIP)["quant_final"]), 0
    for scale in config.scales:
        part = vectors[:, start : start + scale * scale].mT.reshape(2, -1, scale, scale)
        total += F.interpolate(part, size=(16, 16), mode="bicubic", align_corners=False)
        start += scale * scale
    assert difference(tokenizer.features(tokens), total) < 1e-5
    assert difference(tokenizer.features(images()), total) < 1e-5


def test_features_may_be_fed_to_a_model_in_training() -> None:
    tokenizer, tokens = model(), encoded()
    for found in (tokenizer.embed(tokens), tokenizer.features(tokens), tokenizer.ar_inputs(tokens), tokenizer.semantic(tokens)):
        rows = found.flatten(2).mT if found.ndim == 4 else found
        projector = torch.nn.Linear(rows.shape[-1], 2)
        projector(rows).sum().backward()
        assert projector.weight.grad.abs().sum() > 0


def test_parts_work_by_themselves(tmp_path: Path) -> None:
    """Images are decoded without the semantic branch, say."""
    model().save_pretrained(tmp_path)
    decoder, encoder, meaning = (
        zoo.load(f"local-dir:{tmp_path}", parts=part) for part in ("decoder", "encoder", "semantic_decoder")
    )
    numbers = {part: sum(p.numel() for p in getattr(model(), part).parameters()) for part in PARTS}
    for part, tokenizer in zip(("decoder", "encoder", "semantic_decoder"), (decoder, encoder, meaning), strict=True):
        assert tokenizer.num_parameters == numbers[part] + 512 * 40
        assert torch.equal(tokenizer.features(encoded()), model().features(encoded()))
    assert all(torch.equal(a, b) for a, b in zip(decoder.decode(encoded()), decoded(), strict=True))
    assert encoder.encode(images()).tolist() == encoded().tolist()
    assert torch.equal(meaning.semantic(encoded()), model().semantic(encoded()))
    with pytest.raises(zoo.WeightsError, match=r"encoding needs the encoder.*parts=\('decoder', 'encoder'\)"):
        decoder.encode(images())
    with pytest.raises(zoo.WeightsError, match="decoding to images needs the decoder"):
        meaning.decode(encoded())
    with pytest.raises(zoo.WeightsError, match="decoding to features needs the semantic_decoder"):
        decoder.semantic(encoded())
    state = load_file(CASES / CLIP / "weights.safetensors")
    chosen = replace(model().config, parts=("decoder",))
    found, converted = as_ours(TokenFlow, {k: v for k, v in state.items() if TokenFlow.checkpoint.wanted(k)}, chosen)
    assert found == chosen and converted.keys() == decoder.state_dict().keys()


def test_prefixes_are_whole_scales() -> None:
    tokenizer, tokens = model(), encoded()
    ends = tokenizer.config.scale_ends
    for number, end in enumerate(ends, start=1):
        if number in (1, 4, 9):
            assert torch.equal(tokenizer.decode(tokens, scales=number)[1], tokenizer.decode(tokens[1].truncate(end))[0])
    calls: list[Callable[[Any], Any]] = [
        tokenizer.decode,
        tokenizer.semantic,
        tokenizer.features,
        tokenizer.embed,
        tokenizer.ar_inputs,
    ]
    for call in calls:
        with pytest.raises(zoo.InputError, match="item 1: 56 tokens are no whole number of scales") as caught:
            call(zoo.Tokens.cat([tokens[0], tokens[1].truncate(56)]))
        assert caught.value.index == 1
    for scales in (0, 10):
        with pytest.raises(zoo.InputError, match=r"scales must lie in \[1, 9\]"):
            tokenizer.decode(tokens, scales=scales)
    for refine, given in ((0, tokens), (9, tokens), (-1, tokens), (4, tokens.truncate(ends[3]))):
        with pytest.raises(zoo.InputError, match="refine must be"):
            tokenizer.ar_inputs(given, refine=refine)


def test_bare_ids_and_files_of_tokens(tmp_path: Path) -> None:
    tokenizer, tokens = model(), encoded()
    expected = decoded()
    for bare in (tokens.ids, list(tokens.ids)):
        assert all(torch.equal(a, b) for a, b in zip(tokenizer.decode(bare), expected, strict=True))
    tokens.save(tmp_path / "batch.zt")
    loaded = zoo.Tokens.load(tmp_path / "batch.zt")
    assert loaded.equal(tokens) and loaded.segments == tokenizer.config.scale_ends
    assert tokenizer.tokens([tokens.ids[0, :21]]).segments == (1, 5, 21)


def test_media_of_the_size_it_had() -> None:
    picture = Image.fromarray(recorded(CLIP)["image_u8"][0].numpy()).resize((200, 90))
    for fit in ("crop", "pad", "stretch"):
        tokens = model().encode(picture, fit=fit)
        assert model().decode(tokens, size="original")[0].shape == (3, 90, 200)
        assert model().decode(tokens)[0].shape == (3, 128, 128)
    exact = model().encode(images()[0], fit="none")
    assert exact.tolist() == encoded()[0].tolist()
    assert exact.meta[0]["fit"] == "none"


@BOTH
def test_save_and_load(case: str, tmp_path: Path) -> None:
    model(case).save_pretrained(tmp_path)
    again = zoo.load(f"local-dir:{tmp_path}")
    assert again.config == model(case).config and again.spec == model(case).spec
    assert torch.equal(again.features(encoded(case)), model(case).features(encoded(case)))


def test_pickle() -> None:
    again = pickle.loads(pickle.dumps(model()))
    assert again.encode(images()[0]).equal(model().encode(images()[0]))


def test_precision_leaves_the_ids_alone() -> None:
    reduced = fresh(CLIP)
    reduced.set_precision("bf16")
    assert next(reduced.decoder.parameters()).dtype == torch.bfloat16
    assert reduced.encode(images()).tolist() == encoded().tolist()
    for exact, rough in zip(decoded(), reduced.decode(encoded()), strict=True):
        assert rough.dtype == torch.float32
        assert (exact - rough).square().mean() < 0.01 * exact.square().mean()
    assert torch.equal(reduced.features(encoded()), model().features(encoded()))
    assert difference(reduced.semantic(encoded()), model().semantic(encoded())) < 0.1


def test_callers_settings_leave_the_ids_alone() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model().encode(images()).equal(model().encode(images()))
        assert model().encode(images()).tolist() == encoded().tolist()
    with torch.inference_mode():
        assert fresh(CLIP).encode(images()[0]).tolist() == encoded()[0].tolist()


def test_half_precision_encoding_is_asked_for() -> None:
    quick = model().encode(images(), encoder_precision="bf16")
    assert quick.ids.shape == encoded().ids.shape
    # The coarsest scale is an average of everything, which rounding hardly moves.
    assert torch.equal(quick.ids[:, 0], encoded().ids[:, 0])
    assert not torch.equal(quick.ids, encoded().ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_gpu_gives_the_same(case: str) -> None:
    tokenizer = fresh(case).to("cuda")
    assert tokenizer.encode(images(case)).tolist() == encoded(case).tolist()
    for ours, expected in zip(tokenizer.decode(encoded(case)), decoded(case), strict=True):
        assert difference(ours.cpu(), expected) < 1e-3


def test_bad_items_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(b"no image at all" * 20)
    for bad, reason in (
        (tmp_path / "nowhere.png", "does not exist"),
        (tmp_path / "noise.png", "not an image file"),
        (torch.full((3, 128, 128), float("nan")), "NaN"),
        (torch.zeros(3, 128, 128) + 200, "must lie in"),
        (torch.zeros(2, 128, 128), "of shape"),
        (object(), "not object"),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            model().encode([images()[0], bad])
        assert caught.value.index == 1
    for options, reason in (
        ({"fit": "none"}, "does not fit: it must have 128 x 128"),
        ({"fit": "squeeze"}, "fit must be one of"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"max_pixels": 100}, "max_pixels"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            model().encode(np.zeros((64, 128, 3), np.uint8), **options)
    with pytest.raises(zoo.InputError, match="outside the vocabulary"):
        model().decode(torch.tensor([[512]]))


# --------------------------------------------------------------------------------------------------------------- full size

FULL_SIZE = """
import json, sys
import numpy, zoo, zoo.codecs.tokenflow, zoo.hub
import timm.models.vision_transformer
from diffusers.models.unets import unet_2d_blocks

def memory(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field + ":"))

name, path = sys.argv[1:]
before = memory("VmRSS")
tokenizer = zoo.load(name, files={"main": path})
loaded = memory("VmHWM") - before
weights = sum(tensor.nbytes for tensor in tokenizer.state_dict().values())
tokens = tokenizer.encode(numpy.random.default_rng(0).integers(0, 256, (300, 400, 3), numpy.uint8))
image = tokenizer.decode(tokens)[0]
used = memory("VmHWM") - before
print(json.dumps([weights, loaded, used, int(tokens.lengths[0]), list(image.shape), bool(image.isfinite().all())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", ["tokenflow-b-256", "tokenflow-xl-384"])
def test_loading_takes_little_more_memory_than_the_weights(name: str, tmp_path: Path) -> None:
    shapes = manifest_of(registry.get(name))["tensors"]
    write_random_safetensors(tmp_path / "main.safetensors", shapes, torch.float32)
    command = [sys.executable, "-c", FULL_SIZE, name, str(tmp_path / "main.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, loaded, used, tokens, shape, finite = json.loads(result.stdout.splitlines()[-1])
    spec = registry.check_config(registry.get(name))
    assert weights > 1.4e9
    assert loaded <= 1.2 * weights
    # Memory mapped weights as far as they were read, and the maps of the finest level.
    assert used <= 1.2 * weights + (1 << 30)
    assert (tokens, shape) == (spec.scale_ends[-1], [3, spec.image_size, spec.image_size]) and finite
