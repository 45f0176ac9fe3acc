"""Low-bit floating point (Chen, Giannoula, Moshovos 2024, arXiv 2408.06995): formats, rounding, search, learned rounding.

Everything there is about number formats, in one place to import from; `zoo.quantize` is the call that uses it on a model.
"""

from zoo.kernels.formats import FloatFormat, finite, format_named, integer, values
from zoo.kernels.packing import pack, unpack
from zoo.moved import names_of
from zoo.quantization.blocks import Blocks, block_scales, dequantize, quantize_mx, quantize_nvfp4
from zoo.quantization.layers import Granularity, Grid, LowBitLayer, choose_grid
from zoo.quantization.learned import (
    Learned,
    LearningConfig,
    Neighbours,
    hard_weight,
    inverse_rectified_sigmoid,
    learn,
    neighbours,
    output_error,
    rectified_sigmoid,
    regularizer,
)
from zoo.quantization.rounding import decode, encode, fake_quantize, round_to
from zoo.quantization.search import Found, mantissa_splits, search

__all__ = [
    "Blocks",
    "FloatFormat",
    "Found",
    "Granularity",
    "Grid",
    "Learned",
    "LearningConfig",
    "LowBitLayer",
    "Neighbours",
    "block_scales",
    "choose_grid",
    "decode",
    "dequantize",
    "encode",
    "fake_quantize",
    "finite",
    "format_named",
    "hard_weight",
    "integer",
    "inverse_rectified_sigmoid",
    "learn",
    "mantissa_splits",
    "neighbours",
    "output_error",
    "pack",
    "quantize_mx",
    "quantize_nvfp4",
    "rectified_sigmoid",
    "regularizer",
    "round_to",
    "search",
    "unpack",
    "values",
]


#: Former names, for one release.
__getattr__ = names_of(__name__, {"FloatLayer": "zoo.quantization.layers:LowBitLayer"})
