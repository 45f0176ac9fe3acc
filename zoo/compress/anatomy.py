"""Places of the parts of a supported vision-language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.compress.methods import SUPPORTED
from zoo.errors import InputError


@dataclass(frozen=True)
class Anatomy:
    """Parts of a model that methods act on.

    Attributes:
        model: the user's model.
        core: joins the tower and the language model.
        language: the language model without its head.
        layers: its layers.
        image_token: id of a visual token's placeholder.
        tower: the vision tower; like what follows ``None`` or empty where methods leave it alone.
        tower_layers: its layers.
        projector: from the tower's width to the language model's.
        grid: rows and columns of a view's patches.
        feature_layer: tower layer (0-based) whose output goes to the projector.
        views: an image is a thumbnail and crops, packed with newlines (LLaVA-NeXT).
        has_cls: the tower has a [CLS] token, which the projector does not get.
        all_patches: the tower has none, as SigLIP's.
    """

    model: Any
    core: Any
    language: Any
    layers: Any
    image_token: int
    tower: Any = None
    tower_layers: Any = ()
    projector: Any = None
    grid: tuple[int, int] = (0, 0)
    feature_layer: int = 0
    views: bool = False
    has_cls: bool = False
    all_patches: bool = False

    @property
    def patches(self) -> int:
        """Patches of a view."""
        return self.grid[0] * self.grid[1]

    @property
    def hooked(self) -> tuple[Any, ...]:
        """The parts that methods have hooks in."""
        return tuple(part for part in (self.language, self.tower, self.projector) if part is not None)

    @property
    def tower_heads(self) -> int:
        """Attention heads of the tower."""
        return int(self.tower.config.num_attention_heads)


def anatomy_of(model: object) -> Anatomy:
    """Finds the parts of a model.

    Raises:
        InputError: a class that isn't supported, a language model with sliding windows, or a version of transformers whose
            parts have other names.
    """
    import transformers

    names = {kind.__name__ for kind in type(model).__mro__}
    if not names & set(SUPPORTED):
        raise InputError(f"{type(model).__name__} cannot be compressed; supported are {', '.join(SUPPORTED)}")
    assert isinstance(model, nn.Module)
    try:
        core: Any = model.model
        config: Any = model.config
        llava = any(name.startswith("Llava") for name in names)
        found = Anatomy(
            model=model,
            core=core,
            language=core.language_model,
            layers=core.language_model.layers,
            image_token=config.image_token_id,
            **(_tower_parts(core, config) if llava else {}),
            views="LlavaNextForConditionalGeneration" in names,
        )
    except AttributeError as error:
        raise InputError(
            f"{type(model).__name__} of transformers {transformers.__version__} is not laid out as expected: {error}"
        ) from error
    text = found.language.config
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if sliding or "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise InputError("language models with sliding-window attention cannot be compressed")
    return found


def _tower_parts(core: Any, config: Any) -> dict[str, Any]:
    """Parts of a LLaVA model's tower."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise InputError("features of several tower layers side by side cannot be compressed")
    encoder = getattr(core.vision_tower, "vision_model", core.vision_tower)
    layers = encoder.encoder.layers
    side = config.vision_config.image_size // config.vision_config.patch_size
    cls, cut = hasattr(encoder.embeddings, "class_embedding"), config.vision_feature_select_strategy == "default"
    return {
        "tower": core.vision_tower,
        "tower_layers": layers,
        "projector": core.multi_modal_projector,
        "grid": (side, side),
        # hidden state 0 is what the embeddings give, so state n is the output of layer n - 1
        "feature_layer": (layer if layer >= 0 else len(layers) + 1 + layer) - 1,
        "has_cls": cls and cut,
        "all_patches": not cls and not cut,
    }
