"""MrT5's delete gate gives the original's results, and a batch gives what its rows give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import zoo
from zoo.compress.mrt5 import (
    DeleteGate,
    DeletionController,
    MrT5Config,
    MrT5Encoder,
    byte_ids,
    deletion_loss,
    deletion_rate,
    gathered_positions,
    softmax1,
)

TINY = MrT5Config(vocab_size=64, d_model=16, num_layers=4, num_heads=2, d_kv=8, d_ff=24, delete_gate_layer=1)


@pytest.fixture
def case(golden: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    folder = golden / "compress" / "kv-mrt5-gate2"
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")


def tiny(seed: int = 0, **changes: Any) -> MrT5Encoder:
    torch.manual_seed(seed)
    encoder = MrT5Encoder(replace(TINY, **changes)).eval().requires_grad_(False)
    # So that some tokens go and some stay.
    encoder.delete_gate.linear.weight.mul_(3)
    encoder.delete_gate.linear.bias.zero_()
    return encoder


def test_golden(case: tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]) -> None:
    config, weights, io = case
    encoder = MrT5Encoder.from_upstream(config, weights)
    with torch.no_grad():
        soft = encoder(io["input_ids"], io["attention_mask"], deletion="soft")
        hard = encoder(io["input_ids"], io["attention_mask"], deletion="hard")
    torch.testing.assert_close(soft.gate_logits, io["gate_logits"][..., 0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(soft.gate, io["gate_output"][..., 0], atol=2e-5, rtol=2e-5)
    assert torch.equal(hard.keep, io["keep"])
    real = io["attention_mask"].bool()
    torch.testing.assert_close(soft.hidden[real], io["soft_encoder_output"][real], atol=2e-5, rtol=2e-5)
    assert torch.equal(hard.decoder_bias, io["hard_decoder_gate_mask"][..., 0])
    # The original's mask lets filler pass, which its gate then hides.
    left = io["hard_attention_mask"].bool() & (io["hard_decoder_gate_mask"][..., 0] == 0)
    assert torch.equal(hard.attention_mask, left)
    torch.testing.assert_close(hard.hidden[left], io["hard_encoder_output"][left], atol=2e-5, rtol=2e-5)


def test_without_deletion_it_is_the_encoder_of_t5() -> None:
    encoder = tiny()
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0
    )
    t5 = T5EncoderModel(config).eval()
    ours = MrT5Encoder.from_upstream(
        config.to_dict() | {"delete_gate_layer": 1},
        t5.state_dict() | {f"encoder.block.1.delete_gate.{name}": tensor for name, tensor in gate_entries(encoder).items()},
    )
    ids, mask = torch.randint(3, 64, (2, 150)), torch.ones(2, 150, dtype=torch.bool)
    mask[0, 140:] = False
    with torch.no_grad():
        expected = t5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        actual = ours(ids, mask, deletion="none").hidden
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=1e-4)


def gate_entries(encoder: MrT5Encoder) -> dict[str, Tensor]:
    gate = encoder.delete_gate
    return {
        "layer_norm.weight": gate.norm.weight,
        "feed_forward.weight": gate.linear.weight,
        "feed_forward.bias": gate.linear.bias,
    }


@pytest.mark.parametrize("deletion", ["hard", "soft", "none"])
@pytest.mark.parametrize("changes", [{}, {"use_softmax1": True}, {"gate_layer_norm": False}, {"feed_forward_proj": "relu"}])
def test_a_batch_gives_what_its_rows_give(deletion: Any, changes: dict[str, Any]) -> None:
    encoder = tiny(**changes)
    texts = [b"a short text", b"a longer text, with more of everything!", b"x"]
    ids, mask = byte_ids([bytes(byte % 60 for byte in text) for text in texts])
    together = encoder(ids, mask, deletion)
    kept = set()
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = encoder(ids[row : row + 1, :length], None, deletion)
        count = int(alone.kept_lengths[0])
        kept.add(count)
        assert int(together.kept_lengths[row]) == count
        assert torch.equal(together.positions[row, :count], alone.positions[0, :count])
        torch.testing.assert_close(together.hidden[row, :count], alone.hidden[0, :count], atol=1e-5, rtol=1e-4)
    assert deletion != "hard" or max(kept) < mask.shape[1], "some tokens have to go"


def test_a_threshold_below_every_gate_keeps_everything() -> None:
    encoder = tiny(deletion_threshold=-31.0)
    ids, mask = torch.randint(3, 60, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 15:], ids[1, 15:] = False, 0
    hard, none = encoder(ids, mask, "hard"), encoder(ids, mask, "none")
    assert torch.equal(hard.attention_mask, mask)
    torch.testing.assert_close(hard.hidden[mask], none.hidden[mask], atol=1e-6, rtol=1e-5)


def test_soft_and_hard_agree_when_gates_are_saturated() -> None:
    encoder = tiny()
    encoder.delete_gate.linear.weight.mul_(1e5)
    ids, mask = byte_ids([b"some bytes to be deleted", b"and others"])
    ids = ids % 64
    soft, hard = encoder(ids, mask, "soft"), encoder(ids, mask, "hard")
    for row, count in enumerate(hard.kept_lengths.tolist()):
        assert 0 < count < int(mask[row].sum())
        torch.testing.assert_close(
            hard.hidden[row, :count], soft.hidden[row, hard.positions[row, :count]], atol=1e-5, rtol=1e-4
        )


def test_a_row_that_loses_everything_keeps_its_first_token() -> None:
    encoder = tiny()
    encoder.delete_gate.linear.bias.fill_(-1e6)
    out = encoder(torch.randint(3, 60, (2, 9)))
    assert not out.keep.any() and out.kept_lengths.tolist() == [1, 1] and out.positions.tolist() == [[0], [0]]
    assert out.hidden.isfinite().all() and (out.decoder_bias == 0).all()


def test_gathered_positions() -> None:
    keep = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    positions, filled = gathered_positions(keep)
    assert filled.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert [row[mask].tolist() for row, mask in zip(positions, filled, strict=True)] == [[1, 3], [0], [0, 1, 2]]


def test_softmax1_is_a_softmax_with_a_score_of_zero() -> None:
    scores = torch.tensor([[1.0, -2.0, 0.5], [-1e4, -1e4, -1e4], [90.0, 1.0, 88.0]])
    expected = torch.cat([scores, torch.zeros(3, 1)], dim=-1).softmax(-1)[:, :3]
    torch.testing.assert_close(softmax1(scores), expected)


def test_noise_only_in_training_and_of_gumbel_s_distribution() -> None:
    gate = DeleteGate(4)
    x, real = torch.zeros(1, 200_000, 4), torch.ones(1, 200_000, dtype=torch.bool)
    logits, gates = gate(x, real)
    assert (logits == 1).all() and torch.allclose(gates, -30 * torch.sigmoid(torch.tensor(-1.0)))
    torch.manual_seed(0)
    noise = gate(x, real, noise=True)[0] - 1
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)


def test_gradients_reach_the_gate_through_soft_deletion() -> None:
    encoder = MrT5Encoder(TINY)
    ids, mask = torch.randint(3, 60, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    out = encoder(ids, mask, "soft")
    (out.hidden.square().mean() + deletion_loss(out.gate, mask)).backward()
    assert encoder.delete_gate.linear.weight.grad.abs().sum() > 0


def test_losses_leave_padding_out() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    gate = torch.tensor([[-30.0, -6.0, -30.0], [0.0, -30.0, -30.0]])
    assert deletion_loss(gate, real).item() == pytest.approx(-12)
    assert deletion_rate(gate > -15, real).item() == pytest.approx(1 / 3)


def test_controller() -> None:
    controller = DeletionController(target=0.5, proportional=0.5, integral=0.1)
    assert controller.update(0.1) == pytest.approx(0.1 * 0.5 * 0.4 + 0.1 * 0.4)
    assert controller.update(0.3) == pytest.approx(0.9 * 0.02 + 0.1 * 0.5 * 0.2 + 0.04 + 0.1 * 0.2)
    assert DeletionController(target=0.1).update(0.9) == 0


def test_bad_checkpoints_and_inputs(case: tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]) -> None:
    config, weights, _ = case
    with pytest.raises(zoo.KeysError, match="unexpected"):
        MrT5Encoder.from_upstream(config, weights | {"encoder.surprise": torch.zeros(1)})
    with pytest.raises(zoo.KeysError, match="missing: delete_gate"):
        MrT5Encoder.from_upstream(config, {key: tensor for key, tensor in weights.items() if "delete_gate" not in key})
    with pytest.raises(zoo.KeysError, match="wrong shapes"):
        MrT5Encoder.from_upstream(config | {"d_ff": 63}, weights)
    MrT5Encoder.from_upstream(config, weights | {"decoder.anything": torch.zeros(1), "lm_head.weight": torch.zeros(1)})
    encoder = tiny()
    for ids, message in (
        (torch.tensor([[64]]), "id 64"),
        (torch.tensor([[-1]]), "id -1"),
        (torch.zeros(1, 0).long(), "no bytes"),
    ):
        with pytest.raises(zoo.InputError, match=message):
            encoder(ids)
    with pytest.raises(zoo.InputError, match="deletion is one of hard"):
        encoder(torch.tensor([[5]]), deletion="all")
    with pytest.raises(zoo.InputError, match="nothing"):
        byte_ids([])
    with pytest.raises(zoo.InputError, match="no block 9"):
        replace(TINY, delete_gate_layer=9)
