"""The architecture's layers: imports run downward only, and heavy libraries stay in the files named after them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tutti", "ensembles", "ray_app", "export", "loadtest", "demo", "benchmarks")

# The layer of each module; a package's entry covers what lies below it.
LAYERS = {
    "tutti": 0, "tutti.extras": 0, "tutti.types": 0, "tutti.dtypes": 0, "tutti.errors": 0,
    "tutti.batching": 1, "tutti.bounds": 1, "tutti.cost": 1, "tutti.lengths": 1, "tutti.padding": 1, "tutti.ragged": 1,
    "tutti.contents": 1, "tutti.paths": 1, "tutti.arguments": 1, "ray_app.documents": 1,
    "tutti.api_keys": 1,
    "tutti.files": 1, "tutti.progress": 0, "tutti.operations": 1, "tutti.wire": 1, "tutti.config": 1, "tutti.rows": 1,
    "tutti.scratch": 1, "tutti.lifeline": 1, "tutti.threads": 1, "tutti.ending": 1,
    "tutti.rate_limiting": 1, "tutti.rate_limits": 2,
    "ensembles.axes": 1,
    "ensembles.graph": 1, "ensembles.conditions": 1, "ensembles.extensions": 1, "ensembles.explain": 1,
    "ensembles.show": 1, "ensembles.picture": 1, "ensembles.frame": 1, "ensembles.builder": 2,
    "ensembles.expressions": 1, "ensembles.places": 1,
    "ensembles.source": 4, "ensembles.cli": 4,
    "tutti.statistics": 1, "tutti.devices": 1, "tutti.collector": 1, "tutti.custom_metrics": 1,
    "tutti.host_metrics": 1,
    "tutti.frontends.http_codec": 1, "tutti.frontends.grpc_codec": 1, "tutti.frontends.http_status": 1,
    "tutti.frontends.answer_headers": 1,
    "tutti.frontends.compression": 1, "tutti.frontends.generate": 1, "tutti.frontends.gate": 1,
    "tutti.classification": 1, "tutti.frontends.answers": 2, "tutti.shared_memory": 2, "tutti.logs": 2,
    "tutti.tracing": 2, "tutti.trace_files": 2, "tutti.trace_spans": 2, "tutti.trace_records": 1, "tutti.segments": 1,
    "tutti.explain": 1, "tutti.waterfall": 1, "tutti.trace_reading": 1, "tutti.input_files": 2,
    "tutti.explain_remote": 2,
    "tutti.explain_command": 4,
    "tutti.request_log": 2,
    "tutti.frontends": 1, "ray_app.placement": 1, "ray_app": 1, "ray_app.environment": 1,
    "tutti.repository": 2, "tutti.scheduler": 2, "tutti.sequences": 2,
    "tutti.device_instance": 2, "tutti.device_simulation": 2,
    "tutti.cache": 2, "tutti.warmup": 2, "tutti.backends": 2, "tutti.model": 2, "ensembles.executor": 2,
    "ensembles": 2, "ensembles.streams": 2, "ensembles.solo": 2, "ensembles.placed": 2,
    "tutti.engine": 3, "tutti.local": 3, "tutti.metrics": 3,
    "tutti.frontends.api": 4, "tutti.frontends.http_api": 4, "tutti.frontends.http": 4,
    "tutti.frontends.http_connection": 4, "tutti.frontends.grpc": 4, "tutti.frontends.grpc_aio": 4,
    "tutti.frontends.grpc_methods": 4, "tutti.frontends.setup": 4,
    "tutti.frontends.http_events": 4, "tutti.frontends.grpc_events": 4,
    "tutti.frontends.following": 4,
    "tutti.frontends.engine_link": 4, "tutti.frontends.link": 4, "tutti.frontends.task": 4,
    "tutti.frontends.front_ends": 1, "tutti.frontends.worker": 5,
    "tutti.frontends.keepalive": 0, "tutti.foreign_flags": 0,
    "tutti.frontends.server": 4, "tutti.frontends.limits": 0, "tutti.frontends.relay": 4, "tutti.restarts": 1,
    "tutti.reports": 1, "tutti.supervisor": 4, "tutti.process": 5,
    "ray_app.pools": 4, "ray_app.replica": 4, "ray_app.gateway": 4,
    "ray_app.control": 4, "ray_app.journal": 4, "ray_app.engine": 4, "ray_app.fallback": 4,
    "ray_app.autoscaling": 2, "ray_app.health": 2, "ray_app.hops": 4, "ray_app.members": 1,
    "ray_app.options": 1, "ray_app.scenario": 1, "ray_app.simulation": 4, "ray_app.routing": 4, "ray_app.sticky": 4,
    "tutti.__main__": 5, "tutti.cli": 5, "tutti.serve_options": 5, "tutti.overview": 4, "tutti.hints": 2,
    "tutti.usage": 0, "tutti.commands": 5, "tutti.completion": 5, "ray_app.planning": 5,
    "tutti.scrapes": 1, "tutti.top_table": 2, "tutti.top": 5,
    "tutti.doctor": 5, "ray_app.app": 5, "ray_app.run": 5, "ray_app.cli": 5, "ray_app.planner": 1,
    "ray_app.processes": 1,
    "ray_app.watch": 1,
    "ray_app.head": 1, "ray_app.supervisor": 4,
    "ray_app.checks": 4, "ray_app.news": 1, "ray_app.overview": 4, "ray_app.starting": 4,
    "ray_app.gpu_rates": 4,
}  # fmt: skip
ROOTS = {
    "tutti.__main__",
    "tutti.cli",
    "tutti.process",
    "tutti.frontends.worker",
    "ray_app.app",
    "ray_app.run",
    "ray_app.cli",
}
# Heavy library -> the files that may import it. export/ may import what it exports with.
HEAVY = {
    "ray": {
        "ray_app.app",
        "ray_app.run",
        "ray_app.starting",
        "ray_app.replica",
        "ray_app.routing",
        "ray_app.gateway",
        "ray_app.journal",
        "ray_app.simulation",
    },
    "torch": {
        "tutti.backends.pytorch",
        "tutti.backends.compiled",
        "tutti.backends.compiler",
        "tutti.backends.cuda_graphs",
        "tutti.backends.verification",
        "tutti.backends.tensorrt",
        "tutti.backends.capturing",
        "tutti.devices.cuda",
    },
    "transformers": set(),
    "tensorrt": {"tutti.backends.tensorrt"},
    "onnxruntime": {"tutti.backends.onnxruntime"},
    "psutil": {"ray_app.processes"},
    "pynvml": {"tutti.devices.nvml"},
    "cuda": {"tutti.devices.ipc"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            relative = path.relative_to(ROOT).with_suffix("")
            name = ".".join(relative.parts).removesuffix(".__init__")
            if "steps" not in relative.parts:  # model.py files, which run inside a server
                found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Names of the modules that `name` imports anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else node.module)
    return found


def layer(name: str) -> int:
    while name not in LAYERS:
        name, dot, _ = name.rpartition(".")
        assert dot, "give the module a layer"
    return LAYERS[name]


SERVER = sorted(name for name in MODULES if name.split(".")[0] in ("tutti", "ensembles", "ray_app"))


@pytest.mark.parametrize("name", SERVER)
def test_imports_run_downward(name: str) -> None:
    # A root may hand over to another root: the command to Ray's, both lazily.
    above = {
        other
        for other in imports(name) & set(MODULES)
        if other.split(".")[0] in ("tutti", "ensembles", "ray_app") and layer(other) > layer(name)
    }
    assert not above


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_imports_a_root(name: str) -> None:
    if name not in ROOTS:
        assert not imports(name) & ROOTS


def test_the_engine_does_not_know_ensembles() -> None:
    assert not {other for other in imports("tutti.engine") | imports("tutti.local") if other.startswith("ensembles")}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("export")))
def test_export_imports_only_the_pure_layers_of_the_server(name: str) -> None:
    server = {other for other in imports(name) if other in MODULES and other.split(".")[0] == "tutti"}
    server -= {
        "export.served": {"tutti.engine", "tutti.local", "tutti.model"},  # what was staged is served before it is seen
        "export.init": {"tutti.overview", "tutti.repository"},  # it speaks to a person
        "export.refusals": {"tutti.repository"},  # of a name
        "export.initial": {"tutti.backends.onnxruntime"},  # which tells what a graph takes
    }.get(name, set())
    assert all(layer(other) <= 1 for other in server)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("loadtest")))
def test_loadtest_imports_no_server_code(name: str) -> None:
    own = imports(name) - {
        "tutti.extras",
        "tutti.progress",
        "tutti.api_keys",
        "tutti.errors",
    }  # how its libraries are installed, how progress is told, and what shows a key
    assert not {other for other in own if other.split(".")[0] in ("tutti", "ensembles", "ray_app", "export")}


@pytest.mark.parametrize("name", SERVER)
def test_heavy_libraries_stay_where_they_belong(name: str) -> None:
    used = {other.split(".")[0] for other in imports(name)} & set(HEAVY)
    assert all(name in HEAVY[library] for library in used)
