"""Shape annotations are checked at run time in every test: a wrong shape fails where it arises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook(["zoo"], "type_checking.checked")

import pytest  # noqa: E402  (the hook must be in place before anything imports zoo)

from hub_server import HubServer  # noqa: E402


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of cases with the original code's outputs."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A fresh Hub, caches and catalogue; the client is pointed at it as ``HF_ENDPOINT`` would."""
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


# Cases of fast tests that take long and whose relatives stay: the beginning of a test's name, and a part of its parameters.
LONG_CASES = (
    ("test_contract.py::test_deterministic", "seed-tiny"),
    ("test_contract.py::test_reduced_precision_leaves_the_ids_alone", "seed-tiny"),
    ("test_contract.py::test_several_threads", "seed-tiny"),
    ("test_settings.py::test_settings_change_nothing", "denormals are zero"),
    ("test_settings.py::test_settings_change_nothing", "no gradients"),
    ("test_settings.py::test_settings_change_nothing[seed-tiny", "default device cpu"),
    ("test_compress_uses.py::test_a_copy_has_a_method_of_its_own", "by_torch"),
    ("test_compress_uses.py::test_a_copy_has_a_method_of_its_own", "token select-by_pickle"),
    ("test_recipe_vat.py::test_resuming_goes_on_as_an_uninterrupted_run_does", "6"),
    ("test_recipe_flextok.py::test_resuming_goes_on_as_an_uninterrupted_run_does", "balance"),
    ("test_recipe_flextok.py::test_resuming_goes_on_as_an_uninterrupted_run_does", "decoder"),
    ("test_recipe_flextok.py::test_every_stage_lowers_its_loss", "BalanceStage"),
    ("test_trust.py::test_plug_ins_of_the_users_own_process", "register_family"),
    ("test_trust.py::test_plug_ins_of_the_users_own_process", "ZOO_REGISTRY"),
    ("test_bench.py::test_against_another_environment", ""),
    ("test_quantize_diffusion.py::test_learned_fp4_beats_nearest_on_every_block", ""),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave long cases to the slow tests."""
    for item in items:
        _, _, case = item.nodeid.partition("tests/")
        name, _, parameters = case.partition("[")
        for start, part in LONG_CASES:
            if case.startswith(start) and (part in parameters if part else name == start):
                item.add_marker(pytest.mark.slow)
