"""The recipe of ``vlm-tiny``: a LLaVA of 2.6 MB that answers questions about scenes, trained on a CPU in twenty minutes.

    python -m zoo.weights.recipes.vlm --out weights/vlm-tiny.safetensors

It exists to measure what dropping visual tokens costs: `zoo.eval.studies.compress` asks it the same questions with fewer of
them. Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. Three stages,
on the scenes of `vlm_data`:

1. The vision tower. Patches of its last layer but one, the layer of LLaVA, have to name their place and the object that covers
   them. [CLS] of the last layer has to name all objects, so its attention goes to objects as that of CLIP does.
2. Projector and language model on features of the frozen tower. Each scene comes with several questions that do not see each
   other, so that each is learned as it will be asked, alone.
3. The same with gaps: most batches lack a random part of the visual tokens, ground rather than objects in various degrees, and
   the others stand at their old places or are moved together. Large models bear gaps; a small one that does not would measure
   the gaps, not what is in them.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from zoo.errors import CorruptWeightsError
from zoo.media import replacing
from zoo.weights.data import scenes as vlm_data
from zoo.weights.data.scenes import COLOURS, GRID, IDS, PATCH, PLACES, QUESTION_LENGTH, SHAPES, SIZE, WORDS, Scene
from zoo.weights.recipes import trainer

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

PATCHES = GRID**2
#: Beginning of sequence and a whole image, which every question sees.
PREFIX = 1 + PATCHES
#: A question with its answer.
BLOCK = QUESTION_LENGTH + 1
# Ground is class 0 of colours and shapes; the last is the cell that a patch lies in.
PATCH_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), len(PLACES))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        scenes: size of the training set.
        tower_steps, language_steps, gap_steps: lengths of the three schedules in optimiser steps.
        tower_batch, language_batch: scenes per step.
        tower_rate, language_rate, gap_rate: highest learning rates.
        questions: per scene and step.
        whole: share of the last stage's batches with all visual tokens; the others have a share drawn log-uniformly from
            ``fewest`` to 1.
        fewest: smallest share of visual tokens.
        warmup: steps of rising learning rate.
        widths: of tower and language model; heads have 32 numbers, multilayer perceptrons twice the width.
        depths: layers of tower and language model.
    """

    scenes: int = 12_000
    tower_steps: int = 750
    language_steps: int = 1_400
    gap_steps: int = 600
    tower_batch: int = 16
    language_batch: int = 16
    tower_rate: float = 2e-3
    language_rate: float = 2e-3
    gap_rate: float = 1e-3
    questions: int = 16
    whole: float = 0.25
    fewest: float = 0.1
    warmup: int = 50
    widths: tuple[int, int] = (128, 128)
    depths: tuple[int, int] = (4, 4)
    seed: int = 3407


HEAD_DIM = 32


def configuration(recipe: Recipe) -> LlavaConfig:
    """Sizes of the model, in the terms of transformers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision, language = recipe.widths
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision,
            intermediate_size=2 * vision,
            projection_dim=vision,
            num_hidden_layers=recipe.depths[0],
            num_attention_heads=vision // HEAD_DIM,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=language,
            intermediate_size=2 * language,
            num_hidden_layers=recipe.depths[1],
            num_attention_heads=language // HEAD_DIM,
            num_key_value_heads=language // HEAD_DIM,
            max_position_embeddings=2 * PREFIX,
            pad_token_id=IDS["<pad>"],
            bos_token_id=IDS["<bos>"],
            eos_token_id=IDS["<eos>"],
        ),
        image_token_index=IDS["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def build(recipe: Recipe) -> LlavaForConditionalGeneration:
    """The model before training."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(recipe.seed)
    return LlavaForConditionalGeneration(configuration(recipe))


class Examples(NamedTuple):
    """The training set: pictures, what covers each patch, which objects there are, and the scenes for their questions."""

    pixels: UInt8[np.ndarray, "scenes 3 side side"]
    colours: Int[Tensor, "scenes patches"]
    shapes: Int[Tensor, "scenes patches"]
    present: Float[Tensor, "scenes kinds"]
    scenes: list[Scene]


def make_examples(seed: int, count: int) -> Examples:
    """The first scenes of a seed."""
    scenes = [vlm_data.scene(seed, index) for index in tqdm(range(count), desc="scenes", unit="scene", mininterval=5)]
    colours, shapes = (torch.zeros(count, PATCHES, dtype=torch.int64) for _ in range(2))
    present = torch.zeros(count, len(COLOURS) * len(SHAPES))
    for row, content in enumerate(scenes):
        # What object 0, the ground, looks like, and then the objects.
        table = torch.tensor([(0, 0), *((1 + item.colour, 1 + item.shape) for item in content.objects)])
        colours[row], shapes[row] = table[torch.from_numpy(content.patches).flatten()].T
        present[row, [item.colour * len(SHAPES) + item.shape for item in content.objects]] = 1
    return Examples(np.stack([content.pixels for content in scenes]), colours, shapes, present, scenes)


# ---------------------------------------------------------------------------------------------------------------- stages


class Stage(trainer.Stage):
    """Modules on their schedule."""

    name: str

    def __init__(self, recipe: Recipe, modules: Sequence[nn.Module], steps: int, rate: float) -> None:
        self.recipe = recipe
        self.modules = nn.ModuleList(modules)
        self.draws = np.random.default_rng((recipe.seed, len(self.name)))
        named = [(".layers." in name and parameter.ndim == 2, parameter) for name, parameter in self.modules.named_parameters()]
        matrices, others = ([parameter for inside, parameter in named if inside is wanted] for wanted in (True, False))
        optimizers = trainer.muon_and_adamw(matrices, others, rate, rate)
        super().__init__(self.name, steps, None, optimizers, {"modules": self.modules}, torch.Generator())

    @abstractmethod
    def losses(self) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Loss of the next batch, and what to show of it."""

    def update(self) -> dict[str, float]:
        self.set_rates(self.recipe.warmup)
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = self.losses()
        self.optimizer_step(loss, self.modules.parameters())
        return shown

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"draws": json.dumps(self.draws.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.draws.bit_generator.state = json.loads(state["draws"])


class TowerStage(Stage):
    """The vision tower, by what patches and [CLS] have to name."""

    name = "tower"

    def __init__(self, recipe: Recipe, model: LlavaForConditionalGeneration, examples: Examples) -> None:
        self.examples = examples
        self.tower = model.model.vision_tower
        width = recipe.widths[0]
        torch.manual_seed(recipe.seed)
        self.patch_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(PATCH_CLASSES)))
        self.scene_head = nn.Linear(width, examples.present.shape[1])
        super().__init__(recipe, [self.tower, self.patch_head, self.scene_head], recipe.tower_steps, recipe.tower_rate)

    def losses(self) -> tuple[Float[Tensor, ""], dict[str, float]]:
        rows = self.draws.integers(len(self.examples.scenes), size=self.recipe.tower_batch)
        pixels = augmented(self.draws, vlm_data.pixel_values(self.examples.pixels[rows]))
        seen = self.tower(pixels, output_hidden_states=True)
        colours, shapes, places = self.patch_head(seen.hidden_states[-2][:, 1:]).float().split(PATCH_CLASSES, dim=-1)
        colour = F.cross_entropy(colours.flatten(0, 1), self.examples.colours[rows].flatten())
        shape = F.cross_entropy(shapes.flatten(0, 1), self.examples.shapes[rows].flatten())
        place = F.cross_entropy(places.flatten(0, 1), cells_of_patches().repeat(len(rows)))
        scene = F.binary_cross_entropy_with_logits(self.scene_head(seen.pooler_output).float(), self.examples.present[rows])
        terms = {"colour": colour, "shape": shape, "place": place, "scene": scene}
        return colour + shape + place + 5 * scene, {name: term.item() for name, term in terms.items()}


def cells_of_patches() -> Int[Tensor, " patches"]:
    """The cell that each patch lies in."""
    rows = torch.arange(GRID) * PATCH // vlm_data.CELL
    return (rows[:, None] * vlm_data.CELLS + rows).flatten()


def augmented(rng: np.random.Generator, pixels: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
    """Pictures with other exposure and noise; nothing moves, since patches keep their names."""
    batch = len(pixels)
    gain, shift = rng.normal(1, 0.08, (batch, 1, 1, 1)), rng.normal(0, 0.06, (batch, 3, 1, 1))
    noise = rng.normal(0, 0.03, pixels.shape)
    return (pixels * torch.from_numpy(gain) + torch.from_numpy(shift + noise)).float()


class LanguageStage(Stage):
    """Projector and language model, by the answers to several questions about each scene."""

    name = "language"
    schedule = ("language_steps", "language_rate")

    def __init__(self, recipe: Recipe, model: LlavaForConditionalGeneration, examples: Examples) -> None:
        self.examples = examples
        self.projector, self.language = model.model.multi_modal_projector, model.model.language_model
        self.head = model.lm_head
        self.features = features_of(model, examples.pixels)
        steps, rate = (getattr(recipe, field) for field in self.schedule)
        super().__init__(recipe, [self.projector, self.language, self.head], steps, rate)

    def losses(self) -> tuple[Float[Tensor, ""], dict[str, float]]:
        rows = self.draws.integers(len(self.examples.scenes), size=self.recipe.language_batch)
        asked = [vlm_data.draw_questions(self.draws, self.examples.scenes[row], self.recipe.questions) for row in rows]
        words = torch.tensor([[vlm_data.question_ids(question) for question in questions] for questions in asked])
        answers = torch.tensor([[IDS[question.answer] for question in questions] for questions in asked])
        blocks = torch.cat([words, answers[..., None]], dim=-1)
        image = self.projector(self.features[torch.from_numpy(rows)].float())
        chosen, places = self.thinned(rows)
        image = image.gather(1, chosen[..., None].expand(-1, -1, image.shape[-1]))
        embed = self.language.embed_tokens
        start = embed(torch.full((len(rows), 1), IDS["<bos>"]))
        real = blocks != IDS["<pad>"]
        out = self.language(
            inputs_embeds=torch.cat([start, image, embed(blocks.flatten(1))], dim=1),
            attention_mask=question_mask(real, 1 + chosen.shape[1]),
            position_ids=question_positions(real, places),
            use_cache=False,
        ).last_hidden_state
        logits = self.head(out[:, 1 + chosen.shape[1] :].unflatten(1, blocks.shape[1:])[:, :, -2:]).float()
        targets = torch.stack([answers, torch.full_like(answers, IDS["<eos>"])], dim=-1)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        right = (logits[:, :, 0].argmax(-1) == answers).float()
        shown = {"loss": loss.item(), "right": right.mean().item()}
        for kind in vlm_data.KINDS:
            of_kind = torch.tensor([[question.kind == kind for question in questions] for questions in asked])
            shown[kind] = right[of_kind].mean().item()
        return loss, shown

    def thinned(self, rows: Int[np.ndarray, " batch"]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Visual tokens of each scene, in order, and the positions that they have: all of them here."""
        everything = torch.arange(PATCHES).expand(len(rows), -1)
        return everything, 1 + everything


class GapStage(LanguageStage):
    """The language model on images with missing tokens."""

    name = "gaps"
    schedule = ("gap_steps", "gap_rate")

    def thinned(self, rows: Int[np.ndarray, " batch"]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """A random part of the tokens, at their own positions or one after another.

        How much rather objects than ground stay differs from scene to scene, from not at all to always.
        """
        whole, moved = self.draws.random() < self.recipe.whole, self.draws.random() < 0.5
        share = 1.0 if whole else self.recipe.fewest ** self.draws.random()
        count = max(1, round(share * PATCHES))
        covered = (self.examples.colours[torch.from_numpy(rows)] > 0).numpy()
        draws = self.draws.random((len(rows), PATCHES)) + self.draws.random((len(rows), 1)) * covered
        chosen = torch.from_numpy(np.sort(draws.argsort(axis=1)[:, ::-1][:, :count], axis=1))
        return chosen, 1 + (torch.arange(count).expand(len(rows), -1) if moved else chosen)


def question_mask(real: Bool[Tensor, "batch questions block"], prefix: int) -> Bool[Tensor, "batch 1 length length"]:
    """The mask of attention: everything the prefix in causal order, a question besides it only itself without its padding."""
    batch, questions, block = real.shape
    length = prefix + questions * block
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(questions).repeat_interleave(block)])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (owner[None] == -1) | (owner[None] == owner[:, None])
    visible = torch.cat([torch.ones(batch, prefix, dtype=torch.bool), real.flatten(1)], dim=1)
    return (causal & related & visible[:, None])[:, None]


def question_positions(
    real: Bool[Tensor, "batch questions block"], image: Int[Tensor, "batch tokens"]
) -> Int[Tensor, "batch length"]:
    """Positions of everything, given those of the visual tokens; questions follow as if each were the only one.

    After an image with gaps they follow where a whole one would have ended.
    """
    batch = len(real)
    end = torch.where(image[:, -1:] > image.shape[1], PREFIX, image[:, -1:] + 1)
    inside = end[..., None] + (real.cumsum(-1) - 1).clamp(min=0)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.int64), image, inside.flatten(1)], dim=1)


@torch.no_grad()
def features_of(
    model: LlavaForConditionalGeneration, pixels: UInt8[np.ndarray, "scenes 3 side side"], batch: int = 64
) -> Float[Tensor, "scenes patches width"]:
    """Vectors that the projector will read, in bfloat16."""
    tower = model.model.vision_tower
    parts = []
    for start in tqdm(range(0, len(pixels), batch), desc="features", unit="batch", mininterval=5):
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower(vlm_data.pixel_values(pixels[start : start + batch]), output_hidden_states=True)
        parts.append(seen.hidden_states[-2][:, 1:].bfloat16())
    return torch.cat(parts)


STAGES: tuple[type[Stage], ...] = (TowerStage, LanguageStage, GapStage)


class Training(trainer.Training["LlavaForConditionalGeneration"]):
    """The three stages in a row.

    Args:
        recipe: of the whole training.
        examples: what it is trained on.
    """

    stages = len(STAGES)
    writes_early = False

    def __init__(self, recipe: Recipe, examples: Examples) -> None:
        self.examples = examples
        super().__init__(recipe, build(recipe))

    def make_stage(self, index: int) -> Stage:
        return STAGES[index](self.recipe, self.model, self.examples)  # type: ignore[call-arg]

    def snapshot(self) -> LlavaForConditionalGeneration:
        return self.model

    def write(self, model: LlavaForConditionalGeneration, out: Path) -> None:
        write(model, out)


# ------------------------------------------------------------------------------------------------------------------ file


def write(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write weights in half precision, with configuration and words in the metadata."""
    state = {key: tensor.detach().to(torch.float16).contiguous() for key, tensor in model.state_dict().items()}
    metadata = {"config": model.config.to_json_string(use_diff=False), "words": json.dumps(WORDS)}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata)


def load(path: Path) -> LlavaForConditionalGeneration:
    """The model in a file of `write`, in float32.

    Raises:
        CorruptWeightsError: the file is none of those, or of another vocabulary.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (not a dictionary)
    if metadata.get("words") != json.dumps(WORDS) or "config" not in metadata:
        raise CorruptWeightsError(f"{path} does not hold a model of this recipe's vocabulary")
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads(metadata["config"])))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def train(recipe: Recipe, out: Path, checkpoint_seconds: float = 60.0) -> LlavaForConditionalGeneration:
    """Train, or go on training; a checkpoint is written every ``checkpoint_seconds``."""
    return trainer.run(recipe, out, lambda: Training(recipe, make_examples(recipe.seed, recipe.scenes)), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    options = trainer.recipe_parser(__doc__, Recipe.seed, timed=False).parse_args(arguments)
    train(Recipe(seed=options.seed), options.out)


if __name__ == "__main__":
    main()
