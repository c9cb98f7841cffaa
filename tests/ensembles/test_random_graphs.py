"""Random graphs with all that a graph may say, executed as batches, one by one, and by a slow oracle, row by row.

The oracle knows nothing of columns: a row is a dict of what was made for it, and each step looks whether it may run.
"""

import pickle
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.serving import infer
from tutti.core.errors import InferError, Internal, InvalidArgument
from tutti.core.types import Call, Infer, InferRequest, InferResponse, Tensor, settle
from tutti.ensembles import graph, planner
from tutti.ensembles.executor import EnsembleExecutor
from tutti.ensembles.placed import PlacedExecutor, executor_of_segment
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config, model_config

GRAPHS = 2_000
SHARDS = 20
WIDTH = 3
LIMIT = 40.0
SPEC = f"data_type: TYPE_FP32 dims: {WIDTH}"
Row = dict[str, Any]


@dataclass
class Model:
    """What one step's model does with the rows of a request; a row too large fails its request."""

    kind: str
    factor: float
    max_rows: int
    seen: list[int] = field(default_factory=list)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        total = sum(x.astype(np.float64) for x in inputs.values()) * self.factor
        if np.abs(total).max(initial=0) > LIMIT:
            raise InvalidArgument("too much")
        if self.kind == "score":
            return {"y": total.mean(axis=1, keepdims=True).astype(np.float32)}  # type: ignore[union-attr]
        if self.kind == "items":
            n = np.abs(total[:, 0]).astype(np.int64) % 4  # type: ignore[index]
            items = total[:, np.newaxis, :] + np.arange(max(n.max(initial=0), 1))[:, np.newaxis]  # type: ignore[index]
            return {"y": items.astype(np.float32), "n": n[:, np.newaxis].astype(np.int32)}
        return {"y": total.astype(np.float32)}  # type: ignore[union-attr]

    def execute(self, request: InferRequest) -> InferResponse:
        inputs = {name: tensor.array() for name, tensor in request.inputs.items()}
        rows = len(next(iter(inputs.values())))
        assert rows <= self.max_rows
        self.seen.append(rows)
        made = self.run(inputs)
        return InferResponse("m", "1", [Tensor.of(name, made[name]) for name in request.outputs])


class Models:
    """The models' engine: answers in other threads, in any order, or at once."""

    def __init__(self, models: dict[str, Model], rng: random.Random) -> None:
        self._models = models
        self._rng = rng
        self._is_inline = rng.random() < 0.5

    def __call__(self, calls: Sequence[Call]) -> None:
        if self._is_inline:
            self._run(list(calls))
        else:
            threading.Thread(target=self._run, args=(list(calls),)).start()

    def _run(self, calls: list[Call]) -> None:
        self._rng.shuffle(calls)
        while calls:
            group = [calls.pop() for _ in range(self._rng.randint(1, len(calls)))]
            for call in group:
                try:
                    call.answer = self._models[call.request.model_name].execute(call.request)
                except InferError as error:
                    call.answer = error
                except Exception as error:
                    call.answer = Internal(repr(error))
            settle(group)


class Counted:
    """As a model does for its executor: says how many rows each call has."""

    def __init__(self, executor: Infer) -> None:
        self._executor = executor

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.rows = call.request.inputs["X"].shape[0]
        self._executor(calls)


@dataclass
class Graph:
    """A drawn graph: its configuration, and what the oracle needs to know of it."""

    text: str
    configs: dict[str, model_config.ModelConfig]
    models: dict[str, Model]
    outputs: list[str]
    # The oracle's own notes: (model, inputs, optional ones, output map, when, each, gather), defaults, exit.
    steps: list[dict[str, Any]]
    defaults: dict[str, float]
    exit: tuple[str, Callable[[Row], bool], set[str]] | None


def draw(rng: random.Random) -> Graph:
    vectors, scores, steps, parameters = ["X", "W"], [], [], {}
    items: dict[str, str] = {}
    defaults: dict[str, float] = {}
    configs, models = {}, {}
    maybe = {"W"}
    for index in range(rng.randint(1, 7)):
        kind = rng.choice(["sum", "sum", "score", "items"])
        each = rng.choice(list(items)) if items and kind == "sum" and rng.random() < 0.8 else ""
        reads = rng.sample(vectors, rng.randint(0 if each else 1, min(3, len(vectors))))
        if each:
            reads = [each, *[name for name in reads if name not in items]]
        name, out = f"m{index}", f"T{index}"
        optional = {read for read in reads[1:] if rng.random() < 0.5}
        backend = rng.choice(['backend: "onnxruntime"', 'backend: "python"'])
        model = models[name] = Model(kind, rng.choice([0.5, 1.0, 1.5, -1.0]), rng.choice([2, 3, 8, 64]))
        inputs = "".join(
            f'input {{ name: "i{k}" {SPEC} {"optional: true" if read in optional else ""} }}'
            for k, read in enumerate(reads)
        )
        y = {"score": "dims: 1", "items": f"dims: [ -1, {WIDTH} ]"}.get(kind, f"dims: {WIDTH}")
        more = 'output { name: "n" data_type: TYPE_INT32 dims: 1 }' if kind == "items" else ""
        configs[name] = config.parse(
            f"{backend} max_batch_size: {model.max_rows} dynamic_batching {{}} {inputs} "
            f'output {{ name: "y" data_type: TYPE_FP32 {y} }} {more}',
            name,
        )
        made = {"y": out, **({"n": f"N{index}"} if kind == "items" else {})}
        step = {"model": name, "inputs": reads, "optional": optional, "made": made, "when": None, "each": each}
        if scores and rng.random() < 0.5:
            score, limit, sign = rng.choice(scores), rng.choice([-3.0, 0.0, 3.0]), rng.choice(["<", ">"])
            parameters[f"when.{out}"] = f"{score} {sign} {limit}"
            step["when"] = _compare(score, sign, limit)  # type: ignore[assignment]
        is_maybe = step["when"] is not None or any(read in maybe for read in reads if read not in optional)
        if each:
            parameters[f"each.{out}"] = each
            step["count"] = items[each]
            step["gather"] = rng.choice(["max", "min", "mean", "sum", "concat"])
            parameters[f"gather.{out}"] = step["gather"]  # type: ignore[assignment]
            is_maybe = is_maybe or step["gather"] in ("max", "min", "mean")
        for tensor in made.values():
            if (is_maybe and rng.random() < 0.6) or rng.random() < 0.1:
                defaults[tensor] = rng.randint(0, 2) if tensor[0] == "T" else 0
                parameters[f"default.{tensor}"] = str(defaults[tensor])
            elif is_maybe:
                maybe.add(tensor)
        steps.append(step)
        if kind == "items":
            items[out] = parameters[f"items.{out}"] = f"N{index}"
        elif kind == "score":
            scores.append(out)
        elif step.get("gather") != "concat":
            vectors.append(out)
    return _assembled(rng, steps, configs, models, parameters, defaults, scores)


def _compare(score: str, sign: str, limit: float) -> Callable[[Row], bool]:
    def holds(row: Row) -> bool:
        value = row.get(score)
        return value is not None and bool(value[0] < limit if sign == "<" else value[0] > limit)

    return holds


def _assembled(
    rng: random.Random,
    steps: list[dict[str, Any]],
    configs: dict[str, model_config.ModelConfig],
    models: dict[str, Model],
    parameters: dict[str, str],
    defaults: dict[str, float],
    scores: list[str],
) -> Graph:
    decided = None
    if scores and rng.random() < 0.3:
        score = rng.choice(scores)
        parameters["exit"] = f"{score} > 2"
        decided = (score, _compare(score, ">", 2.0), _needed(steps, {score}))
    # Beyond a row's count anything may stand among its items: they are looked at through their gathered results.
    kinds = {step["model"]: models[step["model"]].kind for step in steps}
    tensors = [t for step in steps for key, t in step["made"].items() if (kinds[step["model"]], key) != ("items", "y")]
    outputs = rng.sample(tensors, rng.randint(1, len(tensors)))
    dims: dict[str, str] = {}
    for step in steps:
        spec = configs[step["model"]].outputs
        for tensor, one in zip(step["made"].values(), spec, strict=True):
            shape = [-1, *one.dims] if step.get("gather") == "concat" else list(one.dims)
            dims[tensor] = f"data_type: TYPE_{one.datatype} dims: {shape}"
    for tensor in outputs:  # what may be missing in some rows needs a default
        if tensor not in defaults:
            defaults[tensor] = int(tensor[0] == "T")
            parameters[f"default.{tensor}"] = str(defaults[tensor])
    shuffled = rng.sample(steps, len(steps))
    shown = "".join(
        'step {{ model_name: "{}" model_version: -1 {} {} }}'.format(
            step["model"],
            "".join(f'input_map {{ key: "i{k}" value: "{read}" }}' for k, read in enumerate(step["inputs"])),
            "".join(f'output_map {{ key: "{key}" value: "{tensor}" }}' for key, tensor in step["made"].items()),
        )
        for step in shuffled
    )
    text = (
        f'platform: "ensemble" max_batch_size: 8 input {{ name: "X" {SPEC} }} '
        f'input {{ name: "W" {SPEC} optional: true }} '
        + "".join(f'output {{ name: "{name}" {dims[name]} }}' for name in outputs)
        + "".join(f'parameters {{ key: "tutti.{k}" value {{ string_value: "{v}" }} }}' for k, v in parameters.items())
        + f"ensemble_scheduling {{ {shown} }}"
    )
    return Graph(text, configs, models, outputs, steps, defaults, decided)


def _needed(steps: list[dict[str, Any]], tensors: set[str]) -> set[str]:
    """The models of the steps that make `tensors`, directly or not."""
    found: set[str] = set()
    for step in reversed(steps):
        if tensors & set(step["made"].values()):
            found.add(step["model"])
            tensors = tensors | set(step["inputs"]) | {step.get("count", "")}
            if step["when"] is not None:
                tensors = tensors | set(step["when"].__closure__[1].cell_contents.split())
    return found


def oracle(drawn: Graph, request: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """A request's outputs, row by row; None where a row of it fails."""
    rows = []
    needed = _needed(drawn.steps, set(drawn.outputs))
    if drawn.exit is not None:
        others = needed - drawn.exit[2]
        needed = needed | drawn.exit[2] if others else needed
    first = drawn.exit[2] if drawn.exit is not None else set()
    steps = sorted(drawn.steps, key=lambda step: step["model"] not in first)
    for at in range(len(request["X"])):
        row: Row = {name: x[at] for name, x in request.items()}
        for step in steps:
            if step["model"] in needed and not _step(drawn, step, row):
                return None
        rows.append(row)
    answer = {}
    for name in drawn.outputs:
        values = [row[name] for row in rows]
        longest = max(len(value) for value in values)
        if any(len(value) < longest for value in values):  # ragged: filled up
            values = [_filled(drawn, name, value, longest) for value in values]
        answer[name] = np.stack(values)
    return answer


def _filled(drawn: Graph, name: str, value: np.ndarray, size: int) -> np.ndarray:
    made = np.full((size, *value.shape[1:]), drawn.defaults[name], value.dtype)
    made[: len(value)] = value
    return made


def _step(drawn: Graph, step: dict[str, Any], row: Row) -> bool:
    model = drawn.models[step["model"]]
    required = [read for read in step["inputs"] if read not in step["optional"]] + (
        [step["count"]] if step["each"] else []
    )
    runs = all(row.get(read) is not None for read in required)
    runs = runs and (step["when"] is None or step["when"](row))
    if drawn.exit is not None and step["model"] not in drawn.exit[2]:
        runs = runs and not drawn.exit[1](row)
    made: dict[str, Any] = dict.fromkeys(step["made"].values())
    if runs:
        given = {f"i{k}": row[read] for k, read in enumerate(step["inputs"]) if row.get(read) is not None}
        try:
            if step["each"]:
                made[step["made"]["y"]] = _each(model, step, row, given)
            else:
                outputs = model.run({name: x[np.newaxis] for name, x in given.items()})
                made = {tensor: outputs[key][0] for key, tensor in step["made"].items()}
        except InvalidArgument:
            return False
    for tensor, value in made.items():
        if value is None and tensor in drawn.defaults:
            spec = next(o for o in drawn.configs[step["model"]].outputs if step["made"][o.name] == tensor)
            dims = (-1, *spec.dims) if step.get("gather") == "concat" else spec.dims
            dtype = np.int32 if spec.datatype == "INT32" else np.float32
            value = np.full([max(0, dim) for dim in dims], drawn.defaults[tensor], dtype)
        row[tensor] = value
    return True


def _each(model: Model, step: dict[str, Any], row: Row, given: dict[str, np.ndarray]) -> np.ndarray | None:
    results = []
    for item in row[step["each"]][: int(row[step["count"]][0])]:
        results.append(model.run({**{k: x[np.newaxis] for k, x in given.items()}, "i0": item[np.newaxis]})["y"][0])
    how = step["gather"]
    if not results:
        return {"concat": np.zeros((0, WIDTH), np.float32), "sum": np.zeros(WIDTH, np.float32)}.get(how)
    stacked = np.stack(results)
    return stacked if how == "concat" else getattr(stacked, how)(axis=0)


def requests_of(rng: random.Random, seed: int) -> list[dict[str, np.ndarray]]:
    numbers = np.random.default_rng(seed)
    made = []
    for _ in range(rng.randint(1, 8)):
        rows = rng.choice([1, 1, 2, 5])
        request = {"X": numbers.normal(0, 5, (rows, WIDTH)).astype(np.float32)}
        if rng.random() < 0.7:
            request["W"] = numbers.normal(0, 5, (rows, WIDTH)).astype(np.float32)
        made.append(request)
    return made


def check(answer: Any, expected: dict[str, np.ndarray] | None) -> None:
    if expected is None:
        assert isinstance(answer, InvalidArgument), answer
        assert "in ensemble 'e', step 'm" in answer.message
        return
    assert isinstance(answer, InferResponse), answer
    assert [output.name for output in answer.outputs] == list(expected)
    for output in answer.outputs:
        np.testing.assert_allclose(output.array(), expected[output.name], rtol=1e-5, atol=1e-5, err_msg=output.name)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_graphs_cut_by_places_agree_with_the_oracle(shard: int) -> None:
    segments = 0
    for seed in range(shard, GRAPHS, SHARDS):
        rng = random.Random(seed)
        drawn = draw(rng)
        models = Models(drawn.models, rng)
        kinds = rng.choice([["gpu"], ["gpu", "gpu", "cpu"], ["gpu", None]])
        places = {name: rng.choice(kinds) for name in drawn.configs}

        def serve(step: graph.Step, segment: graph.Plan, place: object, models: Models = models) -> Infer:
            nonlocal segments
            segments += 1
            assert len({places[inner.model_name] for inner in segment.steps}) == 1  # noqa: B023
            return executor_of_segment(pickle.loads(pickle.dumps(segment)), models)

        plan = planner.plan(config.parse(drawn.text, "e"), lambda name, _, drawn=drawn: drawn.configs[name])
        made = PlacedExecutor(
            plan, "1", models, ModelStatistics(), lambda step, places=places: places[step.model_name], serve
        )
        asked = requests_of(rng, seed)
        requests = [InferRequest("e", {name: Tensor.of(name, x) for name, x in request.items()}) for request in asked]
        expected = [oracle(drawn, request) for request in asked]
        for answer, right in zip(infer(Counted(made), requests), expected, strict=True):
            check(answer, right)
    assert segments > 4


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_graphs_agree_with_the_oracle(shard: int) -> None:
    for seed in range(shard, GRAPHS, SHARDS):
        rng = random.Random(seed)
        drawn = draw(rng)
        plan = planner.plan(config.parse(drawn.text, "e"), lambda name, _, drawn=drawn: drawn.configs[name])
        executor = Counted(EnsembleExecutor(plan, "1", Models(drawn.models, rng), ModelStatistics()))
        asked = requests_of(rng, seed)
        expected = [oracle(drawn, request) for request in asked]
        requests = [InferRequest("e", {name: Tensor.of(name, x) for name, x in request.items()}) for request in asked]
        for answer, right in zip(infer(executor, requests), expected, strict=True):
            check(answer, right)
        for request, right in zip(requests, expected, strict=True):
            (alone,) = infer(executor, [request])
            check(alone, right)
