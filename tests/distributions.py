"""Distributions that are installed for the length of a test, each with a backend."""

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tutti.repository import backend_records

Install = Callable[..., None]
"""`install(distribution, entry_point, module=source, ...)`."""


@contextmanager
def installing(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes distributions of version 1.2 with one entry point each, and their modules, in a new folder."""
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(distribution: str, entry_point: str, **modules: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[tutti.backends]\n{entry_point}\n")
        for name, source in modules.items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        _forget()

    before = set(sys.modules)
    try:
        yield install
    finally:
        _forget()
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(site)):
                del sys.modules[name]


def _forget() -> None:
    backend_records._entry_points.cache_clear()
    backend_records._loaded.cache_clear()
