"""Latents in memory and in safetensors files, and what a continuous tokenizer says of itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import zoo
from zoo import Latents, Spec

META = ({"width": 64, "height": 48, "fit": "crop"}, {"width": 8, "height": 16, "fit": "none"})


def latents(dtype: torch.dtype = torch.float32, **options: Any) -> Latents:
    generator = torch.Generator().manual_seed(0)
    values = tuple(torch.randn(4, *grid, generator=generator).to(dtype) for grid in ((6, 8), (2, 1)))
    return Latents(**({"values": values, "tokenizer": "some-vae", "fingerprint": "0123456789abcdef", "meta": META} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_files_give_back_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = latents(dtype)
    path = saved.save(tmp_path / "latents.safetensors")
    loaded = Latents.load(path)
    assert loaded.equal(saved)
    assert (loaded.tokenizer, loaded.fingerprint, loaded.meta) == ("some-vae", "0123456789abcdef", META)
    assert [value.dtype for value in loaded.values] == [dtype, dtype]
    assert list(tmp_path.iterdir()) == [path]
    # Any program that reads safetensors can read them.
    assert torch.equal(load_file(path)["1"], saved.values[1])


def test_rows_of_one_tensor_and_odd_layouts_can_be_saved() -> None:
    rows = torch.randn(3, 4, 5, 6)
    for values in (tuple(rows), (rows[0], rows[0]), (rows[0].permute(2, 0, 1),), (), (torch.randn(16),)):
        saved = latents(values=values, meta=())
        assert Latents.from_bytes(saved.to_bytes()).equal(saved)


def test_indexing_iterating_and_joining() -> None:
    both = latents()
    assert len(both) == 2
    assert both[1].meta == (META[1],)
    assert torch.equal(both[-1].values[0], both.values[1])
    assert both[::-1].meta == META[::-1]
    assert both[[1, 1]].values[0] is both.values[1]
    assert Latents.cat(list(both)).equal(both)
    assert Latents.cat([both, latents(meta=())]).meta == ()
    assert not both.equal(both[::-1])
    assert not both.equal(both.to(dtype=torch.float16))
    assert both.to("cpu").equal(both)
    assert both.to(dtype=torch.float16).values[0].dtype == torch.float16
    assert "shapes=[[4, 6, 8], [4, 2, 1]]" in repr(both)
    with pytest.raises(IndexError):
        both[2]


def test_stacking() -> None:
    assert latents(values=(torch.zeros(4, 2, 2), torch.ones(4, 2, 2))).stack().shape == (2, 4, 2, 2)
    with pytest.raises(zoo.InputError, match=r"item 1: latents \[4, 2, 1\] cannot be stacked on \[4, 6, 8\]"):
        latents().stack()
    with pytest.raises(zoo.InputError, match="nothing to stack"):
        latents(values=(), meta=()).stack()


def test_different_checkpoints_do_not_join() -> None:
    with pytest.raises(zoo.MismatchError, match="item 1"):
        Latents.cat([latents(), latents(fingerprint="f" * 16)])
    with pytest.raises(zoo.InputError, match="nothing"):
        Latents.cat([])


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    content = latents().to_bytes()
    for size in range(len(content)):
        with pytest.raises(zoo.FormatError):
            Latents.from_bytes(content[:size])
    (tmp_path / "cut.safetensors").write_bytes(content[:-1])
    with pytest.raises(zoo.FormatError, match=r"cut\.safetensors"):
        Latents.load(tmp_path / "cut.safetensors")


def test_hostile_files_raise_nothing_else() -> None:
    content = latents().to_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for _ in range(3_000):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] = rng.randrange(256)
        try:
            loaded = Latents.from_bytes(bytes(damaged))
        except zoo.FormatError:
            continue
        assert all(value.is_floating_point() for value in loaded.values)
        assert len(loaded.meta) in (0, len(loaded))


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        ({"0": torch.zeros(4)}, {"kind": "something"}, "does not hold latents"),
        ({"0": torch.zeros(4)}, {"version": "9"}, "version 9"),
        ({"1": torch.zeros(4)}, {}, "incomplete"),
        ({"0": torch.zeros(4), "2": torch.zeros(4)}, {}, "incomplete"),
        ({"0": torch.zeros(4, dtype=torch.int64)}, {}, "int64"),
        ({"0": torch.tensor(1.0)}, {}, "tensor 0"),
        ({"0": torch.zeros(4)}, {"meta": "[" * 100_000}, "incomplete or corrupt"),
        ({"0": torch.zeros(4)}, {"meta": "{}"}, "incomplete or corrupt"),
        ({"0": torch.zeros(4)}, {"meta": '[{"a": [1]}]'}, "incomplete or corrupt"),
        ({"0": torch.zeros(4)}, {"meta": '[{"a": 1}, {"a": 2}]'}, "meta of 2 items"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, torch.Tensor], changes: dict[str, str], reason: str) -> None:
    sound = {"kind": "zoo.Latents", "version": "1", "tokenizer": "a", "fingerprint": "", "meta": "[]"}
    assert len(Latents.from_bytes(save({"0": torch.zeros(4)}, sound))) == 1
    with pytest.raises(zoo.FormatError, match=reason):
        Latents.from_bytes(save(tensors, sound | changes))


def test_other_files_are_told_apart() -> None:
    tokens = zoo.Tokens.from_sequences([torch.arange(3)], tokenizer="a", fingerprint="", vocab_size=8)
    with pytest.raises(zoo.FormatError, match=r"zoo\.Tokens\.load"):
        Latents.from_bytes(tokens.to_bytes())
    with pytest.raises(zoo.FormatError, match="does not hold latents"):
        Latents.from_bytes(save({"weight": torch.zeros(2)}))
    with pytest.raises(zoo.FormatError):
        Latents.from_bytes(b"")


def test_spec_of_continuous_and_of_ordered_tokenizers() -> None:
    vae = Spec("vae", "flextok_vae", "image", 0, 16)
    assert vae.continuous
    assert (vae.bits_per_token, vae.bit_rate, vae.bits_per_item) == (0, None, None)
    ordered = Spec("flextok", "flextok", "image", 64_000, 6, ordered=True, image_size=(256, 128), max_tokens=256)
    assert not ordered.continuous
    assert (ordered.bits_per_token, ordered.bits_per_item, ordered.bit_rate) == (16, 4096, None)
    for spec in (vae, ordered):
        assert json.loads(json.dumps(spec.as_dict()))["bits_per_item"] == spec.bits_per_item


def test_masks_choose_items() -> None:
    latents = zoo.Latents(tuple(torch.full((2, 3), float(i)) for i in range(3)), "a", "", tuple({"n": i} for i in range(3)))
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        chosen = latents[mask]
        assert [int(value[0, 0]) for value in chosen.values] == [0, 2] and chosen.meta == ({"n": 0}, {"n": 2})
    assert latents[-1].meta == ({"n": 2},) and len(latents[1:]) == 2
    with pytest.raises(zoo.InputError):
        latents[[True, False]]
