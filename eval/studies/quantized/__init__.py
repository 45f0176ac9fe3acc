"""Measures of quantized models: a module for each kind of media, with a ``SUBJECT``."""

from zoo.moved import names_of

#: Names of the former module `zoo.eval.quantize_subjects`, for one release.
__getattr__ = names_of(
    __name__,
    {
        **dict.fromkeys(("TOGETHER", "Subject", "signal_to_noise"), "zoo.eval.studies.quantized.base"),
        "Files": "zoo.eval.studies.quantized.bytes",
        "Pictures": "zoo.eval.studies.quantized.image",
        "Recordings": "zoo.eval.studies.quantized.audio",
    },
)
