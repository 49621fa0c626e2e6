"""The one place where tests reach for the assets and fixtures that lie beside the project."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import track4d  # noqa: F401  # before torch: it lets idle threads sleep

hypothesis.settings.register_profile("shared", deadline=None)  # machines that run tests are busy with other things too
hypothesis.settings.load_profile("shared")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published fixtures and real assets; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED} with real assets and published fixtures is absent")
    return SHARED


@pytest.fixture(scope="session")
def asset(shared: Path) -> Callable[[str], Path]:
    """asset("fox.glb") is the path of that real asset."""
    return lambda name: shared / "assets" / name
