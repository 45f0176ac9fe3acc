"""FlexTok against the original code's outputs, and the promises that the original does not make."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from small_models import SMALL_FLEXTOK, small_flextok
from zoo import registry
from zoo.bench import peak_memory
from zoo.checkpoint import as_ours
from zoo.codecs.flextok import FlexTok, FlexTokConfig, training
from zoo.codecs.flextok.checkpoint import our_key
from zoo.codecs.flextok.encoder import Encoder, EncoderBlock
from zoo.codecs.flextok.flow import NormalisedGuidance, noise_levels
from zoo.codecs.flextok.transformer import ATTENTION_SCALE, normalise, sinusoidal_positions
from zoo.nn.fsq import FSQ

CASE = Path(__file__).parent / "golden" / "flextok" / "tiny64"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
KS = (1, 4, 16)


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    return zoo.load_upstream("flextok", CASE / "config.json", CASE / "weights.safetensors")


@cache
def recorded() -> dict[str, Tensor]:
    return load_file(CASE / "io.safetensors")


@cache
def settings() -> dict[str, object]:
    return json.loads((CASE / "config.json").read_text())["meta"]


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random colours in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


# ------------------------------------------------------------------------------------------------------------ golden cases


def test_autoencoder(tok: FlexTok) -> None:
    mean, log_variance = tok.vae.encoder(recorded()["images"])
    assert difference(mean, recorded()["vae_mean"]) < 1e-4
    assert difference(log_variance, recorded()["vae_logvar"]) < 1e-4
    assert difference(tok.latents(recorded()["images"]), recorded()["vae_latents_mode"]) < 1e-4
    sampled = tok.latents(recorded()["images"], recorded()["posterior_noise"])
    assert difference(sampled, recorded()["vae_latents_sample"]) < 1e-4


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_encoder(tok: FlexTok, posterior: str) -> None:
    latents = recorded()[f"vae_latents_{posterior}"]
    z = tok.encoder(latents)
    assert difference(z, recorded()[f"enc_z_{posterior}"]) < 1e-4
    assert torch.equal(tok.fsq.ids(z), recorded()[f"tokens_{posterior}"])


def test_encoder_on_the_way(tok: FlexTok) -> None:
    latents = recorded()["vae_latents_mode"]
    assert difference(tok.encoder.embed(latents).unflatten(1, (4, 4)), recorded()["enc_patches_in"]) < 1e-4
    assert difference(tok.encoder.trunk(latents, 16), recorded()["enc_registers_out"]) < 1e-4
    x = torch.cat([tok.encoder.embed(latents), tok.encoder.registers.expand(2, -1, -1)], dim=1)
    for block in tok.encoder.blocks:
        x = block(x, 16)
    assert difference(x[:, :16].unflatten(1, (4, 4)), recorded()["enc_patches_out"]) < 1e-4
    assert difference(x[:, 16:], recorded()["enc_registers_out"]) < 1e-4


def test_ids_of_images(tok: FlexTok) -> None:
    assert torch.equal(tok.encode(recorded()["images"]).ids, recorded()["tokens_mode"])


def test_quantizer(tok: FlexTok) -> None:
    z = recorded()["fsq_z"]
    assert difference(tok.fsq.bound(z), recorded()["fsq_bound"]) < 1e-6
    assert difference(tok.fsq(z), recorded()["fsq_quant"]) < 1e-6
    assert torch.equal(tok.fsq.ids(z), recorded()["fsq_tokens"])
    assert difference(tok.fsq.codes(recorded()["fsq_indices"]), recorded()["fsq_codes"]) == 0
    assert difference(tok.embed(recorded()["tokens_mode"]), recorded()["quant_mode"]) == 0


def test_time(tok: FlexTok) -> None:
    t = recorded()["time_values"]
    assert difference(tok.decoder.time.features(t), recorded()["time_features"]) < 1e-6
    assert difference(tok.decoder.time(t), recorded()["time_embedding"]) < 1e-4


@pytest.mark.parametrize("t", [1.0, 0.5])
def test_velocity(tok: FlexTok, t: float) -> None:
    noise, codes = recorded()["flow_noise"], recorded()["quant_mode"]
    timestep = tok.decoder.timestep(torch.tensor([t]))
    for k in KS:
        velocity = tok.decoder(noise, timestep, tok.decoder.condition(codes, [k, k]))
        assert difference(velocity, recorded()[f"v_cond_k{k}_t{t}"]) < 1e-4
    unconditional = tok.decoder(noise, timestep, tok.decoder.condition(codes, [16, 16], [True, True]))
    assert difference(unconditional, recorded()[f"v_uncond_t{t}"]) < 1e-4


def test_decoder_on_the_way(tok: FlexTok) -> None:
    """The tap of the alignment loss behind the block of index 1, and the registers behind the last one."""
    decoder, timestep = tok.decoder, tok.decoder.timestep(torch.tensor([0.5]))
    condition = decoder.dense_condition(recorded()["quant_mode"], torch.tensor([16, 16]))
    x = decoder.patches(recorded()["flow_noise"]) + decoder.patch_positions.flatten(2).transpose(1, 2)
    x = torch.cat([x, condition.registers], dim=1)
    for index, (block, modulation) in enumerate(zip(decoder.blocks, timestep.blocks, strict=True)):
        x = block(x, modulation, None, 16)
        if index == 1:
            assert difference(x[:, :16].unflatten(1, (4, 4)), recorded()["dec_block2_patches_kall_t0.5"]) < 1e-4
    assert difference(x[:, 16:], recorded()["dec_registers_out_kall_t0.5"]) < 1e-4


@pytest.mark.parametrize("k", KS)
def test_decoding(tok: FlexTok, k: int) -> None:
    tokens, noise, steps = recorded()["tokens_mode"][:, :k], recorded()["flow_noise"], settings()["flow_steps"]
    plain = tok.decode_latents(tokens, noise, steps=steps, guidance=1.0)
    assert difference(plain, recorded()[f"dec_latents_k{k}_g1"]) < 1e-4
    guided = tok.decode_latents(tokens, noise, steps=steps, guidance=settings()["cfg_scale"], guidance_method="cfg")
    assert difference(guided, recorded()[f"dec_latents_k{k}_cfg"]) < 1e-4
    projected = tok.decode_latents(tokens, noise, steps=steps, guidance=settings()["apg_scale"])
    assert difference(projected, recorded()[f"dec_latents_k{k}_apg"]) < 1e-4
    images = torch.stack(tok.decode(tokens, noise=noise, steps=steps, guidance=settings()["apg_scale"]))
    assert difference(images, recorded()[f"dec_images_k{k}_apg"]) < 2e-4


def test_decoding_without_guidance_to_images(tok: FlexTok) -> None:
    images = tok.decode(recorded()["tokens_mode"], noise=recorded()["flow_noise"], steps=4, guidance=1.0)
    assert difference(torch.stack(images), recorded()["dec_images_k16_g1"]) < 2e-4


def test_guidance_as_a_function_of_time(tok: FlexTok) -> None:
    found = tok.decode_latents(recorded()["tokens_mode"], recorded()["flow_noise"], steps=4, guidance=lambda t: 1 + 4 * t)
    assert difference(found, recorded()["dec_latents_k16_apg_sched"]) < 1e-4


def test_prefixes_of_mixed_length(tok: FlexTok) -> None:
    prefixes = [ids[:k] for ids, k in zip(recorded()["tokens_mode"], recorded()["ragged_k"].tolist(), strict=True)]
    found = tok.decode_latents(prefixes, recorded()["flow_noise"], steps=4, guidance=7.5)
    assert difference(found, recorded()["dec_latents_ragged_apg"]) < 1e-4


def test_training(tok: FlexTok) -> None:
    r = recorded()
    latents, noise, t, keep = (r[key] for key in ("vae_latents_mode", "train_noise", "train_sigmas", "train_keep_k"))
    level = t[:, None, None, None]
    assert difference(level * noise + (1 - level) * latents, r["train_noised"]) < 1e-6
    condition = tok.decoder.dense_condition(r["quant_mode"], keep)
    assert difference(tok.decoder(r["train_noised"], tok.decoder.timestep(t), condition), r["train_v_pred"]) < 1e-4
    loss = training.losses(tok, latents, noise=noise, t=t, keep=keep).total
    assert abs(loss.item() - r["train_rf_loss"].item()) < 1e-4
    assert difference(noise_levels(r["sigma_u"], tok.config), r["sigma_of_u"]) < 1e-6


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", zoo.list(family="flextok", embedded=False))
def test_manifest_maps_both_ways(name: str) -> None:
    entry = registry.get(name)
    manifests = [json.loads(path.read_text()) for path in MANIFESTS.glob("flextok-*.json")]
    [manifest] = [m for m in manifests if (m["checkpoint"], m["file"]) == (entry.weights.repo, entry.weights.file)]
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    config, named = as_ours(FlexTok, official, registry.check_config(entry))
    assert config == registry.check_config(entry)
    # Strict both ways: convert_checkpoint compares with the model's own state dict, and the renaming is one to one.
    assert len(named) == len(official) == len({our_key(key) for key in official})
    assert sum(tensor.numel() for tensor in named.values()) == manifest["num_parameters"]
    assert as_ours(FlexTok, official, None)[0] == config


def test_missing_and_unexpected_tensors_are_named(tok: FlexTok) -> None:
    state = load_file(CASE / "weights.safetensors")
    config = json.loads((CASE / "config.json").read_text())
    less = {key: tensor for key, tensor in state.items() if "nullcond" not in key}
    with pytest.raises(zoo.KeysError, match=r"missing: decoder\.null_token"):
        zoo.load_upstream("flextok", config, less)
    with pytest.raises(zoo.KeysError, match=r"unexpected in a FlexTok checkpoint: .*surprise"):
        zoo.load_upstream("flextok", config, state | {"decoder.module_dict.surprise.weight": torch.zeros(1)})
    config["encoder"]["module_dict"]["enc_register_module"]["n_max"] = 32
    with pytest.raises(zoo.KeysError, match="registers is 16 in the tensors and 32 in the configuration"):
        zoo.load_upstream("flextok", config, state)


def test_names_that_training_leaves_behind(tok: FlexTok) -> None:
    state = {
        key.replace(".blocks.0.", ".blocks.0._checkpoint_wrapped_module."): tensor
        for key, tensor in load_file(CASE / "weights.safetensors").items()
    }
    state["decoder.module_dict.dec_repa_head.proj.weight"] = torch.zeros(3)
    attention = "vae.vae.encoder.mid_block.attentions.0"
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state[f"{attention}.{old}.bias"] = state.pop(f"{attention}.{new}.bias")
        state[f"{attention}.{old}.weight"] = state.pop(f"{attention}.{new}.weight")[:, :, None, None]
    again = zoo.load_upstream("flextok", CASE / "config.json", state)
    assert torch.equal(again.encode(recorded()["images"]).ids, recorded()["tokens_mode"])


def test_configuration_in_the_metadata(tok: FlexTok, tmp_path: Path) -> None:
    """The official files carry the tree in their header, every entry as a Python literal."""
    with safe_open(CASE / "weights.safetensors", "pt") as file:
        metadata = file.metadata()
    tree = FlexTok.checkpoint.metadata(metadata)
    assert tree is not None
    # The header says nothing about the autoencoder, as the official one does not.
    assert FlexTok.checkpoint.config(tree) == replace(
        tok.config, vae_widths=(128, 256, 512, 512), vae_layers_per_block=2, vae_groups=32
    )
    autoencoder = json.loads((CASE / "config.json").read_text())["vae_autoencoder_kl"]
    state = load_file(CASE / "weights.safetensors")
    save_file(state, tmp_path / "whole.safetensors", metadata=metadata | {"vae_autoencoder_kl": repr(autoencoder)})
    again = zoo.load_upstream("flextok", None, tmp_path / "whole.safetensors")
    assert again.config == tok.config
    assert torch.equal(again.encode(recorded()["images"]).ids, recorded()["tokens_mode"])


def hostile(where: str, value: object) -> dict[str, object]:
    """The configuration of the golden case with one value replaced; ``where`` is a dotted path."""
    tree = json.loads((CASE / "config.json").read_text())
    *parents, last = where.split(".")
    place = tree
    for parent in parents:
        place = place[parent]
    place[last] = value
    return tree


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        ("pipeline._target_", "os.system", "names 'os.system'"),
        ("encoder.module_dict.enc_transformer._target_", "builtins.eval", "names 'builtins.eval'"),
        ("vae.extra", {"_target_": "subprocess.run", "args": ["true"]}, "configuration.vae.extra names 'subprocess.run'"),
        ("decoder.module_dict.dec_seq_packer.mask_mode", "causal", "mask_mode must be full"),
        ("encoder.module_dict.enc_to_latents.use_mup_readout", True, "use_mup_readout is not supported"),
        ("decoder.module_dict.dec_transformer.adaLN_expansion", 1, "adaLN_expansion must be 2"),
        ("decoder.module_dict.dec_patches_posemb_module.max_sizes", [8, 8], "the same grid"),
        ("decoder.module_dict.more", {"_target_": "flextok.regularizers.quantize_fsq.FSQ"}, "module more of class"),
        ("encoder.module_dict.enc_transformer.dim", "wide", "cannot be used"),
    ],
)
def test_configurations_that_are_refused(where: str, value: object, reason: str) -> None:
    with pytest.raises(zoo.WeightsError, match=reason):
        zoo.load_upstream("flextok", hostile(where, value), CASE / "weights.safetensors")


def test_modules_out_of_order_are_refused() -> None:
    tree = json.loads((CASE / "config.json").read_text())
    modules = tree["decoder"]["module_dict"]
    dropout = modules.pop("dec_nested_dropout")
    tree["decoder"]["module_dict"] = {"dec_nested_dropout": dropout} | modules
    with pytest.raises(zoo.WeightsError, match="stand in the order"):
        zoo.load_upstream("flextok", tree, CASE / "weights.safetensors")


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "{" * 500, "[1, 2"])
def test_metadata_is_read_as_literals_only(text: str, tmp_path: Path) -> None:
    tree = {key: "{}" for key in ("vae", "encoder", "decoder", "flow_matching_noise_module")}
    save_file({"x": torch.zeros(1)}, tmp_path / "hostile.safetensors", metadata=tree | {"regularizer": text})
    with pytest.raises(zoo.WeightsError, match="'regularizer' is not a Python literal"):
        zoo.load_upstream("flextok", None, tmp_path / "hostile.safetensors")


def test_metadata_of_absurd_length_is_refused(tmp_path: Path) -> None:
    tree = {key: "{}" for key in ("vae", "encoder", "decoder", "flow_matching_noise_module")}
    long = "[" + "1," * 200_000 + "]"
    save_file({"x": torch.zeros(1)}, tmp_path / "hostile.safetensors", metadata=tree | {"regularizer": long})
    with pytest.raises(zoo.WeightsError, match="characters"):
        zoo.load_upstream("flextok", None, tmp_path / "hostile.safetensors")


# --------------------------------------------------------------------------------------------------------- the quantizer


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (4, 3, 5), (2, 7)])
def test_every_code_has_its_number(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    ids = torch.arange(fsq.vocab_size)
    codes = fsq.codes(ids)
    assert codes.min() >= -1 and codes.max() <= 1
    assert len(codes.unique(dim=0)) == fsq.vocab_size
    # The values on the grid, before rounding and bounding, come back to their own number.
    half = torch.tensor([level // 2 for level in levels])
    for component, level in enumerate(levels):
        grid = torch.arange(level) - level // 2
        z = torch.zeros(level, len(levels))
        half_range, offset = (level - 1) * 1.001 / 2, 0.5 * (level % 2 == 0)
        z[:, component] = torch.atanh((grid + offset) / half_range) - torch.atanh(torch.tensor(offset / half_range))
        assert torch.equal((fsq(z) * half)[:, component].round().long(), grid)
        assert torch.equal(fsq.codes(fsq.ids(z)), fsq(z))


def test_gradients_pass_through_the_rounding() -> None:
    z = torch.zeros(3, 2, requires_grad=True)
    FSQ((8, 5))(z).sum().backward()
    assert z.grad is not None and (z.grad > 0).all()


# ------------------------------------------------------------------------------------------------- savings change nothing


def dense_prefix_mask(patches: int, registers: int) -> Tensor:
    """Who sees whom under ``causal_last``, in full."""
    mask = torch.zeros(patches + registers, patches + registers, dtype=torch.bool)
    mask[:, :patches] = True
    mask[patches:, patches:] = torch.ones(registers, registers, dtype=torch.bool).tril()
    return mask


@pytest.mark.parametrize("mode", ["causal_last", "causal", "full"])
def test_encoder_block_equals_attention_under_the_full_mask(mode: str) -> None:
    patches, registers = 6, 5
    with torch.random.fork_rng():
        torch.manual_seed(1)
        block = EncoderBlock(replace(SMALL_FLEXTOK, encoder_mask=mode)).requires_grad_(False)
        x = torch.randn(2, patches + registers, 32)
    total = patches + registers
    mask = {
        "causal_last": dense_prefix_mask(patches, registers),
        "causal": torch.ones(total, total, dtype=torch.bool).tril(),
        "full": torch.ones(total, total, dtype=torch.bool),
    }[mode]
    h = normalise(x)
    heads = [linear(h).unflatten(-1, (2, 16)).transpose(1, 2) for linear in (block.attn.wq, block.attn.wk, block.attn.wv)]
    scores = normalise(heads[0]) @ normalise(heads[1]).mT * (ATTENTION_SCALE / 16)
    mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ heads[2]
    expected = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
    expected = expected + block.mlp(normalise(expected))
    assert difference(block(x, patches), expected) < 1e-5
    assert difference(block(x, patches, registers_only=True), expected[:, patches:]) < 1e-5


@pytest.mark.parametrize("mode", ["causal_last", "causal", "full"])
def test_first_tokens_alone_are_the_first_of_all(mode: str) -> None:
    tokenizer = small_flextok(config=replace(SMALL_FLEXTOK, encoder_mask=mode))
    images = pictures(3, 32, 48)
    everything = tokenizer.encode(images)
    for k in (1, 3, 8):
        assert tokenizer.encode(images, tokens=k).equal(everything.truncate(k))


@pytest.mark.parametrize("registers", [8, 256])
def test_collapsed_registers_equal_all_of_them(registers: int) -> None:
    tokenizer = small_flextok(config=replace(SMALL_FLEXTOK, registers=registers))
    decoder = tokenizer.decoder
    with torch.random.fork_rng():
        torch.manual_seed(2)
        latents = torch.randn(1, 4, 4, 6)
        codes = tokenizer.fsq.codes(torch.randint(60, (1, registers)))
    timestep = decoder.timestep(torch.tensor([0.7]))
    results = []
    for k in (0, 1, 2, registers - 1, registers):
        dense = decoder(latents, timestep, decoder.dense_condition(codes, torch.tensor([k])))
        condition = decoder.condition(codes, [k])
        assert condition.registers.shape[1] == min(k + 1, registers)
        assert difference(decoder(latents, timestep, condition), dense) < 1e-5
        results.append(dense)
    null = decoder(latents, timestep, decoder.dense_condition(codes, torch.tensor([3]), torch.tensor([True])))
    assert difference(decoder(latents, timestep, decoder.condition(codes, [3], [True])), null) < 1e-5
    results.append(null)
    # And the comparison means something: each of these conditions gives a velocity of its own.
    assert all(difference(a, b) > 1e-3 for i, a in enumerate(results) for b in results[:i])


def test_one_batch_of_everything_equals_single_passes() -> None:
    """Items of all lengths together, padded, with and without guidance."""
    tokenizer = small_flextok()
    ids = torch.randint(60, (8, 8), generator=torch.Generator().manual_seed(3))
    prefixes = [row[: k + 1] for k, row in enumerate(ids)]
    for options in ({"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_method": "cfg"}):
        together = tokenizer.decode(prefixes, seed=list(range(8)), **options)
        for k, (prefix, image) in enumerate(zip(prefixes, together, strict=True)):
            [alone] = tokenizer.decode([prefix], seed=k, **options)
            assert difference(alone, image) < 1e-4


# ----------------------------------------------------------------------------------------------------------------- sampling


def test_normalised_guidance_by_its_definition() -> None:
    guide, generator = NormalisedGuidance(), torch.Generator().manual_seed(4)
    running = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(3):
        conditional, unconditional = torch.randn(2, 2, 3, 4, 4, generator=generator).double()
        running = conditional - unconditional - 0.5 * running
        expected = []
        for d, v in zip(running, conditional, strict=True):
            d = d * min(1.0, 2.5 / d.norm().item())
            n = v / v.norm()
            expected.append(v + 6 * (d - (d * n).sum() * n))
        found = guide(conditional.float(), unconditional.float(), 7.0)
        assert difference(found.double(), torch.stack(expected)) < 1e-5


def test_seeds_and_generators() -> None:
    tokenizer = small_flextok()
    ids = torch.randint(60, (2, 5), generator=torch.Generator().manual_seed(5))
    twice = tokenizer.decode(ids[[0, 0]], seed=[1, 2])
    assert difference(twice[0], twice[1]) > 1e-3
    assert difference(tokenizer.decode(ids[[1, 0]], seed=[7, 1])[1], twice[0]) < 1e-4
    drawn = [tokenizer.decode(ids, generator=torch.Generator().manual_seed(6)) for _ in range(2)]
    assert difference(drawn[0][0], drawn[1][0]) == 0
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(6))
    given = tokenizer.decode(ids, noise=torch.stack([*noise]))
    assert difference(given[0], drawn[0][0]) < 1e-4


def test_progressive_decoding_is_decoding_of_prefixes() -> None:
    tokenizer = small_flextok()
    tokens = tokenizer.encode(pictures(2, 32, 48))
    steps = tokenizer.decode_progressive(tokens, seed=3)
    assert list(steps) == [1, 2, 4, 8]
    for k, images in steps.items():
        for image, alone in zip(images, tokenizer.decode(tokens.truncate(k), seed=3), strict=True):
            assert difference(image, alone) < 1e-4
    assert list(tokenizer.decode_progressive(tokens, ks=(5, 2), seed=[1, 2])) == [5, 2]
    with pytest.raises(zoo.InputError, match="prefixes must have 1 to 8 tokens, not 9"):
        tokenizer.decode_progressive(tokens, ks=(1, 9))


def test_posterior_sample_is_random_and_repeatable() -> None:
    # A wide posterior, so that a draw from it changes ids.
    tokenizer = small_flextok()
    image = pictures(1, 32, 48)
    draws = [tokenizer.encode(image, posterior="sample", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    assert not tokenizer.encode(image).equal(draws[0])


def test_images_smaller_than_the_table_of_positions() -> None:
    tokenizer = small_flextok()
    image = pictures(1, 16, 32)[0]
    tokens = tokenizer.encode(image, fit="none")
    [decoded] = tokenizer.decode(tokens)
    assert decoded.shape == (3, 16, 32)
    for height, width in ((64, 48), (16, 24)):
        with pytest.raises(zoo.InputError, match="does not fit: at most 48 x 32, and a multiple of 16 x 16"):
            tokenizer.encode(pictures(1, height, width), fit="none")


def test_mixed_sizes_in_one_batch() -> None:
    tokenizer = small_flextok()
    items = [pictures(1, 32, 48)[0], pictures(1, 16, 32)[0], pictures(1, 32, 48, seed=1)[0]]
    tokens = tokenizer.encode(items, fit="none")
    decoded = tokenizer.decode(tokens)
    assert [tuple(image.shape[1:]) for image in decoded] == [(32, 48), (16, 32), (32, 48)]
    for index, image in enumerate(decoded):
        assert difference(tokenizer.decode(tokens[index])[0], image) < 1e-4


def test_new_position_tables_are_those_of_the_original(tok: FlexTok) -> None:
    assert difference(sinusoidal_positions((4, 4), 64), tok.encoder.positions) < 1e-6
    assert difference(sinusoidal_positions((4, 4), 96), tok.decoder.patch_positions) < 1e-6


def test_reduced_precision_of_the_encoder_is_asked_for() -> None:
    tokenizer = small_flextok()
    images = pictures(8, 32, 48)
    exact, reduced = tokenizer.encode(images), tokenizer.encode(images, encoder_precision="bf16")
    changed = (exact.ids != reduced.ids).float().mean().item()
    assert 0 < changed < 0.5


# --------------------------------------------------------------------------------------------------------------- bad input


def test_bad_tokens_are_named() -> None:
    tokenizer = small_flextok()
    good = torch.tensor([1, 2])
    for ids, reason in (
        (torch.tensor([60]), "id 60 is outside the vocabulary, 0 to 59"),
        (torch.tensor([-2]), "id -2 is outside"),
        (torch.zeros(0, dtype=torch.int64), "the sequence is empty"),
        (torch.zeros(9, dtype=torch.int64), "9 tokens are more than the model's 8"),
        (torch.zeros(2), "integers"),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tokenizer.decode([good, ids])
        assert caught.value.index == 1
    with pytest.raises(zoo.MismatchError):
        tokenizer.decode(small_flextok(seed=1).encode(pictures(1, 32, 48)))


def test_sizes_in_a_file_are_not_believed() -> None:
    tokenizer = small_flextok()
    for width, height in ((1 << 40, 1 << 40), (33, 7), (480, 320), (0, 0)):
        meta = [{"width": 48, "height": 32, "fit": "crop"}, {"width": width, "height": height, "fit": "none"}]
        tokens = tokenizer.tokens([torch.tensor([1]), torch.tensor([2])], meta)
        with pytest.raises(zoo.InputError, match="does not fit") as caught:
            tokenizer.decode(tokens)
        assert caught.value.index == 1
    tokens = tokenizer.tokens([torch.tensor([1])], [{"width": 1000, "height": 500, "fit": "stretch"}])
    with pytest.raises(zoo.InputError, match="max_pixels"):
        tokenizer.decode(tokens, size="original", max_pixels=10_000)
    assert tokenizer.decode(tokens, size="original")[0].shape == (3, 500, 1000)


def test_bad_options_are_named() -> None:
    tokenizer = small_flextok()
    image, ids = pictures(1, 32, 48), torch.tensor([[1, 2]])
    for options, reason in (
        ({"tokens": 0}, r"tokens must lie in \[1, 8\], not 0"),
        ({"tokens": 9}, r"not 9"),
        ({"posterior": "median"}, "posterior must be"),
        ({"fit": "squeeze"}, "fit must be"),
        ({"precision": "int4"}, "precision must be"),
        ({"max_pixels": 100}, "pixels"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            tokenizer.encode(image, **options)
    for options, reason in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance_method": "magic"}, "guidance_method must be"),
        ({"seed": [1, 2]}, "2 seeds do not fit 1 items"),
        ({"noise": torch.zeros(1, 4, 4, 4)}, r"noise must be \[1, 4, 4, 6\]"),
        ({"size": "large"}, "size must be None or 'original'"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            tokenizer.decode(ids, **options)
    with pytest.raises(zoo.InputError, match="keep at least 1"):
        tokenizer.encode(image).truncate(0)


def test_impossible_configurations_are_refused() -> None:
    for change, reason in (
        ({"encoder_dim": 33}, "not a multiple"),
        ({"grid": (0, 3)}, "two positive integers"),
        ({"levels": (1, 5)}, "at least 2 levels"),
        ({"encoder_mask": "random"}, "encoder_mask must be"),
        ({"guidance_method": "magic"}, "guidance_method must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            replace(SMALL_FLEXTOK, **change)


# ------------------------------------------------------------------------------------------------------------- memory, GPU


@pytest.mark.slow
def test_the_largest_model_loads_in_little_more_than_its_file(tmp_path: Path) -> None:
    """2.5 billion random parameters, 10 GB, written one tensor at a time."""
    manifest = json.loads((MANIFESTS / "flextok-d18_d28_dfn.json").read_text())
    path = tmp_path / "model.safetensors"
    write_random(path, manifest["tensors"])
    with peak_memory("cpu") as peak:
        tokenizer = zoo.load_upstream("flextok", None, path)
        touched = sum(float(parameter.view(-1)[0]) for parameter in tokenizer.parameters())
    assert touched == touched
    assert tokenizer.num_parameters == manifest["num_parameters"]
    print(f"\nload, {path.stat().st_size / 1e9:.1f} GB: +{peak[0] / 1e9:.2f} GB")
    assert peak[0] < path.stat().st_size + 1e9


def write_random(path: Path, shapes: dict[str, list[int]]) -> None:
    """A float32 safetensors file that is never in memory as a whole."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(1 << 24).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            file.write(block[: min(len(block), offset)])
            offset -= len(block)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same() -> None:
    config = FlexTokConfig(**{**vars(SMALL_FLEXTOK), "encoder_depth": 1})
    tokenizer = small_flextok(config=config)
    tokens = tokenizer.encode(pictures(4, 32, 48))
    images = tokenizer.decode(tokens)
    tokenizer.to("cuda")
    assert tokenizer.encode(pictures(4, 32, 48)).tolist() == tokens.tolist()
    assert all(difference(a.cpu(), b) < 1e-3 for a, b in zip(tokenizer.decode(tokens), images, strict=True))


def test_the_encoder_keeps_float32() -> None:
    tokenizer = small_flextok()
    tokenizer.set_precision("bf16")
    assert {p.dtype for p in tokenizer.decoder.parameters()} == {torch.bfloat16}
    assert isinstance(tokenizer.encoder, Encoder)
    assert {p.dtype for p in [*tokenizer.encoder.parameters(), *tokenizer.vae.encoder.parameters()]} == {torch.float32}


@pytest.mark.parametrize("size", [10, 7])
def test_the_number_of_time_features_is_the_configuration_s(size: int, tmp_path: Path) -> None:
    """With fewer columns in the first layer and another size in the tree; an odd one out is zero."""
    raw = json.loads((CASE / "config.json").read_text())
    raw["decoder"]["module_dict"]["dec_time_embedder"]["frequency_embedding_size"] = size
    first = "decoder.module_dict.dec_time_embedder.mlp.0.weight"
    state = load_file(CASE / "weights.safetensors")
    state[first] = state[first][:, :size].contiguous()
    tokenizer = zoo.load_upstream("flextok", raw, state)
    assert tokenizer.config.frequency_embedding_size == size
    t = torch.tensor([0.0, 0.3, 1.0])
    half = size // 2
    # The longest period stays 256; this model's times are scaled by 1000.
    phases = t[:, None] * 1000 * 256.0 ** (-torch.arange(half) / half)
    expected = torch.cat([phases.cos(), phases.sin(), torch.zeros(3, size % 2)], dim=1)
    assert difference(tokenizer.decoder.time.features(t), expected) < 1e-4
    tokens = tokenizer.encode(recorded()["images"])
    assert torch.equal(tokens.ids, recorded()["tokens_mode"])
    again = zoo.load(f"local-dir:{tokenizer.save_pretrained(tmp_path)}")
    images = tokenizer.decode(tokens, steps=1)
    assert all(difference(a, b) < 1e-5 for a, b in zip(again.decode(tokens, steps=1), images, strict=True))
    raw["decoder"]["module_dict"]["dec_time_embedder"]["frequency_embedding_size"] = size + 1
    with pytest.raises(zoo.WeightsError, match="frequency_embedding_size"):
        zoo.load_upstream("flextok", raw, state)


@pytest.mark.parametrize(
    ("module", "setting", "value"),
    [
        ("enc_posemb_module", "posemb_scaling", "interpolate"),
        ("enc_transformer", "qk_norm", False),
        ("dec_transformer", "gated_mlp", False),
        ("dec_transformer", "act_layer", {"_target_": "torch.nn.GELU"}),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(module: str, setting: str, value: object) -> None:
    raw = json.loads((CASE / "config.json").read_text())
    raw["encoder" if module.startswith("enc") else "decoder"]["module_dict"][module][setting] = value
    with pytest.raises(zoo.WeightsError):
        zoo.load_upstream("flextok", raw, CASE / "weights.safetensors")
