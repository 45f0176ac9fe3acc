"""Sequences of vectors get shorter by the rule that was asked for, each item as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from small_models import small_flextok, small_wavtokenizer
from zoo.compress.sequence import adaptive_prefix, kept_lengths, root_mean_square, shorten

METHODS = ("merge", "distinct", "uniform", "random", "prefix")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 1.0, 1, 4, 100])
def test_lengths_and_bookkeeping(method: Any, keep: float) -> None:
    vectors, lengths = torch.randn(3, 11, 4), torch.tensor([11, 1, 6])
    share = {"count": keep} if isinstance(keep, int) else {"keep": keep}
    out = shorten(vectors, **share, method=method, lengths=lengths)
    expected = [min(keep, n) if isinstance(keep, int) else max(1, round(keep * n)) for n in lengths.tolist()]
    assert out.lengths.tolist() == expected
    for row, count in enumerate(expected):
        positions = out.positions[row, :count]
        assert (positions.diff() > 0).all() and positions.min() >= 0 and positions.max() < lengths[row]
        assert out.sizes[row, :count].sum() == (lengths[row] if method == "merge" else count)
        assert (out.positions[row, count:] == -1).all() and (out.sizes[row, count:] == 0).all()
        assert (out.vectors[row, count:] == 0).all()
        alone = out.sizes[row, :count] == 1
        assert torch.equal(out.vectors[row, :count][alone], vectors[row, positions[alone]])


@pytest.mark.parametrize("method", METHODS)
def test_items_give_what_they_give_alone(method: Any) -> None:
    vectors, lengths = torch.randn(3, 13, 4), torch.tensor([7, 13, 2])
    together = shorten(vectors, 0.4, method=method, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = shorten(vectors[row : row + 1, :length], 0.4, method=method)
        count = int(alone.lengths[0])
        assert torch.equal(together.positions[row, :count], alone.positions[0])
        torch.testing.assert_close(together.vectors[row, :count], alone.vectors[0])


def test_uniform_keeps_the_middles_of_equal_parts() -> None:
    positions = shorten(torch.randn(1, 12, 2), count=4, method="uniform").positions
    assert positions.diff().eq(3).all()
    for count in range(1, 13):
        assert len(shorten(torch.randn(1, 12, 2), count=count, method="uniform").positions[0]) == count


def test_prefix_and_random() -> None:
    vectors = torch.randn(2, 9, 3)
    assert shorten(vectors, count=3, method="prefix").positions.tolist() == [[0, 1, 2]] * 2
    first, again, other = (shorten(vectors, count=4, method="random", seed=seed).positions for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_distinct_keeps_what_is_unlike_the_mean() -> None:
    vectors = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.05], [-1.0, 0.0]])[None]
    assert shorten(vectors, count=2, method="distinct").positions.tolist() == [[2, 4]]


def test_merge_joins_the_most_similar_pair_by_weight() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 2.0], [5.0, 0.1]])[None]
    # Candidates 0 and 2; 0 is most like 3 (nearly 1), 2 most like 1 (less).
    out = shorten(vectors, count=3)
    assert out.positions.tolist() == [[1, 2, 3]] and out.sizes.tolist() == [[1, 1, 2]]
    torch.testing.assert_close(out.vectors[0, 2], torch.tensor([3.0, 0.05]))
    whole = shorten(vectors, count=1)
    assert whole.sizes.tolist() == [[4]]
    torch.testing.assert_close(whole.vectors[0, 0], vectors[0].mean(0))


def test_merging_equal_vectors_loses_nothing() -> None:
    vectors = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).repeat_interleave(4, dim=0)[None]
    out = shorten(vectors, count=2)
    assert out.sizes.tolist() == [[4, 4]]
    torch.testing.assert_close(out.vectors, torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))


def test_on_the_zoo_s_own_tokens() -> None:
    tokenizer = small_flextok()
    tokens = tokenizer.encode([torch.rand(3, 32, 48) * 2 - 1 for _ in range(2)])
    out = zoo.compress.shorten(tokenizer.embed(tokens), keep=0.5, lengths=tokens.lengths)
    assert out.vectors.shape == (2, 4, 3) and out.lengths.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        *(({"keep": keep}, "keep is a share") for keep in (0, -1, 2, 0.0, 1.5, -0.5, float("nan"))),
        *(({"count": count}, "count is a number") for count in (0, -1, True)),
        ({}, "either keep"),
        ({"keep": 0.5, "count": 2}, "either keep"),
    ],
)
def test_keep_and_count_out_of_range(settings: Any, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        kept_lengths(torch.tensor([4]), **settings)


def test_keep_is_a_share_and_one_keeps_all() -> None:
    vectors = torch.randn(1, 6, 2)
    assert torch.equal(shorten(vectors, keep=1).vectors, vectors)


def test_the_former_name_counts_by_integers() -> None:
    vectors = torch.randn(1, 6, 2)
    with pytest.warns(DeprecationWarning, match="shorten, where an integer keep is count=1"):
        assert zoo.compress.tokens(vectors, keep=1).lengths.tolist() == [1]
    with pytest.warns(DeprecationWarning, match="is zoo.compress.shorten now"):
        assert zoo.compress.tokens(vectors, 0.5, method="prefix").lengths.tolist() == [3]


def test_bad_vectors_are_named() -> None:
    with pytest.raises(zoo.InputError, match="no tokens"):
        shorten(torch.zeros(1, 0, 3), 0.5)
    with pytest.raises(zoo.InputError, match="item 1: its length is 5"):
        shorten(torch.zeros(2, 4, 3), 0.5, lengths=torch.tensor([4, 5]))
    with pytest.raises(zoo.InputError, match="item 0: its vectors are not finite"):
        shorten(torch.full((1, 4, 3), torch.nan), 0.5)
    with pytest.raises(zoo.InputError, match="method is one of merge"):
        shorten(torch.zeros(1, 4, 3), 0.5, method="best")


# ------------------------------------------------------------------------------------------------------ adaptive prefixes


def images(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 32, 48, generator=generator) * 2 - 1 for _ in range(count)]


def by_length(lengths: dict[int, float]) -> Any:
    """A tokenizer of random weights whose reconstruction of k tokens is an image of the constant value given for k."""
    tokenizer = small_flextok()
    tokenizer.decode = lambda tokens, **options: [  # type: ignore[method-assign]
        torch.full((3, 32, 48), lengths[int(length)]) for length in tokens.lengths
    ]
    return tokenizer


def test_the_shortest_prefix_within_the_target() -> None:
    black = [torch.full((3, 32, 48), -1.0)] * 2
    # Errors of 0.8, 0.7, ..., 0.1 by 1 to 8 tokens.
    tokenizer = by_length({k: 2 * (0.9 - 0.1 * k) - 1 for k in range(1, 9)})
    for target, length in ((0.85, 1), (0.75, 2), (0.35, 6), (0.15, 8)):
        chosen = adaptive_prefix(tokenizer, black, target)
        assert chosen.tokens.lengths.tolist() == [length] * 2
        torch.testing.assert_close(chosen.errors, torch.full((2,), 0.9 - 0.1 * length))
        assert chosen.reached.all()
    missed = adaptive_prefix(tokenizer, black, 0.05)
    assert missed.tokens.lengths.tolist() == [8, 8] and not missed.reached.any()


def test_prefixes_of_a_real_decoder_are_prefixes_and_within_the_target() -> None:
    tokenizer, items = small_flextok(), images()
    whole = tokenizer.encode(items)
    errors = {
        count: [root_mean_square(a, b) for a, b in zip(items, tokenizer.decode(whole.truncate(count)), strict=True)]
        for count in range(1, 9)
    }
    target = sorted(errors[4])[1]
    chosen = adaptive_prefix(tokenizer, items, target)
    for row, count in enumerate(chosen.tokens.lengths.tolist()):
        assert chosen.tokens.tolist()[row] == whole.tolist()[row][:count]
        assert float(chosen.errors[row]) == pytest.approx(errors[count][row], abs=1e-5)
        assert bool(chosen.reached[row]) == (errors[8][row] <= target)
        assert not chosen.reached[row] or float(chosen.errors[row]) <= target


def test_own_errors_and_other_sizes() -> None:
    tokenizer = small_flextok()
    large = [torch.rand(3, 70, 90) * 2 - 1]
    assert adaptive_prefix(tokenizer, large, 10.0).tokens.lengths.tolist() == [1]
    seen: list[Any] = []

    def error(item: Any, restored: Tensor) -> float:
        seen.append(item)
        return 0.0

    adaptive_prefix(tokenizer, large, 0.5, error=error, decode={"steps": 1})
    assert all(item is large[0] for item in seen)


def test_tokenizers_without_prefixes() -> None:
    with pytest.raises(zoo.InputError, match="not ordered"):
        adaptive_prefix(small_wavtokenizer(), [torch.zeros(100)], 0.1)

    with pytest.raises(zoo.InputError, match="no default error for shape"):
        adaptive_prefix(zoo.load("vat-tiny"), [1], 0.1)
