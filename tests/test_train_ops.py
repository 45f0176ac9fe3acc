"""Training operators against the outputs of the original training code (golden case ``train_ops``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hash_weights import hash_tensor
from zoo.nn.discriminators import (
    DACDiscriminator,
    Judgement,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminator,
)
from zoo.nn.ema_codebook import EMACodebook, kmeans
from zoo.nn.losses import (
    LogMel,
    MelLoss,
    STFTLoss,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "wavtokenizer" / "train_ops" / "io.safetensors")


@pytest.fixture(scope="module")
def config(golden: Path) -> dict:
    return json.loads((golden / "wavtokenizer" / "train_ops" / "config.json").read_text())


def assert_matches(got: Tensor, wanted: Tensor) -> None:
    """Relative or absolute 1e-4, whichever is larger, as the case's notes say."""
    torch.testing.assert_close(got, wanted.reshape(got.shape), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- losses


def test_log_mel_matches_upstream(case: dict[str, Tensor]) -> None:
    log_mel = LogMel()
    assert_matches(log_mel.mel.mel_scale.fb, case["mel_fb"])
    assert_matches(log_mel(case["y"]), case["mel_y"])
    assert_matches(log_mel(case["y_hat"]), case["mel_y_hat"])
    assert_matches(MelLoss()(case["y"], case["y_hat"]), case["mel_loss"])


def test_hinge_losses_match_upstream(case: dict[str, Tensor]) -> None:
    real, fake = ([case[f"score_{side}_{i}"] for i in range(3)] for side in ("real", "fake"))
    assert_matches(hinge_discriminator_loss(real, fake), case["hinge_disc_sum"])
    assert_matches(hinge_generator_loss(fake), case["hinge_gen_sum"])


def test_feature_matching_matches_upstream(case: dict[str, Tensor]) -> None:
    real, fake = ([[case[f"fmap_{side}_{i}_{j}"] for j in range(2)] for i in range(3)] for side in ("real", "fake"))
    assert_matches(feature_matching_loss(real, fake), case["fm_sum"])


def test_feature_matching_moves_only_the_generator() -> None:
    real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    feature_matching_loss([[real]], [[fake]]).backward()
    assert real.grad is None and fake.grad is not None


def test_stft_loss_is_zero_for_equal_signals_and_grows_with_noise() -> None:
    torch.manual_seed(0)
    signal, noise = torch.randn(2, 8000), torch.randn(2, 8000)
    loss = STFTLoss()
    assert loss(signal, signal) == 0
    assert 0 < loss(signal, signal + 0.1 * noise) < loss(signal, signal + noise)


# -------------------------------------------------------------------------------------------------------------- codebook


def codebook_before(case: dict[str, Tensor], config: dict, prefix: str, *, official: bool) -> EMACodebook:
    settings = config["codebook"]
    codebook = EMACodebook(
        settings["size"],
        settings["dim"],
        decay=settings["decay"],
        epsilon=settings["epsilon"],
        dead_below=float(settings["threshold_ema_dead_code"]),
        official=official,
    )
    codebook.inited.fill_(1)
    for name in ("embed", "embed_avg", "cluster_size"):
        getattr(codebook, name).copy_(case[f"{prefix}.{name}_before"])
    return codebook.train()


@pytest.mark.parametrize("prefix", ["vq", "vq_dead"])
def test_codebook_step_matches_upstream(case: dict[str, Tensor], config: dict, prefix: str) -> None:
    """Also with dead codes: upstream's replacement vectors are overwritten by the average of the same step."""
    codebook = codebook_before(case, config, prefix, official=True)
    latents = case[f"{prefix}.x"].transpose(1, 2)
    quantized = codebook.eval()(latents)
    codebook.update(latents.reshape(-1, latents.shape[2]), quantized.ids.flatten(), replacement=case[f"{prefix}.replacement"])

    assert torch.equal(quantized.ids, case[f"{prefix}.indices"])
    assert_matches(quantized.vectors.transpose(1, 2), case[f"{prefix}.quantized"])
    assert_matches(quantized.commitment, case[f"{prefix}.commit_loss"])
    for name in ("embed", "embed_avg", "cluster_size"):
        assert_matches(getattr(codebook, name), case[f"{prefix}.{name}_after"])


def test_training_forward_is_quantisation_then_update(case: dict[str, Tensor], config: dict) -> None:
    codebook = codebook_before(case, config, "vq", official=True)
    codebook(case["vq.x"].transpose(1, 2))
    assert_matches(codebook.embed, case["vq.embed_after"])


def test_dead_codes_are_really_replaced_by_default(case: dict[str, Tensor], config: dict) -> None:
    """The corrected mode differs from upstream's only in the dead codes, which land near their replacements."""
    latents = case["vq_dead.x"].transpose(1, 2)
    replacement, dead = case["vq_dead.replacement"], case["vq_dead.cluster_size_before"] < 2
    assert 0 < dead.sum() < len(dead)
    codebook = codebook_before(case, config, "vq_dead", official=False)
    codebook.update(latents.reshape(-1, 12), case["vq_dead.indices"].flatten(), replacement=replacement)
    distance = (codebook.embed - replacement)[dead].norm(dim=1)
    ignored = (case["vq_dead.embed_after"] - replacement)[dead].norm(dim=1)
    assert distance.max() < ignored.min()
    assert_matches(codebook.embed_avg[~dead], case["vq_dead.embed_avg_after"][~dead])


def test_codebook_passes_gradients_straight_through(case: dict[str, Tensor], config: dict) -> None:
    latents = case["vq.x"].transpose(1, 2).clone().requires_grad_()
    codebook_before(case, config, "vq", official=False)(latents).vectors.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_kmeans_matches_upstream(case: dict[str, Tensor], config: dict) -> None:
    centres, counts = kmeans(case["kmeans.samples"], case["kmeans.init"], config["codebook"]["kmeans_iters"])
    assert_matches(centres, case["kmeans.means_15"])
    assert torch.equal(counts.long(), case["kmeans.bins_15"])


# -------------------------------------------------------------------------------------------------------- discriminators


def upstream_key(key: str, *, dac: bool) -> str:
    """The name that the original code has for a tensor of ours."""
    key = key.replace("score.conv", "conv_post").replace("score.condition", "emb")
    key = key.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")
    if dac and "conv_post" not in key:
        # Convolution and activation form a pair there.
        head, _, leaf = key.rpartition(".")
        key = f"{head}.0.{leaf}"
    return key


def fill_by_formula(module: nn.Module, prefix: str, seed: int) -> None:
    state = {}
    for key, tensor in module.state_dict().items():
        name = prefix + upstream_key(key, dac=prefix == "dac.")
        if name.endswith("weight_g"):
            base, scale = 1.4, 0.4
        elif name.endswith("weight_v"):
            base, scale = 0.0, 1.0
        else:
            base, scale = 0.0, 0.05 if name.endswith("emb.weight") else 0.1
        state[key] = hash_tensor(name, tuple(tensor.shape), base, scale, seed)
    module.load_state_dict(state)


def judge(module: nn.Module, case: dict[str, Tensor], *condition: int) -> tuple[Judgement, Judgement]:
    with torch.no_grad():
        return tuple(module(case[name][:, :4096], *condition) for name in ("y", "y_hat"))


def means(maps: list[Tensor]) -> Tensor:
    return torch.stack([feature.abs().mean() for feature in maps])


@pytest.mark.parametrize("prefix, kind", [("mpd", MultiPeriodDiscriminator), ("mrd", MultiResolutionDiscriminator)])
def test_conditioned_discriminators_match_upstream(case: dict[str, Tensor], config: dict, prefix: str, kind: type) -> None:
    module = kind()
    fill_by_formula(module, f"{prefix}.", config["seed"])
    real, fake = judge(module, case, config["bandwidth_id"])
    count = len(real.scores)
    for i in range(count):
        assert_matches(real.scores[i], case[f"{prefix}.{i}.score_real"])
        assert_matches(fake.scores[i], case[f"{prefix}.{i}.score_fake"])
        assert [list(feature.shape) for feature in real.features[i]] == config["fmap_shapes"][f"{prefix}.{i}"]
        assert_matches(means(real.features[i]), case[f"{prefix}.{i}.fmap_absmean_real"])
    assert_matches(hinge_discriminator_loss(real.scores, fake.scores) / count, case[f"{prefix}.disc_loss_mean"])
    assert_matches(hinge_generator_loss(fake.scores) / count, case[f"{prefix}.gen_loss_mean"])
    assert_matches(feature_matching_loss(real.features, fake.features) / count, case[f"{prefix}.fm_mean"])


def test_dac_discriminator_matches_upstream(case: dict[str, Tensor], config: dict) -> None:
    module = DACDiscriminator()
    fill_by_formula(module, "dac.", config["seed"])
    real, fake = judge(module, case)
    for i, (score, features) in enumerate(zip(real.scores, real.features, strict=True)):
        maps = [*features, score]
        assert_matches(score, case[f"dac.{i}.last"])
        assert [list(feature.shape) for feature in maps] == config["fmap_shapes"][f"dac.{i}"]
        assert_matches(means(maps), case[f"dac.{i}.fmap_absmean"])
    assert_matches(least_squares_discriminator_loss(real.scores, fake.scores), case["dac.disc_loss"])
    assert_matches(least_squares_generator_loss(fake.scores), case["dac.gen_loss"])
    assert_matches(feature_matching_loss(real.features, fake.features), case["dac.fm_loss"])


def test_conditioned_discriminator_asks_for_its_condition() -> None:
    with pytest.raises(ValueError, match="bandwidth id"):
        MultiResolutionDiscriminator(channels=4)(torch.randn(1, 4096), None)
