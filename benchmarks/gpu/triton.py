"""The part `triton`: the real server with its python backend around the same torch modules, taking turns with tutti.

It is from the wheel nvidia-pytriton. Both have dynamic batching; Triton also preferred sizes and up to two instances,
of which the best counts.
"""

import contextlib
import os
import shutil
import statistics
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import frame, kept_programs, load, models, repository, served, server
from benchmarks.gpu.context import ROOT, Context, Figures, NotThereYetError
from benchmarks.gpu.frame import Line
from benchmarks.gpu.requests import Request
from tutti.loadtest.process import free_ports

_HERE = "benchmarks.gpu.triton"
_MODEL = Path(__file__).with_name("triton_model.py")
_ROUNDS = 2
_FRONT_ENDS = 4


def lines(is_short: bool) -> list[Line]:
    if is_short:
        return [Line("minilm fp32", f"{_HERE}:model", 90, {"name": "minilm", "precision": "fp32", "clients": [8]})]
    return [
        Line(
            f"{name} fp16", f"{_HERE}:model", 165, {"name": name, "precision": "fp16", "clients": [64, 256]}, least_s=90
        )
        for name in ("minilm", "vit", "resnet50")
    ]


def packages(work: Path) -> Path:
    """The folder with the wheel's packages: the kit's, or that of `make triton`."""
    environment = ROOT / ".venv-triton"
    if (environment / ".ready").exists():
        return next((environment / "lib").glob("python3.*/site-packages"))
    return kept_programs.installed("triton", work)


def _python(work: Path) -> tuple[list[Path], list[Path]]:
    """Folders of libraries and of modules for the stub: this Python's libpython, or the kit's where it has none."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), Path("/usr/lib/x86_64-linux-gnu")]
    if any((folder / name).exists() for folder in folders):
        return [folder for folder in folders if (folder / name).exists()], []
    packed = next(iter(kept_programs.KIT.glob(f"triton*/{name}.tar.xz")), None)
    if packed is None:
        raise NotThereYetError(f"Triton's python backend needs {name}, which is neither here nor in the kit")
    target = work / "libpython"
    if not (target / name).exists():
        with tarfile.open(packed) as file:
            file.extractall(target, filter="data")
    return [target], [target / "lib-dynload"]


@contextlib.contextmanager
def tritonserver(context: Context, root: Path, folder: Path) -> Iterator[server.Server]:
    """Serve `root`. Raises StartError."""
    site = packages(context.work)
    backends = folder / "backends"
    if not backends.exists():
        _copy_backend(site / "pytriton" / "tritonserver", backends)
    libraries, modules = _python(context.work)
    ports = free_ports(3)
    environment = frame.environment()
    environment |= {
        "LD_LIBRARY_PATH": ":".join(map(str, [site / "nvidia_pytriton.libs", *libraries])),
        # The stub's Python looks for its standard library beside the first python3 that it finds.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
        "TUTTI_KIT_MODELS": os.environ.get("TUTTI_KIT_MODELS", str(ROOT.parent / "models")),
    }
    command = [
        str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"), f"--model-repository={root}",
        f"--backend-directory={backends}", f"--http-port={ports[0]}", f"--grpc-port={ports[1]}",
        f"--metrics-port={ports[2]}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
        "--disable-auto-complete-config", "--exit-timeout-secs=3",
    ]  # fmt: skip
    # The stub searches its working directory first: modules that belong to the kit's libpython are found there.
    where = modules[0] if modules else folder
    with server.running(command, ports, folder / "tritonserver.log", env=environment, cwd=where) as running:
        yield running


def _copy_backend(home: Path, backends: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise NotThereYetError(f"nvidia-pytriton has no stub for Python {version}")
    shutil.copytree(home / "backends" / "python", backends / "python")
    shutil.copy(stub, backends / "python")
    (backends / "python" / stub.name).chmod(0o755)
    (home / "bin" / "tritonserver").chmod(0o755)


def model(context: Context, name: str, precision: str, clients: list[int], rounds: int = _ROUNDS) -> None:
    """Both up at the same time, one of them asked: rounds take turns, and the median of each counts."""
    spec = models.specs(context.is_short)[name]
    folder = served.fresh(context, f"triton-{name}-{precision}")
    counts = (1,) if context.is_short else (1, 2)
    asked = served.request(spec, f"{name}_{precision}")
    truth = models.reference(spec, [array for _, array in asked.tensors])
    with contextlib.ExitStack() as stack:
        front_ends = 1 if context.is_short else _FRONT_ENDS
        tutti, _ = stack.enter_context(served.serving(context, folder, spec, precision, front_ends))
        running = {"tutti": tutti}
        for count in counts:
            root = _triton_repository(context, folder, spec, precision, count)
            home = served.fresh(context, f"{folder.name}/home{count}")
            running[f"triton, {count} instances"] = stack.enter_context(tritonserver(context, root, home))
        for title, one in running.items():
            off = models.difference(one.infer(asked)[spec.output], truth)
            context.check(f"{title}: answer", off < served.NEAR[precision], off=off)
        for protocol in load.PROTOCOLS:
            for number in clients:
                about = {"model": name, "precision": precision, "protocol": protocol, "clients": number}
                _compare(context, running, asked, about, 1 if context.is_short else rounds)


def _triton_repository(context: Context, folder: Path, spec: models.Spec, precision: str, count: int) -> Path:
    """The module in a model.py; sizes that are preferred are those that requests of `rows` fill."""
    most = 32 if context.is_short else served.MOST_ROWS
    root = served.fresh(context, f"{folder.name}/models{count}")
    sizes = ", ".join(str(size) for size in (most // 2, most))
    extra = f"dynamic_batching {{ preferred_batch_size: [ {sizes} ] max_queue_delay_microseconds: 1000 }}"
    # Where it runs is the model's own business: Triton here is to give it tensors in the host's memory.
    text = repository.config(spec, precision, "cpu", most, extra, backend="python", count=count)
    for key, value in {"model": spec.name, "precision": precision, "device": context.device,
                       "short": "yes" if context.is_short else "no"}.items():  # fmt: skip
        text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    target = repository.add(root, f"{spec.name}_{precision}", text)
    # The stub knows none of our folders, and not in every build the variable that would tell it.
    paths = [str(ROOT), *(path for path in sys.path if path)]
    (target / "model.py").write_text(f"import sys\n\nsys.path[:0] = {paths!r}\n\n{_MODEL.read_text()}")
    return root


def _compare(context: Context, running: dict[str, server.Server], asked: Request, about: Figures, rounds: int) -> None:
    protocol, clients = about["protocol"], about["clients"]
    measured: dict[str, list[Figures]] = {title: [] for title in running}
    for _ in range(rounds):
        for title, one in running.items():
            measured[title].append(served.measured(context, one, protocol, asked, clients))
    rates = {}
    for title, found in measured.items():
        errors = [row["error"] for row in found if "error" in row]
        if errors:
            context.emit(f"{title}, {protocol} {clients} clients", {"error": errors[0]})
            continue
        rates[title] = statistics.median(row["rows/s"] for row in found)
        row = {"server": title, "rows/s": rates[title],
               "p50 ms": statistics.median(row["p50 ms"] for row in found),
               "p99 ms": statistics.median(row["p99 ms"] for row in found)}  # fmt: skip
        context.emit(f"{title}, {protocol} {clients} clients", about | row)
    best = max((rate for title, rate in rates.items() if title != "tutti"), default=0.0)
    if best and "tutti" in rates:
        context.emit(f"tutti over triton, {protocol} {clients} clients", about | {"times": rates["tutti"] / best})
