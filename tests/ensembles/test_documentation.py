"""docs/ensembles.md: every example is run, every operator is what its table says, every command is one."""

import re
import shlex
from pathlib import Path

import pytest

from tests.models import Repository
from tutti.app import cli
from tutti.ensembles.builder import Graph
from tutti.ensembles.cli import planned
from tutti.ensembles.expressions import Expression, Tensor, bare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ensembles.md").read_text()
FILES = re.findall(r"say `(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
# Those that run here: what serves does not end, and what asks a server needs one.
COMMANDS = re.findall(r"^(tutti (?:ensemble (?:build|show|draw)|explain) [^#\n]+?) *(?:#.*)?$", PAGE, re.MULTILINE)
TENSORS = (("a", "FP32", 1), ("b", "FP32", 1), ("t", "FP32", 4), ("image", "BYTES", 1), ("lang", "BYTES", 1))
EXPRESSIONS = re.findall(
    r"^\| `(.+)` \| `(.+)` \| ", PAGE.partition("| in Python |")[2].partition("\n\n")[0], re.MULTILINE
)


@pytest.fixture
def folder(sample_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the project's, with the sample models but no ensembles."""
    (tmp_path / "model_repository").mkdir()
    for model in sample_repository.iterdir():
        if model.is_dir() and model.name != "content_intelligence":
            (tmp_path / "model_repository" / model.name).symlink_to(model.resolve())
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_configuration_is_right(folder: Path) -> None:
    (folder / "model_repository" / "moderate" / "1").mkdir(parents=True)
    config = PAGE[PAGE.index('name: "moderate"') :].partition("```")[0]
    (folder / "model_repository" / "moderate" / "config.pbtxt").write_text(config)
    assert [step.model_name for step in planned(folder / "model_repository", "moderate").steps] == [
        "text_gate", "text_tokenizer", "text_encoder",
    ]  # fmt: skip


def test_the_files_are_built_and_the_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [name for name, _ in FILES] == ["moderate.py", "guarded.py"] and PAGE.count("```python") == len(FILES)
    for name, code in FILES:
        (folder / name).write_text(code)
    run = [shlex.split(command)[1:] for command in COMMANDS if " --url " not in command]
    run = [arguments for arguments in run if not {"NAME", "FILE.py"} & set(arguments)]
    assert len(run) == 6
    for arguments in run:
        assert cli.main(arguments) == 0, arguments
    said = capsys.readouterr()
    assert "image_classifier               1/1" in said.out
    assert "try it: tutti explain guarded 'THE TEXT=...' IMAGE=...\n" in said.err
    assert (folder / "moderate.svg").is_file()


@pytest.mark.parametrize(("python", "condition"), EXPRESSIONS)
def test_operators_are_what_their_table_says(python: str, condition: str, repository: Repository) -> None:
    assert len(EXPRESSIONS) == 8
    tensors = _tensors(repository)
    made = eval(python.replace("\\|", "|"), dict(tensors))
    assert isinstance(made, Expression)
    assert bare(made.render({id(tensor): name for name, tensor in tensors.items()})) == condition


def test_functions_and_signs_that_a_table_only_names_are_there(repository: Repository) -> None:
    tensors = _tensors(repository)
    for python in ("a >= 1", "a < 1", "a <= 1", "a == 1", "a != b", 'lang == "en"'):
        assert isinstance(eval(python, dict(tensors)), Expression)
    for name in ("min", "mean", "sum", "argmax", "count"):
        assert f"`{name}`" in PAGE and isinstance(getattr(tensors["t"], name)() > 0, Expression)


def _tensors(repository: Repository) -> dict[str, Tensor]:
    graph = Graph("any", repository.root, 8)
    return {name: graph.input(name, datatype, [size]) for name, datatype, size in TENSORS}
