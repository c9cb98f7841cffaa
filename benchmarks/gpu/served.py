"""The part `served`: the whole server over both protocols, beside the bare loop of `limits` on the same inputs.

The load generator is on the same cores. Requests are of 8 texts of 64 tokens and of 4 UINT8 pictures.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import load, models, predicted, repository, server
from benchmarks.gpu.context import Array, Context, Figures
from benchmarks.gpu.frame import Line
from benchmarks.gpu.models import Spec
from benchmarks.gpu.requests import Request

_HERE = "benchmarks.gpu.served"
# As close as 16 bits come to float64 with these models.
NEAR = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
_TINY_CLIENTS = 256
# The best first. The log tells what a model does without, although it asks for it.
_WAYS = (f"{repository.GRAPHS} {repository.COMPILED}", repository.GRAPHS, "")
_WITHOUT = {"compiled": "is served uncompiled", "graphs": "without CUDA graphs"}
MOST_ROWS = 256


def lines(is_short: bool) -> list[Line]:
    """First what no card has been asked yet; then the rest of what the targets ask for; then others."""
    if is_short:
        arguments: dict[str, Any] = {"name": "minilm", "precision": "fp32", "clients": [1, 8], "front_ends": 1}
        return [Line("minilm fp32, 1 front-end", f"{_HERE}:model", 60, arguments),
                Line("tiny model", f"{_HERE}:tiny", 60, {"front_ends": [1, 2], "clients": 16})]  # fmt: skip
    found = [_model("resnet50", "fp16", [64, 1, 256], 4), _tiny([1, 8])]
    found += [_model(name, "fp16", [64, 1, 256], 4) for name in ("minilm", "vit")]
    found.append(_tiny([2, 4]))
    found += [_model("minilm", "fp16", [64, 256], count) for count in (1, 8, 2)]
    found += [_model(name, "fp16", [16, 512, 4], 4) for name in ("minilm", "vit", "resnet50")]
    found += [_model("vit", "fp16", [64], 1), _model("whisper_encoder", "fp16", [64, 1], 4)]
    found += [_model(name, "fp32", [64, 1], 4) for name in ("minilm", "vit", "resnet50")]
    return found


def _tiny(front_ends: list[int]) -> Line:
    arguments = {"front_ends": front_ends, "clients": _TINY_CLIENTS}
    return Line(f"tiny model, {' and '.join(map(str, front_ends))} front-ends", f"{_HERE}:tiny", 60, arguments)


def _model(name: str, precision: str, clients: list[int], front_ends: int) -> Line:
    arguments = {"name": name, "precision": precision, "clients": clients, "front_ends": front_ends}
    shown = f"{front_ends} front-end{'s' if front_ends > 1 else ''}"
    return Line(f"{name} {precision}, {shown}, {clients} clients", f"{_HERE}:model", 300, arguments, least_s=30)


def bare(context: Context, name: str, precision: str) -> list[Figures]:
    """The rows that `limits` has of a model, from this folder or the last run's."""
    for folder in (context.out, context.work):
        path = folder / "limits.json"
        if path.exists():
            record = json.loads(path.read_text())
            rows = [row for line in record["lines"] for row in line["rows"] if row.get("model") == name]
            if record["short"] == context.is_short and (rows := [r for r in rows if r["precision"] == precision]):
                return rows
    return []


def best_rate(rows: list[Figures]) -> float:
    """The most rows a second, of any batch and way."""
    return max((float(value) for row in rows for key, value in row.items() if key.endswith(" rows/s")), default=0.0)


def call_ms(rows: list[Figures], batch: int) -> float | None:
    """The quickest that a batch of a request's size is done by itself."""
    found = [row[key] for row in rows for key in ("alone ms", "graph alone ms") if row["batch"] == batch and key in row]
    return min(found, default=None)


def request(spec: Spec, name: str) -> Request:
    names = [one.name for one in spec.inputs]
    return Request(name, list(zip(names, spec.draw(spec.rows), strict=True)), spec.output)


def check_answer(context: Context, spec: Spec, precision: str, asked: Request, said: Array) -> None:
    """A row that says whether the server is right, before it is said to be quick."""
    off = models.difference(said, models.reference(spec, [array for _, array in asked.tensors]))
    context.check("answer", bool(off < NEAR[precision]), off=off)


@contextlib.contextmanager
def serving(
    context: Context, folder: Path, spec: Spec, precision: str, front_ends: int
) -> Iterator[tuple[server.Server, str]]:
    """tutti with the model at its best settings: compiled and with CUDA graphs where it can be; and how it is."""

    def make(wish: str) -> Path:
        root = fresh(context, f"{folder.name}/tutti")
        most = 32 if context.is_short else MOST_ROWS
        repository.add_spec(root, spec, precision, context.device, context.work, context.is_short, most, wish)
        return root

    wishes = [f"dynamic_batching {{}} {way}" for way in _WAYS] if context.is_gpu else [""]
    with server.tutti_with(make, wishes, folder / "tutti.log", f"--front-end-processes={front_ends}") as (tutti, wish):
        said = tutti.said()
        found = [
            title for title, text in (("compiled", repository.COMPILED), ("graphs", repository.GRAPHS))
            if text in wish and _WITHOUT[title] not in said
        ]  # fmt: skip
        yield tutti, " with ".join(found) or "plain"


def model(context: Context, name: str, precision: str, clients: list[int], front_ends: int) -> None:
    """A row for each protocol and number of clients."""
    spec = models.specs(context.is_short)[name]
    rows = bare(context, name, precision)
    folder = fresh(context, f"served-{name}-{precision}-{front_ends}")
    with serving(context, folder, spec, precision, front_ends) as (tutti, way):
        asked = request(spec, f"{name}_{precision}")
        answer = tutti.infer(asked)[spec.output]
        check_answer(context, spec, precision, asked, answer)
        row_bytes = sum([array.nbytes for _, array in asked.tensors]) // spec.rows, answer.nbytes // spec.rows
        about = {"model": name, "precision": precision, "front_ends": front_ends, "way": way}
        for count in clients:
            for protocol in load.PROTOCOLS:
                row = about | {"protocol": protocol, "clients": count}
                row |= measured(context, tutti, protocol, asked, count)
                row |= beside(row, rows, spec.rows)
                expected = predicted.rate(rows, count, spec.rows, 32 if context.is_short else MOST_ROWS, row_bytes)
                row |= {"predicted rows/s": expected} if expected else {}
                context.emit(f"{protocol} {count} clients", row)


def measured(
    context: Context, tutti: server.Server, protocol: str, asked: Request, clients: int, most_processes: int = 0
) -> Figures:
    """One measurement; one that failed says why, and the next goes on."""
    seconds, warm_s = (0.5, 0.2) if context.is_short else (3.0, 1.0)
    use = server.Use(tutti, context.is_gpu, asked.model)
    address = tutti.http if protocol == "http" else tutti.grpc
    more = {"most_processes": most_processes} if most_processes else {}
    try:
        figures = load.measure(protocol, address, asked, clients, seconds, warm_s, tutti.log.parent, use.during, **more)
    except load.Refused as error:
        return {"error": str(error)[:300]}
    return load.as_row(figures, asked) | use.row


def beside(row: Figures, rows: list[Figures], batch: int) -> Figures:
    """Shares of the bare loop's best, and for one client what is added to a bare call."""
    found: Figures = {}
    if rows and "rows/s" in row:
        found["of bare"] = row["rows/s"] / best_rate(rows)
        alone = call_ms(rows, batch)
        if row["clients"] == 1 and alone is not None:
            found["over bare ms"] = row["p50 ms"] - alone
    return found


def tiny(context: Context, front_ends: list[int], clients: int) -> None:
    """The tiny model of the processor, with more and more front-end processes."""
    folder = fresh(context, "served-tiny")
    root = fresh(context, "served-tiny/models")
    asked = Request(repository.add_tiny(root), [("x", np.full((1, 384), 0.5, np.float32))])
    for count in front_ends:
        with server.tutti(root, folder / "server.log", f"--front-end-processes={count}") as tutti:
            for protocol in load.PROTOCOLS:
                row: Figures = {"model": "tiny", "front_ends": count, "protocol": protocol, "clients": clients}
                row |= measured(context, tutti, protocol, asked, clients, 1 if context.is_short else 8)
                context.emit(f"{protocol}, {count} front-ends", row)


def fresh(context: Context, name: str) -> Path:
    """An empty folder."""
    folder = context.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
