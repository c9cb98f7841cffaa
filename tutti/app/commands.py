"""The commands of `tutti`, by what people do; each in a package that is imported when it is asked for."""

import argparse
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from tutti.core import extras
from tutti.core.errors import ConfigError

GROUPS = ("make a repository", "serve it", "look at it")


@dataclass(frozen=True, slots=True)
class Command:
    """`module.main(arguments)` runs it, `module.make_parser()` has its flags. `libraries` come with the extra."""

    group: str
    help: str
    example: str
    module: str
    extra: str = ""
    libraries: tuple[str, ...] = ()

    def run(self, name: str, arguments: Sequence[str]) -> int:
        if not {"-h", "--help"} & set(arguments):  # help needs nothing
            need(name, *self.libraries, extra=self.extra)
        status: int = importlib.import_module(self.module).main(arguments)
        return status

    def parser(self) -> argparse.ArgumentParser:
        built = importlib.import_module(self.module).make_parser()
        parser: argparse.ArgumentParser = built[0] if isinstance(built, tuple) else built
        return parser


COMMANDS = {
    "init": Command(
        GROUPS[0],
        "make a repository of a model's file, and prove that it is served",
        "tutti init models my_model.onnx",
        "tutti.export.init",
    ),
    "export": Command(
        GROUPS[0],
        "export a checkpoint into a repository, verified",
        "tutti export text sentence-transformers/all-MiniLM-L6-v2 --name minilm",
        "tutti.export.cli",
    ),
    "ensemble": Command(
        GROUPS[0],
        "check, show, draw, explain and build ensembles",
        "tutti ensemble check --repository models",
        "tutti.ensembles.cli",
    ),
    "serve": Command(
        GROUPS[1],
        "serve a model repository over HTTP and gRPC",
        "tutti serve models",
        "tutti.app.serve_options",
    ),
    "cluster": Command(
        GROUPS[1],
        "plan and simulate pools of replicas on Ray",
        "tutti cluster plan models --gpus 4",
        "tutti.ray_app.cli",
        "ray",
        ("ray", "psutil", "yaml", "pydantic"),
    ),
    "top": Command(
        GROUPS[2],
        "watch what a server does, by model and by pool",
        "tutti top 127.0.0.1:8002",
        "tutti.app.top",
    ),
    "loadtest": Command(
        GROUPS[2],
        "load a server in open loop, and judge it by a goal",
        "tutti loadtest run steady --url 127.0.0.1:8000",
        "tutti.loadtest.cli",
    ),
    "explain": Command(
        GROUPS[2],
        "ask a model one request, and show where its time went",
        "tutti explain text_tokenizer TEXT=hello --url 127.0.0.1:8000",
        "tutti.app.explain",
    ),
    "doctor": Command(
        GROUPS[2],
        "say what this machine has, and what it lacks",
        "tutti doctor",
        "tutti.app.doctor",
    ),
    "completion": Command(
        GROUPS[2],
        "print what lets a shell complete commands and flags",
        "source <(tutti completion bash)",
        "tutti.app.completion",
    ),
}


def need(purpose: str, *libraries: str, extra: str) -> None:
    """Raises ConfigError, with what to install, where a library is not there."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {' and '.join(missing)}: {extras.install(extra)}")


def overview() -> str:
    """The commands in their groups, each with a line to try."""
    width = max(map(len, COMMANDS))
    told = []
    for group in GROUPS:
        told.append(f"{group}:")
        for name, command in COMMANDS.items():
            if command.group == group:
                told += [f"  {name:{width}}  {command.help}", f"  {'':{width}}    $ {command.example}"]
        told.append("")
    return "\n".join(told).rstrip()
