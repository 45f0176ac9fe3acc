"""Former names go on working, and say so."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import zoo
from zoo import moved


@pytest.mark.parametrize(("former", "present"), moved.MODULES.items())
def test_a_former_module_is_the_present_one(former: str, present: str) -> None:
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"^{former} is {present} now$") as warned:
        found = import_module(former)
    assert warned[-1].category is DeprecationWarning
    expected = import_module(present)
    if former in moved.FUNCTIONS:
        home, _, function = moved.FUNCTIONS[former].partition(":")
        expected = getattr(import_module(home), function)
    assert found is expected is sys.modules[former]
    assert found.__spec__ is None or found.__spec__.name == present


def test_the_longest_name_counts() -> None:
    assert moved.present_name("zoo.quantize.fp") == "zoo.quantization.fp"
    assert moved.present_name("zoo.quantize.formats") == "zoo.kernels.formats"
    assert moved.present_name("zoo.quantized") is moved.present_name("zoo") is moved.present_name("quantize") is None


def test_quantize_is_a_function_and_for_now_a_package_too() -> None:
    code = """
import pickle, warnings
import zoo
assert pickle.loads(pickle.dumps(zoo.quantize)) is zoo.quantize
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert zoo.quantize.Policy is zoo.quantization.Policy
    assert list(zoo.quantize.names()) == list(zoo.quantization.names())
    function = zoo.quantize
    from zoo.quantize import LearningConfig, binary, plan, quantize
    import zoo.quantize.fp as fp
    import zoo.quantize.layers
    assert binary is zoo.quantization.binary and fp is zoo.quantization.fp and quantize is zoo.quantize is function
    assert zoo.quantize.layers is zoo.quantization.layers
    assert LearningConfig is zoo.quantization.LearningConfig
    for statement in ("import zoo.quantize.nothing", "from zoo.quantize import nothing"):
        try:
            exec(statement)
        except ImportError as error:
            assert "nothing" in str(error) and "zoo.quantize" in str(error), error
        else:
            raise AssertionError(statement)
said = [(str(one.message), one.filename) for one in said if one.category is DeprecationWarning]
assert said == [
    ("zoo.quantize.names is zoo.quantization.methods.names now", "<string>"),
    ("zoo.quantize is zoo.quantization now", "<string>"),
    ("zoo.quantize.binary is zoo.quantization.binary now", "<string>"),
    ("zoo.quantize.fp is zoo.quantization.fp now", "<string>"),
    ("zoo.quantize.layers is zoo.quantization.layers now", "<string>"),
], said
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert inspect.isfunction(zoo.quantize)
    assert list(inspect.signature(zoo.quantize).parameters)[:2] == ["model", "method"]


@pytest.mark.parametrize(
    ("module", "name", "present"),
    [
        ("zoo.bench.measure", "device_name", "zoo.machine"),
        ("zoo.bench.quantize", "METHODS", "zoo.bench.quantize:MEASURED"),
        ("zoo.compress.kv", "Handle", "zoo.compress.kv.attach:PolicyHandle"),
        ("zoo.compress.methods", "Stage", "zoo.compress.methods:Place"),
        ("zoo.compress.sequence", "METHODS", "zoo.compress.sequence:RULES"),
        ("zoo.eval.binary_subjects", "Subject", "zoo.eval.studies.binary_tracks:Track"),
        ("zoo.eval.journal", "Journal", "zoo.eval.journal:RunJournal"),
        ("zoo.eval.modality", "Metric", "zoo.eval.modality.base"),
        ("zoo.eval.modality", "Modality", "zoo.eval.modality.base:Measures"),
        ("zoo.eval.modality", "modality_named", "zoo.eval.modality.base:measures_of"),
        ("zoo.eval.quantize_subjects", "Pictures", "zoo.eval.studies.quantized.image"),
        ("zoo.eval.report", "print_summary", "zoo.eval.report.html"),
        ("zoo.hub", "AnyTokenizer", "zoo.hub.build"),
        ("zoo.kernels.binary", "row_bytes", "zoo.kernels.packing"),
        ("zoo.kernels.lowbit", "block_size", "zoo.kernels.packing"),
        ("zoo.quantization.fp", "FloatLayer", "zoo.quantization.layers:LowBitLayer"),
        ("zoo.quantization.layers", "FloatConv1d", "zoo.quantization.layers:LowBitConv1d"),
        ("zoo.quantization.methods", "METHODS", "zoo.quantization.methods:SCHEMES"),
        ("zoo.quantization.methods", "Method", "zoo.quantization.methods:Scheme"),
        ("zoo.quantization.rounding", "pack", "zoo.kernels.packing"),
        ("zoo.tokens", "META_LAYOUTS", "zoo.zt"),
        ("zoo.tokenizer", "require_complete", "zoo.checkpoint"),
        ("zoo.weights.recipes.trainer", "as_images", "zoo.weights.data.image"),
    ],
)
@pytest.mark.filterwarnings("ignore:zoo.eval.[a-z]+_subjects is:DeprecationWarning")
def test_a_former_name_of_a_module(module: str, name: str, present: str) -> None:
    home, _, attribute = present.partition(":")
    attribute = attribute or name
    with pytest.warns(DeprecationWarning, match=rf"\.{name} is {home}\.{attribute} now$"):
        found = getattr(import_module(module), name)
    assert found is getattr(import_module(home), attribute)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import_module(module).nothing  # noqa: B018
