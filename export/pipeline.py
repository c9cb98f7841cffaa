"""From what a family asks for to a repository: build, verify, profile, stage, look at what is staged, publish, report.

Nothing reaches the repository unless all of it is well.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tutti.console.progress import Work
from tutti.core import dtypes
from tutti.core.types import Shape
from tutti.export import layout, manifest, onnx, served
from tutti.export.errors import ParityError
from tutti.export.graphs import Check, Graph, Product
from tutti.export.layout import Entry, Staging
from tutti.export.names import FILES
from tutti.export.profiling import Measured, measure, recommend
from tutti.export.sources import Source
from tutti.export.variants import Builder, Result
from tutti.repository import config, length_limits, value_bounds
from tutti.repository.model_config import TensorSpec


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of a source. `variants` begin with fp32; `cpu` and `gpu` are those that are served there.

    For the backend pytorch, `gpu` is torch, torch-fp16 or torch-bf16.
    """

    variants: tuple[str, ...] = ("fp32",)
    backend: str = "onnxruntime"
    cpu: str = "fp32"
    gpu: str = "fp32"
    compute_capability: str = ""
    version: int = 1
    profiles: bool = False
    goal_ms: float = 50.0


@dataclass(slots=True)
class Outcome:
    """All that the report shows. With `failures` nothing was published."""

    name: str
    source: Source
    options: Options
    results: list[Result] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    published: list[Path] = field(default_factory=list)
    accuracy: float | None = None
    provenance: str = ""
    key: str = ""
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        comparisons = [
            f"{comparison.graph} {comparison.variant}: {why}"
            for result in self.results
            for comparison in result.comparisons
            for why in comparison.failures
        ]
        return comparisons + [f"{check.what}: {check.why}" for check in self.checks if not check.is_well]


def run(
    product: Product,
    source: Source,
    name: str,
    repository: Path,
    options: Options,
    work: Path,
    key: str = "",
    progress: Work | None = None,
) -> Outcome:
    """Export a product; `key` tells a rerun of it. The first step that `progress` was told of has made the product.

    Raises ParityError carrying the outcome when something is not well; nothing is published then.
    """
    started = time.monotonic()
    total = 1 + len(product.graphs) * (len(options.variants) + options.profiles) + 2
    progress = progress or Work(name)
    provenance = product.provenance or source.provenance
    outcome = Outcome(name, source, options, accuracy=product.accuracy, provenance=provenance, key=key)
    entries: dict[str, Entry] = {}
    for graph in product.graphs:
        folder = work / graph.name
        folder.mkdir(parents=True)
        progress.say(f"{graph.name}: what PyTorch answers")
        builder = Builder(graph, folder, options.compute_capability)
        outcome.results.append(builder.result)
        for variant in options.variants:
            progress.step(f"{graph.name}: {variant}", total)
            builder.make(variant)
        if options.profiles:
            progress.step(f"{graph.name}: profile", total)
            outcome.measured[graph.name] = measure(builder.result)
        if not graph.host:
            entries[graph.name] = _entry(builder.result, options, outcome.measured.get(graph.name, []))
    progress.step("checks", total)
    results = {result.graph.name: result for result in outcome.results}
    outcome.checks += [check(results) for check in product.checks]
    _stop_if(outcome)
    for step in product.steps:
        hosted = [result for result in outcome.results if result.graph.host == step.name]
        files = {_hosted_name(result.graph): _file_of(result, options.cpu) for result in hosted}
        entries[step.name] = replace(step, files={**step.files, **files})
    if product.ensemble is not None:
        ensemble = product.ensemble(entries)
        entries[ensemble.name] = ensemble
    progress.step("load and ask what is to be published", total)
    with Staging(repository) as staging:
        _stage(staging, entries, outcome, work)
        outcome.checks += _look_at(staging.folder, entries, outcome)
        _stop_if(outcome)
        outcome.checks += _serve(staging.folder, product, outcome, entries)
        _stop_if(outcome)
        outcome.published = staging.publish()
    outcome.seconds = time.monotonic() - started
    return outcome


def _serve(folder: Path, product: Product, outcome: Outcome, entries: Mapping[str, Entry]) -> list[Check]:
    """Ask what would be published. A plan runs on the GPU that it was built for, and is not asked."""
    options = outcome.options
    names = [entry.name for entry in entries.values() if entry.links]
    if not names or not product.trials or options.backend == "tensorrt":
        return []
    variant = options.cpu if options.backend == "onnxruntime" else "torch"
    limits = [graph.limits_of(variant) for graph in product.graphs]
    return [served.check(folder, names[0], product.trials, max(limits, key=lambda limit: limit.max_error))]


def _stop_if(outcome: Outcome) -> None:
    if outcome.failures:
        raise ParityError("; ".join(outcome.failures[:5]), outcome)


def _hosted_name(graph: Graph) -> str:
    """The file of a graph that a python model runs itself: "NAME.part" is its part.onnx."""
    return f"{graph.name.removeprefix(graph.host + '.')}.onnx"


def _file_of(result: Result, variant: str) -> Path:
    return result.built[variant if variant in result.built else "fp32"].path


def _entry(result: Result, options: Options, measured: Sequence[Measured]) -> Entry:
    """The graph's model, with all its variants; which of them is served follows from the options."""
    graph, built = result.graph, result.built
    inputs, outputs = onnx.tensor_specs(built["fp32"].path)
    if options.backend == "pytorch":  # a program takes all of them, in this order; ONNX may do without some
        inputs = [_spec(graph, name) for name in graph.example]
    backend, filename = options.backend, FILES["fp32"]
    # Others are ONNX Runtime's, and no other backend's.
    is_read = {key: backend == "onnxruntime" or key.startswith("tutti.") for key in graph.parameters}
    parameters = {key: value for key, value in graph.parameters.items() if is_read[key]}
    if backend == "tensorrt":
        filename = FILES["tensorrt"]
    elif backend == "pytorch":
        filename = FILES["torch"]
        if options.gpu in built and options.gpu.startswith("torch-"):
            parameters["tutti.gpu_model_filename"] = FILES[options.gpu]
    else:
        if options.cpu in built and options.cpu != "fp32":
            parameters["tutti.cpu_model_filename"] = FILES[options.cpu]
            parameters["tutti.cpu_tolerance"] = str(graph.limits_of(options.cpu).max_error)
        if options.gpu in built and options.gpu != "fp32":
            parameters["tutti.gpu_model_filename"] = FILES[options.gpu]
    if result.bounds:
        parameters[value_bounds.PARAMETER] = json.dumps(result.bounds)
    most_items = _max_dims(result, inputs, backend)
    if most_items:
        parameters[length_limits.PARAMETER] = json.dumps(most_items)
    most = graph.max_batch_size
    preferred: tuple[int, ...] = ()
    if measured:
        recommended = recommend(measured, options.cpu if options.cpu in built else "fp32", options.goal_ms)
        most, preferred = min(most, recommended.max_batch_size), recommended.preferred
        parameters["tutti.latency_ms"] = recommended.latency
    return Entry(
        graph.name,
        backend,
        inputs,
        outputs,
        {FILES[variant.variant]: variant.path for variant in built.values()},
        most,
        parameters,
        graph.labels,
        warmups=_warmups(graph, [spec.name for spec in inputs]),
        preferred=preferred,
        filename=filename,
        kind="KIND_GPU" if backend == "tensorrt" else "KIND_AUTO",
    )


def _spec(graph: Graph, name: str) -> TensorSpec:
    """Of an input, from its example."""
    example, variable = graph.example[name], graph.axes.get(name, {})
    dims = tuple(-1 if axis in variable else size for axis, size in enumerate(example.shape))
    return TensorSpec(name, dtypes.from_numpy(example.numpy().dtype), dims[1:])


def _max_dims(result: Result, inputs: Sequence[TensorSpec], backend: str) -> dict[str, list[int]]:
    """The greatest size of each variable dimension, where there is one; a plan's are those that it was built for."""
    counts: dict[str, list[int]] = {}
    for spec in inputs:
        limits = [result.most] * len(spec.dims)
        if backend == "tensorrt":
            largest = result.graph.profile[spec.name][2][1:]
            limits = [size if result.most is None else min(size, result.most) for size in largest]
        sizes = [most for dim, most in zip(spec.dims, limits, strict=True) if dim == -1 and most is not None]
        if sizes:
            counts[spec.name] = sizes
    return counts


def _warmups(graph: Graph, inputs: Sequence[str]) -> list[layout.Warmup]:
    """One for each bucket of lengths: a single row of the smallest, the usual and the largest shape but one."""
    shapes: list[Mapping[str, Shape]] = []
    for number in (0, 1):
        shapes_of_inputs = {name: tuple(graph.profile[name][number][1:]) for name in inputs}
        if shapes_of_inputs not in shapes:
            shapes.append(shapes_of_inputs)
    return [layout.Warmup(1, shape) for shape in shapes]


def _stage(staging: Staging, entries: Mapping[str, Entry], outcome: Outcome, work: Path) -> None:
    """With a manifest for each; the ensemble last, since it needs the others."""
    results = {result.graph.name: result for result in outcome.results}
    for entry in entries.values():
        result = results.get(entry.name)
        hosted = [other for other in outcome.results if other.graph.host == entry.name]
        built = [variant for each in ([result] if result else hosted) for variant in each.built.values()]
        told = ", ".join(sorted({other.reference for other in ([result] if result else hosted)}))
        text = manifest.describe(
            outcome.source, outcome.key, list(entries), built, entry.files, outcome.provenance, told
        )
        path = work / f"{entry.name}.manifest.json"
        path.write_text(text)
        staging.add([replace(entry, files={**entry.files, manifest.NAME: path})], outcome.options.version)


def _look_at(folder: Path, entries: Mapping[str, Entry], outcome: Outcome) -> list[Check]:
    """At what would be published: each file is the one that was verified, and labels stand where they should."""
    checks = []
    for result in outcome.results:
        graph = result.graph
        place = folder / (graph.host or graph.name) / str(outcome.options.version)
        for built in result.built.values():
            file = place / (_hosted_name(graph) if graph.host else FILES[built.variant])
            if graph.host and built.path != _file_of(result, outcome.options.cpu):
                continue
            is_same = file.is_file() and layout.sha256(file) == built.sha256
            why = "as verified" if is_same else "it is not the file that was verified: truncated, or written since"
            checks.append(Check(f"{graph.name}/{file.name}", is_same, why))
        if graph.labels:
            checks.append(_labels(folder / graph.name, graph, result, outcome.options.version))
    for name in entries:
        config.load(folder / name / "config.pbtxt")
    return checks


def _labels(folder: Path, graph: Graph, result: Result, version: int) -> Check:
    """The names that the published labels give to the graph's decisions are those of the checkpoint."""
    labels = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    subject = f"{graph.name}/labels.txt"
    if labels != list(graph.labels):
        wrong = next((i for i, (a, b) in enumerate(zip(labels, graph.labels, strict=False)) if a != b), len(labels))
        expected = graph.labels[wrong] if wrong < len(graph.labels) else "no more"
        return Check(subject, False, f"class {wrong} is '{expected}' in the checkpoint, and not so here")
    decided = [int(row) for case in result.expected for row in np.asarray(case[graph.decision]).argmax(-1).reshape(-1)]
    if decided and max(decided) >= len(labels):
        return Check(subject, False, f"the graph has a class {max(decided)}, and there are {len(labels)} labels")
    return Check(subject, True, f"{len(labels)} classes, {len(set(decided))} of them seen")


def plan_lines(product: Product, options: Options, repository: Path) -> list[str]:
    """What would be done."""
    lines = [f"into {repository}, version {options.version}; variants: {', '.join(options.variants)}"]
    for graph in product.graphs:
        where = f"part of '{graph.host}'" if graph.host else f"model, {options.backend}"
        inputs = ", ".join(graph.example)
        lines.append(f"  {graph.name}: {where}; {inputs} -> {', '.join(graph.outputs)}; {len(graph.cases)} cases")
    lines += [f"  {step.name}: model, {step.backend}" for step in product.steps]
    if product.ensemble is not None:
        lines.append("  and the ensemble over them")
    return lines


def stopped(error: ParityError) -> Outcome | None:
    """What was found before it was decided to publish nothing."""
    outcome = error.args[1] if len(error.args) > 1 else None
    return outcome if isinstance(outcome, Outcome) else None
