"""Key-value cache policies on transformers' own caches: H2O, Double Sparsity, TidalDecode, TokenSelect.

    with zoo.compress.kv.apply(model, zoo.compress.kv.H2O(heavy=0.1, recent=0.1)):
        model.generate(**inputs)

H2O (arXiv 2306.14048) drops entries and makes the cache smaller; Double Sparsity (arXiv 2408.07092) and TidalDecode
(arXiv 2410.05076) keep all of them and read fewer in each decoding step; TokenSelect
(arXiv 2411.02886) reads fewer in the prompt too.
"""

from zoo.compress.kv.attach import PolicyHandle, apply, calibrate, remove
from zoo.compress.kv.cache import PolicyLayer, SelectionStats, Step
from zoo.compress.kv.policies import H2O, Budget, DoubleSparsity, Policy, TidalDecode
from zoo.compress.kv.tensors import (
    attention_logits,
    attention_mass,
    causal_rows,
    channel_labels,
    channel_mass,
    channel_order,
    fake_quantized,
    gather_entries,
    grouped,
    h2o_kept,
    h2o_scores,
    label_scores,
    merged_values,
    selected_attention,
    top_tokens,
)
from zoo.compress.kv.tokenselect import TokenSelect, rotated, token_votes
from zoo.moved import names_of

__all__ = [
    "H2O",
    "Budget",
    "DoubleSparsity",
    "Policy",
    "PolicyHandle",
    "PolicyLayer",
    "SelectionStats",
    "Step",
    "TidalDecode",
    "TokenSelect",
    "apply",
    "attention_logits",
    "attention_mass",
    "calibrate",
    "causal_rows",
    "channel_labels",
    "channel_mass",
    "channel_order",
    "fake_quantized",
    "gather_entries",
    "grouped",
    "h2o_kept",
    "h2o_scores",
    "label_scores",
    "merged_values",
    "remove",
    "rotated",
    "selected_attention",
    "token_votes",
    "top_tokens",
]


#: Former names, for one release.
__getattr__ = names_of(__name__, {"Handle": "zoo.compress.kv.attach:PolicyHandle"})
