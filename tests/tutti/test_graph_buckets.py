"""Which CUDA graphs a configuration asks for, and what is refused or told."""

from itertools import pairwise

import pytest

from tutti.backends.graph_buckets import Bucket, are_all_filled_up, are_wanted, plan
from tutti.core.errors import ConfigError
from tutti.repository import config, model_config

FIXED = """backend: "pytorch" max_batch_size: {most}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 3, 4 ] }}, {{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }} ]
output {{ name: "z" data_type: TYPE_FP32 dims: [ 3 ] }}
optimization {{ cuda {{ graphs: true {graphs} }} }} {more}"""
TEXT = """backend: "pytorch" max_batch_size: 4
input [ { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] }, { name: "mask" data_type: TYPE_INT64 dims: [ -1 ] } ]
output { name: "z" data_type: TYPE_FP32 dims: [ 3 ] }
optimization { cuda { graphs: true } } """


def parsed(text: str) -> model_config.ModelConfig:
    return config.parse(text, "m")


def fixed(most: int = 8, graphs: str = "", more: str = "") -> model_config.ModelConfig:
    return parsed(FIXED.format(most=most, graphs=graphs, more=more))


def parameter(name: str, text: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{text}" }} }}'


def intervals(made: model_config.ModelConfig) -> list[tuple[int, int]]:
    return [(bucket.least, bucket.rows) for bucket in plan(made).buckets]


def spec(rows: int, x: str = "dim: [ 3, 4 ]", lower: str = "") -> str:
    inputs = f'input {{ key: "x" value {{ {x} }} }} input {{ key: "y" value {{ dim: 1 }} }}'
    return f"graph_spec {{ batch_size: {rows} {inputs} {lower} }}"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (fixed(1), [(1, 1)]),
        (fixed(5), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
        (fixed(8, more=parameter("tutti.graphs.max_count", "7")), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8)]),
        (fixed(8, more=parameter("tutti.graphs.max_count", "5")), [(1, 1), (2, 2), (3, 4), (5, 8)]),
        (fixed(12, more=parameter("tutti.graphs.max_count", "5")), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12)]),
        (fixed(0), [(0, 0)]),
        (fixed(9, more=parameter("tutti.graphs.max_count", "7") + "dynamic_batching { preferred_batch_size: [3, 5] }"),
         [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (9, 9)]),
        (fixed(8, more=parameter("tutti.graphs.batch_sizes", " 5,2 ")), [(1, 2), (3, 5)]),
        (fixed(8, more=parameter("tutti.graphs.max_count", "2")), [(1, 1), (2, 2)]),
        (fixed(8, spec(2) + spec(4)), [(2, 2), (4, 4)]),
        (fixed(8, spec(2) + spec(2)), [(2, 2)]),
        (fixed(8, "graph_spec { batch_size: 8 graph_lower_bound { batch_size: 3 } }"), [(3, 8)]),
        (fixed(0, "graph_spec { }"), [(0, 0)]),
    ],
)  # fmt: skip
def test_batch_sizes(made: model_config.ModelConfig, expected: list[tuple[int, int]]) -> None:
    assert intervals(made) == expected
    assert all(bucket.shapes == {"x": (3, 4), "y": (1,)} for bucket in plan(made).buckets)


@pytest.mark.parametrize(
    ("lengths", "worst"), [("8", 1 / 5), ("8, 16", 1 / 5), ("8, 16, 24", 1 / 3), ("8, 16, 24, 32, 40", 1 / 2)]
)
def test_batches_are_filled_up_by_little_where_graphs_may_be_many(lengths: str, worst: float) -> None:
    """Of the largest size the greatest share that is filled up; as many lengths as there are share what may be."""
    both = parameter("tutti.buckets.ids", lengths) + parameter("tutti.buckets.mask", lengths)
    buckets = plan(parsed(TEXT.replace("max_batch_size: 4", "max_batch_size: 256") + both)).buckets
    assert len(buckets) <= 64 and max(bucket.rows for bucket in buckets) == 256
    sizes = sorted({bucket.rows for bucket in buckets})
    assert max(1 - (before + 1) / size for before, size in pairwise(sizes)) < worst


def test_graphs_are_wanted_where_the_configuration_says_so() -> None:
    assert are_wanted(fixed())
    assert not are_wanted(parsed(TEXT.replace("graphs: true", "graphs: false")))


def test_lengths_are_those_of_the_buckets() -> None:
    """The mask has the same buckets as the ids, and so their length."""
    both = parameter("tutti.buckets.ids", "8, 16") + parameter("tutti.buckets.mask", "16,8")
    sizes = parameter("tutti.graphs.batch_sizes", "1, 4")
    shapes = [(b.rows, b.shapes["ids"], b.shapes["mask"]) for b in plan(parsed(TEXT + both + sizes)).buckets]
    assert shapes == [(1, (8,), (8,)), (1, (16,), (16,)), (4, (8,), (8,)), (4, (16,), (16,))]
    other = parameter("tutti.buckets.ids", "8, 16") + parameter("tutti.buckets.mask", "4")
    shapes = [(b.rows, b.shapes["ids"], b.shapes["mask"]) for b in plan(parsed(TEXT + other + sizes)).buckets]
    assert shapes == [(1, (8,), (4,)), (1, (16,), (4,)), (4, (8,), (4,)), (4, (16,), (4,))]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TEXT, "input 'ids' has variable dims [-1]: they need parameters.tutti.buckets.ids, or a graph_spec"),
        (TEXT.replace('name: "mask" data_type: TYPE_INT64 dims: [ -1 ]',
                      'name: "mask" data_type: TYPE_INT64 dims: [ 2 ] allow_ragged_batch: true')
         + parameter("tutti.buckets.ids", "8"), "batches of ragged inputs have any length"),
        (TEXT.replace("dims: [ -1 ] }", "dims: [ -1 ] reshape { shape: [ -1, 1 ] } }")
         + parameter("tutti.buckets.ids", "8") + parameter("tutti.buckets.mask", "8"),
         "input 'ids' has variable dims and a reshape"),
    ],
)  # fmt: skip
def test_why_there_are_none_is_told(text: str, why: str) -> None:
    made = plan(parsed(text))
    assert not made.buckets
    assert len(made.notes) == 1 and why in made.notes[0]


def test_fixed_dims_are_those_that_the_model_has() -> None:
    text = TEXT.replace("dims: [ -1 ]", "dims: [ 4 ] reshape { shape: [ 2, 2 ] }")
    assert {bucket.shapes["ids"] for bucket in plan(parsed(text)).buckets} == {(2, 2)}


def test_variable_dims_may_be_specified() -> None:
    inputs = 'input { key: "ids" value { dim: 7 } } input { key: "mask" value { dim: 7 } }'
    text = TEXT.replace("graphs: true", f"graphs: true graph_spec {{ batch_size: 2 {inputs} }}")
    (bucket,) = plan(parsed(text)).buckets
    assert (bucket.rows, bucket.shapes) == (2, {"ids": (7,), "mask": (7,)})
    assert str(bucket) == "'ids' [2, 7], 'mask' [2, 7]"


def test_what_is_left_out_is_told() -> None:
    made = plan(fixed(8, more=parameter("tutti.graphs.max_count", "3")))
    (note,) = made.notes
    expected = "1 of 4 CUDA graphs are left out, from 'x' [8, 3, 4], 'y' [8, 1] upwards"
    assert note == f"{expected} (parameters.tutti.graphs.max_count is 3)"


def test_smaller_shapes_than_specified_have_no_graph_but_fewer_rows_have() -> None:
    lower = 'graph_lower_bound { batch_size: 2 input { key: "x" value { dim: [ 1, 4 ] } } }'
    made = plan(fixed(8, spec(4, lower=lower)))
    assert [(bucket.least, bucket.rows) for bucket in made.buckets] == [(2, 4)]
    assert len(made.notes) == 1 and "input 'x': only [3, 4] has a CUDA graph" in made.notes[0]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (fixed(8, spec(9)), r"optimization.cuda.graph_spec\[0\].batch_size: expected 1 to max_batch_size 8, got 9"),
        (fixed(8, "graph_spec { }"), r"graph_spec\[0\].batch_size: expected 1 to max_batch_size 8, got 0"),
        (fixed(0, "graph_spec { batch_size: 1 }"), r"batch_size: expected 0, as max_batch_size is, got 1"),
        (fixed(8, spec(1) + spec(2, "dim: [ 3, 5 ]")), r"graph_spec\[1\].input\['x'\]: .*\[3, 4\], got \[3, 5\]"),
        (fixed(8, spec(2, "dim: 3")), r"expected a shape of \[3, 4\], got \[3\]"),
        (fixed(8, 'graph_spec { batch_size: 1 input { key: "x" value { dim: 1 } } }'), r"inputs \['x', 'y'\], got"),
        (fixed(8, spec(2, lower="graph_lower_bound { batch_size: 3 }")), "expected at most batch_size 2, got 3"),
        (fixed(8, spec(2, lower="graph_lower_bound { }")), r"graph_lower_bound.batch_size: expected 1 to"),
        (fixed(8, spec(2, lower='graph_lower_bound { batch_size: 1 input { key: "x" value { dim: [ 4, 4 ] } } }')),
         r"graph_lower_bound.input\['x'\]: expected dims of at most \[3, 4\], got \[4, 4\]"),
        (fixed(8, spec(2, lower='graph_lower_bound { batch_size: 1 input { key: "q" value { dim: 4 } } }')),
         "graph_spec has no input 'q'"),
        (fixed(8, more=parameter("tutti.graphs.batch_sizes", "1, 9")), "expected sizes from 1 to max_batch_size 8"),
        (fixed(8, more=parameter("tutti.graphs.batch_sizes", "")), "expected sizes from 1"),
        (fixed(0, more=parameter("tutti.graphs.batch_sizes", "1")), "expected sizes from 1 to max_batch_size 0"),
        (fixed(8, more=parameter("tutti.graphs.max_count", "0")), "expected a number of at least 1, got '0'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_path(made: model_config.ModelConfig, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan(made)


@pytest.mark.parametrize(
    ("intervals", "is_so"),
    [
        ([(1, 1), (2, 4)], True),
        ([(2, 4), (1, 1)], True),
        ([(1, 1), (4, 4)], False),
        ([(2, 4)], False),
        ([(0, 0)], False),
    ],
)
def test_whether_every_batch_is_filled_up(intervals: list[tuple[int, int]], is_so: bool) -> None:
    assert are_all_filled_up([Bucket(rows, least, {}) for least, rows in intervals]) is is_so
