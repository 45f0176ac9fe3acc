"""Table of the methods and the models they go into, readable without torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from zoo.moved import names_of

Place = Literal["tower", "llm", "both"]


class MethodInfo(NamedTuple):
    """One method of `zoo.compress.apply`.

    Attributes:
        summary: what it does, in a sentence.
        stage: where tokens go: ``tower`` before the language model, ``llm`` inside it, ``both``.
        home: module and class, ``"module:Class"``.
        source: the paper.
        trained: it needs weights of its own.
    """

    summary: str
    stage: Place
    home: str
    source: str
    trained: bool = False


METHODS: dict[str, MethodInfo] = {
    "mustdrop": MethodInfo(
        "Merges uniform windows in the tower, drops what the text does not look at in the language model, evicts the cache.",
        "both",
        "zoo.compress.mustdrop:MustDrop",
        "arXiv 2411.10803",
    ),
    "globalcom2": MethodInfo(
        "The thumbnail of a LLaVA-NeXT image decides how many tokens each crop keeps, and which.",
        "tower",
        "zoo.compress.globalcom2:GlobalCom2",
        "arXiv 2501.05179",
    ),
    "quecc": MethodInfo(
        "A trained projector that turns the grid into a few tokens by attention in regions, given the question.",
        "tower",
        "zoo.compress.quecc:QueCCMethod",
        "arXiv 2411.03312",
        trained=True,
    ),
    "fastv": MethodInfo(
        "Keeps the tokens that the last prompt token looks at in an early layer.",
        "llm",
        "zoo.compress.peers:FastV",
        "arXiv 2403.06764",
    ),
    "pyramiddrop": MethodInfo(
        "Keeps fewer and fewer of the tokens that the last prompt token looks at, in stages.",
        "llm",
        "zoo.compress.peers:PyramidDrop",
        "arXiv 2410.17247",
    ),
    "visionzip": MethodInfo(
        "Keeps the tokens that [CLS] looks at in the tower and merges the rest into a few.",
        "tower",
        "zoo.compress.peers:VisionZip",
        "arXiv 2412.04467",
    ),
    "prumerge": MethodInfo(
        "Keeps the tokens that [CLS] looks at, each with a weighted sum of its nearest neighbours added.",
        "tower",
        "zoo.compress.peers:PruMerge",
        "arXiv 2403.15388",
    ),
    "tome": MethodInfo(
        "Merges the most similar pairs of tokens in every layer of the tower.",
        "tower",
        "zoo.compress.peers:ToMe",
        "arXiv 2210.09461",
    ),
    "random": MethodInfo("Keeps tokens chosen by chance.", "llm", "zoo.compress.peers:Random", "baseline"),
    "uniform": MethodInfo("Keeps tokens at equal distances.", "llm", "zoo.compress.peers:Uniform", "baseline"),
    "pool": MethodInfo("Averages neighbouring tokens.", "tower", "zoo.compress.peers:Pool", "baseline"),
}

# Classes of transformers that `zoo.compress.apply` takes; those of Qwen only with methods that act in the language model.
SUPPORTED: tuple[str, ...] = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)


#: Former names, for one release.
__getattr__ = names_of(__name__, {"Stage": "zoo.compress.methods:Place"})
