"""Exact distributions of the next byte, and mixtures behind merges: the original's numbers, and brute force."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import zoo
from zoo.bench import byte_model as bench
from zoo.text import ByteEnsemble, ByteModel, byte_probabilities, fill_in_the_middle, mixture, pieces_of, read_sentencepiece
from zoo.text.mixture import WordCounts
from zoo.text.pieces import unfinished

CORPUS = [
    "the cat and then the hen, the other there! été café, l'été 今日は今日 12345 1234 don't",
    "a  b   c then that hat",
] * 3


@cache
def gpt2(vocabulary: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.6}
    config = GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@cache
def byte_level(vocabulary: int = 300) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<end>", "<pre>", "<suf>", "<mid>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")


def with_fallback() -> Any:
    """As Llama's converted tokenizer: characters, spaces as U+2581 with one in front, byte pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581thecant"]
    names = list(dict.fromkeys(names))
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "n"), ("c", "a"), ("\u2581the", "n"), ("ca", "t")]
    names += [first + second for first, second in merges]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# ------------------------------------------------------------------------------------------------------- the original's numbers


@cache
def golden_case(folder: Path) -> tuple[Any, Any, Any]:
    config, io = json.loads((folder / "config.json").read_text()), json.loads((folder / "io.json").read_text())
    sizes = {name: config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    model.tie_weights()
    return model, io, load_file(folder / "io.safetensors")["next_byte"]


def test_the_originals_next_bytes(golden: Path) -> None:
    folder = golden / "text" / "byteprob_gpt2"
    model, io, expected = golden_case(folder)
    pieces = read_sentencepiece(folder / "tokenizer.model", escaped=True)
    for text, ids in io["encodings"].items():
        assert pieces.encode(pieces.lead + text.encode()) == ids
    names = [name for name in io["bins"] if isinstance(name, str)]
    going_on = ByteModel(model, pieces).start(bytes(io["steps"][0]["prefix_bytes"]))
    for number, (step, bins) in enumerate(zip(io["steps"], expected, strict=True)):
        text = bytes(step["prefix_bytes"])
        started = ByteModel(model, pieces).start(text)
        if number:
            going_on.advance(text[-1])
        context = step["context_ids"][1 : step["context_start"]]
        covers = {
            (*context, *ids, bytes(rest)): weight
            for ids, rest, weight in zip(step["cover_ids"], step["cover_rest"], step["cover_weight"], strict=True)
        }
        for way in (started, going_on):
            found = way.next()
            ours = np.concatenate([found.bytes, [found.specials[pieces_number(pieces, name)] for name in names]])
            np.testing.assert_allclose(ours, bins.numpy(), atol=1e-6, rtol=1e-4)
            assert {(*cover.tokens, cover.rest): pytest.approx(cover.weight, abs=1e-5) for cover in way.covers()} == covers
        tokens = step["context_ids"][1:]
        follows = set(np.flatnonzero(pieces.follows(tokens)).tolist())
        assert follows == set(step["valid_next_ids"]) - set(pieces.specials)
        assert pieces.unfinished(tokens) or set(pieces.specials) <= set(step["valid_next_ids"])


def pieces_number(pieces: Any, name: str) -> int:
    return next(number for number, special in pieces.specials.items() if special == name)


# ------------------------------------------------------------------------------------------------------------------ brute force


def lists(pieces: Any, text: bytes, tokens: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All covers of a text among all lists of ids."""
    done = b"".join(pieces.octets[number] for number in tokens)
    for number, octets in enumerate(pieces.octets):
        if not octets:
            continue
        whole = done + octets
        if whole.startswith(text):
            yield (*tokens, number)
        elif text.startswith(whole):
            yield from lists(pieces, text, (*tokens, number))


def valid(pieces: Any, tokens: tuple[int, ...]) -> bool:
    octets = b"".join(pieces.octets[number] for number in tokens)
    return not unfinished(octets) and decodes(octets) and pieces.encode(octets) == list(tokens)


def decodes(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "kind"), [("the", "bytes"), (" th", "bytes"), ("12", "bytes"), ("th", "fallback"), ("c", "fallback")]
)
def test_all_covers_and_no_other(text: str, kind: str) -> None:
    """Where no character is unfinished, the covers are those of all lists of ids that the tokenizer gives back."""
    tokenizer = byte_level(280) if kind == "bytes" else with_fallback()
    pieces = pieces_of(tokenizer)
    model = gpt2(len(pieces.octets))
    byte_model = ByteModel(model, tokenizer).start(text)
    octets = byte_model.text
    expected = {}
    for tokens in lists(pieces, octets):
        if valid(pieces, tokens):
            ids = torch.tensor([[pieces.begin, *tokens]])
            logs = model(ids).logits[0].double().log_softmax(-1)
            expected[tokens] = float(logs[:-1].gather(1, ids[0, 1:, None]).sum().exp())
    total = sum(expected.values())
    found = {cover.tokens: cover.weight for cover in byte_model.covers() if valid(pieces, cover.tokens)}
    # Covers that end inside of a character are in doubt until it is finished.
    share = sum(found.values())
    assert found.keys() == expected.keys()
    for tokens, weight in found.items():
        assert weight / share == pytest.approx(expected[tokens] / total, rel=1e-4, abs=1e-12)


def test_single_bytes_are_the_models_own() -> None:
    tokenizer = byte_level(1)
    model, pieces = gpt2(260), pieces_of(tokenizer)
    assert all(len(piece) == 1 for piece in pieces.octets if piece)
    found = byte_probabilities(model, tokenizer, "the c")
    ids = torch.tensor([[pieces.begin, *pieces.encode(b"the c")]])
    own = model(ids).logits[0, -1].double().softmax(-1).numpy()
    allowed = pieces.follows(ids[0, 1:].tolist())
    for number in np.flatnonzero(allowed):
        assert found.bytes[pieces.octets[number][0]] == pytest.approx(own[number] * (1 - 0) / (1 - found.invalid), rel=1e-4)
    assert found.bytes.sum() + sum(found.specials.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("text", ["the cat and th", "été 今日は, l'é", "1234 a  b   ", "don't th"])
def test_any_beginning_gives_the_same_as_going_on(text: str) -> None:
    tokenizer = byte_level()
    octets = text.encode()
    model = ByteModel(gpt2(300), tokenizer)
    going_on = model.copy().start(b"")
    for end, byte in enumerate(octets):
        expected = going_on.next()
        found = ByteModel(gpt2(300), tokenizer).next(octets[:end])
        np.testing.assert_allclose(found.bytes, expected.bytes, atol=1e-7, rtol=1e-4)
        going_on.advance(byte)
    assert 0 <= expected.invalid < 1


def test_a_function_in_place_of_a_model() -> None:
    """Without the cache, with the same result; and the logarithm of a text is the sum over its bytes."""
    model, tokenizer = gpt2(300), byte_level()

    def logprobs(ids: Any) -> Any:
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    one, other = ByteModel(model, tokenizer).start("the c"), ByteModel(logprobs, tokenizer).start("the c")
    np.testing.assert_allclose(one.next().bytes, other.next().bytes, atol=1e-7, rtol=1e-4)
    total, state = 0.0, other.copy()
    for byte in b"at and":
        total += float(np.log(state.next().bytes[byte]))
        state.advance(byte)
    assert one.logprob("at and") == pytest.approx(total, abs=1e-4)
    assert one.text == b"the c", "the state stays"


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_working_ahead_changes_nothing(kind: str) -> None:
    """The model also works on the likeliest ways on, and gives what a function without a cache gives, whatever comes."""
    tokenizer = byte_level() if kind == "bytes" else with_fallback()
    model = gpt2(len(pieces_of(tokenizer).octets))

    def logprobs(ids: Any) -> Any:
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    one, other = ByteModel(model, tokenizer).start("then the c"), ByteModel(logprobs, tokenizer).start("then the c")
    # Mostly the most likely byte, and now and then the next one.
    for place in range(40):
        found, expected = one.next(), other.next()
        np.testing.assert_allclose(found.bytes, expected.bytes, atol=1e-6, rtol=1e-3)
        assert found.specials == pytest.approx(expected.specials, abs=1e-6)
        byte = int(np.argsort(expected.bytes)[-1 if place % 8 else -2])
        one.advance(byte)
        other.advance(byte)


def test_a_token_that_is_taken_costs_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = bench.language_model(2, 32, 4, 600)
    monkeypatch.setattr(bench, "BYTES", 40)
    octets = bench._printable(ByteModel(model, tokenizer).start(bench.PROMPT))
    passes, forward = 0, model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    going_on = ByteModel(model, tokenizer).start(bench.PROMPT)
    before = len(going_on.text)
    passes = 0
    for byte in octets:
        going_on.next()
        going_on.advance(byte)
    tokens = len(going_on.pieces.encode(going_on.text)) - len(going_on.pieces.encode(going_on.text[:before]))
    assert tokens <= passes <= tokens + 4 < 0.7 * len(octets), (passes, tokens)


def test_speed_of_bytes_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"BYTES": 12, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)
    content = bench.run(json_path=tmp_path / "speed.json")
    assert content == json.loads((tmp_path / "speed.json").read_text())
    assert [found["contender"] for found in content["measurements"]] == [
        *("steps of the original", "its passes alone", "one by one", "a given text")
    ]
    assert content["largest_difference"] < 1e-5
    bench.print_table(content)


def test_samples() -> None:
    model = ByteModel(gpt2(300), byte_level())
    assert model.start("the c").sample(12, seed=3) == model.start("the c").sample(12, seed=3)
    greedy = model.start("the c").sample(5, temperature=0)
    other = model.start("the c")
    for byte in greedy:
        assert int(other.next().bytes.argmax()) == byte
        other.advance(byte)
    assert model.start("the c").sample(50, seed=3, stop=greedy[:1])[:-1].find(greedy[:1]) == -1


def test_ensembles_of_different_vocabularies() -> None:
    one, other = ByteModel(gpt2(300), byte_level()), ByteModel(gpt2(280, seed=1), byte_level(280))
    both = ByteEnsemble([one, other], [3, 1])
    found = both.next("the ca")
    np.testing.assert_allclose(found.bytes, 0.75 * one.next("the ca").bytes + 0.25 * other.next("the ca").bytes, atol=1e-12)
    assert found.bytes.sum() + found.specials[0] == pytest.approx(1, abs=1e-9)
    assert len(both.start("the ca").sample(4, seed=0)) <= 4
    with pytest.raises(zoo.InputError, match="do not go with the weights"):
        ByteEnsemble([one], [1, 2])


def test_filling_in_goes_on_behind_the_prefix() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer)
    before, behind, middle = (pieces_number(pieces, name) for name in ("<pre>", "<suf>", "<mid>"))
    found = fill_in_the_middle(gpt2(300), tokenizer, "the c", "and", markers=(before, behind, middle), length=6, seed=1)
    context = [pieces.begin, before, behind, *pieces.encode(b"and"), middle]
    assert found == ByteModel(gpt2(300), tokenizer, context=context).start("the c").sample(6, seed=1)


def test_tokenizers_and_texts_that_are_refused(tmp_path: Path) -> None:
    without = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    with pytest.raises(zoo.InputError, match="no byte fallback"):
        byte_probabilities(gpt2(300), without, "a")
    words = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(zoo.InputError, match="WordPiece, not BPE"):
        byte_probabilities(gpt2(300), words, "a")
    with pytest.raises(zoo.InputError, match="no fast tokenizer"):
        byte_probabilities(gpt2(300), object(), "a")
    bare = byte_level().backend_tokenizer
    with pytest.raises(zoo.InputError, match="no begin marker and the text no space"):
        byte_probabilities(gpt2(300), bare, "then")
    assert byte_probabilities(gpt2(300), bare, "the c").bytes.sum() > 0
    model = ByteModel(gpt2(300), byte_level())
    with pytest.raises(zoo.InputError, match="0xff at offset 1 does not belong to UTF-8"):
        model.start(b"a\xff bc")
    with pytest.raises(zoo.InputError, match="goes on with the byte 0xff"):
        model.start("a").advance(0xFF)
    model.start("é".encode()[:1])
    assert set(np.flatnonzero(model.next().bytes)) <= set(range(0x80, 0xC0))
    (tmp_path / "no.model").write_bytes(b"no model")
    with pytest.raises(zoo.FormatError, match="no SentencePiece model"):
        byte_probabilities(gpt2(300), tmp_path / "no.model", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", "index 1 is the lone surrogate"),
        ("the " * 200, "too long for it"),
    ],
)
def test_texts_that_are_refused(text: Any, message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        byte_probabilities(gpt2(300), byte_level(), text)


@pytest.mark.parametrize("byte", [-1, 256])
def test_bytes_that_are_refused(byte: int) -> None:
    with pytest.raises(zoo.InputError, match="from 0 to 255"):
        ByteModel(gpt2(300), byte_level()).start("a").advance(byte)


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        (np.full(300, np.nan), "NaN or infinity"),
        (np.full(300, np.inf), "NaN or infinity"),
        (np.full(300, -np.inf), "no probability to anything"),
        (np.zeros(10), "has 300 ids, and the model gives"),
        (np.zeros((1, 300)), "has 300 ids, and the model gives"),
    ],
)
def test_models_that_give_no_distribution(logs: Any, message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        byte_probabilities(lambda ids: logs, byte_level(), "the ")


def test_models_that_do_not_go_with_the_tokenizer_or_draw_at_random() -> None:
    with pytest.raises(zoo.InputError, match="the tokenizer is another model's"):
        byte_probabilities(gpt2(20), byte_level(), "the ")
    training = GPT2LMHeadModel(gpt2(300).config).train()
    with pytest.raises(zoo.InputError, match=r"model\.eval"):
        byte_probabilities(training, byte_level(), "the ")


def test_draws_and_weights_that_are_refused() -> None:
    model = ByteModel(gpt2(300), byte_level()).start("the ")
    with pytest.raises(zoo.InputError, match="counts from 0"):
        model.sample(-1)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(zoo.InputError, match="temperature"):
            model.sample(1, temperature=temperature)
    with pytest.raises(zoo.InputError, match="do not go with the weights"):
        ByteEnsemble([model, model], [1.0, float("nan")])


# --------------------------------------------------------------------------------------------------------------------- mixtures


def test_the_originals_mixture(golden: Path) -> None:
    io = json.loads((golden / "text" / "mixture_3" / "io.json").read_text())
    words = {
        name: {word.replace(" ", "Ġ"): count for word, count in sample.items()} for name, sample in io["word_counts"].items()
    }
    for name, sample in words.items():
        counts = WordCounts(sample)
        states = io["pair_counts"][name]
        assert {" ".join(pair): count for pair, count in counts.pairs.items()} == states[0]
        assert sum(counts.pairs.values()) == io["denominators"][name]
        for merge, changed in zip(io["merges"], states[1:], strict=False):
            first, second = merge.split(" ")
            assert {" ".join(pair): count for pair, count in counts.merge((first, second)).items()} == changed
    found = mixture(io["merges"], words)
    programme = io["full_programme_highs"]
    assert found.objective == pytest.approx(programme["objective"], abs=1e-6)
    assert found.constraints < programme["constraints"] / 10
    for name, share in programme["mixture"].items():
        least, most = found.intervals[name]
        assert least - 1e-6 <= share <= most + 1e-6
        assert least <= found.shares[name] <= most
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_planted_mixture_of_five() -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    words: list[dict[str, int]] = []
    for _ in shares:
        # A language: its own frequencies of letters.
        letters = random.permutation(list("abcdefghijklmnop"))
        chances = 1 / np.arange(1, 17) ** 1.1
        spelled = {"".join(random.choice(letters, size=random.integers(3, 8), p=chances / chances.sum())) for _ in range(150)}
        words.append(
            {word: int(count) for word, count in zip(sorted(spelled), random.integers(20, 200, len(spelled)), strict=True)}
        )
    totals = [sum((len(word) - 1) * count for word, count in sample.items()) for sample in words]
    corpus: dict[str, float] = {}
    for share, total, sample in zip(shares, totals, words, strict=True):
        for word, count in sample.items():
            corpus[word] = corpus.get(word, 0) + count * share / total * 1e9
    counts, merges = WordCounts({word: round(count) for word, count in corpus.items()}), []
    for _ in range(150):
        best = max(counts.pairs, key=lambda pair: (counts.pairs[pair], pair))
        merges.append(best)
        counts.merge(best)
    found = mixture(merges, {f"language {index}": sample for index, sample in enumerate(words)})
    np.testing.assert_allclose(list(found.shares.values()), shares, atol=0.01)
    assert found.missing == ()
    assert all(
        least <= share <= most for share, (least, most) in zip(found.shares.values(), found.intervals.values(), strict=True)
    )


def test_mixtures_of_a_tokenizers_own_words() -> None:
    samples = {"english": CORPUS[0], "letters": ["xyz xyz zyx", "zzz"]}
    found = mixture(byte_level(), samples, merges=10, intervals=False)
    assert found.shares["english"] > 0.8 and found.intervals == {}
    assert ("qq", "q") in mixture([("a", "b"), ("qq", "q")], {"a": {"ab": 2}, "c": {"cd": 1, "ab": 1}}).missing


@pytest.mark.parametrize(
    ("merges", "samples", "message"),
    [
        (["a b"], {"one": {"ab": 1}}, "at least two categories"),
        (["a b"], {"one": {"ab": 1}, "two": {"a": 3}}, "'two' has no word of two symbols"),
        (["a b"], {"one": "ab", "two": "ab"}, "counted words"),
        (["ab"], {"one": {"ab": 1}, "two": {"ab": 1}}, "a merge is a pair"),
        ([], {"one": {"ab": 1}, "two": {"ab": 1}}, "no merges"),
        (Tokenizer(models.Unigram([("a", 0.0)])), {"one": "ab", "two": "ab"}, "Unigram, not BPE"),
        (3, {"one": "ab", "two": "ab"}, "not int"),
        (["a b"], {"one": {"ab": 1}, "two": {"ab": -1}}, "'ab' -1 times"),
        (["a b"], {"one": {"ab": 1}, "two": {"ab": float("nan")}}, "'ab' nan times"),
        (byte_level(), {"one": "ab", "two": "a\ud800"}, "'two': the character at index 1 is the lone surrogate"),
    ],
)
def test_bad_mixtures(merges: Any, samples: Any, message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        mixture(merges, samples)


def test_a_mixture_of_no_merges() -> None:
    with pytest.raises(zoo.InputError, match="at least one merge"):
        mixture(["a b"], {"one": {"ab": 1}, "two": {"ab": 1}}, merges=0)
