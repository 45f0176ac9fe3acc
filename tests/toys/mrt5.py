"""A small random MrT5 whose gate keeps some bytes and drops others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from zoo.codecs.mrt5 import MrT5, MrT5ModelConfig

SMALL_MRT5 = MrT5ModelConfig(d_model=16, num_layers=3, num_decoder_layers=2, num_heads=2, d_kv=8, d_ff=24, delete_gate_layer=1)


def small_mrt5(**changes: Any) -> MrT5:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MrT5(replace(SMALL_MRT5, **changes), name="small-mrt5").eval().requires_grad_(False)
        model.encoder.delete_gate.linear.weight.mul_(3)
        model.encoder.delete_gate.linear.bias.zero_()
    model.fingerprint = model.compute_fingerprint()
    return model
