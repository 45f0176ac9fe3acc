"""Kinds of media in the evaluation: metrics, baseline, and how an item is read, measured and shown."""

from zoo.moved import names_of

#: Names of the former module, for one release.
__getattr__ = names_of(
    __name__,
    {
        **dict.fromkeys(("Metric", "MetricFunction", "Network", "Row", "Variant"), "zoo.eval.modality.base"),
        "Modality": "zoo.eval.modality.base:Measures",
        "modality_named": "zoo.eval.modality.base:measures_of",
    },
)
