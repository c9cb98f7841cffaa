"""Folders as people leave them: other encodings, things that are no files, what changes while it is read."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import engine_over
from tutti.backends import completion
from tutti.core import files
from tutti.core.errors import ConfigError
from tutti.core.types import Tensor
from tutti.frontends.v2.classification import classify
from tutti.repository import config
from tutti.repository import folders as repository

PLAIN = 'backend: "python" input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 '
CONFIG = (PLAIN + "dims: -1 }\n").encode()


def model(root: Path, name: str, configuration: bytes = CONFIG) -> Path:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text("class TritonPythonModel:\n    def execute(self, requests): ...\n")
    (folder / "config.pbtxt").write_bytes(configuration)
    return folder


@pytest.mark.parametrize("start", [b"# mod\xe8le du caf\xe9\n", b"\xef\xbb\xbf", "# caf\u00e9\n".encode()])
def test_a_comment_of_any_bytes_and_a_mark_of_byte_order_do_no_harm(tmp_path: Path, start: bytes) -> None:
    model(tmp_path, "plain", start + CONFIG)
    assert completion.open_model(tmp_path, "plain").config.inputs[0].name == "X"


@pytest.mark.parametrize(
    "configuration",
    [
        CONFIG + b'parameters { key: "a" value { string_value: "caf\xe9" } }',
        CONFIG.decode().encode("utf-16"),
        b"\x00" + CONFIG,
        bytes(range(256)),
    ],
)
def test_other_bytes_elsewhere_cost_the_model_and_are_told_in_plain_text(tmp_path: Path, configuration: bytes) -> None:
    model(tmp_path, "bad", configuration)
    model(tmp_path, "good")
    folders, failures = completion.open_models(tmp_path)
    assert [folder.config.name for folder in folders] == ["good"]
    assert "model 'bad': config.pbtxt does not parse" in str(failures["bad"])
    str(failures["bad"]).encode()  # what it quotes can be written


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [fifo, endless, folder, dangling, loop])
@pytest.mark.parametrize("where", ["config.pbtxt", "labels.txt", "1/model.py", "."])
def test_what_is_no_file_costs_its_model_and_is_not_waited_for(tmp_path: Path, make: object, where: str) -> None:
    labelled = PLAIN + 'dims: -1 label_filename: "labels.txt" }'
    bad = model(tmp_path, "bad", labelled.encode() if where == "labels.txt" else CONFIG)
    target = bad / where
    if where == ".":
        bad.rename(tmp_path / ".was")
    else:
        target.unlink(missing_ok=True)
    make(target)  # type: ignore[operator]
    model(tmp_path, "good", CONFIG + IN_PROCESS.encode())
    with engine_over(tmp_path) as engine:
        assert engine.versions("good") == ["1"]
        assert engine.versions("bad") == []
        if where != ".":
            assert any("model 'bad'" in why for why in engine.failures())


def test_a_model_whose_folder_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path, "bad")
    model(tmp_path, "good")
    is_dir = Path.is_dir

    def denied(path: Path) -> bool:
        if path.name == "bad":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", denied)
    folders, failures = completion.open_models(tmp_path)
    assert [folder.config.name for folder in folders] == ["good"]
    assert "bad': Permission denied" in str(failures["bad"])


def test_a_repository_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="model repository"):
            repository.model_names(root)


def test_names_with_nul_are_their_models_failure(tmp_path: Path) -> None:
    configured = CONFIG + b'default_model_filename: "a\\000b"'
    model(tmp_path, "bad", configured)
    labelled = PLAIN + 'dims: -1 label_filename: "a\\000b" }'
    model(tmp_path, "labelled", labelled.encode())
    with engine_over(tmp_path) as engine:
        assert engine.models() == []
        assert {entry.name for entry in engine.index() if entry.reason} == {"bad", "labelled"}
    with pytest.raises(ConfigError, match="not a valid model name"):
        completion.open_model(tmp_path, "a\0b")


def test_labels_are_lines_of_bytes(tmp_path: Path) -> None:
    """As Triton has them: only a line feed ends one, an empty one is none, and every byte is kept."""
    folder = model(tmp_path, "labelled", (PLAIN + 'dims: -1 label_filename: "labels.txt" }').encode())
    (folder / "labels.txt").write_bytes(b"caf\xe9\r\nb\x0bc\xc2\x85d\n\nlast")
    labels = completion.open_model(tmp_path, "labelled").labels()["Y"]
    scores = Tensor.of("Y", np.array([5, 4, 3, 2, 1], np.float32))
    shown = classify("labelled", scores, 5, labels, is_batched=False).array().tolist()
    assert shown == [
        b"5.000000:0:caf\xe9\r", b"4.000000:1:b\x0bc\xc2\x85d", b"3.000000:2", b"2.000000:3:last", b"1.000000:4"
    ]  # fmt: skip


def test_a_text_is_of_a_size(tmp_path: Path) -> None:
    huge = model(tmp_path, "huge") / "config.pbtxt"
    os.truncate(huge, files.MAX_TEXT_BYTES + 1)
    with pytest.raises(ConfigError, match=r"model 'huge': cannot read config\.pbtxt: it has more than"):
        config.load(huge)


def test_another_file_of_the_same_age_and_size_is_a_change(tmp_path: Path) -> None:
    file = model(tmp_path, "one") / "1" / "model.py"
    before = repository.fingerprint(tmp_path, "one")
    assert repository.fingerprint(tmp_path, "one") == before
    status, content = file.stat(), file.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(content.swapcase())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)
    assert repository.fingerprint(tmp_path, "one") != before


def test_files_behind_links_count_and_links_in_circles_end(tmp_path: Path) -> None:
    """Volumes that are mounted into containers consist of links."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "model.py").write_text("1")
    one = tmp_path / "models" / "one"
    one.mkdir(parents=True)
    (one / "1").symlink_to(data)
    (data / "again").symlink_to(one)
    before = repository.fingerprint(tmp_path / "models", "one")
    assert len(before) == 1
    (data / "model.py").write_text("22")
    assert repository.fingerprint(tmp_path / "models", "one") != before


def test_loaders_may_fail_in_any_way(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is read makes a library fail as it likes."""
    from tutti.backends import onnxruntime

    repository.add_onnx()
    repository.add_onnx("other")
    load = onnxruntime.load

    def fails(folder: object, version: int, infer: object) -> object:
        if folder.config.name == "other":  # type: ignore[attr-defined]
            raise MemoryError("the file says that it has 2**62 bytes")
        return load(folder, version, infer)  # type: ignore[arg-type]

    monkeypatch.setattr(onnxruntime, "load", fails)
    with engine_over(repository.root) as engine:
        assert engine.versions("add_one") == ["1"]
        assert any("MemoryError" in why and "'other'" in why for why in engine.failures())
