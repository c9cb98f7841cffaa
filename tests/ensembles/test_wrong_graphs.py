"""Graph files with a mistake: each is told in a sentence with the line on which it was made."""

from pathlib import Path

import numpy as np
import pytest

from tutti.core.errors import ConfigError
from tutti.ensembles.builder import Graph
from tutti.ensembles.places import MistakeAt
from tutti.ensembles.source import graph_of

_X = 'input { name: "x" data_type: TYPE_FP32 dims: 1 }'
_Y = 'output { name: "y" data_type: TYPE_FP32 dims: 1 }'
MODELS = {
    "ten": f"max_batch_size: 8 {_X} {_Y}",
    "costly": f"max_batch_size: 8 {_X} {_Y}",
    "flat": f"{_X} {_Y}",
    "two": f'max_batch_size: 8 {_X} input {{ name: "b" data_type: TYPE_FP32 dims: 1 optional: true }} {_Y}',
    "text": 'max_batch_size: 8 input { name: "t" data_type: TYPE_STRING dims: 1 } '
    'output { name: "label" data_type: TYPE_STRING dims: 1 }',
    "wide": f'max_batch_size: 8 {_X} output {{ name: "v" data_type: TYPE_FP32 dims: 4 }} '
    'output { name: "flag" data_type: TYPE_BOOL dims: 1 } output { name: "n" data_type: TYPE_INT32 dims: 1 }',
}
FILE = """from tutti.ensembles.builder import Graph
import numpy as np


def build(repository):
    graph = Graph("g", repository, 8)
    x = graph.input("X", "FP32", [1])
    score = graph.step("ten", x=x)["y"]
    label = graph.step("text", t=graph.input("T", "BYTES", [1]))["label"]
    wide = graph.step("wide", x=x)
    v, flag, n = wide["v"], wide["flag"], wide["n"]
    other = Graph("other", repository, 8).input("Z", "FP32", [1])
    graph.output("LABEL", label)
    graph.output("V", v)
    {wrong}
    graph.output("SCORE", score)
    graph.output("FLAG", flag)
    graph.output("N", n)
    return graph
"""
LINE = FILE.splitlines().index("    {wrong}") + 1

# What stands on the line, and what is told of it.
EXPRESSIONS = {
    'score > "high"': "condition ten.y > 'high': '>' compares a number with a text: expected two of one kind",
    "label == 3": "condition text.label == 3: '==' compares a text with a number",
    'label < "b"': "condition text.label < 'b': '<' compares numbers, got a text",
    "flag == 1": "condition wide.flag == 1: '==' compares a truth with a number",
    "0 < score < 3": "condition ten.y > 0: whether it is true is not known before a request comes; expected & | ~",
    "score > 1 and n > 2": "condition ten.y > 1: whether it is true is not known",
    "not (score > 1)": "condition ten.y > 1: whether it is true is not known",
    'label in ("a", "b")': "condition text.label == 'a': whether it is true is not known",
    '"a" in label': "tensor 'text.label', BYTES[1]: what it contains is not known",
    "score & n": "condition ten.y and wide.n: 'and' joins comparisons, got a number; in Python & | ~ bind closer",
    "score > 3 & n > 2": "condition 3 and wide.n: 'and' joins comparisons, got a number; in Python & | ~ bind closer",
    "score % 2 == 0": "tensor 'ten.y', FP32[1]: its remainder (%) is not known",
    "2 ** score > 1": "tensor 'ten.y', FP32[1]: its power (**) is not known",
    "(score > 1) ^ (n > 1)": "condition ten.y > 1: ^ is not known",
    "abs(score) > 1": "tensor 'ten.y', FP32[1]: its abs() is not known",
    "float(score) > 1": "tensor 'ten.y', FP32[1]: its number is not known",
    "sum(v) > 1": "tensor 'wide.v', FP32[4]: what its elements are is not known before a request comes; expected t[0]",
    "len(v) > 1": "tensor 'wide.v', FP32[4]: its length is not known",
    'score > float("nan")': "tensor 'ten.y', FP32[1] >: expected a tensor, a finite number, text without quotes",
    "score == None": "got None; whether a row has a tensor is t.given()",
    "v > 1": "condition wide.v > 1: 'wide.v' has dims [4]: expected one element in a row; say wide.v[0]",
    "v[9] > 1": "condition wide.v[9]: wide.v[9]: the tensor has 4 elements in a row",
    "v[-1] > 1": "tensor 'wide.v', FP32[4]: expected the number of an element, from 0 on, got [-1]",
    "label.max() > 1": "condition max(text.label): max(text.label): expected numbers, the tensor has text",
    "score.maximum() > 1": "AttributeError: 'Tensor' object has no attribute 'maximum'; did you mean max?",
    "score + 1": "expected a comparison of tensors, as step['RISK'] > 0.5, got a number: condition ten.y + 1",
    "'score > 1'": "exit_when: expected a comparison of tensors, as step['RISK'] > 0.5, got 'score > 1'",
    "other > 1": "exit_when: 'Z' is a tensor of graph 'other'",
}
STEPS = {
    "x=step": "input 'x': expected a tensor, as step['NAME'] or graph.input(...), got step 'wide', whose outputs are",
    "x=3": "input 'x': expected a tensor, as step['NAME'] or graph.input(...), got 3",
    "x=score + 1": "input 'x': expected a tensor, as step['NAME'] or graph.input(...), got condition ten.y + 1",
    "x=label": "input 'x': expected FP32, got tensor 'text.label', BYTES[1]",
    "": "input 'x' of the model is missing; it has ['x']",
    "score": "the inputs: expected them by name, as {'NAME': ...}, got tensor 'ten.y', FP32[1]",
    "x=score, whn=score > 1": "the model has no input 'whn', it has ['x']; did you mean when?",
    "x=score, when=True": "when: expected a comparison of tensors, as step['RISK'] > 0.5, got True",
    "x=score, version='1'": "version: expected a whole number, -1 or more, got '1'",
    "x=score, each=score": "each: expected a list of tensors, as each=[boxes], got tensor 'ten.y', FP32[1]",
    "x=score, each=[n]": "each: expected tensors among its inputs, got tensor 'wide.n', INT32[1]",
    "x=v, each=[v], gather={'y': 'median'}": "gather of 'y': expected concat, max, min, mean, sum, got 'median'",
    "x=v, each=[v], gather={'z': 'max'}": "the model has no output 'z', it has ['y']",
    "x=score, gather={'y': 'max'}": "gather needs each=[...], the tensors whose items are gathered",
    "x=score, defaults={'z': 1}": "the model has no output 'z', it has ['y']",
    "x=score, defaults={'y': [1]}": "default of 'y': expected a number, text, True or False, got [1]",
}
LINES = {
    "if score: pass": "tensor 'ten.y', FP32[1]: whether it is true is not known before a request comes",
    "for one in v: pass": "tensor 'wide.v', FP32[4]: what its elements are is not known",
    "graph.step('costly', x=score, version=7)": "model 'costly' has no version 7, it has [1]",
    "graph.where(score > 1)": "where: expected a block, as `with graph.where(...):`, got no with",
    "graph.output('C', wide)": "output 'C': expected a tensor, as step['NAME'] or graph.input(...), got step 'wide'",
    "graph.output('V', score)": "output 'V': the graph has an output 'V' already",
    "graph.output('V2', v)": "output 'V2': tensor 'wide.v', FP32[4] is its output 'V' already",
    "graph.output('C', x)": "output 'C': expected a tensor that a step makes, got the graph's input 'X'",
    "graph.output('X', graph.step('costly', x=x)['y'])": "output 'X': the graph has an input of that name",
    "graph.output(3, score)": "expected a tensor's name as text, got 3",
    "graph.output('C', wide.v)": "'Step' object has no attribute 'v'; it is step 'wide', whose outputs are step['v']",
    "graph.ouput('C', score)": "'Graph' object has no attribute 'ouput'; did you mean output?",
    "graph.input('X', 'FP32', [1])": "input 'X': graph 'g' has a tensor of that name already",
    "graph.input('Z', 'TYPE_FP32', [1])": "got 'TYPE_FP32'; did you mean FP32?",
    "graph.input('Z', 'FP32', 1)": "input 'Z': expected dims as a list of sizes of at least 1, or -1 for any, got 1",
    "graph.items('v', n)": "items: expected a tensor, as step['NAME'] or graph.input(...), got 'v'",
    "graph.deadline_ms('5')": "deadline_ms: expected a whole number, 1 or more, got '5'",
    "Graph('ten', repository)": "graph 'ten': the repository has a model of that name, which is no ensemble",
    "Graph('a/b', repository)": "Graph: expected a name that a folder can have, got 'a/b'",
    "Graph('h', repository, '8')": "graph 'h': max_batch_size: expected a whole number, 0 or more, got '8'",
    "Graph(repository, 'h')": "Graph: expected a name that a folder can have, got PosixPath(",
    "Graph('h', 8)": "Graph: expected the repository's folder, as build(repository) gets it, got 8",
    # These show in the whole graph only.
    "graph.step('costly', x=score)": "step 'costly': nothing takes its outputs",
    "graph.output('C', graph.step('costly', x=v)['y'])": "ensemble 'g': step 3 'costly' input_map 'x': expected shape "
    "[-1, 1], ensemble tensor 'V' has [-1, 4]",
    "graph.output('C', graph.step('flat', x=score, when=score > 1)['y'])": "step 3 'flat' tutti.when: the model has no",
    "graph.output('C', graph.step('costly', x=score, when=score > 1)['y'])": "output 'C': is not made for every row",
    "graph.output('C', graph.step('costly', x=score)['y'], default='a')": "expected a value of FP32, got 'a'",
    "graph.output('C', graph.step('two', x=score, defaults={'y': 'a'})['y'])": "expected a value of FP32, got 'a'",
    "graph.items(v, v)": "expected one whole number a row, 'V' is FP32 with dims [4]",
    "c = graph.step('two', x=x, b=x); c.inputs['b'] = c['y']": "cycle among ['two']",
}
WRONG = {
    **{f"graph.exit_when({text})": told for text, told in EXPRESSIONS.items()},
    **{f"step = wide; graph.step('costly', {text})": f"step 'costly': {told}" for text, told in STEPS.items()},
    **LINES,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for name, text in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(f'name: "{name}" backend: "python" {text}')
        (root / name / "1" / "model.py").touch()
    return root


def test_the_file_without_a_mistake_makes_a_graph(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "graph.py"
    file.write_text(FILE.format(wrong="graph.deadline_ms(5)"))
    assert graph_of(file, root).proto().parameters["tutti.deadline_ms"].string_value == "5"


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_told_with_its_line(wrong: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "graph.py"
    file.write_text(FILE.replace("{wrong}", wrong))
    with pytest.raises(ConfigError) as raised:
        graph_of(file, root)
    said = str(raised.value)
    assert said.startswith(f"{file}:{LINE}: ")
    assert WRONG[wrong] in said
    assert "\n" not in said and " object at 0x" not in said


def test_a_mistake_of_whatever_kind_is_told_with_the_file(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "graph.py"
    file.write_text(FILE.replace("{wrong}", "graph.proto = lambda: 1 / 0"))
    with pytest.raises(ConfigError, match=f":{LINE}: ZeroDivisionError: division by zero"):
        graph_of(file, root)


def test_calculations_may_begin_with_a_number(root: Path) -> None:
    graph = Graph("g", root, 8)
    x = graph.input("a tensor", "FP32", [1])
    made = graph.step("ten", x=x, when=(1 - x > -x * 2) & (np.float32(3) > 2 / x) & (np.int64(1) + x != 0))  # type: ignore[operator]
    graph.output("and", made["y"], default=0)
    graph.exit_when(True & (made["y"] > np.float64(2.5)))
    parameters = graph.proto().parameters
    name = '"a tensor"'
    assert parameters["tutti.when.and"].string_value == (
        f"(((1 - {name}) > (-({name}) * 2)) and ((2 / {name}) < 3.0)) and ((1 + {name}) != 0)"
    )
    assert parameters["tutti.exit"].string_value == 'true and ("and" > 2.5)'


def test_dims_that_only_the_whole_graph_tells_are_left_to_it(root: Path) -> None:
    graph = Graph("g", root)  # without a batch of its own: whether its tensors have the models' shows in the end
    made = graph.step("wide", x=graph.input("X", "FP32", [1]))["v"]
    graph.output("V", made)
    graph.exit_when(made[9] > 1)
    with pytest.raises(MistakeAt, match=r"parameters.tutti.exit: V\[9\]: the tensor has 4 elements in a row"):
        graph.proto()
