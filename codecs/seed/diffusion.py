"""Image embeddings to images, with the parts of a diffusion model from diffusers: unCLIP (arXiv 2204.06125) for SEED-2.

The prompt is always empty, so that its text states are kept and the text encoder is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.seed.config import SeedConfig
from zoo.errors import WeightsError
from zoo.nn.vae import VAE, VAESizes

Embeddings = Float[Tensor, "batch dim"]
TextStates = Float[Tensor, "batch states text"]
LatentTensor = Float[Tensor, "batch channels rows columns"]

#: Solvers that add no noise of their own, by the name of their class in diffusers.
SOLVERS = ("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
# The schedule by which unCLIP adds noise to an image embedding.
_NOISING = "DDPMScheduler"
# What diffusers' autoencoders assume where their configuration says nothing.
_SCALING_FACTOR = 0.18215
_TEXT_SETTINGS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# The text encoder's configurations of old checkpoints carry ids of another vocabulary; transformers knows them by this one.
_LEGACY_EOS = 2


class Diffusion(nn.Module):
    """UNet, image decoder and the text states of the empty prompt.

    Models whose UNet takes a class embedding are told the image embedding there (unCLIP); the others take it in place of the
    text states.
    """

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        parts = config.diffusion
        self.unet = UNet2DConditionModel.from_config(_settings(parts["unet"]))
        sizes = vae_sizes(parts["vae"])
        self.vae, self.factor = VAE(sizes).decoder, sizes.factor
        self.scaling_factor: float = parts["vae"].get("scaling_factor") or _SCALING_FACTOR
        self.scheduler: Mapping[str, Any] = parts["scheduler"]
        _require_known(solver_name(self.scheduler))
        self.noising: Mapping[str, Any] | None = parts.get("image_noising_scheduler")
        length, width = parts["text_encoder"].get("max_position_embeddings", 77), parts["text_encoder"]["hidden_size"]
        self.prompt_states = nn.Parameter(torch.zeros(length, width))
        self.by_class: bool = self.unet.config.class_embed_type is not None
        if self.by_class:
            self.mean = nn.Parameter(torch.zeros(config.embedding_dim))
            self.std = nn.Parameter(torch.ones(config.embedding_dim))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents."""
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, rows, columns

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        _, rows, columns = self.latent_shape
        return self.factor * rows, self.factor * columns

    def noised(self, embeddings: Embeddings, noise: Embeddings, level: int) -> Float[Tensor, "batch twice_dim"]:
        """Class labels of the UNet: embeddings with some noise, and how much. Level 0 is a little noise too.

        The noise goes into the normalised embedding, as in diffusers' ``StableUnCLIPImg2ImgPipeline``.
        """
        from diffusers.models.embeddings import get_timestep_embedding

        assert self.noising is not None
        kept = _scheduler(self.noising, _NOISING).alphas_cumprod[level].to(embeddings.device)
        mean, std = self.mean.float(), self.std.float()
        mixed = (kept.sqrt() * ((embeddings - mean) / std) + (1 - kept).sqrt() * noise) * std + mean
        levels = torch.full((len(embeddings),), level, dtype=torch.int64, device=embeddings.device)
        told = get_timestep_embedding(levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([mixed, told], dim=1)

    def sample(
        self,
        latents: LatentTensor,
        positive: Float[Tensor, "batch ..."],
        negative: Float[Tensor, "batch ..."] | None,
        *,
        steps: int,
        guidance: float,
        solver: str | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> LatentTensor:
        """Denoise latents from standard normal ones under classifier-free guidance.

        Args:
            latents: the initial noise.
            positive: class labels (see `noised`) or text states to move to.
            negative: those to move away from; zeros, or the empty prompt's states, by default.
            steps: of the solver. PNDM evaluates its second step twice.
            guidance: scale; 1 for none, and half the work.
            solver: one of `SOLVERS` in place of the configuration's.
            on_step: called after each step.
        """
        scheduler = _scheduler(self.scheduler, solver or solver_name(self.scheduler))
        scheduler.set_timesteps(steps, device=latents.device)
        guided = guidance != 1.0
        condition = torch.cat([self._default_negative(positive) if negative is None else negative, positive])
        if not guided:
            condition = positive
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
            prediction = self.predict(noisy, t, condition)
            if guided:
                away, towards = prediction.chunk(2)
                prediction = away + guidance * (towards - away)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
            on_step()
        return latents

    def predict(self, latents: LatentTensor, t: Tensor, condition: Float[Tensor, "batch ..."]) -> LatentTensor:
        """One evaluation of the UNet, in the precision of its weights."""
        dtype = self.unet.conv_in.weight.dtype
        # Convolutions on a CPU are several times quicker in this layout.
        latents = latents.to(dtype, memory_format=torch.channels_last)
        condition = condition.to(dtype)
        prompt = self.prompt_states.to(dtype).expand(len(latents), -1, -1)
        text, labels = (prompt, condition) if self.by_class else (condition, None)
        prediction: Tensor = self.unet(latents, t, encoder_hidden_states=text, class_labels=labels, return_dict=False)[0]
        return prediction.float().contiguous()

    def images(self, latents: LatentTensor) -> Float[Tensor, "batch 3 height width"]:
        """Decoded latents, nominally in [-1, 1], not clamped."""
        images: Tensor = self.vae(latents / self.scaling_factor)
        return images

    def _default_negative(self, positive: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if self.by_class:
            return torch.zeros_like(positive)
        return self.prompt_states.float().expand(len(positive), -1, -1)


def evaluations(config: Mapping[str, Any], steps: int, solver: str | None) -> int:
    """Number of times that a solver calls the UNet."""
    scheduler = _scheduler(config, solver or solver_name(config))
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _scheduler(config: Mapping[str, Any], name: str) -> Any:
    """A scheduler by name, which a file may have chosen: no other class of diffusers can be reached by it."""
    _require_known(name)
    import diffusers

    return getattr(diffusers, name).from_config(_settings(config))


def _require_known(scheduler: str) -> None:
    if scheduler not in (*SOLVERS, _NOISING):
        raise WeightsError(f"the scheduler {scheduler[:80]!r} is not supported; known are {', '.join(SOLVERS)}")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration without the names of classes, which diffusers would look up."""
    return {key: value for key, value in config.items() if key not in ("class", "_class_name", "auto_map")}


def solver_name(config: Mapping[str, Any]) -> str:
    """The solver that a scheduler's configuration names."""
    return str(config.get("_class_name") or config.get("class") or SOLVERS[0])


def vae_sizes(config: Mapping[str, Any]) -> VAESizes:
    """Sizes of an autoencoder from its configuration."""
    return VAESizes(
        tuple(config["block_out_channels"]),
        config.get("layers_per_block", 1),
        config.get("norm_num_groups", 32),
        config.get("latent_channels", 4),
    )


@torch.no_grad()
def empty_prompt_states(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Float[Tensor, "states text"]:
    """States of a CLIP text encoder for the empty prompt: start, end, and padding up to its full length.

    Args:
        config: of the text encoder, in transformers' terms.
        state: its tensors; a leading ``text_model.`` is dropped from the keys, as newer releases of transformers do.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**{key: config[key] for key in _TEXT_SETTINGS if key in config})).eval()
    named = {key.removeprefix("text_model."): tensor.float() for key, tensor in state.items() if "position_ids" not in key}
    ours = {key.removeprefix("text_model."): key for key in model.state_dict()}
    model.load_state_dict({ours.get(key, key): tensor for key, tensor in named.items()}, strict=True, assign=True)
    ids = torch.tensor([_empty_prompt(model.config)], dtype=torch.int64, device=next(iter(named.values())).device)
    places = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)[None]
    states: Tensor = model(input_ids=ids, position_ids=places).last_hidden_state[0]
    return states


def _empty_prompt(config: Any) -> Sequence[int]:
    """Ids of the empty prompt. OpenAI's tokenizer pads with the end marker, OpenCLIP's with id 0."""
    start, end, padding = config.bos_token_id, config.eos_token_id, config.pad_token_id
    if end == _LEGACY_EOS:
        start, end = config.vocab_size - 2, config.vocab_size - 1
        padding = end if config.hidden_act == "quick_gelu" else 0
    return [start, end] + [padding] * (config.max_position_embeddings - 2)
