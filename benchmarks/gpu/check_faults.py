"""Of `check`: faults for real, while a client with one connection goes on asking a good model.

A context that is lost takes all models of its process with it. What is looked at: every request is answered, the
server is well again by itself, and the client's connection is not broken where front-ends are processes of their own.
"""

import contextlib
import http.client
import itertools
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import repository, served, server
from benchmarks.gpu.check import Double
from benchmarks.gpu.context import Context, NotThereYetError
from benchmarks.gpu.requests import Request

# The kernels of PyTorch 2.11 keep 32 bits of an id where the table is small, and look up what is left of it.
WIDE_ID = 1 << 40
BAD_ID = 1 << 20
_ROWS = 100
# What the server is given to be well again.
_WELL_S = 60.0
# A process whose device has failed has ended by then.
_DYING_S = 7.0
_HANG_S = 30.0
# Of the good client: longer than the engine's own, which holds up what shares the device.
_PATIENCE_S = 90.0
# A product of matrices of this width takes 0.2 s in 32 bits.
_WIDE, _PRODUCTS = 16_384, 450
BOUNDS = 'parameters { key: "tutti.bounds" value { string_value: "{\\"ids\\": [0, 99]}" } }'
# The status of a process whose device has failed.
_DEVICE_LOST = 75


class Look(torch.nn.Module):
    """ids [batch, 4] INT64 -> [batch, 8]: a table of 100 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(_ROWS, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(1)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the good client: when it ended, and 200, another status, or 0 for a broken connection."""

    at_s: float
    status: int


class GoodClient:
    """Asks the model "double" over one connection as long as it lasts, and over a new one when it does not."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._head, self._body = Request("double", [("x", np.ones((1, 8), np.float32))]).http()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.asked: list[Asked] = []
        self.was_not_ready = False
        self.connections = 0

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def good_since(self, at_s: float) -> bool:
        """Whether ten were answered well after `at_s`, and nothing else since the first of them."""
        late = [one for one in list(self.asked) if one.at_s > at_s][-10:]
        return len(late) == 10 and all(one.status == 200 for one in late)

    def _run(self) -> None:
        headers = dict(line.split(": ", 1) for line in self._head.decode().split("\r\n")[1:] if line)
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(self._address, timeout=_PATIENCE_S)
                    connection.connect()
                    self.connections += 1
                connection.request("POST", "/v2/models/double/infer", self._body, headers)
                response = connection.getresponse()
                response.read()
                self.asked.append(Asked(time.monotonic(), response.status))
            except (OSError, http.client.HTTPException):
                self.asked.append(Asked(time.monotonic(), 0))
                connection = None
            self._stop.wait(0.005)

    def row(self, fault_s: float) -> dict[str, Any]:
        """What it saw: the time without a good answer around the fault, statuses, connections."""
        good = [one.at_s for one in self.asked if one.status == 200]
        gaps = [after - before for before, after in itertools.pairwise(good) if after > fault_s]
        return {
            "outage s": max(gaps, default=0.0),
            "refused": sum(one.status not in (0, 200) for one in self.asked),
            "broken": sum(one.status == 0 for one in self.asked),
            "connections": self.connections,
        }


def _models(context: Context, root: Path, bounds: str = "") -> None:
    repository.add_module(root, "double", Double(), 8, repository.floats("pytorch", context.device, 8, 8))
    folder = repository.add(
        root, "look",
        'backend: "pytorch" max_batch_size: 8 dynamic_batching {}\n'
        'input { name: "ids" data_type: TYPE_INT64 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 8 }\n'
        f"instance_group {{ kind: {repository.kind(context.device)} }} {bounds}\n",
    )  # fmt: skip
    torch.manual_seed(0)
    module = Look().eval().requires_grad_(False)
    repository.export(module, (torch.zeros(2, 4, dtype=torch.int64),), folder / "model.pt2")


@contextlib.contextmanager
def _under_load(
    context: Context, name: str, bounds: str = "", *flags: str, more: Callable[[Path], None] = lambda root: None
) -> Iterator[tuple[server.Server, GoodClient]]:
    folder = served.fresh(context, name)
    root = served.fresh(context, f"{name}/models")
    _models(context, root, bounds)
    more(root)
    with server.tutti(root, folder / "server.log", *flags) as tutti:
        tutti.infer(Request("look", [("ids", np.zeros((1, 4), np.int64))]))
        client = GoodClient(tutti.http)
        client.start()
        try:
            _wait(lambda: client.good_since(0.0), 20, "the good model was not answered before the fault")
            yield tutti, client
        finally:
            client.end()


def _wait(is_so: Any, seconds: float, otherwise: str) -> None:
    pause = threading.Event()
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError(otherwise)
        pause.wait(0.02)


def _ask_bad(tutti: server.Server, bad: int) -> tuple[int, str]:
    """The status of the answer for the bad id, or 0 when the connection broke; and the text."""
    ids = np.array([[1, bad, 2, 3]], np.int64)
    try:
        tutti.infer(Request("look", [("ids", ids)]), timeout_s=30)
    except server.RefusedError as error:
        return error.status, str(error)
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{type(error).__name__}: {error}"
    return 200, "it was answered as if it were right"


def bad_id(context: Context) -> None:
    """Without bounds a card's context dies. Two front-end processes keep connections; one alone ends with it."""
    for front_ends in (2,) if context.is_short else (2, 1):
        flag = f"--front-end-processes={front_ends}"
        with _under_load(context, f"check-bad-{front_ends}", "", flag) as (tutti, client):
            if front_ends > 1:
                status, text = _ask_bad(tutti, WIDE_ID)
                context.emit(f"id {WIDE_ID}", {"status": status, "text": text[:200]})
            began = time.monotonic()
            status, text = _ask_bad(tutti, BAD_ID)
            row = {"status": status, "s": time.monotonic() - began, "text": text[:200]}
            context.check(f"answered, {front_ends} front-ends", status >= 400, **row)
            if front_ends == 1 and context.is_gpu:
                with contextlib.suppress(TimeoutError):
                    _wait(lambda: tutti.process.poll() is not None, _WELL_S, "")
                exited = tutti.process.poll()
                context.check("one process ends", exited == _DEVICE_LOST, exited=exited, s=time.monotonic() - began)
            else:
                _recover(
                    context,
                    f"good model, {front_ends} front-ends",
                    tutti,
                    client,
                    (began, time.monotonic()),
                    front_ends,
                )


def _recover(
    context: Context, name: str, tutti: server.Server, client: GoodClient, fault_s: tuple[float, float], front_ends: int
) -> None:
    """Of a fault that began and was told at `fault_s`: the good model is answered again, without a break."""
    began_s, told_s = fault_s
    # Before a process ends by itself it may answer for a while, which is not to be taken for being well.
    settled_s = told_s + (_DYING_S if context.is_gpu else 0.0)
    try:
        _wait(lambda: client.good_since(settled_s), _WELL_S, "")
        is_well = True
    except TimeoutError:
        is_well = False
    row = client.row(began_s)
    is_kept = front_ends == 1 or row["connections"] == 1
    context.check(name, is_well and is_kept, **row, exited=str(tutti.process.poll()))
    if is_well:
        said = tutti.infer(Request("look", [("ids", np.zeros((1, 4), np.int64))]))["y"]
        context.check(f"the model itself, {front_ends} front-ends", bool(np.isfinite(said).all()))


def bounded_id(context: Context) -> None:
    """With bounds: refused with 400 before it gets to the device, and nobody else notices."""
    with _under_load(context, "check-bounded", BOUNDS, "--front-end-processes=1") as (tutti, client):
        began = time.monotonic()
        status, text = _ask_bad(tutti, WIDE_ID)
        if status != 400:
            raise NotThereYetError(f"bounds on ids: status {status}, {text[:200]}")
        for bad in (-1, _ROWS, 1 << 33):
            with contextlib.suppress(server.RefusedError):
                tutti.infer(Request("look", [("ids", np.array([[0, 0, 0, bad]], np.int64))]))
                context.check(f"id {bad}", False)
        _wait(lambda: client.good_since(began), 20, "the good model is not answered any more")
        row = client.row(began)
        context.check("refused with 400", True)
        context.check("good model", not row["refused"] and not row["broken"], **row)


_HANG = """
    import time

    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            if DEVICE == "cpu":
                time.sleep(SECONDS)
            else:
                import torch

                torch.cuda._sleep(int(1.8e9 * SECONDS))
                torch.cuda.current_stream().synchronize()
            found = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in found]
"""


def _add_hang(context: Context, root: Path, patience_s: int) -> None:
    """A python model in a process of its own, which may be ended when it has no answer for so long."""
    told = {"tutti.isolate": "process", "tutti.hang_timeout_s": str(patience_s)}
    extra = " ".join(f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in told.items())
    folder = repository.add(root, "hang", repository.floats("python", context.device, 8, 8, extra=extra))
    source = textwrap.dedent(_HANG).lstrip().replace("DEVICE", repr(context.device)).replace("SECONDS", str(_HANG_S))
    (folder / "model.py").write_text(source)


def hang(context: Context) -> None:
    """A kernel of half a minute, on a processor a sleep: its caller is told early, and the good model goes on."""
    patience_s = 2 if context.is_short else 10
    with _under_load(
        context, "check-hang", "", "--front-end-processes=2", more=lambda root: _add_hang(context, root, patience_s)
    ) as (tutti, client):
        began = time.monotonic()
        _ask_hang(context, tutti, "hang", patience_s + 10)
        _recover(context, "good model", tutti, client, (began, time.monotonic()), 2)
        _tell_log(context, tutti, "hang")


class Endless(torch.nn.Module):
    """x [batch, 8] -> [batch, 8], after so many large products that they take longer than an engine waits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x[:1, :1].expand(_WIDE, _WIDE).contiguous()
        for _ in range(_PRODUCTS):
            wide = (wide @ wide) * (1 / _WIDE)
        return x + wide[:1, :1]


def engine_hang(context: Context) -> None:
    """A batch that outlasts the engine's patience of a minute: the device is given up, and begun anew."""

    def add(root: Path) -> None:
        text = repository.floats("pytorch", context.device, 8, 8)
        repository.add_module(root, "endless", Endless(), 8, text)

    with _under_load(context, "check-endless", "", "--front-end-processes=2", more=add) as (tutti, client):
        began = time.monotonic()
        _ask_hang(context, tutti, "endless", 85)
        _recover(context, "good model", tutti, client, (began, time.monotonic()), 2)
        _tell_log(context, tutti, "endless")


def _ask_hang(context: Context, tutti: server.Server, model: str, within_s: float) -> None:
    """Its caller is to get an error, and to get it in time."""
    began, status = time.monotonic(), 0
    try:
        tutti.infer(Request(model, [("x", np.ones((1, 8), np.float32))]), timeout_s=within_s + 20)
        status, what = 200, "answered at its end"
    except server.RefusedError as error:
        status, what = error.status, str(error)
    except (OSError, http.client.HTTPException) as error:
        what = f"{type(error).__name__}: {error}"
    took_s = time.monotonic() - began
    context.check("its caller", status >= 400 and took_s < within_s, status=status, s=took_s, what=what[:200])


def _tell_log(context: Context, tutti: server.Server, model: str) -> None:
    """What the server wrote of a model, but that it was loaded."""
    told = [line for line in tutti.said().splitlines() if f"'{model}'" in line and " loaded " not in line]
    context.emit("log", {"said": told[0][:250] if told else "nothing of it"})
