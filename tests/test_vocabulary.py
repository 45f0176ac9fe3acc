"""Several tokenizers and a text tokenizer in one id space, both ways."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as TextTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import zoo
from small_models import SMALL
from small_models_ibq import SMALL_IBQ, small_ibq
from small_models_s3tokenizer import small_s3tokenizer
from small_models_snac import SMALL_SNAC, small_snac
from zoo.codecs.wavtokenizer import WavTokenizer
from zoo.vocabulary import Naming, Section, _shared_code

WORDS = ["[UNK]", "a", "cat", "and", "its", "purr", "draw", "."]
IMAGE = zoo.Spec("seed-like", "seed", "image", 8192, 32, fingerprint="0011223344556677", max_tokens=32)
ORDERED = zoo.Spec("flextok-like", "flextok", "image", 1000, 6, ordered=True, fingerprint="8899aabbccddeeff", max_tokens=256)
SOUND = zoo.Spec(
    "wav-like", "wavtokenizer", "audio", 64, 16, fingerprint="1234567812345678", sample_rate=24_000, hop_length=320
)


def text_tokenizer() -> TextTokenizer:
    tokenizer = TextTokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def tokens_of(spec: zoo.Spec, *items: list[int]) -> zoo.Tokens:
    return zoo.Tokens.from_sequences(
        [torch.tensor(item) for item in items],
        tokenizer=spec.name,
        fingerprint=spec.fingerprint,
        vocab_size=spec.vocab_size,
    )


PICTURE = list(range(8160, 8192))


@pytest.fixture
def vocabulary() -> zoo.Vocabulary:
    return zoo.Vocabulary.build(len(WORDS), {"img": IMAGE, "flex": ORDERED, "sound": SOUND})


def test_layout_of_seed() -> None:
    """LLaMA's 32000 ids, then 8192 codes as ``<img_00000>``, then the markers."""
    seed = zoo.Vocabulary.build(32_000, {"img": IMAGE})["img"]
    strings = dict(zip(seed.ids(), seed.strings(), strict=True))
    assert strings[32_000] == "<img_00000>" and strings[40_191] == "<img_08191>"
    assert {seed.begin: strings[seed.begin], seed.end: strings[seed.end]} == {40_192: "<img>", 40_193: "</img>"}


def test_sections_follow_each_other(vocabulary: zoo.Vocabulary) -> None:
    taken = [number for section in vocabulary.sections for number in section.ids()]
    assert taken == list(range(len(WORDS), vocabulary.size))
    assert vocabulary.size == len(WORDS) + 8192 + 1000 + 64 + 3 * 2
    with pytest.raises(KeyError):
        vocabulary["nobody"]


def test_prompt_and_back(vocabulary: zoo.Vocabulary) -> None:
    text = text_tokenizer()
    image, sound = tokens_of(IMAGE, PICTURE), tokens_of(SOUND, [5, 0, 63], [1])
    ids = vocabulary.join(["draw a cat", image, [WORDS.index("and")], sound, "."], text=text)
    flat = [6, 1, 2, 8200, *(8 + code for code in PICTURE), 8201, 3]
    first = 8 + 8194 + 1002
    flat += [first + 64, first + 5, first, first + 63, first + 65, first + 64, first + 1, first + 65, 7]
    assert ids.tolist() == flat
    segments = vocabulary.split(ids)
    assert [segment.name for segment in segments] == ["", "img", "", "sound", "sound", ""]
    assert text.decode(list(segments[0].ids)) == "draw a cat"
    assert segments[1].tokens is not None and segments[1].tokens.equal(image)
    assert [segment.tokens.tolist()[0] for segment in segments if segment.name == "sound"] == [[5, 0, 63], [1]]
    assert vocabulary.split(flat) == segments
    assert vocabulary.split([]) == []


def test_every_item_is_flattened_by_itself(vocabulary: zoo.Vocabulary) -> None:
    section = vocabulary["sound"]
    flat = vocabulary.flatten(tokens_of(SOUND, [1, 2, 3], [4]))
    assert [ids.tolist() for ids in flat] == [
        [section.begin, *(section.offset + code for code in (1, 2, 3)), section.end],
        [section.begin, section.offset + 4, section.end],
    ]


def test_prefixes_of_ordered_tokenizers_only(vocabulary: zoo.Vocabulary) -> None:
    for count in (1, 100, 256):
        [ids] = vocabulary.flatten(tokens_of(ORDERED, [7] * count))
        assert len(vocabulary.split(ids)[0].ids) == count
    with pytest.raises(zoo.InputError, match="'flex' has 257 tokens, not 1 to 256"):
        vocabulary.flatten(tokens_of(ORDERED, [7] * 257))
    for count in (31, 33):
        with pytest.raises(zoo.InputError, match=f"'img' has {count} tokens, not 32"):
            vocabulary.flatten(tokens_of(IMAGE, [7] * count))
        with pytest.raises(zoo.InputError, match=f"position {count + 1}: .* {count} tokens, not 32"):
            vocabulary.split([vocabulary["img"].begin, *[8] * count, vocabulary["img"].end])


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([1, 8], "position 1: id 8 of 'img' stands outside of any item"),
        ([8201], "position 0: id 8201 of 'img' stands outside"),
        ([8200, 9, 1], "position 2: id 1 stands within an item of 'img'"),
        ([8200, 9, 8200], "position 2: id 8200 stands within"),
        ([8200, 9, 9], "ends within an item of 'img', after 2 tokens"),
        ([8200, 8201], "position 1: .*'img' has 0 tokens"),
        ([0, -1], "position 1: id -1 is outside the vocabulary"),
        ([9272], "position 0: id 9272 is outside the vocabulary, 0 to 9269"),
    ],
)
def test_malformed_sequences(vocabulary: zoo.Vocabulary, ids: list[int], reason: str) -> None:
    assert vocabulary.size == 9270
    with pytest.raises(zoo.InputError, match=reason):
        vocabulary.split(ids)


@pytest.mark.parametrize("ids", [torch.tensor([[1, 2]]), torch.tensor([1.0])])
def test_what_is_no_sequence_of_ids(vocabulary: zoo.Vocabulary, ids: Any) -> None:
    with pytest.raises(zoo.InputError, match="position 0: an id is a whole number"):
        vocabulary.split.__wrapped__(vocabulary, ids)


def test_foreign_tokens(vocabulary: zoo.Vocabulary) -> None:
    stranger = zoo.Spec("other", "seed", "image", 8192, 32, fingerprint="ffffffffffffffff", max_tokens=32)
    for use in (vocabulary.flatten, vocabulary.to_text, lambda tokens: vocabulary.join([tokens])):
        with pytest.raises(zoo.MismatchError, match="tokens of other have no place"):
            use(tokens_of(stranger, PICTURE))
    with pytest.raises(zoo.InputError, match="item 1: 8200 is no id of text"):
        vocabulary.join([[1], [8200]])
    with pytest.raises(zoo.InputError, match="pass text="):
        vocabulary.join(["a cat"])


def test_text_and_back(vocabulary: zoo.Vocabulary) -> None:
    image, sound = tokens_of(IMAGE, PICTURE), tokens_of(SOUND, [5, 63])
    assert vocabulary.to_text(sound) == ["<sound><sound_00005><sound_00063></sound>"]
    [written] = vocabulary.to_text(image)
    assert written.startswith("<img><img_08160><img_08161>") and written.endswith("<img_08191></img>")
    found = vocabulary.from_text(f"a cat {written} and <sound> <sound_00005>\n<sound_00063> </sound>")
    assert [part if isinstance(part, str) else part.tokenizer for part in found] == ["a cat ", IMAGE.name, " and ", SOUND.name]
    assert found[1].equal(image) and found[3].equal(sound)
    assert vocabulary.from_text("") == [] and vocabulary.from_text("a <b> c") == ["a <b> c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<sound><sound_00005>", "<sound> has no </sound>"),
        ("<sound>cat</sound>", "'cat' is no token of 'sound'"),
        ("<sound><sound_5></sound>", "'<sound_5>' is no token"),
        ("<sound><sound_00064></sound>", "is no token"),
        ("<sound></sound>", "has 0 tokens"),
        ("<img><img_00001></img>", "has 1 tokens, not 32"),
    ],
)
def test_malformed_text(vocabulary: zoo.Vocabulary, text: str, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        vocabulary.from_text(text)


def transformers_tokenizer() -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=text_tokenizer(), unk_token="[UNK]")


@pytest.mark.parametrize("make", [text_tokenizer, transformers_tokenizer])
def test_text_tokenizers_learn_the_strings(make: object, vocabulary: zoo.Vocabulary) -> None:
    text = make()
    assert vocabulary.extend(text) == vocabulary.size - len(WORDS)
    assert vocabulary.extend(text) == 0, "a second time nothing is new"
    image = tokens_of(IMAGE, PICTURE)
    written = f"draw a cat {vocabulary.to_text(image)[0]}and its purr"
    encoded = text.encode(written, add_special_tokens=False)
    ids = list(getattr(encoded, "ids", encoded))
    assert ids == vocabulary.join(["draw a cat", image, "and its purr"], text=text).tolist()
    found = zoo.Vocabulary.found_in(text, {"img": IMAGE, "flex": ORDERED, "sound": SOUND})
    assert found == vocabulary
    assert zoo.Vocabulary.build(text, {"more": SOUND}).sections[0].offset == vocabulary.size


def test_text_tokenizers_that_do_not_fit(vocabulary: zoo.Vocabulary) -> None:
    text = text_tokenizer()
    text.add_tokens(["<flex_00003>"])
    with pytest.raises(zoo.InputError, match="has '<flex_00003>' already, as id 8"):
        vocabulary.extend(text)
    larger = text_tokenizer()
    larger.add_tokens(["dog"])
    with pytest.raises(zoo.InputError, match="ids up to 8, but this layout goes on at 8"):
        vocabulary.extend(larger)
    with pytest.raises(zoo.InputError, match=r"lacks <img_00000>, .* and 8189 more"):
        zoo.Vocabulary.found_in(text, {"img": IMAGE})
    text.add_tokens([f"<few_{number}>" for number in (0, 2, 1)] + ["<few>", "</few>"])
    few = zoo.Spec("few", "seed", "image", 3, 1)
    with pytest.raises(zoo.InputError, match="not consecutive"):
        zoo.Vocabulary.found_in(text, {"few": few}, {"few": Naming("<few_{}>", "<few>", "</few>")})


def test_other_names(vocabulary: zoo.Vocabulary) -> None:
    """TokenFlow's strings; codes of two tokenizers must not share any."""
    naming = {"image": Naming("<vq_token_{}>", "<img>", "</img>")}
    named = zoo.Vocabulary.build(100, {"image": SOUND}, naming)
    assert named.to_text(tokens_of(SOUND, [3, 12])) == ["<img><vq_token_3><vq_token_12></img>"]
    assert named.from_text("<img><vq_token_3></img>")[0].tolist() == [[3]]
    with pytest.raises(zoo.InputError, match="'<img>' is taken by 'image' and by 'img'"):
        zoo.Vocabulary.build(100, {"image": SOUND, "img": IMAGE}, naming)
    for code, begin, end in (
        ("<a>", "<", ">"),
        ("<{}{}>", "<", ">"),
        ("<{0.x}>", "<", ">"),
        ("<{}>", "<", "<"),
        ("<{}>", "", ">"),
    ):
        with pytest.raises(zoo.InputError):
            Naming(code, begin, end)


def test_no_place_for_continuous_tokenizers() -> None:
    with pytest.raises(zoo.InputError, match="continuous"):
        zoo.Vocabulary.build(10, {"vae": zoo.Spec("vae", "autoencoder_kl", "image", 0, 4)})


def test_files(vocabulary: zoo.Vocabulary, tmp_path: Path) -> None:
    path = vocabulary.save(tmp_path / "vocabulary.json")
    assert zoo.Vocabulary.load(path) == vocabulary
    content = path.read_text()
    for change, reason in (
        (('"size":9270', '"size":9269'), "outside the vocabulary"),
        ((f'"offset":{len(WORDS)}', '"offset":9'), "overlap"),
        (('"size"', '"length"'), "length"),
        (('"name":"flex"', '"name":"img"'), "same name"),
        (('"vocab_size":64', '"vocab_size":"64"'), "vocab_size"),
        (("{", ""), "JSON"),
    ):
        compact = content.replace(": ", ":")
        assert change[0] in compact
        path.write_text(compact.replace(*change, 1))
        with pytest.raises(zoo.FormatError, match=reason) as caught:
            zoo.Vocabulary.load(path)
        assert str(path) in str(caught.value)


def section(name: str, code: str, vocab_size: int, offset: int) -> dict[str, object]:
    naming = {"code": code, "begin": f"<{name}>", "end": f"</{name}>"}
    places = {"offset": offset, "begin": offset + vocab_size, "end": offset + vocab_size + 1}
    return {"name": name, "tokenizer": name, "fingerprint": "", "vocab_size": vocab_size, "naming": naming} | places


def test_size_costs_nothing(tmp_path: Path) -> None:
    """A vocabulary of billions of ids is checked without writing any of them out."""
    path, large = tmp_path / "large.json", 1 << 32
    first, second = section("a", "<a_{:05d}>", large, 0), section("b", "<b_{}>", large, large + 2)
    path.write_text(json.dumps({"size": 2 * large + 4, "sections": [first, second]}))
    vocabulary = zoo.Vocabulary.load(path)
    begin, end = vocabulary["b"].begin, vocabulary["b"].end
    assert vocabulary.split([begin, large + 5, end])[0].tokens.tolist() == [[3]]
    for change, reason in (
        ({"offset": large + 1}, "taken by 'a' and by 'b'"),
        ({"naming": second["naming"] | {"code": "<a_{}>"}}, "'<a_10000>' is taken by 'a' and by 'b'"),
        ({"naming": second["naming"] | {"code": "<a_{:02d}>"}}, "'<a_10000>' is taken"),
        ({"naming": second["naming"] | {"code": "<a_1{}>"}}, "'<a_1.*>' is taken"),
        ({"naming": second["naming"] | {"begin": "<a_00007>"}}, "'<a_00007>' is taken by 'b' and by 'a'"),
        ({"naming": second["naming"] | {"code": "<b_{:0999999999d}>"}}, "must hold one number"),
        ({"vocab_size": 0}, "no ids"),
        ({"offset": -1}, "id -1 of 'b' is outside"),
    ):
        path.write_text(json.dumps({"size": 2 * large + 4, "sections": [first, second | change]}))
        with pytest.raises(zoo.FormatError, match=reason):
            zoo.Vocabulary.load(path)
    for size, sections in ((-1, []), ((1 << 48) + 1, []), (2 * large + 4, [first] * 257)):
        path.write_text(json.dumps({"size": size, "sections": sections}))
        with pytest.raises(zoo.FormatError):
            zoo.Vocabulary.load(path)


def test_strings_that_two_sections_share() -> None:
    """Found exactly where writing all strings out finds one."""
    rng = random.Random(3)
    shared = 0
    for _ in range(600):
        made = []
        for name in ("a", "b"):
            before = rng.choice(["<", "<1", "<12", "<0", "<10", ""])
            behind = rng.choice([">", "1>", "21>", "0>", "00>", ""])
            width = rng.choice(["", ":01d", ":02d", ":03d"])
            naming = Naming(f"{before}{{{width}}}{behind}", f"({name}", f"{name})")
            made.append(Section(name, name, "", rng.choice([1, 2, 9, 11, 25, 120, 1200]), 0, 0, 0, naming))
        one, other = made
        expected = set(map(one.naming.code.format, range(one.vocab_size))) & set(
            map(other.naming.code.format, range(other.vocab_size))
        )
        found = _shared_code(one, other)
        assert (found in expected) if expected else found is None, (one, other)
        shared += bool(expected)
    assert 20 < shared < 580


def test_long_numbers_are_no_codes(vocabulary: zoo.Vocabulary) -> None:
    for number in ("9" * 5_000, "٣" * 5, "-0001"):
        with pytest.raises(zoo.InputError, match="is no token"):
            vocabulary.from_text(f"<sound><sound_{number}></sound>")


# ------------------------------------------------------------------------------------------- grids and published layouts

LAYOUTS = Path(__file__).parent / "golden" / "ibq" / "emu35" / "layout.json"
PICTURES = zoo.Spec("emu3.5", "ibq", "image", 131_072, 256, fingerprint="0123456789abcdef")


def grid_tokens(codes: list[list[int]], fingerprint: str = "") -> zoo.Tokens:
    ids = torch.tensor(codes).flatten()
    return zoo.Tokens.from_sequences(
        [ids], tokenizer="emu3.5", fingerprint=fingerprint, vocab_size=131_072, meta=({"rows": len(codes)},)
    )


@pytest.mark.parametrize(("preset", "key"), [("emu3.5", "emu35"), ("apertus-1.5", "apertus15")])
def test_images_of_published_layouts(preset: str, key: str) -> None:
    vocabulary = zoo.Vocabulary.preset(preset)
    bound = zoo.Vocabulary.preset(preset, {"image": PICTURES})
    for sequence in json.loads(LAYOUTS.read_text())[key]["sequences"]:
        tokens = grid_tokens(sequence["codes"])
        assert vocabulary.flatten(tokens)[0].tolist() == sequence["ids"]
        assert bound.flatten(grid_tokens(sequence["codes"], PICTURES.fingerprint))[0].tolist() == sequence["ids"]
        before, picture, after = vocabulary.split([7, *sequence["ids"], 8])
        assert (before.ids, after.ids) == ((7,), (8,))
        assert picture.tokens.equal(tokens) and picture.tokens.meta == ({"rows": sequence["grid"][0]},)
        if sequence.get("text"):
            assert vocabulary.to_text(tokens) == [sequence["text"]]
        assert vocabulary.from_text(f"see {vocabulary.to_text(tokens)[0]}")[1].equal(tokens)
    assert bound.split(sequence["ids"])[0].tokens.fingerprint == PICTURES.fingerprint


def test_what_is_split_can_be_joined() -> None:
    vocabulary = zoo.Vocabulary.preset("emu3.5")
    ids = [5, 151852, 17, 9, 16, 151851, 151854, 151846, 151855, 151853, 6]
    assert vocabulary.join(vocabulary.split(ids)).tolist() == ids


def test_ids_of_published_layouts() -> None:
    emu, apertus, cosy = (zoo.Vocabulary.preset(name) for name in ("emu3.5", "apertus-1.5", "cosyvoice2"))
    assert emu.size == 282_926
    strings = {
        name: dict(zip(v[s].ids(), v[s].strings(), strict=True))
        for name, v, s in (
            ("emu", emu, "image"),
            ("image", apertus, "image"),
            ("audio", apertus, "audio"),
            ("speech", cosy, "speech"),
        )
    }
    assert strings["emu"][151_854] == "<|visual token 000000|>" and strings["emu"][282_925] == "<|visual token 131071|>"
    assert strings["image"][131_272] == "<|visual token 0|>" and strings["image"][262_343] == "<|visual token 131071|>"
    assert strings["audio"][262_344] == "<|audio token 0|>" and strings["audio"][266_439] == "<|audio token 4095|>"
    assert strings["speech"][151_663] == "<|s_0|>" and strings["speech"][158_223] == "<|s_6560|>"
    assert (cosy["speech"].begin, cosy["speech"].end, cosy.size) == (158_228, 158_224, 158_229)
    assert [apertus["image"].grid.header(12, 9), apertus.size] == [[1049, 1050, 1042, 1057, 131_075], 266_440]


def test_sound_and_speech_of_published_layouts() -> None:
    sound = zoo.Tokens.from_sequences(
        [torch.tensor([0, 4095])], tokenizer="wavtokenizer-large-unify-40", fingerprint="ab" * 8, vocab_size=4096
    )
    apertus = zoo.Vocabulary.preset("apertus-1.5")
    assert apertus.flatten(sound)[0].tolist() == [131_080, 262_344, 266_439, 131_081]
    assert apertus.to_text(sound) == ["<|audio_start|><|audio token 0|><|audio token 4095|><|audio_end|>"]
    cosy = zoo.Vocabulary.preset("cosyvoice2")
    words, speech = cosy.split([158_227, 5, 6, 158_228, 151_663 + 9, 151_663, 158_224])
    assert words.ids == (158_227, 5, 6) and speech.tokens.tolist() == [[9, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: []}, "position 5: the grid has no header"),
        ({2: 151_854}, "position 2: id 151854 stands in the header"),
        ({9: 151_855}, "position 9: row 0 does not have 3 ids"),
        ({7: 151_846}, "position 7: row 0 does not have 3 ids"),
        ({12: 17}, "id 17 of text stands among the ids"),
        ({13: [151_854, 151_853]}, "position 13: something stands behind the last of 2 rows"),
        ({12: []}, "position 12: the grid of 2 x 3 is not complete"),
        ({2: 9}, r"position 5: '\*\*3' is no header"),
        ({2: 15}, r"position 5: '0\*3' is no header"),
    ],
)
def test_broken_grids_are_refused_with_their_position(change: dict[int, int | list[int]], message: str) -> None:
    """Two rows of three ids behind two ids of text: at 1 the marker, 2 to 4 the header, 5 its marker."""
    vocabulary = zoo.Vocabulary.preset("emu3.5")
    sound = [5, *vocabulary.flatten(grid_tokens([[0, 1, 2], [3, 4, 5]]))[0].tolist()]
    assert len(sound) == 14
    [(place, value)] = change.items()
    broken = [*sound[:place], *(value if isinstance(value, list) else [value]), *sound[place + 1 :]]
    with pytest.raises(zoo.InputError, match=message):
        vocabulary.split(broken)


def test_grids_need_their_rows(tmp_path: Path) -> None:
    vocabulary = zoo.Vocabulary.preset("emu3.5")
    bare = zoo.Tokens.from_sequences([[1, 2]], tokenizer="emu3.5", fingerprint="", vocab_size=131_072)
    for tokens in (bare, grid_tokens([[1, 2], [3, 4]]).truncate(3)):
        with pytest.raises(zoo.InputError, match="remember its rows"):
            vocabulary.flatten(tokens)
    assert zoo.Vocabulary.load(vocabulary.save(tmp_path / "layout.json")) == vocabulary
    with pytest.raises(zoo.InputError, match="151846 is no id of text"):
        vocabulary.join([[151_846]])
    for text in ("<|image start|>2*2<|image token|><|visual token 000001|><|image end|>", "<|image start|>7<|image end|>"):
        with pytest.raises(zoo.InputError, match="header"):
            vocabulary.from_text(text)
    with pytest.raises(zoo.InputError, match=r"layouts emu3\.5"):
        zoo.Vocabulary.preset("gpt")
    with pytest.raises(zoo.InputError, match="no section 'sound'"):
        zoo.Vocabulary.preset("emu3.5", {"sound": PICTURES})
    with pytest.raises(zoo.InputError, match="has 131072 ids, and seed-like 8192"):
        zoo.Vocabulary.preset("emu3.5", {"image": IMAGE})
    foreign = zoo.Tokens.from_sequences([[1]], tokenizer="another", fingerprint="ff" * 8, vocab_size=131_072)
    with pytest.raises(zoo.MismatchError, match="no place"):
        vocabulary.flatten(foreign)


# ---- Orpheus, and media in one call


def test_ids_of_orpheus() -> None:
    orpheus = zoo.Vocabulary.preset("orpheus")
    speech = orpheus["speech"]
    names = dict(zip(speech.ids(), speech.strings(), strict=True))
    # N = 10 + 4096 * place + code, at 128256 + N.
    assert (names[128_266], names[128_266 + 6 * 4096 + 5]) == ("<custom_token_10>", f"<custom_token_{10 + 6 * 4096 + 5}>")
    assert (names[128_257], names[128_258], orpheus.size) == ("<custom_token_1>", "<custom_token_2>", 156_940)
    codes = torch.tensor([[0, 4095, 3, 2, 1, 0, 9]])
    tokens = zoo.Tokens.from_codes([codes], frame=speech.frame, tokenizer="snac-24khz", fingerprint="ab" * 8)
    ids = orpheus.flatten(tokens)[0].tolist()
    assert ids == [128_257, *(128_266 + 4096 * place + code for place, code in enumerate(codes[0].tolist())), 128_258]
    before, item, after = orpheus.split([128_259, 5, 128_009, 128_260, 128_261, *ids, 128_262])
    assert item.tokens.codes()[0].tolist() == codes.tolist() and (len(before.ids), after.ids) == (5, (128_262,))
    [text] = orpheus.to_text(tokens)
    assert text.startswith("<custom_token_1><custom_token_10><custom_token_8201>")
    assert orpheus.from_text(text)[0].codes().tolist() == [codes.tolist()]
    # The original drops a code of 0 at the first place, and every place behind it is shifted.
    with pytest.raises(zoo.InputError, match="no whole number of frames"):
        orpheus.split([ids[0], *ids[2:]])
    with pytest.raises(zoo.InputError, match="does not belong to codebook 0"):
        orpheus.split([ids[0], *ids[2:8], ids[1], ids[8]])
    assert speech.code_of("<custom_token_9>") is None and speech.code_of(f"<custom_token_{10 + 7 * 4096}>") is None


def test_numbers_that_do_not_begin_at_zero(tmp_path: Path) -> None:
    def sections(first: int, other: str = "<c_{}>", behind: int = 20) -> tuple[Section, ...]:
        early = Section("early", "one", "", 10, 100, 110, 111, Naming("<c_{}>", "<a>", "</a>", first=5))
        late = Section("late", "two", "", behind, 200, 298, 299, Naming(other, "<b>", "</b>", first=first))
        return early, late

    for first, other in ((14, "<c_{}>"), (0, "<c_{}>"), (3, "<c_1{}>"), (14, "<c_{:01d}>")):
        with pytest.raises(zoo.InputError, match="sections overlap"):
            zoo.Vocabulary(300, sections(first, other))
    vocabulary = zoo.Vocabulary(300, sections(15))
    assert zoo.Vocabulary.load(vocabulary.save(tmp_path / "layout.json")) == vocabulary
    assert "first" not in zoo.Vocabulary.preset("emu3.5").save(tmp_path / "emu.json").read_text()
    zoo.Vocabulary(300, sections(5, "<c_1{}>"))
    zoo.Vocabulary(300, sections(0, behind=5))
    assert vocabulary["late"].code_of("<c_15>") == 0 and vocabulary["early"].code_of("<c_14>") == 9
    with pytest.raises(zoo.InputError, match="begin at 0 or above"):
        Naming("<c_{}>", "<a>", "</a>", first=-1)


def test_text_and_media_in_one_call(tmp_path: Path) -> None:
    snac = small_snac()
    vocabulary = zoo.Vocabulary.build(256, {"sound": snac})
    one, other = torch.sin(torch.arange(400) / 5), torch.cos(torch.arange(90) / 7)
    ids = vocabulary.encode_media([[72, 105], {"sound": one}, {"sound": other}, [33]])
    found = vocabulary.decode_media(ids)
    assert (found[0], found[3]) == ((72, 105), (33,))
    frame = snac.config.coarse_hop
    for media, item in ((found[1], one), (found[2], other)):
        assert media.shape == (1, -(-len(item) // frame) * frame)
        assert torch.allclose(media[:, : len(item)], snac.decode(snac.encode(item))[0], atol=1e-5)
    silent = vocabulary.decode_media(ids, options={"sound": {"noise": "zero"}})
    assert not torch.equal(silent[1], found[1])
    # A file holds no tokenizers, and a layout of Orpheus no checkpoint.
    read = zoo.Vocabulary.load(vocabulary.save(tmp_path / "layout.json"))
    with pytest.raises(zoo.InputError, match=r"pass tokenizers=\{'sound': zoo\.load\('small-snac'\)\}"):
        read.decode_media(ids)
    assert torch.equal(read.decode_media(ids, tokenizers={"sound": snac})[1], found[1])
    with pytest.raises(zoo.InputError, match="no section 'noise'"):
        vocabulary.encode_media([{"noise": one}])
    large = small_snac(0, replace(SMALL_SNAC, codebook_size=4096))
    orpheus = zoo.Vocabulary.preset("orpheus")
    spoken = orpheus.encode_media([[7], {"speech": other}], tokenizers={"speech": large})
    words, media = orpheus.decode_media(spoken, tokenizers={"speech": large})
    assert words == (7,) and media.shape[1] == -(-len(other) // frame) * frame
    with pytest.raises(zoo.InputError, match="small-snac has other ids than 'speech'"):
        orpheus.decode_media(spoken, tokenizers={"speech": snac})


@pytest.mark.parametrize("preset", ["emu3.5", "apertus-1.5"])
def test_pictures_and_sound_of_published_layouts_in_one_call(preset: str) -> None:
    """Small models with as many codes as the published ones."""
    given: dict[str, zoo.Tokenizer] = {"image": small_ibq(replace(SMALL_IBQ, codebook_size=131_072))}
    picture = torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    segments: list[Any] = [[7], {"image": picture}, [8, 9]]
    if preset == "apertus-1.5":
        given["audio"] = WavTokenizer(replace(SMALL, codebook_size=4096), name="small").eval().requires_grad_(False)
        given["audio"].codebook.embed.normal_(generator=torch.Generator().manual_seed(0))
        segments.insert(2, {"audio": torch.sin(torch.arange(900) / 5)})
    layout = zoo.Vocabulary.preset(preset)
    ids = layout.encode_media(segments, tokenizers=given)
    assert torch.equal(ids, zoo.Vocabulary.preset(preset, given).encode_media(segments))
    found = layout.decode_media(ids, tokenizers=given)
    assert (found[0], found[-1], len(found)) == ((7,), (8, 9), len(segments))
    for segment, media in zip(segments, found, strict=True):
        for name, item in segment.items() if isinstance(segment, dict) else ():
            [expected] = given[name].decode(given[name].encode([item]), **({"trim": False} if name == "audio" else {}))
            assert media.shape == expected.shape and torch.allclose(media, expected, atol=1e-5)


def test_media_that_no_tokenizer_makes() -> None:
    speech = small_s3tokenizer()
    layout = zoo.Vocabulary.preset("cosyvoice2", {"speech": speech})
    ids = layout.encode_media([[1], {"speech": torch.sin(torch.arange(16_000) / 9)}])
    assert layout.split(ids)[1].tokens.tolist() == speech.encode(torch.sin(torch.arange(16_000) / 9)).tolist()
    with pytest.raises(zoo.WeightsError, match=r"encode only.*vocoder"):
        layout.decode_media(ids)
