"""Fixtures every test may use: small model repositories in a temporary folder, and the built sample repository."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports its library, which reads it once: asking the hub again and again for what it has not takes
# half a minute where there is no network.
os.environ["HF_HUB_OFFLINE"] = "1"

from tests import models, wheels
from tests.distributions import Install, installing
from tutti.devices import health, process_engines
from tutti.devices.health import DeviceHealth
from tutti.devices.simulated import SIMULATED

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """The collector leaves all that is imported alone: half a million objects, a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_logging() -> Iterator[None]:
    """Logging ends as it began: a server run in this process takes it over, with a stream that ends with its test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def repository(tmp_path: Path) -> models.Repository:
    """An empty model repository to fill with small models."""
    return models.Repository(tmp_path / "models")


@pytest.fixture(scope="session")
def sample_repository() -> Path:
    """The sample repository with its weights built."""
    root = ROOT / "model_repository"
    if not (root / "text_encoder" / "1" / "model.onnx").exists():
        message = "the sample repository is not built: run `make models`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return root


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> wheels.Installed:
    """The wheel of this checkout, in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    return wheels.install(wheels.build(folder), folder / "environment")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs distributions with backends, for this test."""
    with installing(tmp_path / "site", monkeypatch) as install:
        yield install


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One simulated GPU in the place of real ones, whose failures end with the test."""
    monkeypatch.setenv(SIMULATED, "1")
    monkeypatch.setattr(process_engines, "_engines", {})
    monkeypatch.setattr(health, "health", DeviceHealth())
    yield
    for engine in process_engines.engines():
        engine.close()
