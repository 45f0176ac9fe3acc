"""The kind of a picture, told from its tokens by a linear classifier.

    zoo study probe tokenflow-tiny --out eval/results/tokenflow-tiny-probe.json

Pictures are those of `zoo.weights.data.image`, of seeds that nothing was trained on, and classes are kinds of scenes. The
semantic and the pixel half of a TokenFlow's latents get the same probe: means over 4 x 4 areas, standardised, and a logistic
regression whose weight decay is chosen on a fifth of the training pictures. Once over all kinds, once among those whose names
the semantic encoder was never told.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.errors import InputError
from zoo.eval.options import Name, Out
from zoo.eval.studies.record import write_result
from zoo.weights.data import image as image_data

Rows = Float[Tensor, "rows features"]
Labels = Int[Tensor, " rows"]

#: Seeds of the pictures that probes are trained and tested on.
TRAIN_SEED, TEST_SEED = 101, 102
SCENES = tuple(scene.__name__ for scene in image_data.SCENES)
# Rows and columns of areas whose means are probed.
_AREAS = 4
_DECAYS = (1e-3, 1e-2, 1e-1, 1.0)


def labelled_pictures(count: int, seed: int) -> tuple[list[Tensor], Labels]:
    """Pictures of a seed as images of 8 bits, and the numbers of their kinds in `SCENES`."""
    pictures = [torch.from_numpy(image_data.picture(index, seed)) for index in range(count)]
    return pictures, torch.tensor([image_data.scene_number(index, seed) for index in range(count)])


class LinearProbe:
    """A logistic regression over standardised features.

    Args:
        features, labels: to learn from.
        classes: number of classes.
    """

    def __init__(self, features: Rows, labels: Labels, classes: int) -> None:
        self.classes = classes
        self.mean, self.std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        part = len(features) // 5
        self.decay = max(
            _DECAYS,
            key=lambda decay: self._accuracy(self._fit(features[part:], labels[part:], decay), features[:part], labels[:part]),
        )
        self.weight = self._fit(features, labels, self.decay)

    def _fit(self, features: Rows, labels: Labels, decay: float) -> Float[Tensor, "classes weights"]:
        inputs = self._inputs(features)
        weight = torch.zeros(self.classes, inputs.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(inputs @ weight.T, labels) + decay * weight[:, :-1].square().mean(dim=1).sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return weight.detach()

    def _inputs(self, features: Rows) -> Float[Tensor, "rows weights"]:
        return F.pad((features - self.mean) / self.std, (0, 1), value=1.0)

    def _accuracy(self, weight: Float[Tensor, "classes weights"], features: Rows, labels: Labels) -> float:
        return float(((self._inputs(features) @ weight.T).argmax(dim=1) == labels).float().mean())

    def __call__(self, features: Rows) -> Labels:
        """The likeliest classes."""
        return (self._inputs(features) @ self.weight.T).argmax(dim=1)

    def accuracy(self, features: Rows, labels: Labels) -> float:
        """Share of items that are classified right."""
        return self._accuracy(self.weight, features, labels)


def halves(tokenizer: Any, pictures: list[Tensor]) -> tuple[Rows, Float[Tensor, "rows pixel_features"]]:
    """Vectors of pictures' tokens, their semantic and their pixel half, as rows for a probe."""
    latents = F.adaptive_avg_pool2d(tokenizer.features(pictures), _AREAS)
    width = tokenizer.config.semantic_code_dim
    return latents[:, :width].flatten(1), latents[:, width:].flatten(1)


def run(name: str, train: int, test: int) -> dict[str, Any]:
    """Probe both halves of a TokenFlow; accuracies over all kinds of scenes and over those that were not taught.

    Raises:
        InputError: it is another tokenizer.
    """
    import zoo
    from zoo.weights.recipes.tokenflow import TAUGHT

    tokenizer: Any = zoo.load(name)
    if tokenizer.spec.family != "tokenflow":
        raise InputError(f"{name} is no TokenFlow, whose tokens have a semantic and a pixel half")
    sets = [labelled_pictures(count, seed) for count, seed in ((train, TRAIN_SEED), (test, TEST_SEED))]
    known, unseen = (halves(tokenizer, pictures) for pictures, _ in sets)
    (_, known_labels), (_, unseen_labels) = sets
    untaught = torch.tensor([SCENES.index(scene) for scene in SCENES if scene not in TAUGHT])
    everything = torch.arange(len(SCENES))
    content: dict[str, Any] = {"tokenizer": name, "fingerprint": tokenizer.spec.fingerprint, "train": train, "test": test}
    for title, classes in (("all kinds", everything), ("kinds that were not taught", untaught)):
        chosen, judged = torch.isin(known_labels, classes), torch.isin(unseen_labels, classes)
        content[title] = {"classes": [SCENES[number] for number in classes.tolist()], "test pictures": int(judged.sum())}
        content[title]["most frequent"] = _most_frequent(unseen_labels, judged)
        for half, learned, asked in zip(("semantic", "pixel"), known, unseen, strict=True):
            probe = LinearProbe(learned[chosen], known_labels[chosen], len(SCENES))
            content[title][half] = probe.accuracy(asked[judged], unseen_labels[judged])
    return content


def _most_frequent(labels: Labels, chosen: Bool[Tensor, " rows"]) -> float:
    """Accuracy of always naming the most frequent class."""
    return float(torch.bincount(labels[chosen]).max() / chosen.sum())


def main(
    name: Name,
    out: Out,
    train: Annotated[int, typer.Option(min=100, help="pictures that the probes learn from")] = 1500,
    test: Annotated[int, typer.Option(min=100, help="pictures that they are tested on")] = 700,
) -> None:
    """Probe the two halves of a TokenFlow's tokens for the kind of picture."""
    write_result(run(name, train, test), out)
