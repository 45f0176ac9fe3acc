"""What a program sets for its own computations changes neither ids nor media, and tokenizers leave it as it is."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_contract import EMBEDDED, ITEMS, RANDOM, close, numbers
from torch import Tensor

import zoo
from zoo.precision import all_finite, exact_float32, undisturbed

# Drawing takes its time, and a few steps show what many would.
QUICK = {"flextok": {"steps": 2}, "seed": {"steps": 2}, "vat": {"resolution": 16}}
CPU = torch.device("cpu")
MKLDNN: Any = torch.backends.mkldnn
SWITCHES = [torch.backends, MKLDNN, MKLDNN.matmul, MKLDNN.conv, MKLDNN.rnn]


@dataclass
class Model:
    """A tokenizer, what it is loaded by, some items, and what it makes of them where nothing was set."""

    address: str
    tokenizer: zoo.Tokenizer
    items: list[Any]

    def __post_init__(self) -> None:
        self.expected = self.run(self.tokenizer)

    def run(self, tokenizer: zoo.Tokenizer) -> tuple[Any, list[Any], Tensor]:
        """Tokens, media and embeddings."""
        tokens = tokenizer.encode(self.items)
        media = tokenizer.decode(tokens, **QUICK.get(tokenizer.family, {}))
        return tokens, media, tokenizer.embed(tokens) if tokenizer.spec.dim else torch.zeros(0, dtype=torch.float32, device=CPU)

    def check(self, found: tuple[Any, list[Any], Tensor], tolerance: float = 1e-4) -> None:
        """Ids are equal, media and embeddings the same within a bound, of the usual type and place, and without gradients."""
        (tokens, media, vectors), (expected, usual, embedded) = found, self.expected
        assert tokens.equal(expected)
        assert close(media, usual, tolerance)
        assert vectors.dtype == torch.float32 and torch.allclose(vectors, embedded, atol=1e-5)
        for tensor in [*media, vectors]:
            if isinstance(tensor, Tensor):
                assert tensor.dtype == torch.float32 and tensor.device == CPU and not tensor.requires_grad


@pytest.fixture(scope="module", params=[*EMBEDDED, "autoencoder_kl", "vectok"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    address = request.param
    if address not in EMBEDDED:
        address = f"local-dir:{RANDOM[address]().save_pretrained(folder / 'saved')}"
    tokenizer = zoo.load(address)
    items = ITEMS[tokenizer.spec.modality](tokenizer, folder)
    # A file of another rate or size, and an array of integers.
    return Model(address, tokenizer, [items[0], items[-3]])


# ---- settings


@pytest.fixture(autouse=True)
def as_in_a_fresh_process() -> None:
    """PyTorch's older interface leaves "ieee" where nothing was set, as tests of other files do in the same process."""
    for switch in SWITCHES:
        switch.fp32_precision = "none"


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def default_device(device: str) -> AbstractContextManager[None]:
    return changed(lambda: None, torch.set_default_device, device)


def float32_precision(switch: Any) -> AbstractContextManager[None]:
    return changed(lambda: "none", lambda value: setattr(switch, "fp32_precision", value), "bf16")


@contextmanager
def medium_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    # The old interface leaves what it restores as a setting of its own.
    for switch in (MKLDNN.matmul, torch.backends.cuda.matmul):
        switch.fp32_precision = "none"


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "medium products": medium_products,
    "bf16 for everything": lambda: float32_precision(torch.backends),
    "bf16 for oneDNN": lambda: float32_precision(MKLDNN),
    "bf16 products": lambda: float32_precision(MKLDNN.matmul),
    "bf16 convolutions": lambda: float32_precision(MKLDNN.conv),
    "denormals are zero": lambda: changed(lambda: False, torch.set_flush_denormal, True),
    "deterministic": lambda: changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "one thread": lambda: changed(torch.get_num_threads, torch.set_num_threads, 1),
    "two threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
}


def settings() -> list[Any]:
    """What may have been set, and the states of PyTorch's and NumPy's generators of random numbers."""
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        [switch.fp32_precision for switch in SWITCHES],
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    ]


# Set at once, as each of them takes a run of every model; those of a group do not replace one another.
GROUPS = (
    ("default dtype float64", "autocast bfloat16", "bf16 for everything"),
    ("default dtype bfloat16", "default device meta", "medium products"),
    ("default dtype float16", "autocast float16", "bf16 for oneDNN", "deterministic"),
    ("default device cpu", "bf16 products", "bf16 convolutions", "gradients", "two threads"),
    ("denormals are zero", "inference mode", "one thread"),
    ("no gradients",),
)


def test_every_setting_is_tried() -> None:
    assert sorted(name for group in GROUPS for name in group) == sorted(SETTINGS)


@pytest.mark.parametrize("group", GROUPS, ids=", ".join)
def test_settings_change_nothing(model: Model, group: tuple[str, ...]) -> None:
    """Neither where the model was loaded before nor where it is loaded under the settings."""
    usual = settings()
    with ExitStack() as stack:
        for name in group:
            stack.enter_context(SETTINGS[name]())
        before = settings()
        found = model.run(model.tokenizer), model.run(zoo.load(model.address))
        assert settings() == before
    assert settings() == usual
    for results in found:
        model.check(results)


DRAWS = """
import random, sys, numpy as np, torch, zoo

def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

before = states()
for name in sys.argv[1:]:
    tokenizer = zoo.load(name)
    if tokenizer.spec.modality == "bytes":
        item = bytes(range(200))
    elif tokenizer.spec.modality == "text":
        item = "GATTACA" * 30
    elif tokenizer.spec.modality == "image":
        item = torch.linspace(-1, 1, 3 * 50 * 81).reshape(3, 50, 81)
    elif tokenizer.spec.modality == "video":
        item = torch.linspace(-1, 1, 3 * 5 * 16 * 20).reshape(3, 5, 16, 20)
    elif tokenizer.spec.modality == "shape":
        item = torch.sin(torch.arange(6 * 500) / 30).reshape(500, 6)
    else:
        item = torch.sin(torch.arange(7_777) / 30)
    tokens = tokenizer.encode(item)
    if tokenizer.spec.dim:
        tokenizer.embed(tokens)
    tokenizer.decode(tokens, **({"resolution": 8} if tokenizer.spec.modality == "shape" else {}))
    assert states() == before, name
"""


def test_global_generators_are_left_alone() -> None:
    """In a process of its own: the type checks of the test suite draw from Python's generator."""
    subprocess.run([sys.executable, "-c", DRAWS, *EMBEDDED], check=True)


def test_two_threads_in_different_settings(model: Model) -> None:
    found: dict[str, Any] = {}

    def work(setting: str) -> None:
        with SETTINGS[setting]():
            found[setting] = model.run(model.tokenizer)

    usual = settings()
    with default_dtype(torch.bfloat16):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("autocast bfloat16", "default device meta")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert settings() == usual and len(found) == 2
    for results in found.values():
        model.check(results)


def test_results_may_take_part_in_training(model: Model) -> None:
    tokens, media, vectors = model.run(model.tokenizer)
    weight = torch.ones((), requires_grad=True)
    floats = [tensor for tensor in (*media, vectors) if isinstance(tensor, Tensor)]
    sum((weight * tensor).square().mean() for tensor in floats).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad)
    if not model.tokenizer.spec.continuous:
        table = torch.nn.Embedding(model.tokenizer.spec.vocab_size, 2)
        table(tokens.ids.clamp(min=0)).sum().backward()


# ---- casts of the model itself


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16", "float"])
def test_casts_leave_the_ids_alone(model: Model, cast: str) -> None:
    """Decoders compute in the type that was asked for; what they give is float32."""
    tokenizer = zoo.load(model.address)
    getattr(tokenizer, cast)()
    if cast in ("double", "float"):
        model.check(model.run(tokenizer))
        return
    tokens, media, vectors = model.run(tokenizer)
    if tokenizer.family != "seed":
        # Whose vision transformer is too large to be kept in float32, as its card says.
        assert tokens.equal(model.expected[0])
    assert vectors.dtype == torch.float32
    if tokenizer.spec.lossless:
        assert media == model.expected[1]
        return
    tokens = model.expected[0]
    for rough, exact in zip(numbers(tokenizer, tokens), numbers(model.tokenizer, tokens), strict=True):
        assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
        image = tokenizer.spec.modality == "image" and not tokenizer.spec.continuous
        assert (exact - rough).square().mean() <= (4e-3 if image else 0.1 * exact.square().mean() + 1e-4)


# ---- how it is done


def test_switches_that_inherit_are_left_inheriting() -> None:
    with float32_precision(torch.backends):
        with exact_float32(CPU):
            assert [switch.fp32_precision for switch in SWITCHES[2:]] == ["ieee"] * 3
        assert [switch.fp32_precision for switch in SWITCHES] == ["bf16"] * 5
    assert [switch.fp32_precision for switch in SWITCHES[2:]] == ["none"] * 3
    with float32_precision(MKLDNN.conv), float32_precision(torch.backends):
        with exact_float32(CPU), exact_float32(CPU):
            assert [switch.fp32_precision for switch in SWITCHES[2:]] == ["ieee"] * 3
        torch.backends.fp32_precision = "none"
        assert [switch.fp32_precision for switch in SWITCHES[2:]] == ["none", "bf16", "none"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_libraries_find_the_usual_defaults_inside(dtype: torch.dtype) -> None:
    """What PyTorch makes in the default dtype: factories, quotients of integers, integers with plain numbers, choices."""
    flags = torch.tensor([True, False])
    made = [
        lambda: torch.zeros(3),
        lambda: torch.arange(0, 1, 0.1),
        lambda: torch.tensor([0.1, 0.2]),
        lambda: torch.full((2,), 0.3),
        lambda: torch.as_tensor(0.1),
        lambda: torch.linspace(0, 1, 7),
        lambda: torch.hann_window(7),
        lambda: torch.randn(5, generator=torch.Generator().manual_seed(0)),
        lambda: torch.arange(7) / 3,
        lambda: torch.arange(7) * 0.7,
        lambda: torch.arange(7).sin(),
        lambda: torch.where(flags, 0.1, 0.7),
        lambda: torch.nn.Linear(2, 3).weight * 0 + 0.1,
    ]
    expected = [make() for make in made]
    with default_dtype(dtype):
        with exact_float32(CPU):
            found = [make() for make in made]
            kept = [
                torch.zeros(2, dtype=torch.float64),
                torch.arange(3),
                torch.ones(2, dtype=dtype) * 0.5,
                torch.tensor([True]),
            ]
        assert torch.zeros(1).dtype == dtype
    for own, usual in zip(found, expected, strict=True):
        assert own.dtype == usual.dtype == torch.float32 and torch.equal(own, usual)
    assert [tensor.dtype for tensor in kept] == [torch.float64, torch.int64, dtype, torch.bool]


def test_generators_cannot_be_shielded() -> None:
    def numbers(self: Any) -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        undisturbed(numbers)


_FACTORIES = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace", "logspace", "arange", "tensor", "scalar_tensor"),
    *("hann_window", "hamming_window", "blackman_window", "randint", "randperm"),
}
#: A new model's weights are in the default dtype, as those of PyTorch's own layers are; training draws as it likes.
_NEW = {"__init__", "learned", "_new_codes"}


def factories_without_type(source: str) -> list[str]:
    """Calls of PyTorch's factories that leave the type to the program, outside of what makes new models."""
    found: list[str] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if (
            isinstance(node, ast.Call)
            and function not in _NEW
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in _FACTORIES
            and not any(keyword.arg == "dtype" for keyword in node.keywords)
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_the_search_finds_what_it_should() -> None:
    source = """
def f(x):
    return torch.zeros(3) + torch.ones(3, dtype=x.dtype)
class A:
    def __init__(self):
        torch.empty(2)
"""
    assert factories_without_type(source) == ["3: torch.zeros(3)"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(wrong: float) -> None:
    values = torch.linspace(-1, 1, 1000, dtype=torch.float32) * 3e38
    assert all_finite(values) and all_finite(values[:0])
    for place in (0, 500, 999):
        broken = values.clone()
        broken[place] = wrong
        assert not all_finite(broken)


def test_every_tensor_that_is_made_has_a_type() -> None:
    root = Path(__file__).parents[1]
    files = [path for folder in ("codecs", "zoo/nn") for path in (root / folder).rglob("*.py") if path.stem != "training"]
    assert len(files) > 50
    missing = {str(path.relative_to(root)): found for path in files if (found := factories_without_type(path.read_text()))}
    assert not missing, missing
