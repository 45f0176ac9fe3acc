"""Networks that metrics need: loaded from a given path, or from their public source when the user asks for it."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.errors import InputError, WeightsError
from zoo.eval.modality.base import MetricFunction, Network
from zoo.media import resample
from zoo.state_dict import read_state


def _from_torch_hub(url: str, fetch: bool) -> Path:
    """A file of PyTorch's own cache, downloaded where wanted.

    Raises:
        OSError: it is not there and must not or cannot be fetched.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        if not fetch:
            raise FileNotFoundError(f"{name} is not in the cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        # These publishers put the first digits of the file's hash into its name.
        digits = re.search(r"-([0-9a-f]{8,})\.", name)
        torch.hub.download_url_to_file(url, str(path), digits[1] if digits else None)
    return path


# ------------------------------------------------------------------------------------------------------------------- LPIPS


def _load_lpips(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
    import lpips
    from torchvision.models import AlexNet_Weights

    state = read_state(path or _from_torch_hub(AlexNet_Weights.IMAGENET1K_V1.url, fetch))
    kinds: dict[tuple[int, ...], str] = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
    kind = kinds.get(tuple(state["features.0.weight"].shape)) if "features.0.weight" in state else None
    if kind is None:
        raise WeightsError(f"{path} holds neither torchvision's AlexNet nor its VGG-16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # how the package calls it is out of fashion
        network = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
    # The trunk is torchvision's, cut into slices that keep the numbers of its layers.
    trunk = {key: state.get(f"features.{key.split('.', 1)[1]}") for key in network.net.state_dict()}
    if missing := [key for key, tensor in trunk.items() if tensor is None]:
        raise WeightsError(f"{path} lacks layers of {kind}: {', '.join(missing[:3])}")
    network.net.load_state_dict(trunk)
    network.to(device)

    def distance(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float | None:
        # AlexNet's pooling leaves nothing of smaller images.
        if min(reference.shape[1:]) < 32:
            return None
        with torch.inference_mode():
            return float(network(reference[None].to(device), estimate[None].to(device), normalize=True))

    return distance


LPIPS = Network(
    _load_lpips,
    accepts="a state dict of torchvision's AlexNet or VGG-16",
    source="torchvision's AlexNet (233 MB)",
)


# -------------------------------------------------------------------------------------------------- similarity of embeddings


def _class_token(model: Any, pixels: Tensor) -> Float[Tensor, "1 dim"]:
    found: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
    return found


def _image_embedding(model: Any, pixels: Tensor) -> Float[Tensor, "1 dim"]:
    found = model.get_image_features(pixel_values=pixels)
    # A tensor up to release 4 of transformers.
    return found if isinstance(found, Tensor) else found.pooler_output


def _embedding_loader(repo: str, embed: Callable[[Any, Tensor], Tensor]) -> Callable[..., MetricFunction]:
    """Loads an image model of transformers, for the cosine of the angle between the embeddings of two images."""

    def load(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
        if path is None and not fetch:
            _require_cached(repo)
        import transformers

        source, local = (repo, not fetch) if path is None else (str(path), True)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(source, local_files_only=local)
            model, report = transformers.AutoModel.from_pretrained(source, local_files_only=local, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            if path is None:
                raise OSError(str(error).splitlines()[0]) from error
            raise InputError(f"{path} is not a folder with an image model of transformers: {error}") from error
        # What is not in the file would be random numbers; a pooler is not used.
        if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
            raise WeightsError(f"{source} lacks weights: {', '.join(missing[:3])}")
        model.eval().to(device)

        def embedding(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "1 dim"]:
            # The model's own resize, crop and normalisation; the pixels are in [0, 1] already.
            pixels = processor(images=image, do_rescale=False, return_tensors="pt")["pixel_values"]
            return embed(model, pixels.to(device)).float()

        def similarity(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float:
            with torch.inference_mode():
                return float(nn.functional.cosine_similarity(embedding(reference), embedding(estimate)))

        return similarity

    return load


def _require_cached(repo: str) -> None:
    """Raise ``OSError`` unless the repository is in the Hub's cache, without the seconds that transformers takes to say so."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(repo, "config.json"), str):
        raise FileNotFoundError(f"{repo} is not in the cache")


DINO = Network(
    _embedding_loader("facebook/dinov2-base", _class_token),
    accepts="a folder with a DINO or DINOv2 model of transformers",
    source="facebook/dinov2-base on the Hub (346 MB)",
)
CLIP = Network(
    _embedding_loader("openai/clip-vit-large-patch14", _image_embedding),
    accepts="a folder with a CLIP or SigLIP model of transformers",
    source="openai/clip-vit-large-patch14 on the Hub (1.7 GB)",
)


# --------------------------------------------------------------------------------------------------------- Fréchet distance


def _load_inception(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    state = read_state(path or _from_torch_hub(inception.URL_INCEPTION_V3, fetch))
    with tempfile.TemporaryDirectory() as folder:
        # The extractor opens its file as an unrestricted pickle, so it gets one that we wrote.
        torch.save(state, checked := Path(folder) / "inception.pth")
        try:
            network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(checked))
        except RuntimeError as error:
            raise WeightsError(f"{path} is not the Inception network of FID: {str(error).splitlines()[0]}") from error
    network.to(device)

    def features(image: Float[Tensor, "3 height width"]) -> NDArray[np.float32]:
        with torch.inference_mode():
            pixels = (image * 255).round().to(torch.uint8)[None].to(device)
            found: NDArray[np.float32] = network(pixels)[0][0].cpu().numpy()
        return found

    return features


INCEPTION = Network(
    _load_inception,
    accepts="the state dict of the Inception network of FID, as torch-fidelity and pytorch-fid publish it",
    source="torch-fidelity's Inception (95 MB)",
)


class _Features(nn.Module):
    """Takes the place of the network where the features are there already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(reference: NDArray[Any], estimate: NDArray[Any]) -> float:
    """Fréchet distance of two sets of features ``[items, dim]``, each taken for a Gaussian (arXiv 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(reference.shape[1]))
    for features, real in ((reference, True), (estimate, False)):
        for part in torch.from_numpy(features).double().split(4096):
            metric.update(part, real=real)
    return max(0.0, float(metric.compute()))


# ------------------------------------------------------------------------------------------------------------------- UTMOS


def _load_utmos(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
    if path is None:
        raise FileNotFoundError("UTMOS has no public TorchScript file")
    network = _torchscript(path, device)

    def score(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float:
        with torch.inference_mode():
            return float(network(resample(estimate[None], rate, 16_000).to(device)).mean())

    return score


UTMOS = Network(_load_utmos, accepts="a TorchScript file that maps [1, samples] at 16 kHz to a score")


# -------------------------------------------------------------------------------------------------------- speaker similarity

_SPEAKER_REPO = "microsoft/wavlm-base-plus-sv"


def _load_speaker(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
    embed = _torchscript(path, device) if path is not None and path.is_file() else _speaker_model(path, device, fetch)

    def similarity(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float | None:
        wide = [resample(audio[None], rate, 16_000) for audio in (reference, estimate)]
        # Less than half a second tells no speaker, and the networks' convolutions need some of it.
        if wide[0].shape[1] < 8_000:
            return None
        with torch.inference_mode():
            one, other = (embed(audio.to(device)) for audio in wide)
        return float(nn.functional.cosine_similarity(one, other))

    return similarity


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        network: Callable[[Tensor], Tensor] = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
    return network


def _speaker_model(path: Path | None, device: torch.device, fetch: bool) -> Callable[[Tensor], Tensor]:
    """A WavLM with an x-vector head, from a folder or the Hub."""
    if path is None and not fetch:
        _require_cached(_SPEAKER_REPO)
    import transformers

    source, local = (_SPEAKER_REPO, not fetch) if path is None else (str(path), True)
    try:
        model = transformers.WavLMForXVector.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, RuntimeError) as error:
        if path is None:
            raise OSError(str(error).splitlines()[0]) from error
        raise InputError(f"{path} is not a folder with a WavLM for speaker verification: {error}") from error
    model.eval().to(device)

    def embed(audio: Float[Tensor, "1 samples"]) -> Float[Tensor, "1 dim"]:
        # WavLM's own feature extractor: zero mean and unit variance.
        normalised = (audio - audio.mean()) / (audio.var(correction=0) + 1e-7).sqrt()
        found: Tensor = model(normalised).embeddings
        return found

    return embed


SPEAKER = Network(
    _load_speaker,
    accepts="a folder with a WavLMForXVector of transformers, or a TorchScript file from [1, samples] at 16 kHz to [1, dim]",
    source=f"{_SPEAKER_REPO} on the Hub (404 MB)",
)
