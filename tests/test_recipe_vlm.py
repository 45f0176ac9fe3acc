"""The recipe of ``vlm-tiny``: scenes that say what they show, questions with one answer, and training that can be resumed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from zoo.eval.studies import compress as accuracy
from zoo.weights.data import scenes as vlm_data
from zoo.weights.data.scenes import COLOURS, IDS, KINDS, PLACES, SHAPES
from zoo.weights.recipes import vlm
from zoo.weights.recipes.vlm import Examples, Recipe, Training

BRIEF = Recipe(
    scenes=8,
    tower_steps=3,
    language_steps=4,
    gap_steps=3,
    tower_batch=4,
    language_batch=2,
    questions=3,
    warmup=2,
    widths=(32, 32),
    depths=(2, 2),
)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return vlm.make_examples(0, BRIEF.scenes)


# ------------------------------------------------------------------------------------------------------------------ scenes


def test_scenes_depend_on_seed_and_index_alone() -> None:
    first, again, other = vlm_data.scene(1, 5), vlm_data.scene(1, 5), vlm_data.scene(1, 6)
    assert np.array_equal(first.pixels, again.pixels) and first.objects == again.objects
    assert not np.array_equal(first.pixels, other.pixels)


def test_objects_are_where_the_scene_says() -> None:
    for index in range(30):
        scene = vlm_data.scene(0, index)
        assert vlm_data.FEWEST <= len(scene.objects) <= vlm_data.MOST
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        assert len({(item.colour, item.shape) for item in scene.objects}) == len(scene.objects)
        cells = vlm.cells_of_patches().view(vlm_data.GRID, vlm_data.GRID).numpy()
        assert set(np.unique(scene.patches)) == set(range(len(scene.objects) + 1)), "every object covers a patch"
        for number, item in enumerate(scene.objects, 1):
            assert (cells[scene.patches == number] == item.cell).all()
            # A fifth of its pixels at least is nearer to its colour than nearly all of the ground is.
            own = np.kron(scene.patches == number, np.ones((vlm_data.PATCH, vlm_data.PATCH), bool))
            colour = np.array(list(COLOURS.values())[item.colour])[:, None]
            distance = np.abs(scene.pixels - colour[..., None]).mean(0)
            ground = np.kron(scene.patches == 0, np.ones((vlm_data.PATCH, vlm_data.PATCH), bool))
            assert np.quantile(distance[own], 0.2) < np.quantile(distance[ground], 0.05)


def test_every_question_has_one_answer() -> None:
    """Recomputed from the objects: exactly those that fit the question's words have the answer."""
    for index in range(30):
        scene = vlm_data.scene(3, index)
        names = [(list(COLOURS)[item.colour], SHAPES[item.shape], PLACES[item.cell]) for item in scene.objects]
        asked = vlm_data.questions(scene)
        assert {question.kind for question in asked} == set(KINDS)
        assert len({question.words for question in asked}) == len(asked)
        for question in asked:
            fitting = [name for name in names if all(word in name for word in question.words if word in known_words())]
            if question.kind == "count":
                assert question.answer == str(len(fitting))
            else:
                column = ("colour", "shape", "where").index(question.kind)
                assert {name[column] for name in fitting} == {question.answer}
            assert sorted(PLACES.index(name[2]) for name in fitting) == sorted(question.cells)
            ids = vlm_data.question_ids(question)
            assert len(ids) == vlm_data.QUESTION_LENGTH and [vlm_data.WORDS[i] for i in ids if i] == list(question.words)


def known_words() -> set[str]:
    return {*COLOURS, *SHAPES, *PLACES}


def test_kinds_are_drawn_alike_often() -> None:
    rng, scene = np.random.default_rng(0), vlm_data.scene(0, 0)
    kinds = Counter(question.kind for question in vlm_data.draw_questions(rng, scene, 400))
    assert all(70 < kinds[kind] < 130 for kind in KINDS)


# ---------------------------------------------------------------------------------------------------------------- training


def test_questions_together_are_learned_as_each_alone() -> None:
    """A block of questions gives every one of them the states that it has in a prompt of its own."""
    model = vlm.build(BRIEF).eval()
    language = model.model.language_model
    embed = language.embed_tokens
    scene = vlm_data.scene(0, 2)
    asked = vlm_data.draw_questions(np.random.default_rng(4), scene, 5)
    words = torch.tensor([[*vlm_data.question_ids(question), IDS[question.answer]] for question in asked])[None]
    real = words != IDS["<pad>"]
    assert not real.all(), "a shorter question among them"
    for image, places, end in (
        (torch.randn(1, 7, 32), [1, 2, 3, 4, 5, 6], 7),
        (torch.randn(1, 4, 32), [2, 50, 140], vlm.PREFIX),
    ):
        prefix, positions = image.shape[1], torch.tensor([places])
        with torch.no_grad():
            together = language(
                inputs_embeds=torch.cat([image, embed(words.flatten(1))], dim=1),
                attention_mask=vlm.question_mask(real, prefix),
                position_ids=vlm.question_positions(real, positions),
            ).last_hidden_state[:, prefix:]
            together = together.unflatten(1, words.shape[1:])
            for row in range(len(asked)):
                own = words[:, row][real[:, row]][None]
                alone = language(
                    inputs_embeds=torch.cat([image, embed(own)], dim=1),
                    position_ids=torch.tensor([[0, *places, *range(end, end + own.shape[1])]]),
                ).last_hidden_state[:, prefix:]
                torch.testing.assert_close(together[:, row][real[:, row]], alone[0], atol=1e-5, rtol=1e-4)


def test_visual_tokens_are_left_out_at_random(examples: Examples) -> None:
    training = Training(BRIEF, examples)
    training.advance()
    stage = training.stage
    assert isinstance(stage, vlm.LanguageStage)
    assert torch.equal(stage.thinned(np.arange(2))[0], torch.arange(vlm.PATCHES).expand(2, -1)), "none before the last stage"
    training.advance()
    stage = training.stage
    assert isinstance(stage, vlm.GapStage)
    counts, moved = Counter(), Counter()
    covered = examples.colours[:3] > 0
    among: list[float] = []
    for _ in range(300):
        chosen, places = stage.thinned(np.arange(3))
        assert (chosen.diff() > 0).all() and chosen.min() >= 0 and chosen.max() < vlm.PATCHES
        counts[chosen.shape[1] == vlm.PATCHES] += 1
        assert chosen.shape[1] >= round(BRIEF.fewest * vlm.PATCHES)
        if chosen.shape[1] <= 60:
            among.append(float(covered.gather(1, chosen).double().mean()))
        compact = torch.equal(places, torch.arange(1, chosen.shape[1] + 1).expand(3, -1))
        assert compact or torch.equal(places, chosen + 1)
        moved[compact] += 1
    assert 50 < counts[True] < 110
    assert 130 < moved[True] < 240
    assert np.mean(among) > float(covered.double().mean()) + 0.2, "objects stay rather than ground"


def test_patches_have_the_names_of_their_objects(examples: Examples) -> None:
    for row, scene in enumerate(examples.scenes):
        for patch, number in enumerate(scene.patches.flatten()):
            item = scene.objects[number - 1]
            expected = (0, 0) if number == 0 else (1 + item.colour, 1 + item.shape)
            assert (int(examples.colours[row, patch]), int(examples.shapes[row, patch])) == expected
        present = {divmod(int(kind), len(SHAPES)) for kind in examples.present[row].nonzero()[:, 0]}
        assert present == {(item.colour, item.shape) for item in scene.objects}


def weights(training: Training) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in training.model.state_dict().values()])


def steps(training: Training, count: int) -> None:
    for _ in range(count):
        if training.stage.step == training.stage.steps:
            training.advance()
        training.stage.train_step()


@pytest.mark.parametrize("stop", [2, 5, 8], ids=["tower", "language", "gaps"])
def test_resuming_goes_on_as_an_uninterrupted_run_does(examples: Examples, tmp_path: Path, stop: int) -> None:
    whole, other, interrupted, resumed = (Training(BRIEF, examples) for _ in range(4))
    other.stage.draws = np.random.default_rng(99)
    for training in (whole, other):
        steps(training, 9)
    steps(interrupted, stop)
    interrupted.save(tmp_path / "checkpoint.pt")
    resumed.restore(tmp_path / "checkpoint.pt")
    steps(resumed, 9 - stop)
    assert whole.index == resumed.index == 2 and whole.stage.step == resumed.stage.step == 2
    assert whole.stage.draws.bit_generator.state == resumed.stage.draws.bit_generator.state
    distance, chance = (float((weights(whole) - weights(run)).norm()) for run in (resumed, other))
    assert distance < 0.05 * chance


def test_a_checkpoint_of_another_recipe_is_refused(examples: Examples, tmp_path: Path) -> None:
    Training(BRIEF, examples).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, tower_steps=9), examples).restore(tmp_path / "checkpoint.pt")


def test_the_written_file_holds_the_model(tmp_path: Path) -> None:
    out = tmp_path / "vlm.safetensors"
    trained = vlm.train(BRIEF, out, checkpoint_seconds=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no checkpoint or temporary file is left"
    loaded = vlm.load(out)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["words"]) == list(vlm_data.WORDS)
    for key, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.half().float()), key
    save_file(load_file(out), tmp_path / "bare.safetensors")
    with pytest.raises(zoo.WeightsError, match="vocabulary"):
        vlm.load(tmp_path / "bare.safetensors")


# ------------------------------------------------------------------------------------------------------- the embedded file


@pytest.fixture(scope="module")
def embedded() -> object:
    return vlm.load(accuracy.embedded_weights())


def test_the_embedded_model_answers(embedded: object) -> None:
    """Far above a blind guess on scenes of another seed, for what it was trained longest on nearly always right."""
    assert accuracy.embedded_weights().stat().st_size <= 8e6
    asked = accuracy.examples(64)
    right = accuracy.accuracies(accuracy.answers(embedded, asked), asked)
    guessed = accuracy.blind(asked)
    assert right["all"] > guessed["all"] + 0.3
    assert right["colour"] > 0.8 and right["count"] > 0.8


def test_losing_tokens_loses_answers(embedded: object, tmp_path: Path) -> None:
    out, plot = tmp_path / "accuracy.json", tmp_path / "accuracy.png"
    content = accuracy.run(embedded, methods=["uniform", "quecc"], keeps=[0.03], questions=64, json_path=out, plot_path=plot)
    assert json.loads(out.read_text()) == content and plot.read_bytes().startswith(b"\x89PNG")
    full, few = content["results"]
    assert (full["method"], few["method"], few["keep"]) == ("full", "uniform", 0.03)
    assert few["accuracy"]["all"] < full["accuracy"]["all"] - 0.2
    assert "quecc 0.03" in content["skipped"]
    assert f"| uniform | {few['accuracy']['all']:.1%} |" in accuracy.table(content)
    with pytest.raises(zoo.InputError, match="no method 'best'"):
        accuracy.run(embedded, methods=["best"])


def test_accuracy_is_counted_by_kind() -> None:
    asked = accuracy.examples(40)
    assert {example.kind for example in asked} == set(KINDS)
    given = torch.tensor([example.answer for example in asked])
    assert set(accuracy.accuracies(given, asked).values()) == {1.0}
    wrong = [i for i, example in enumerate(asked) if example.kind == "count"]
    given[wrong] = IDS["?"]
    counted = accuracy.accuracies(given, asked)
    assert counted["count"] == 0 and counted["where"] == 1 and counted["all"] == pytest.approx(1 - len(wrong) / 40)
