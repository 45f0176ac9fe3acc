"""IBQ, Emu3.5 and Open-MAGVIT2 against the originals' outputs, and what is promised beyond them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_ibq import SMALL_BITS, SMALL_IBQ, small_ibq
from zoo import registry
from zoo.checkpoint import as_ours
from zoo.codecs.ibq import IBQ, IBQConfig, preparing, training
from zoo.codecs.ibq.quantizer import split_ids
from zoo.nn.patch_discriminator import PatchDiscriminator, discriminator_loss

CASES = Path(__file__).parent / "golden" / "ibq"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
NAMES = ("emu35", "ibq", "open-magvit2")


def raw_config(case: str) -> dict[str, Any]:
    return json.loads((CASES / case / "config.json").read_text())


@cache
def model(case: str) -> IBQ:
    return zoo.load_upstream("ibq", CASES / case / "config.json", CASES / case / "weights.safetensors")


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


def passes(case: str) -> list[str]:
    return sorted(key.partition("_")[0] for key in recorded(case) if key.endswith("_image_u8") and key[0].isdigit())


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize(("case", "number"), [(case, number) for case in NAMES for number in passes(case)])
def test_golden_latents_ids_and_images(case: str, number: str) -> None:
    tokenizer, io = model(case), {key[2:]: tensor for key, tensor in recorded(case).items() if key[:2] == f"{number}_"}
    images = list(io["image_u8"].numpy())
    tokens = tokenizer.encode(images, fit="none")
    assert torch.equal(tokens.ids, io["ids"].flatten(1))
    assert tokenizer.grids(tokens) == [tuple(io["ids"].shape[1:])] * len(images)
    pixels = torch.stack([item.tensors["pixels"] for item in tokenizer.prepare(images, fit="none")])
    latents = tokenizer.quantizer.project(tokenizer.encoder(pixels))
    assert difference(latents, io.get("latent", io["encoder_out"])) < 1e-3
    vectors = tokenizer.embed(tokens).mT.reshape(io["quantized"].shape)
    assert difference(vectors, io["quantized"]) < 1e-6
    decoded = torch.stack(tokenizer.decode(tokens))
    assert difference(decoded, io["decoded"]) < 1e-4
    levels, wanted = tokenizer.as_uint8(io["decoded"]).permute(0, 2, 3, 1), io["decoded_u8"]
    near = (io["decoded"].double() + 1) * 127.5
    near = ((near - near.round()).abs() < 1e-4).permute(0, 2, 3, 1)
    assert torch.equal(levels[~near], wanted[~near]) and (levels.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("case", NAMES)
def test_golden_stored_latents_give_the_stored_ids(case: str) -> None:
    io, quantizer = recorded(case), model(case).quantizer
    for number in passes(case):
        if case == "open-magvit2":
            found = quantizer._numbers(io[f"{number}_encoder_out"])
        else:
            found = quantizer.ids(io[f"{number}_latent"])
        assert torch.equal(found, io[f"{number}_ids"])


@pytest.mark.parametrize("case", NAMES)
def test_golden_random_ids(case: str) -> None:
    io = recorded(case)
    ids = io["random_ids"]
    [image] = model(case).decode(ids.flatten(1), grid=tuple(ids.shape[1:]))
    assert difference(image, io["random_decoded"][0]) < 1e-4


@pytest.mark.parametrize("case", NAMES)
def test_golden_intermediates(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    modules = {"0_encoder_mid": "encoder.mid", "0_decoder_mid": "decoder.mid"}
    modules |= {"0_decoder_adaptive_last": "decoder.levels.0.adaptive"}
    modules = {key: name for key, name in modules.items() if key in io}
    seen: dict[str, Tensor] = {}
    named = dict(tokenizer.named_modules())
    hooks = [
        named[name].register_forward_hook(lambda _, __, out, key=key: seen.setdefault(key, out.detach().clone()))
        for key, name in modules.items()
    ]
    tokenizer.decode(tokenizer.encode(list(recorded(case)["0_image_u8"].numpy())))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(modules) >= 2
    for key, found in seen.items():
        assert difference(found[:1], io[key]) < 1e-3, key


@pytest.mark.parametrize("case", ["ibq", "open-magvit2"])
def test_golden_padding(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    image = io["padded_image_u8"].numpy()
    tokens = tokenizer.encode(image)
    assert torch.equal(tokenizer.prepare(image)[0].tensors["pixels"], io["padded_input"][0])
    assert torch.equal(tokens.ids.reshape(io["padded_ids"].shape), io["padded_ids"])
    assert tokens.meta == ({"width": 45, "height": 37, "fit": "none", "rows": 12},)
    [restored] = tokenizer.decode(tokens, size="original")
    assert difference(restored.clamp(-1, 1), io["padded_reconstruction"][0]) < 1e-4


@pytest.mark.parametrize("case", ["ibq", "open-magvit2"])
def test_golden_training_weights(case: str) -> None:
    config = raw_config(case) | {"weights": "training"}
    tokenizer = zoo.load_upstream("ibq", config, CASES / case / "weights.safetensors")
    io = recorded(case)
    for number in passes(case):
        tokens = tokenizer.encode(list(io[f"{number}_image_u8"].numpy()), fit="none")
        assert torch.equal(tokens.ids, io[f"{number}_ids_of_training_weights"].flatten(1))
    assert tokenizer.fingerprint != model(case).fingerprint


@pytest.mark.parametrize("case", NAMES)
def test_golden_training(case: str) -> None:
    """The plain weights; the total is the one that the case names."""
    tokenizer = zoo.load_upstream(
        "ibq", raw_config(case) | {"weights": "training"}, CASES / case / "weights.safetensors"
    ).requires_grad_(True)
    io, quantizer = recorded(case), tokenizer.quantizer
    z = io["train_z"].clone().requires_grad_(True)
    bits = case == "open-magvit2"
    quantized = quantizer.quantize(z) if bits else quantizer(z)
    assert torch.equal(quantized.ids.flatten(), io["train_ids"])

    def near(found: Tensor, key: str) -> None:
        wanted = io[key].reshape(found.shape)
        assert difference(found, wanted) <= 1e-5 * wanted.abs().max() + 5e-7, key

    near(quantized.latents, "train_zq")
    near(quantized.loss, "train_commitment" if bits else "train_quant_loss")
    near(quantized.sample_entropy, "train_sample_entropy")
    near(quantized.mean_entropy, "train_avg_entropy")
    near(quantized.entropy_loss, "train_entropy_loss")
    weights = training.WEIGHTS["lfq" if bits else "ibq"]
    total = weights.quantization * quantized.loss + weights.entropy * quantized.entropy_loss
    (total + 0.1 * (quantized.latents * io["train_w"]).sum()).backward()
    near(z.grad, "train_grad_z")
    if not bits:
        near(quantizer.weight.grad, "train_grad_codebook")


@pytest.mark.parametrize("case", ["ibq", "open-magvit2"])
def test_golden_adversarial_losses(case: str) -> None:
    io = recorded(case)
    real, fake = io["gan_logits_real"], io["gan_logits_fake"]
    assert training.generator_loss(fake).item() == pytest.approx(io["gan_generator"].item(), rel=1e-5)
    assert discriminator_loss(real, fake).item() == pytest.approx(io["gan_discriminator_hinge"].item(), rel=1e-5)
    lecam = training.LeCAM()
    lecam.update(real, fake)
    lecam.update(real + 1, fake - 1)
    assert lecam(real, fake).item() == pytest.approx(io["gan_lecam"].item(), rel=1e-5)
    step = training.discriminator_step_loss(real, fake, training.LeCAM(), 0.05)
    assert step.item() > io["gan_discriminator_hinge"].item()
    assert torch.stack([lecam.real, lecam.fake]).tolist() == pytest.approx(io["gan_lecam_ema"].tolist(), rel=1e-4)


def test_golden_presets() -> None:
    io = recorded("emu35")

    def chw(key: str) -> Tensor:
        return io[key].permute(2, 0, 1)

    assert torch.equal(preparing.emu_resized(chw("emu_image_u8"), 96 * 96), chw("emu_resized_u8"))
    tokenizer = model("emu35")
    [item] = tokenizer.prepare(io["emu_image_u8"].numpy(), resize="emu3.5", area=96 * 96)
    assert torch.equal(item.tensors["pixels"], io["emu_pixel_values"])
    assert item.meta == {"width": 115, "height": 70, "fit": "stretch", "rows": 5}
    for number in "01":
        image = chw(f"apertus_image_u8_{number}")
        assert torch.equal(preparing.apertus_resized(image), chw(f"apertus_resized_u8_{number}"))
        [item] = tokenizer.prepare(image.permute(1, 2, 0).numpy(), resize="apertus")
        assert difference(item.tensors["pixels"], io[f"apertus_pixel_values_{number}"]) < 2e-7


def test_golden_sizes_of_presets() -> None:
    layout = json.loads((CASES / "emu35" / "layout.json").read_text())
    for height, width, area, *size in layout["emu35"]["resize"]["rows"]:
        assert preparing.emu_size(height, width, area) == tuple(size)
    for height, width, *size in layout["apertus15"]["resize"]["rows"]:
        assert preparing.apertus_size(height, width) == tuple(size)
    assert preparing.apertus_size(1400, 1400) == (1392, 1392)
    with pytest.raises(zoo.InputError, match="too oblong"):
        preparing.apertus_size(1, 201)
    with pytest.raises(zoo.InputError, match="too oblong"):
        preparing.emu_size(1, 100_000)


# --------------------------------------------------------------------------------------------------------- official files


def entry_of(manifest: str) -> registry.Entry:
    return registry.get({"ibq-emu3.5-vision-tokenizer": "emu3.5"}.get(manifest, manifest.removeprefix("ibq-")))


@pytest.mark.parametrize(
    "path", [p for p in sorted(MANIFESTS.glob("ibq-*.json")) if "apertus" not in p.name], ids=lambda p: p.stem
)
def test_manifest_maps_both_ways(path: Path) -> None:
    """Every tensor of the official file is used or knowingly dropped, and every tensor of ours is filled, in both sets."""
    manifest, entry = json.loads(path.read_text()), entry_of(path.stem)
    if "hub" in manifest:
        assert (manifest["hub"]["repo"], manifest["hub"]["file"]) == (entry.weights.repo, entry.weights.file)
    config = registry.check_config(entry)
    assert IBQ.checkpoint.config(manifest["config"]) == config
    names = manifest["tensors"] | manifest.get("ema_tensors", {}) | manifest.get("optional_tensors", {})
    official = {key: torch.empty(shape, device="meta") for key, shape in names.items() if IBQ.checkpoint.wanted(key)}
    assert IBQ.checkpoint.recognises(official.keys())
    for weights in ("ema", "training"):
        chosen = replace(config, weights=weights)
        found, state = as_ours(IBQ, official, chosen)
        assert found == chosen and len(state) == manifest["num_tensors"]
        assert sum(tensor.numel() for tensor in state.values()) == manifest["num_parameters"]
    assert as_ours(IBQ, official, None)[0] == config


def test_apertus_manifest_is_the_encoder_of_emu35() -> None:
    manifest = json.loads((MANIFESTS / "ibq-apertus-1.5-vision-tokenizer.json").read_text())
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    official |= {
        "model.language_model.x": torch.empty(1, device="meta"),
        "model.audio_tokenizer.x": torch.empty(1, device="meta"),
    }
    assert IBQ.checkpoint.recognises(official.keys())
    official = {key: tensor for key, tensor in official.items() if IBQ.checkpoint.wanted(key)}
    whole = registry.check_config(registry.get("emu3.5"))
    for config in (None, whole, IBQ.checkpoint.config(manifest["config"])):
        found, state = as_ours(IBQ, official, config)
        assert found == replace(whole, parts=("encoder",)) and len(state) == manifest["num_tensors"]
    alone = {key.removeprefix("model.vision_tokenizer."): tensor for key, tensor in official.items()}
    assert as_ours(IBQ, alone, None)[0].parts == ("encoder",)


def apertus_state() -> dict[str, Tensor]:
    """The encoder of the golden case in the names of transformers."""
    state = {}
    for key, tensor in load_file(CASES / "emu35" / "weights.safetensors").items():
        if key.startswith(("decoder.", "post_quant_conv.")):
            continue
        parts = key.split(".")
        if key.startswith("encoder.down."):
            kind = {"block": "resnet", "attn": "attention"}.get(parts[3])
            middle = ["layers", parts[4], kind] if kind else [parts[3]]
            parts = ["encoder", "stages", parts[2], *middle, *parts[5 if kind else 4 :]]
        state["model.vision_tokenizer." + ".".join(parts)] = tensor
    return state


def test_apertus_encodes_only() -> None:
    tokenizer, io = zoo.load_upstream("ibq", raw_config("emu35"), apertus_state()), recorded("emu35")
    tokens = tokenizer.encode(list(io["0_image_u8"].numpy()))
    assert torch.equal(tokens.ids, io["0_ids"].flatten(1))
    assert tokenizer.spec.parts == ("encoder",) and tokenizer.fingerprint == model("emu35").fingerprint
    with pytest.raises(zoo.WeightsError, match=r"encode only.*decoder.*Emu3\.5"):
        tokenizer.decode(tokens)
    assert difference(model("emu35").decode(tokens)[0], io["0_decoded"][0]) < 1e-4


@pytest.mark.parametrize("case", NAMES)
def test_sizes_follow_from_the_tensors_alone(case: str) -> None:
    found = zoo.load_upstream("ibq", None, CASES / case / "weights.safetensors")
    assert (found.config, found.fingerprint) == (model(case).config, model(case).fingerprint)


def test_forms_of_the_configuration() -> None:
    flat = raw_config("emu35")["model"]
    nested = {"ddconfig": {key: flat[key] for key in flat if key not in ("codebook_size", "embed_dim", "model_type")}}
    nested |= {"n_embed": flat["codebook_size"], "embed_dim": flat["embed_dim"]}
    expected = model("emu35").config
    for raw in (
        flat,
        {"model": flat},
        nested,
        {"variant": "emu3.5", "model": nested},
        {"class_path": "x", "init_args": nested},
    ):
        assert IBQ.checkpoint.config(raw) == expected
    # Attention is a matter of the configured resolution.
    both = flat | {"attn_resolutions": [16, 64]}
    assert IBQ.checkpoint.config(both).attention == (2, 4)
    for change in (
        {"double_z": True},
        {"out_ch": 4},
        {"give_pre_end": True},
        {"resamp_with_conv": False},
        {"l2_normalize": True},
    ):
        with pytest.raises(zoo.WeightsError, match=next(iter(change))):
            IBQ.checkpoint.config(flat | change)
    with pytest.raises(zoo.WeightsError, match="variant"):
        IBQ.checkpoint.config({"variant": "vqgan", "model": flat})


def test_half_a_set_of_averages_is_refused() -> None:
    state = load_file(CASES / "ibq" / "weights.safetensors")
    config = raw_config("ibq")
    for weights in ("ema", "training"):
        raw = config | {"weights": weights}
        with pytest.raises(zoo.KeysError, match=r"none of quant_conv\.bias"):
            zoo.load_upstream("ibq", raw, {key: t for key, t in state.items() if key != "model_ema.quant_convbias"})
        with pytest.raises(zoo.KeysError, match="unexpected averages: new"):
            zoo.load_upstream("ibq", raw, state | {"model_ema.new": torch.zeros(1)})
        with pytest.raises(zoo.KeysError, match="unexpected averages: quant_convbias"):
            zoo.load_upstream("ibq", raw, {key: t for key, t in state.items() if key != "quant_conv.bias"})
    plain = {key: tensor for key, tensor in state.items() if not key.startswith("model_ema.")}
    assert zoo.load_upstream("ibq", config, plain).config.weights == "ema"
    with pytest.raises(zoo.KeysError, match="unexpected in a IBQ checkpoint: teacher"):
        zoo.load_upstream("ibq", config, plain | {"teacher.weight": torch.zeros(1)})
    with pytest.raises(zoo.KeysError, match="quantization is lfq in the tensors"):
        zoo.load_upstream("ibq", config, CASES / "open-magvit2" / "weights.safetensors")


# -------------------------------------------------------------------------------------------------------- sizes and grids


@pytest.mark.parametrize("config", [SMALL_IBQ, SMALL_BITS], ids=["ibq", "lfq"])
def test_any_size(config: IBQConfig) -> None:
    tokenizer = small_ibq(config)
    sizes = [(4, 8), (16, 16), (5, 40), (33, 18), (1, 1), (64, 4)]
    images = [torch.sin(torch.arange(3.0 * h * w)).reshape(3, h, w) for h, w in sizes]
    tokens = tokenizer.encode(images)
    whole = [(h, w) if h % 4 == w % 4 == 0 else (-(-h // 16) * 16, -(-w // 16) * 16) for h, w in sizes]
    assert tokenizer.grids(tokens) == [(h // 4, w // 4) for h, w in whole]
    assert [tuple(image.shape[1:]) for image in tokenizer.decode(tokens)] == whole
    assert [tuple(image.shape[1:]) for image in tokenizer.decode(tokens, size="original")] == sizes
    loaded = zoo.Tokens.from_bytes(tokens.to_bytes())
    assert tokenizer.grids(loaded) == tokenizer.grids(tokens)


def test_images_as_they_are_make_whole_cells_or_begun_ones() -> None:
    image = torch.zeros(3, 27, 38)
    for config, grid in ((SMALL_IBQ, (6, 9)), (SMALL_BITS, (7, 10))):
        tokenizer = small_ibq(config)
        tokens = zoo.Tokens.from_bytes(tokenizer.encode(image, fit="none").to_bytes())
        assert tokenizer.grids(tokens) == [grid]
        assert tokenizer.decode(tokens)[0].shape == (3, 4 * grid[0], 4 * grid[1])
    with pytest.raises(zoo.InputError, match="item 1: an image of 8 x 3 pixels is too small"):
        small_ibq(SMALL_IBQ).encode([image, torch.zeros(3, 3, 8)], fit="none")
    with pytest.raises(zoo.InputError, match="2 or more cells"):
        small_ibq(SMALL_BITS).encode(torch.zeros(3, 4, 4), fit="none")
    with pytest.raises(zoo.InputError, match="2 ids at least"):
        small_ibq(SMALL_BITS).decode(torch.tensor([[3]]))


def test_presets_restore_the_original_size() -> None:
    tokenizer = small_ibq()
    image = torch.sin(torch.arange(3.0 * 30 * 50)).reshape(3, 30, 50)
    for resize, shape, fit in (("apertus", (3, 112, 176), "stretch"), ("seed-voken", (3, 256, 256), "crop")):
        [item] = tokenizer.prepare(image, resize=resize)
        assert item.tensors["pixels"].shape == shape
        assert item.meta == {"width": 50, "height": 30, "fit": fit, "rows": shape[1] // 4}
    tokens = tokenizer.encode(image, resize="emu3.5", area=40 * 40)
    assert tokenizer.decode(tokens)[0].shape == (3, 32, 48)
    assert tokenizer.decode(tokens, size="original")[0].shape == (3, 30, 50)
    # Resized to just the size that padding would make, and put back by resizing all the same.
    square = torch.zeros(3, 30, 30)
    tokens = tokenizer.encode(square, resize="emu3.5", area=32 * 32)
    assert tokens.meta[0]["fit"] == "stretch" and tokens.meta[0]["rows"] == 8
    with pytest.raises(zoo.InputError, match="resize must be None or one of"):
        tokenizer.encode(image, resize="mine")
    with pytest.raises(zoo.InputError, match="nothing to do"):
        tokenizer.encode(image, resize="apertus", fit="none")
    with pytest.raises(zoo.InputError, match="more than max_pixels"):
        tokenizer.encode(image, resize="emu3.5", max_pixels=10_000)


def test_grids_of_bare_ids() -> None:
    tokenizer = small_ibq()
    assert tokenizer.decode(torch.arange(9)[None])[0].shape == (3, 12, 12)
    assert tokenizer.decode(torch.arange(10)[None], grid=(2, 5))[0].shape == (3, 8, 20)
    with pytest.raises(zoo.InputError, match="item 1: 10 ids are no square"):
        tokenizer.decode([torch.arange(9), torch.arange(10)])
    with pytest.raises(zoo.InputError, match="10 ids are no grid of 3 x 3"):
        tokenizer.decode(torch.arange(10)[None], grid=(3, 3))
    tokens = tokenizer.encode(torch.zeros(3, 8, 8))
    with pytest.raises(zoo.InputError, match="3 ids are no grid"):
        tokenizer.decode(tokens.truncate(3))


def test_images_of_8_bits_are_scaled_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 16, 1)
    [item] = small_ibq().prepare(levels)
    assert torch.equal(item.tensors["pixels"], (levels.double() / 127.5 - 1).float())
    deep = np.full((16, 16, 3), 12_345, np.uint16)
    assert small_ibq().prepare(deep)[0].tensors["pixels"].unique().tolist() == pytest.approx([12_345 / 32767.5 - 1])


# ---------------------------------------------------------------------------------------------------------------- training


def test_bits() -> None:
    quantizer = small_ibq(SMALL_BITS).quantizer
    latents = torch.full((1, 9, 1, 2), -1.0)
    latents[0, 0, 0, 0], latents[0, 3, 0, 1], latents[0, 5, 0, 1] = 1.0, 0.5, 0.0
    assert quantizer._numbers(latents).tolist() == [[[1, 8]]]
    assert quantizer.vectors(torch.tensor([8]))[0].tolist() == [-1, -1, -1, 1, -1, -1, -1, -1, -1]
    low, high = split_ids(torch.tensor([5 + 512 * 7, 262_143]), 18)
    assert low.tolist() == [5, 511] and high.tolist() == [7, 511]


@pytest.mark.parametrize("config", [SMALL_IBQ, SMALL_BITS], ids=["ibq", "lfq"])
def test_training_reaches_every_parameter(config: IBQConfig) -> None:
    tokenizer = small_ibq(config).requires_grad_(True)
    images = torch.sin(torch.arange(2 * 3 * 16 * 16.0)).reshape(2, 3, 16, 16)
    found = training.losses(
        tokenizer, images, perceptual=lambda a, b: (a - b).square(), discriminator=PatchDiscriminator(4, layers=1)
    )
    found.total.backward()
    assert torch.isfinite(found.total) and found.outputs["images"].shape == images.shape
    assert not [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert all(found[name] > 0 for name in ("pixels", "perceptual", "adversarial", "quantization"))


def test_hints_tell_the_grid_of_bare_ids() -> None:
    tokenizer = small_ibq()
    image = torch.rand(3, 20, 36) * 2 - 1
    tokens = tokenizer.encode(image)
    own = tokenizer.hints(image)
    assert own == {"grid": (5, 9)}
    assert torch.equal(tokenizer.decode(tokens.unpadded(), **own)[0], tokenizer.decode(tokens)[0])


def test_groups_of_norms_divide_the_channels() -> None:
    tokenizer = small_ibq(replace(SMALL_IBQ, stem=8, widths=(8, 24, 64), groups=1))
    assert tokenizer.encode(torch.zeros(3, 16, 16)).lengths.tolist() == [16]
    with pytest.raises(ValueError, match="multiples of 32"):
        replace(SMALL_IBQ, stem=8)
    with pytest.raises(ValueError, match="32 groups, not 1"):
        replace(SMALL_BITS, groups=1)
