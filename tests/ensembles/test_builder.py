"""Graphs written in Python, and the command that checks, shows, draws, explains and builds them."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import engine_over, infer
from tutti.app import cli
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.ensembles import show
from tutti.ensembles.builder import Graph
from tutti.ensembles.cli import planned

ONE = "data_type: TYPE_FP32 dims: 1"
SCORE = f"""backend: "python" max_batch_size: 8 dynamic_batching {{}}
    input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }} {IN_PROCESS}"""
TEN = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 10)])
"""
FILE = """
from tutti.ensembles.builder import Graph


def build(repository):
    graph = Graph("gated", repository, 8)
    score = graph.step("ten", x=graph.input("X", "FP32", [1]))["y"]
    with graph.where((score > 15) & ~(score == 50)):
        costly = graph.step("costly", x=score)
    graph.output("S", score)
    graph.output("Y", costly["y"], default=-1)
    graph.exit_when(score.max() >= 90)
    graph.deadline_ms(5000)
    return graph
"""


@pytest.fixture
def root(repository: Repository) -> Path:
    repository.add_python("ten", SCORE, TEN)
    repository.add_python("costly", SCORE, TEN)
    return repository.root


@pytest.fixture
def built(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = tmp_path / "gated.py"
    file.write_text(FILE)
    assert cli.main(["ensemble", "build", str(file), "--repository", str(root)]) == 0
    assert cli.main(["ensemble", "build", str(file), "--repository", str(root), "--check"]) == 0
    (root / "gated" / "1" / ".keep").touch()
    capsys.readouterr()
    return root


def test_what_is_built_is_served(built: Path) -> None:
    with engine_over(built) as engine:
        assert not engine.failures(), engine.failures()
        answers = infer(
            engine, [InferRequest("gated", {"X": Tensor("X", "FP32", (1, 1), x)}) for x in map(_fp32, (1, 2, 5, 9))]
        )
        got = [
            [output.array().tolist() for output in answer.outputs]
            for answer in answers
            if isinstance(answer, InferResponse)
        ]
        assert got == [[[[10]], [[-1]]], [[[20]], [[200]]], [[[50]], [[-1]]], [[[90]], [[-1]]]]


def _fp32(value: float) -> bytes:
    import struct

    return struct.pack("<f", value)


def test_the_commands(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--repository", str(built)]
    assert cli.main(["ensemble", "check", *where]) == 0
    assert "gated: 2 steps, right" in capsys.readouterr().out
    assert cli.main(["ensemble", "show", "gated", *where]) == 0
    shown = capsys.readouterr().out
    for line in ("ensemble gated: 2 steps in 2 waves", "deadline  5000 ms", "when (S > 15) and not ((S == 50))",
                 "unless decided: max(S) >= 90", "output    Y FP32[1], -1.0 where not made"):  # fmt: skip
        assert line in shown, shown
    picture = tmp_path / "gated.svg"
    assert cli.main(["ensemble", "draw", "gated", *where, "--output", str(picture)]) == 0
    tree = ElementTree.fromstring(picture.read_text())
    texts = [element.text for element in tree.iter() if element.tag.endswith("}text")]
    assert {"ten", "costly", "X", "FP32[1]", "← S", "→ S FP32[1], output", "→ Y FP32[1], else -1.0, output"} <= set(
        texts
    )
    capsys.readouterr()
    assert cli.main(["ensemble", "explain", "gated", "X=2", *where]) == 0
    assert "costly" in capsys.readouterr().out
    assert cli.main(["ensemble", "explain", "gated", "X=[[1], [2]]", "--json", *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(step["step"], step["rows"]) for step in told["steps"]] == [("ten", 2), ("costly", 1)]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["check", "nope"], "model 'nope': there is none of that name in"),
        (["show", "gatd"], "did you mean gated?"),
        (["explain", "gatd", "X=1"], "did you mean gated?"),
        (["draw", "gated", "--output", "/nowhere/at.svg"], "'/nowhere/at.svg': No such file or directory"),
        (["check", "ten"], "is no ensemble"),
        (["show", "broken"], "its model is not available"),
        (["explain", "gated", "Y=1"], "expected INPUT=VALUE, with one of X=JSON"),
        (["explain", "gated", "X=one"], "expected numbers in JSON"),
        (["explain", "gated", "X=@nothing.npy"], "'nothing.npy' cannot be read"),
        (["explain", "gated", f"X=@{__file__}"], "expected an .npy file, a .wav file or numbers in JSON"),
        (["explain", "gated"], "missing input 'X'"),
        (["build", "nothing.py"], "expected a Python file"),
    ],
)
def test_mistakes_of_the_command(
    built: Path, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (built / "gated" / "config.pbtxt").read_text().replace('"gated"', '"broken"').replace('"costly"', '"gone"')
    (built / "broken" / "1").mkdir(parents=True)
    (built / "broken" / "1" / ".keep").touch()
    (built / "broken" / "config.pbtxt").write_text(text)
    assert cli.main(["ensemble", *arguments, "--repository", str(built)]) == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("score > 15", "score > ", ":8:31: invalid syntax"),
        ('"costly"', '"costy"', ":9: model 'costy': there is none of that name in"),
        ('"costly"', '"costy"', "did you mean costly?"),
        ('"costly", x=', '"costly", z=', ":9: step 'costly': the model has no input 'z'"),
        (
            "with graph.where((score > 15) & ~(score == 50)):",
            "with graph.where('score > 15'):",
            ":8: where: expected a",
        ),
        ("return graph", "return grph", ":14: NameError: name 'grph' is not defined"),
        ("return graph", "return 1", ": build returned 1: expected a Graph"),
        ("def build(repository)", "def build()", "TypeError: build() takes 0 positional arguments"),
        ("def build(", "def built(", "expected a function build(repository)"),
        ("tutti.ensembles", "ensemble", ":2: ModuleNotFoundError: No module named 'ensemble'\n"),
        (
            "with graph.where((score > 15) & ~(score == 50)):",
            "if score > 15:",
            ":8: condition ten.y > 15: whether",
        ),
        ("return graph", "return graph\0", "null bytes"),
        ("return graph", "raise OSError('no')", ":14: OSError: no"),
        (", default=-1", "", "(in Python default=...)"),
        (", default=-1", ", defalt=-1", "keyword argument 'defalt'; did you mean default?"),
        ("graph.deadline_ms(", "graph.deadline(", "no attribute 'deadline'; did you mean deadline_ms?"),
    ],
)
def test_mistakes_in_a_graphs_file_are_told_with_their_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, says: str
) -> None:
    assert old in FILE
    file = tmp_path / "wrong.py"
    file.write_text(FILE.replace(old, new))
    assert cli.main(["ensemble", "build", str(file), "--repository", str(root)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"tutti: {file}") and says in err and len(err.splitlines()) == 1
    assert cli.main(["ensemble", "build", str(file), "--repository", str(tmp_path / "none")]) == 1
    assert f"model repository '{tmp_path / 'none'}' is not a folder" in capsys.readouterr().err


def test_the_packages_name_of_before_is_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensembles", None)  # as from any folder but the checkout, where it is one
    file = tmp_path / "old.py"
    file.write_text(FILE.replace("tutti.ensembles", "ensembles"))
    assert cli.main(["ensemble", "build", str(file), "--repository", str(root)]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"tutti: \S+old.py:2: ModuleNotFoundError: .*; it is tutti.ensembles\n", err)


WRONG_FILES = [
    ("def build(repository):\n    return (1,\n", "{file}:2:12: '(' was never closed: return (1,"),
    ("x = 1\n y = 2\n", "{file}:2:1: unexpected indent: y = 2"),
    ("\0", "{file}: SyntaxError: source code string cannot contain null bytes"),
    ("x = 1\n", "{file}: expected a function build(repository) -> Graph (docs/ensembles.md), there is none"),
    ("build = 3\n", "{file}: expected a function build(repository) -> Graph (docs/ensembles.md), got 3"),
    (
        "def build(a, b): ...\n",
        "{file}: TypeError: build() missing 1 required positional argument: 'b'; expected a fun",
    ),
    ("\nimport nothing_there\n", "{file}:2: ModuleNotFoundError: No module named 'nothing_there'"),
    ("def build(_):\n    return 1 / 0\n", "{file}:2: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(3)\n", "{file}:2: SystemExit: 3"),
    ("def build(_):\n    return 1\n", "{file}: build returned 1: expected a Graph"),
    (FILE.replace("x=graph.input", "z=graph.input"), "{file}:7: step 'ten': the model has no input 'z', it has"),
]


@pytest.mark.parametrize(("text", "says"), WRONG_FILES)
def test_a_file_that_makes_no_graph_is_told_with_its_line(
    text: str, says: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "graph.py"
    file.write_text(text)
    assert cli.main(["ensemble", "build", str(file), "--repository", str(root)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tutti: {says.format(file=file)}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grph.py", "expected a Python file, got no such file; did you mean"),
        (".", "expected a Python file, got a folder"),
        ("graph.txt", "expected a Python file, got a file 'graph.txt'"),
    ],
)
def test_what_is_no_python_file_is_named(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("graph.py", "graph.txt"):
        (tmp_path / file).write_text(FILE)
    assert cli.main(["ensemble", "build", str(tmp_path / name)]) == 1
    assert says in capsys.readouterr().err


def test_checks_and_pictures_of_what_is_not_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, status, says in (
        (["check", "--repository", str(root)], 0, f"no ensembles among the 2 models of {root}"),
        (["check", "--repository", str(tmp_path / "empty")], 1, f"'{tmp_path}/empty' holds no model; expected NAME/1/"),
        (["check", "--repository", str(root / "ten")], 1, f"'{root}/ten' is a model's folder; its repository is the"),
    ):
        assert cli.main(["ensemble", *arguments]) == status
        assert says in "".join(capsys.readouterr())


def test_a_picture_that_cannot_be_written_is_named(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--repository", str(built), "--output"]
    assert cli.main(["ensemble", "draw", "gated", *where, "/nowhere/x.svg"]) == 1
    assert "tutti: '/nowhere/x.svg': No such file or directory\n" in capsys.readouterr().err
    assert cli.main(["ensemble", "draw", "gated", *where, str(built)]) == 1
    assert f"tutti: '{built}': Is a directory\n" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_where_it_is_written(root: Path) -> None:
    graph = Graph("g", root, 8)
    x = graph.input("X", "FP32", [1])
    with pytest.raises(ConfigError, match="step 'ten': the model has no input 'z', it has"):
        graph.step("ten", z=x)
    with pytest.raises(ConfigError, match="the model has no output 'z'"):
        graph.step("ten", x=x)["z"]
    with pytest.raises(ConfigError, match="there is none of that name"):
        graph.step("nope", x=x)
    with pytest.raises(ConfigError, match="is a tensor of graph 'g'"):
        Graph("other", root, 8).step("ten", x=x)
    with pytest.raises(ConfigError, match="text without quotes"):
        x == "it's"  # noqa: B015
    with pytest.raises(ConfigError, match="whether it is true is not known before a request comes"):
        bool(x > 1)
    graph = Graph("g", root, 8)
    x = graph.input("X", "FP32", [1])
    made = graph.step("ten", x=x, when=x > 1)["y"]
    graph.output("Y", made)
    with pytest.raises(ConfigError, match="output 'Y': is not made for every row"):
        graph.config()


def test_the_sample_graph_is_what_its_file_makes(sample_repository: Path) -> None:
    file = Path(__file__).parents[2] / "ensembles" / "graphs" / "content_intelligence.py"
    assert (
        cli.main(
            ["ensemble", "build", str(file.relative_to(Path.cwd())), "--repository", str(sample_repository), "--check"]
        )
        == 0
    )
    assert "for each of" in show.table(planned(sample_repository, "content_intelligence"))
