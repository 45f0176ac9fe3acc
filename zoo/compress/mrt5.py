"""MrT5's delete gate: the encoder that learns what to drop, and the control of its rate of deletion.

The layers are those of `zoo.nn.mrt5`; `zoo.codecs.mrt5` is the whole model, with its decoder, as a tokenizer of texts.
"""

from zoo.nn.mrt5 import (
    DELETIONS,
    EOS,
    FIRST_BYTE,
    PAD,
    DeleteGate,
    DeletionController,
    MrT5Config,
    MrT5Encoder,
    MrT5Output,
    byte_ids,
    deletion_loss,
    deletion_rate,
    gathered_positions,
    relative_buckets,
    softmax1,
)

__all__ = [
    "DELETIONS",
    "EOS",
    "FIRST_BYTE",
    "PAD",
    "DeleteGate",
    "DeletionController",
    "MrT5Config",
    "MrT5Encoder",
    "MrT5Output",
    "byte_ids",
    "deletion_loss",
    "deletion_rate",
    "gathered_positions",
    "relative_buckets",
    "softmax1",
]
