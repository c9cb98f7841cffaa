"""docs/start.md, typed as it stands: from an empty folder, with the wheel installed and nothing of the checkout."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import numpy as np
import onnx
import pytest
import skl2onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.export import checkpoints
from tests.serving import wait_until
from tests.wheels import ROOT, Installed, add_strangers
from tutti.loadtest.process import START_TIMEOUT_S, free_ports

START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
# By exit status. A machine that is busy may not let a run be judged: that there is a verdict is what counts here.
_PROGRESS = re.compile(r"^.* \[\d+/\d+\], .*\n", re.MULTILINE)  # of what takes more than two seconds
_VERDICTS = ("PASS", "FAIL", "INVALID", "INCONCLUSIVE")


@dataclass
class Block:
    """A fenced one: a file to save, or commands with what they print."""

    file: str
    text: str
    commands: list[tuple[str, list[str]]] = field(default_factory=list)


def blocks() -> list[Block]:
    found = []
    for kind, file, text in re.findall(r"^```(console|python)(?: (\S+))?\n(.*?)^```$", START, re.MULTILINE | re.DOTALL):
        block = Block(file, text)
        for line in text.splitlines() if kind == "console" else []:
            if line.startswith("$ "):
                block.commands.append((line[2:], []))
            else:
                block.commands[-1][1].append(line)
        found.append(block)
    return found


def pattern(lines: list[str]) -> re.Pattern[str]:
    """Of what is printed: `...` in a line is anything but the line's end, and a line of it any lines."""
    parts = []
    for line in lines:
        if line == "...":
            parts.append(r"(?:.*\n)*?")
            continue
        if line in _VERDICTS:
            parts.append(rf"(?:{'|'.join(_VERDICTS)})\n")
            continue
        parts.append(r".*?".join(re.escape(" ".join(part.split(" "))) for part in line.split("...")) + r"\n")
    return re.compile("".join(parts))


def status(printed: str) -> int:
    """What a command that has printed this should end with."""
    lines = printed.splitlines()
    verdicts = [_VERDICTS.index(line) for line in lines if line in _VERDICTS]
    return verdicts[0] if verdicts else int(any(line.startswith(("tutti init: ", "bad ")) for line in lines))


@pytest.mark.parametrize(
    ("lines", "printed", "fits"),
    [
        (["a ... c"], "a b c\n", True),
        (["a ... c"], "a b\nc\n", False),
        (["a", "...", "d"], "a\nb\nc\nd\n", True),
        (["a", "..."], "a\n", True),
        (["a"], "a\nb\n", False),
        (["x (1)"], "x (2)\n", False),
        (["PASS"], "INVALID\n", True),
        (["PASS"], "PAST\n", False),
        ([], "", True),
        ([], "warning\n", False),
    ],
)
def test_what_is_printed_is_compared(lines: list[str], printed: str, fits: bool) -> None:
    assert bool(pattern(lines).fullmatch(printed)) == fits


class Scores(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(x), -1)


def models(folder: Path) -> None:
    """What people have: a module, an ONNX of another framework's names, scikit-learn's default, a classifier."""
    rows = torch.export.Dim("rows")
    program = torch.export.export(Scores().eval(), (torch.zeros(2, 8),), dynamic_shapes={"x": {0: rows}})
    torch.export.save(program, folder / "scores.pt2")
    onnx.save(frozen(), str(folder / "frozen (v2).onnx"))
    checkpoints.text(folder / "tone", "distilbert", is_classifier=True)
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("read the paper\n")


def frozen() -> onnx.ModelProto:
    """With an axis, names and weights as another framework calls them."""
    weights = [
        numpy_helper.from_array(np.ones((8, 3), np.float32), "dense/kernel:0"),
        numpy_helper.from_array(np.zeros(3, np.float32), "dense/bias:0"),
    ]
    nodes = [
        helper.make_node("MatMul", ["input:0", "dense/kernel:0"], ["dense/MatMul"]),
        helper.make_node("Add", ["dense/MatMul", "dense/bias:0"], ["dense/BiasAdd:0"]),
        helper.make_node("Softmax", ["dense/BiasAdd:0"], ["the scores"]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [axis, width])
        for name, axis, width in (
            ("input:0", "unk__61", 8),
            ("dense/BiasAdd:0", "unk__62", 3),
            ("the scores", "unk__62", 3),
        )
    ]
    graph = helper.make_graph(nodes, "tf2onnx", tensors[:1], tensors[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def mapped(folder: Path) -> None:
    """scikit-learn's default output, from what the document has trained."""
    made = skl2onnx.to_onnx(joblib.load(folder / "iris.pkl"), np.zeros((1, 4), np.float32))
    (folder / "mapped.onnx").write_bytes(made.SerializeToString())


@dataclass
class Shell:
    """Runs the commands in the folder, against ports of its own instead of the usual ones."""

    folder: Path
    bin: Path
    ports: list[int]
    servers: ExitStack

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = f"{self.bin}:{os.environ['PATH']}"
        return kept | {"PATH": path, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, command: str) -> str:
        """What is printed, as a terminal shows it: both streams."""
        if command.endswith(" &"):
            return self.servers.enter_context(self.serving(command.removesuffix(" &")))
        done = subprocess.run(
            self.own(command), shell=True, cwd=self.folder, env=self.environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
        )  # fmt: skip
        printed = _PROGRESS.sub("", done.stdout)
        assert done.returncode == status(printed), f"$ {command}\n{done.stdout}"
        printed = printed.replace(f"127.0.0.1:{self.ports[0]}", "127.0.0.1:8000")
        return printed if not printed or printed.endswith("\n") else f"{printed}\n"

    def own(self, command: str) -> str:
        """Served at these ports, and asked there."""
        flags = "--http-port {} --grpc-port {} --metrics-port {}".format(*self.ports)
        if command.startswith("tutti serve"):
            return f"{command} {flags}"
        if command.startswith("tutti loadtest"):
            return f"{command} --url 127.0.0.1:{self.ports[0]}"
        return command.replace("127.0.0.1:8000", f"127.0.0.1:{self.ports[0]}")

    @contextmanager
    def serving(self, command: str) -> Iterator[str]:
        """What the server has said when it is ready. Ends it."""
        log = self.folder / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {self.own(command)}"],
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=file,
            )
        try:
            wait_until(lambda: "tutti: try: " in log.read_text() or process.poll() is not None, START_TIMEOUT_S)
            yield log.read_text().replace(f"127.0.0.1:{self.ports[0]}", "127.0.0.1:8000")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of torch's and skl2onnx's, about themselves
def test_the_first_hour_is_as_it_is_written(installed: Installed, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    models(tmp_path)
    add_strangers(tmp_path)
    with ExitStack() as servers:
        shell = Shell(tmp_path, installed.bin, free_ports(3), servers)
        for block in blocks():
            if block.file:
                (tmp_path / block.file).write_text(shell.own(block.text))
            for command, expected in block.commands:
                printed = shell.run(command)
                assert pattern(expected).fullmatch(printed), "\n".join(
                    [f"$ {command}", printed, "expected:", *expected]
                )
                if command == "python train.py":
                    mapped(tmp_path)
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)", START))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
