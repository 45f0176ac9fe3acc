"""Shape annotations are checked at run time in every test: a wrong shape fails where it arises."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook(["zoo"], "type_checking.checked")

import pytest  # noqa: E402  (the hook must be in place before anything imports zoo)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of cases with the original code's outputs."""
    return Path(__file__).parent / "golden"
