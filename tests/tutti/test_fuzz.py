"""A short seeded run of the fuzzer; `python -m benchmarks.fuzz` is the long one."""

from pathlib import Path

import pytest

from tests import fuzz
from tests.models import Repository
from tests.serving import timer
from tutti import ensembles
from tutti.frontends.v2.api import Api
from tutti.serving import local

COUNT = 600


@pytest.fixture
def api(repository: Repository, tmp_path: Path) -> Api:
    repository.add_onnx()
    engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
    engine.load_all()
    return Api(engine)


def test_nothing_but_a_refusal_comes_of_bad_input(api: Api) -> None:
    found: dict[str, int] = {}
    fuzz.run_all(api, seed=1, count=COUNT, report=lambda name, read, _: found.update({name: read}))
    assert found.keys() == fuzz.TARGETS.keys()
    assert all(read > 0 for read in found.values()), f"some input must be good, or little is tried: {found}"
    assert all(read < COUNT for name, read in found.items() if name != "HTTP/1.1 connections"), found
    api.engine.close()
