"""The autoencoder of latent diffusion against diffusers, and as a continuous tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.checkpoint import as_ours
from zoo.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from zoo.nn import resnet, vae

MANIFESTS = Path(__file__).parent / "golden" / "manifests"


@pytest.fixture(scope="module")
def reference() -> Reference:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reference(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=5,
            scaling_factor=0.5,
        ).eval()


@pytest.fixture(scope="module")
def folder(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it."""
    path = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> AutoencoderKL:
    return zoo.load(f"local-dir:{folder}")


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_equals_diffusers(reference: Reference, tokenizer: AutoencoderKL) -> None:
    image = picture(16, 24)
    posterior = reference.encode(image[None]).latent_dist
    latents = tokenizer.encode(image)
    assert tokenizer.config.scaling_factor == 0.5
    assert (latents.values[0] - 0.5 * posterior.mean[0]).abs().max() < 1e-4
    expected = reference.decode(posterior.mean).sample[0]
    assert (tokenizer.decode(latents)[0] - expected).abs().max() < 1e-4
    [drawn] = tokenizer.encode(image, posterior="sample", generator=torch.Generator().manual_seed(1)).values
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    assert (drawn - 0.5 * (posterior.mean + posterior.std * noise)[0]).abs().max() < 1e-4


@torch.no_grad()
def test_blocks_equal_those_of_diffusers(reference: Reference) -> None:
    from diffusers.models.unets.unet_2d_blocks import AttnDownEncoderBlock2D, AttnUpDecoderBlock2D

    options = {"num_layers": 2, "resnet_groups": 4, "attention_head_dim": 16}
    pairs: list[tuple[nn.Module, nn.Module, int]] = [
        (resnet.Encoder(10, (8, 8, 16), 1, 4), reference.encoder, 3),
        (resnet.Decoder(5, 3, (8, 8, 16), 1, 4), reference.decoder, 5),
        (
            resnet.Level(8, 16, 2, 4, attention=True, step="down"),
            AttnDownEncoderBlock2D(8, 16, downsample_padding=0, **options).eval(),
            8,
        ),
        (resnet.Level(8, 16, 2, 4, attention=True, step="up"), AttnUpDecoderBlock2D(8, 16, **options).eval(), 8),
    ]
    for ours, theirs, channels in pairs:
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(2, channels, 18, 13, generator=torch.Generator().manual_seed(0))
        for same in (x, x.to(memory_format=torch.channels_last)):
            assert (ours(same) - theirs(same)).abs().max() < 2e-6 * theirs(same).abs().max()
            # Bit for bit where PyTorch's operators do all of the work.
            with torch.enable_grad():
                assert torch.equal(ours(same), theirs(same))


def test_images_of_any_size_keep_it(tokenizer: AutoencoderKL) -> None:
    images = [picture(16, 24), picture(17, 9, 1), picture(1, 1, 2)]
    latents = tokenizer.encode(images)
    assert [tuple(value.shape) for value in latents.values] == [(5, 4, 6), (5, 5, 3), (5, 1, 1)]
    for image, decoded in zip(images, tokenizer.decode(latents), strict=True):
        assert decoded.shape == image.shape
    assert tokenizer.decode(latents, size=None)[1].shape == (3, 20, 12)
    for index, image in enumerate(images):
        assert tokenizer.encode(image).equal(latents[index])


def small(cls: type[Any], **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=3,
            **settings,
        )
        if cls is AutoencoderKLFlux2:
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
def test_without_convolutions_between_the_halves(tmp_path: Path) -> None:
    model = small(Reference, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    model.save_pretrained(tmp_path)
    tokenizer = zoo.load(f"local-dir:{tmp_path}")
    assert not tokenizer.config.quant_convs
    image = picture(16, 24)
    mean = model.encode(image[None]).latent_dist.mean
    latents = tokenizer.encode(image)
    assert (latents.values[0] - (mean[0] - 0.0609) * 1.5305).abs().max() < 1e-4
    assert (tokenizer.decode(latents)[0] - model.decode(mean).sample[0]).abs().max() < 1e-4
    changed = {key: tensor + 1 if key == "encoder.conv_out.bias" else tensor for key, tensor in model.state_dict().items()}
    other = zoo.load_upstream("autoencoder_kl", tmp_path / "config.json", changed)
    assert (
        other.fingerprint
        != tokenizer.fingerprint
        == zoo.load(f"local-dir:{tokenizer.save_pretrained(tmp_path / 'saved')}").fingerprint
    )


@torch.no_grad()
def test_normalised_patches_of_flux2(tmp_path: Path) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    model = small(AutoencoderKLFlux2)
    model.save_pretrained(tmp_path)
    tokenizer = zoo.load(f"local-dir:{tmp_path}")
    assert tokenizer.spec.dim == 12
    for height, width in ((16, 24), (17, 9)):
        image = picture(height, width)
        whole = torch.nn.functional.pad(image[None], (0, -width % 8, 0, -height % 8), mode="replicate")
        mean = model.encode(whole).latent_dist.mean
        expected = Flux2Pipeline._patchify_latents(mean) - model.bn.running_mean[:, None, None]
        expected /= (model.bn.running_var + model.config.batch_norm_eps).sqrt()[:, None, None]
        latents = tokenizer.encode(image)
        assert (latents.values[0] - expected[0]).abs().max() < 1e-4
        [decoded] = tokenizer.decode(latents)
        assert (decoded - model.decode(mean).sample[0, :, :height, :width]).abs().max() < 1e-4
    saved = zoo.load(f"local-dir:{tokenizer.save_pretrained(tmp_path / 'saved')}")
    assert saved.encode(image).equal(latents)
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "bn.running_var"}
    with pytest.raises(zoo.KeysError, match=r"missing: patch_norm\.variance"):
        zoo.load_upstream("autoencoder_kl", tmp_path / "config.json", state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sd-vae-ft-mse", 83653863),
        ("sdxl-vae", 83653863),
        ("sd3-vae", 83819683),
        ("flux1-vae", 83819683),
        ("flux2-vae", 84046115),
    ],
)
def test_official_sizes(name: str, numbers: int) -> None:
    config = registry.check_config(registry.get(name))
    with torch.device("meta"):
        outline = AutoencoderKL(config)
    assert sum(tensor.numel() for tensor in outline.vae.parameters()) == numbers


def test_spec_embedding_and_files(tokenizer: AutoencoderKL, tmp_path: Path) -> None:
    assert tokenizer.spec.continuous and tokenizer.spec.dim == 5
    latents = tokenizer.encode([picture(16, 24), picture(8, 8)])
    vectors = tokenizer.embed(latents)
    assert vectors.shape == (2, 24, 5)
    assert torch.equal(vectors[0].T.reshape(5, 4, 6), latents.values[0])
    assert torch.equal(vectors[1, :4].T.reshape(5, 2, 2), latents.values[1]) and (vectors[1, 4:] == 0).all()
    latents.save(tmp_path / "latents.safetensors")
    assert zoo.Latents.load(tmp_path / "latents.safetensors").equal(latents)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = zoo.load(f"local-dir:{tmp_path / 'saved'}")
    assert again.spec == tokenizer.spec and again.encode([picture(16, 24), picture(8, 8)]).equal(latents)


def test_bad_latents_are_named(tokenizer: AutoencoderKL) -> None:
    good = torch.zeros(5, 2, 2)
    for bad, reason in (
        (torch.zeros(4, 2, 2), r"latents must be \[5, rows, columns\], not \[4, 2, 2\]"),
        (torch.zeros(5, 2), "latents must be"),
        (torch.full((5, 2, 2), torch.nan), "NaN or infinite"),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tokenizer.decode([good, bad])
        assert caught.value.index == 1
    with pytest.raises(zoo.MismatchError):
        tokenizer.decode(zoo.Latents((good,), "other", "0123456789abcdef"))
    for options in ({"posterior": "median"}, {"max_pixels": 10}):
        with pytest.raises(zoo.InputError):
            tokenizer.encode(picture(8, 8), **options)
    with pytest.raises(zoo.InputError, match="size must be"):
        tokenizer.decode([good], size="large")


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"in_channels": 4},
        {"use_post_quant_conv": False},
        {"decoder_block_out_channels": [8, 8, 32]},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 3},
    ],
)
def test_other_autoencoders_are_refused(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(zoo.WeightsError, match=f"not supported: {next(iter(change))}"):
        zoo.load_upstream("autoencoder_kl", config, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", zoo.list("flextok-*", family="autoencoder_kl"))
def test_manifest_maps_both_ways(name: str) -> None:
    entry = registry.get(name)
    manifests = [json.loads(path.read_text()) for path in MANIFESTS.glob("flextok-vae_*.json")]
    [manifest] = [m for m in manifests if (m["checkpoint"], m["file"]) == (entry.weights.repo, entry.weights.file)]
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    config, named = as_ours(AutoencoderKL, official, registry.check_config(entry))
    assert config == AutoencoderKLConfig(latent_channels=entry.config["latent_channels"])
    assert len(named) == len(official) == len({vae.our_key(key) for key in official})
    assert sum(tensor.numel() for tensor in named.values()) == manifest["num_parameters"]
