"""MrT5 as a whole: the original's encoder and decoder, and texts whose kept bytes are remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import zoo
from toys.mrt5 import SMALL_MRT5, small_mrt5
from zoo import registry
from zoo.checkpoint import as_ours, require_complete
from zoo.codecs.mrt5 import MrT5
from zoo.codecs.mrt5.checkpoint import CHECKPOINT
from zoo.codecs.mrt5.training import losses
from zoo.nn.mrt5 import DeletionController

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent for path in (GOLDEN / "mrt5").glob("*/config.json"))
TEXTS = ["Müller sees the red ball.", b"ACGT\xff", "今天天气很好", "", "x"]


def gate_entries(model: MrT5) -> dict[str, Tensor]:
    gate, stem = model.encoder.delete_gate, f"encoder.block.{model.config.delete_gate_layer}.delete_gate"
    return {
        f"{stem}.layer_norm.weight": gate.norm.weight,
        f"{stem}.feed_forward.weight": gate.linear.weight,
        f"{stem}.feed_forward.bias": gate.linear.bias,
    }


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_golden(folder: Path) -> None:
    io, config = load_file(folder / "io.safetensors"), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = zoo.load_upstream("mrt5", folder / "config.json", folder / "weights.safetensors")

    def same(actual: Tensor, key: str, tolerance: float = 2e-5) -> None:
        torch.testing.assert_close(actual, io[key].reshape(actual.shape), atol=tolerance, rtol=2e-5)

    with torch.no_grad():
        for mode in ("soft", "hard"):
            output = model(io["input_ids"], io["labels"], deletion=mode)
            left = output.encoder.attention_mask
            same(output.logits, f"{mode}.logits", 1e-4)
            same(output.loss, f"{mode}.loss")
            same(output.encoder.decoder_bias, f"{mode}.decoder_gate")
            torch.testing.assert_close(output.encoder.hidden[left], io[f"{mode}.encoder_output"][left], atol=2e-5, rtol=2e-5)
    same(output.encoder.gate, "gate")
    same(output.encoder.gate_logits, "gate_logits")
    same(output.gate_loss, "gate_loss")
    same(output.deletion_rate, "deletion_rate")
    assert torch.equal(output.encoder.keep, io["keep"].bool())

    tokens = model.encode(config["meta"]["texts"])
    assert torch.equal(tokens.ids.clamp(min=0), io["input_ids"])
    vectors = model.embed(tokens)
    for index, kept in enumerate(model.kept(tokens)):
        alone = io[f"alone.{index}.encoder_output"]
        torch.testing.assert_close(vectors[index, : len(alone)], alone, atol=2e-5, rtol=2e-5)
        assert kept.positions.tolist() == io["keep"][index].nonzero().flatten().tolist() and len(alone) == len(kept.ids)
    written = model.generate(tokens, max_new_tokens=io["greedy"].shape[1] - 1)
    assert torch.equal(written.ids, io["greedy"][:, 1:])

    controller = DeletionController(0.5)
    found = [controller.update(rate) for rate in io["controller.rates"].tolist()]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), io["controller.alpha"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", ["small", "large"])
def test_manifests_fill_the_models(size: str) -> None:
    manifest = json.loads((GOLDEN / "manifests" / f"text-mrt5-{size}.json").read_text(encoding="utf-8"))
    entry = registry.get(f"mrt5-{size}")
    assert (entry.weights.repo, entry.weights.file) == (manifest["hf_repo"], manifest["file"])
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in manifest["tensors"].items()}
    wanted = {key: tensor for key, tensor in state.items() if CHECKPOINT.wanted(key)}
    found, named = CHECKPOINT.convert(wanted, None)
    assert found == registry.check_config(entry)
    require_complete(MrT5, found, named)
    with pytest.raises(zoo.KeysError, match="unexpected"):
        as_ours(MrT5, wanted | {"decoder.block.0.layer.3.extra.weight": torch.zeros(1)}, None)
    with pytest.raises(zoo.KeysError, match=r"missing: decoder\.head\.weight"):
        as_ours(MrT5, {key: tensor for key, tensor in wanted.items() if key != "lm_head.weight"}, None)


def test_with_nothing_deleted_it_is_t5() -> None:
    """Encoder, decoder and greedy writing of transformers' T5, with a threshold below every gate."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    config = T5Config(
        **sizes,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config).eval()
    state = {key: tensor.detach() for key, tensor in t5.state_dict().items()} | gate_entries(small_mrt5())
    settings = config.to_dict() | {"delete_gate_layer": 1, "deletion_threshold": -31.0, "tie_word_embeddings": False}
    ours = zoo.load_upstream("mrt5", settings, state)
    tokens = ours.encode(TEXTS)
    ids, mask = tokens.ids.clamp(min=0), tokens.ids >= 0
    labels = torch.randint(3, 259, (len(TEXTS), 40))
    labels[2, 7:] = -100
    with torch.no_grad():
        theirs = t5(input_ids=ids, attention_mask=mask.long(), labels=labels)
        for mode in ("none", "hard"):
            output = ours(ids, labels, mask, mode)
            torch.testing.assert_close(output.logits, theirs.logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(output.loss, theirs.loss, atol=1e-5, rtol=1e-4)
        written = t5.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=9, do_sample=False)
    for row, found in zip(written.tolist(), ours.generate(tokens, max_new_tokens=9).tolist(), strict=True):
        assert row[1 : 1 + len(found)] == found and not any(row[1 + len(found) :])


@pytest.mark.parametrize("changes", [{}, {"deletion_type": "log_sigmoid", "deletion_threshold": -0.7}, {"use_softmax1": True}])
def test_a_batch_gives_what_its_items_give(changes: dict[str, Any]) -> None:
    model = small_mrt5(**changes)
    texts = [*TEXTS, "a longer text than the others, so that they are padded", b"\x00" * 9, "Ω"]
    tokens = model.encode(texts)
    shares = [len(kept.ids) / length for kept, length in zip(model.kept(tokens), tokens.lengths.tolist(), strict=True)]
    assert min(shares) < 1 and max(shares) > 0, "some bytes go and some stay"
    vectors, written = model.embed(tokens), model.generate(tokens, max_new_tokens=5)
    for index, alone in enumerate(tokens):
        kept = len(model.kept(alone)[0].ids)
        torch.testing.assert_close(model.embed(alone)[0], vectors[index, :kept], atol=1e-5, rtol=1e-4)
        assert model.generate(alone, max_new_tokens=5).tolist()[0] == written.tolist()[index]
    # The encoder's own batch, padded, gives the same vectors.
    output = model.encoder(tokens.ids.clamp(min=0), tokens.ids >= 0)
    assert output.kept_lengths.tolist() == [len(kept.ids) for kept in model.kept(tokens)]
    torch.testing.assert_close(output.hidden[output.attention_mask], vectors[output.attention_mask], atol=1e-5, rtol=1e-4)


def test_texts_come_back_whatever_is_kept() -> None:
    model = small_mrt5()
    for options in ({}, {"keep": 0.4}, {"keep": 1.0}, {"positions": False}, {"specials": "none"}):
        tokens = model.encode(TEXTS, **options)
        assert model.decode(tokens) == TEXTS
        assert zoo.Tokens.from_bytes(tokens.to_bytes()).equal(tokens)
    assert model.encode("ab").tolist() == [[100, 101, 1]]
    assert model.encode("ab", specials="none").tolist() == [[100, 101]]


def test_a_share_is_kept() -> None:
    model = small_mrt5()
    tokens = model.encode(["some text of a few words"] * 2 + ["x"], keep=0.4)
    kept = model.kept(tokens)
    assert [len(found.ids) for found in kept] == [10, 10, 1]
    assert kept[0].ids.tolist() == tokens.ids[0, kept[0].positions].tolist()
    gate = model.encoder.gates(tokens.ids[:1])[0]
    assert gate[kept[0].positions].min() >= gate.sort(descending=True).values[9]
    assert model.embed(tokens).shape == (3, 10, 16)
    # Of equals the first: all bytes are alike to a gate that looks at nothing.
    model.encoder.delete_gate.linear.weight.zero_()
    assert model.kept(model.encode("abcdefgh", keep=0.5))[0].positions.tolist() == [0, 1, 2, 3, 4]
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(zoo.ArgumentError, match="keep is a share"):
            model.encode("x", keep=share)


def test_rows_that_keep_nothing_keep_their_first_id() -> None:
    model = small_mrt5()
    model.encoder.delete_gate.linear.bias.fill_(-100)
    tokens = model.encode(["ab", "c"])
    assert [found.positions.tolist() for found in model.kept(tokens)] == [[0], [0]]
    assert model.embed(tokens).shape == (2, 1, 16) and torch.isfinite(model.embed(tokens)).all()
    assert len(model.generate(tokens, max_new_tokens=3)) == 2


def test_what_cannot_be_used_is_named() -> None:
    model = small_mrt5()
    tokens = model.encode(["ab", "c" * 40])
    assert len(model.kept(tokens.truncate(7))[1].ids) == int(model.kept(tokens)[1].positions.lt(7).sum())
    damaged = model.tokens(tokens.unpadded(), [tokens.meta[0], {**tokens.meta[1], "kept": b"\x01"}])
    with pytest.raises(zoo.ItemError, match="item 1: 8 positions are remembered of 41 ids"):
        model.kept(damaged)
    with pytest.raises(zoo.ItemError, match="item 1: 9001 ids are more than the 8192"):
        model.encode(["a", "a" * 9000])
    assert model.encode("a" * 9000, positions=False).lengths.tolist() == [9001]
    with pytest.raises(zoo.ItemError, match="item 0: there are no ids"):
        model.generate(model.encode("", specials="none"))
    with pytest.raises(zoo.ItemError, match="id 2 is the unknown one"):
        model.decode([[2]])


def test_parts(tmp_path: Path) -> None:
    model = small_mrt5()
    model.save_pretrained(tmp_path)
    encoder = zoo.load(f"local-dir:{tmp_path}", parts="encoder")
    tokens = encoder.encode("a text")
    assert torch.equal(encoder.embed(tokens), model.embed(tokens))
    with pytest.raises(zoo.WeightsError, match="writing text needs the decoder"):
        encoder.generate(tokens)
    assert SMALL_MRT5.parts == ("encoder", "decoder")


def test_the_rate_of_deletion_is_held() -> None:
    """Fine-tuning a small model towards a rate brings it there, and the gate's loss has the weight of the step before."""
    torch.manual_seed(0)
    model = small_mrt5().requires_grad_(True).train()
    controller = DeletionController(target=0.5, proportional=5.0, integral=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.randint(3, 259, (4, 24))
    ids[:, -1] = 1
    rates, weights = [], []
    for _ in range(60):
        found = losses(model, ids, ids[:, :8], controller)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        rates.append(found.rate)
        weights.append(found.weight)
    again = DeletionController(target=0.5, proportional=5.0, integral=0.05)
    assert weights == [0.0, *(again.update(rate) for rate in rates[:-1])]
    assert model.encoder.delete_gate.linear.weight.grad.abs().sum() > 0
    assert abs(sum(rates[-10:]) / 10 - 0.5) < 0.2


def test_what_is_kept_may_take_part_in_training() -> None:
    model = small_mrt5()
    [kept] = model.kept(model.encode("a few words"))
    table = torch.nn.Embedding(model.spec.vocab_size, 2)
    table(kept.ids).sum().backward()
    assert not kept.ids.is_inference() and not kept.positions.is_inference()
    assert int(table.weight.grad.sum()) == 2 * len(kept.ids)  # type: ignore[union-attr]  # there is one behind `backward`
