"""Mistakes in a config.pbtxt: each is told with its line, and the name that was meant."""

import pytest

from tests.models import Repository
from tutti.app import cli
from tutti.ensembles.lines import line_of

_X = 'input { name: "x" data_type: TYPE_FP32 dims: 1 }'
_Y = 'output { name: "y" data_type: TYPE_FP32 dims: 1 }'
MODEL = f'backend: "python" max_batch_size: 8 {_X} {_Y}'
# Below a line with the name.
GRAPH = """platform: "ensemble"
max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: 1 }
output { name: "SCORE" data_type: TYPE_FP32 dims: 1 }
output { name: "DEAR" data_type: TYPE_FP32 dims: 1 }
parameters { key: "tutti.when.DEAR" value { string_value: "SCORE > 1" } }
parameters {
  key: "tutti.default.DEAR" value { string_value: "0" }
}
ensemble_scheduling {
  # the gate { that comes first }
  step {
    model_name: "gate" model_version: -1
    input_map { key: "x" value: "X" }
    output_map { key: "y" value: "SCORE" }
  }
  step {
    model_name: "costly" model_version: -1
    input_map { key: "x" value: "SCORE" }
    output_map { key: "y" value: "DEAR" }
  }
}
"""


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ('model_name: "costly"', 'model_name: "costy"', "did you mean 'costly'? (chain/config.pbtxt:18)"),
        (
            'key: "x" value: "SCORE"',
            'key: "x" value: "SCOR"',
            "tensor 'SCOR'; did you mean SCORE? (chain/config.pbtxt:20)",
        ),
        ('key: "y" value: "DEAR"', 'key: "yy" value: "DEAR"', "outputs ['y']; did you mean y? (chain/config.pbtxt:21)"),
        ('key: "x" value: "X"', 'key: "xx" value: "X"', "input 'x' of the model is not mapped (chain/config.pbtxt:13)"),
        ("SCORE > 1", "SCOR > 1", "did you mean SCORE? (chain/config.pbtxt:7)"),
        ("SCORE > 1", "SCORE >", "(chain/config.pbtxt:7)"),
        ("SCORE > 1", "DEAR > 1", "cycle among ['costly'] (chain/config.pbtxt:11)"),
        ("tutti.when.DEAR", "tutti.when.DEER", "of that name; did you mean DEAR? (chain/config.pbtxt:7)"),
        ("tutti.when.DEAR", "tutti.wen.DEAR", "; did you mean tutti.when.DEAR? (chain/config.pbtxt:7)"),
        ("tutti.when.DEAR", "tuti.when.DEAR", "; did you mean tutti.when.DEAR? (chain/config.pbtxt:7)"),
        ("tutti.default.DEAR", "tutti.default.DEER", "did you mean DEAR? (chain/config.pbtxt:8)"),
        ('string_value: "0"', 'string_value: "no"', "a value of FP32, got 'no' (chain/config.pbtxt:8)"),
        ("tutti.default.DEAR", "tutti.default.SCORE", "output 'DEAR': is not made for every row"),
        ('output { name: "SCORE"', 'output { name: "SCORES"', "it; did you mean SCORE? (chain/config.pbtxt:5)"),
        ('value: "X" }', 'value: "DEAR" }', "cycle among ['gate', 'costly'] (chain/config.pbtxt:11)"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_name_that_was_meant(
    repository: Repository, capsys: pytest.CaptureFixture[str], right: str, wrong: str, told: str
) -> None:
    for model in ("gate", "costly"):
        repository.add_python(model, MODEL, "return None")
    assert GRAPH.count(right) == 1
    repository.add("chain", GRAPH.replace(right, wrong), {".keep": ""})
    assert cli.main(["ensemble", "check", "chain", "--repository", str(repository.root)]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_a_server_says_it_as_well(repository: Repository, capfd: pytest.CaptureFixture[str]) -> None:
    for model in ("gate", "costly"):
        repository.add_python(model, MODEL, "return None")
    repository.add("chain", GRAPH.replace("SCORE > 1", "SCOR > 1"), {".keep": ""})
    assert cli.main(["explain", "chain", "X=[1]", "--repository", str(repository.root)]) == 1
    assert "did you mean SCORE? (chain/config.pbtxt:7)\n" in capfd.readouterr().err


LISTED = """ensemble_scheduling: { step: [ { model_name: 'a' input_map: [ {key: "x"
value: "y"}, { key: "z", value: "q" }
] }, < model_name: "b" # }
 output_map { key: "o" "p" value: "a \\"w\\"" } > ] }
parameters [ { key: "tutti.when.a \\"w\\"" value: { string_value: "a" "b" } } ]
input { name: "i" dims: [ 1, 2 ] } input { name: "j" dims: 1; dims: 2 }
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("step 0 'a' input_map 'x'", 1),
        ("step 0 'a' input_map 'z'", 2),
        ("step 0 'a' input_map 'none'", 1),
        ("step 1 'b' output_map 'op'", 4),
        ("step 1 'b' tutti.when", 5),
        ("step 1 'b' tutti.each", 3),
        ("step 'b'", 3),
        ("step 7 'c' input_map", 0),
        ("input 'j'", 6),
        ("output 'j'", 0),
        ("ensemble_scheduling.step", 1),
        ("parameters.tutti.exit", 0),
        ("", 0),
    ],
)
def test_every_form_of_the_text_format_is_read(path: str, line: int) -> None:
    assert line_of(LISTED, path) == line


@pytest.mark.parametrize("text", ["", "}", "]", "a", "a:", "{ }", "'", '"', "a: [", "a { b: 1", "\0 \\"])
def test_what_does_not_parse_harms_nobody(text: str) -> None:
    assert line_of(text, "step 0 'a'") == 0
