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
