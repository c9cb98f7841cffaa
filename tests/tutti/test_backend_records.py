"""The table of backends, and those of other distributions: found, broken, twice, unknown."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributions import Install
from tests.models import Repository
from tests.serving import engine_over
from tutti.app import doctor
from tutti.core.errors import ConfigError
from tutti.repository import backend_records, config, model_config
from tutti.repository.backend_records import BUILT_IN, BackendRecord

TENSORS = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
RECORD = """
from tutti.repository.backend_records import BackendRecord
RECORD = BackendRecord("added", "added_backend", {fields})
"""


def parse(backend: str) -> model_config.ModelConfig:
    return config.parse(f'backend: "{backend}" max_batch_size: 8 dynamic_batching {{}} {TENSORS}', "m")


@pytest.mark.parametrize("record", BUILT_IN.values(), ids=lambda record: record.name)
def test_each_of_our_own_is_a_module_that_is_there(record: BackendRecord) -> None:
    spec = importlib.util.find_spec(record.module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert "\ndef load(" in source
    assert ("\ndef complete(" in source) == (record.completes is not None)


def test_an_installed_one_says_what_its_configurations_may(install: Install) -> None:
    install("tutti-added", "added = added:RECORD", added=RECORD.format(fields='joins_rows=True, gpus="required"'))
    parsed = parse("added")
    assert (parsed.backend, parsed.platform, parsed.gpus) == ("added", "added", "required")
    assert parsed.may_merge
    assert backend_records.installed() == {"added": "tutti-added 1.2"}


@pytest.mark.parametrize(
    ("entry_point", "source", "says"),
    [
        ("bad = bad:RECORD", "import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("bad = bad:RECORD", "raise SystemExit('no')", "cannot be loaded: SystemExit: no"),
        ("bad = bad:MISSING", "", "AttributeError: module 'bad' has no attribute 'MISSING'"),
        ("bad = bad:RECORD", "RECORD = print", "is a builtin_function_or_method: expected a BackendRecord"),
        ("bad = bad:RECORD", RECORD.format(fields=""), "is the record of 'added': expected the entry point's name"),
    ],
)
def test_a_broken_one_is_an_error_of_its_models_only(
    repository: Repository, install: Install, entry_point: str, source: str, says: str
) -> None:
    install("tutti-bad", entry_point, bad=source)
    repository.add_onnx("good")
    repository.add("m", f'backend: "bad" {TENSORS}', {})
    with engine_over(repository.root) as engine:
        assert engine.model("good", "").is_ready()
        (failure,) = engine.failures()
    assert f"model 'm': backend: 'bad': entry point '{entry_point[6:]}' of tutti-bad 1.2" in failure
    assert says in failure
    (finding,) = (finding for finding in doctor.examine() if finding.subject == "backend 'bad'")
    assert finding.verdict == "bad"
    assert says in finding.text


def test_one_of_two_distributions_is_nobodys(install: Install) -> None:
    install("tutti-added", "added = added:RECORD", added=RECORD.format(fields=""))
    install("tutti-again", "added = added:RECORD")
    with pytest.raises(ConfigError, match=r"tutti-a\w+ 1\.2 and tutti-a\w+ 1\.2 are installed, and each has one"):
        parse("added")


def test_ours_stay_ours(install: Install) -> None:
    install("tutti-rival", "onnxruntime = rival:RECORD", rival="raise RuntimeError('imported')")
    assert parse("onnxruntime").joins_rows
    assert backend_records.installed() == {}
    (finding,) = (finding for finding in doctor.examine() if finding.subject == "backend 'onnxruntime'")
    assert (finding.verdict, finding.text) == ("note", "that of tutti-rival 1.2 is not used: tutti has its own")


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("onnxrutime", "; did you mean 'onnxruntime'?"),
        ("Added", "; did you mean 'added'?"),
        ("vllm", ""),
    ],
)
def test_an_unknown_one_is_told_with_those_there_are(
    repository: Repository, install: Install, backend: str, says: str
) -> None:
    install("tutti-added", "added = added:RECORD", added=RECORD.format(fields=""))
    repository.add("m", f'backend: "{backend}" {TENSORS}', {})
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    choice = "onnxruntime, pytorch, tensorrt, python, added (of tutti-added 1.2)"
    assert f"model 'm': backend: '{backend}' is not one of {choice}{says}" in failure
    assert ("did you mean" in failure) == ("did you mean" in says)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import missing_library", "needs 'missing_library': pip install 'tutti-added[fast]'"),
        ("import another_library", "needs 'another_library'"),
        ("1 / 0", "module 'added_backend' of tutti-added cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(
    repository: Repository, install: Install, source: str, says: str
) -> None:
    record = RECORD.format(fields='extras={"missing_library": "fast"}')
    install("tutti-added", "added = added:RECORD", added=record, added_backend=source)
    repository.add("m", f'backend: "added" {TENSORS}', {})
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    assert f"model 'm': backend: 'added': {says}" in failure or f"model 'm': backend: 'added' {says}" in failure


def test_nobody_looks_for_others_while_ours_do() -> None:
    code = f"""
import importlib.metadata
importlib.metadata.entry_points = lambda **_: 1 / 0
from tutti.repository import config
config.parse('backend: "onnxruntime" max_batch_size: 8 {TENSORS}', "m")
config.parse('platform: "pytorch_libtorch" max_batch_size: 8 {TENSORS}', "m")
try:
    config.parse('backend: "another" {TENSORS}', "m")
except ZeroDivisionError:
    print("looked")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "looked\n", done.stderr
