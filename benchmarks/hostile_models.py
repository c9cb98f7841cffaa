"""Random model.py files that do what they should not, beside a good model under load: each costs itself only.

`python -m benchmarks.hostile_models --count 1000 --seed 1`. A model's evils are drawn with a seed. The good model's
answers are all compared, each bad model's request must end, and the server must live.
"""

import argparse
import collections
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tutti.loadtest.process import free_ports, stop, wait_until_ready

HANG_TIMEOUT_S = 1
REQUEST_TIMEOUT_S = 60.0
_CONFIG = (
    'backend: "python" input { name: "X" data_type: TYPE_FP32 dims: [ -1 ] } '
    'output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] }\n'
)
_LIMIT = f'parameters {{ key: "tutti.hang_timeout_s" value {{ string_value: "{HANG_TIMEOUT_S}" }} }}\n'
_HEAD = """
import asyncio, builtins, ctypes, gc, logging, os, signal, subprocess, sys, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

def x_of(request): return pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
def answer(array): return pb_utils.InferenceResponse([pb_utils.Tensor("Y", array)])

class Nasty(BaseException):
    def __str__(self): raise Nasty

"""
_RAISES = (
    "sys.exit(3)",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise asyncio.CancelledError",
    "raise BaseException('evil')",
    "raise Nasty",
    "raise UnicodeError('\\ud800')",
    "raise MemoryError",
    "raise RecursionError",
    "raise StopIteration",
)
_ENDS = (
    "os._exit(9)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os.abort()",
    "ctypes.string_at(0)",
    "threading.Thread(target=os._exit, args=(3,)).start(); time.sleep(60)",
    "subprocess.Popen(['sleep', '600']); os._exit(4)",
    "os.fork() and os._exit(5); time.sleep(600)",
    "os.closerange(3, 256)",
)
_HANGS = (
    "time.sleep(600)",
    "threading.Event().wait()",
    "ctypes.PyDLL(None).pause()",
    "asyncio.new_event_loop().run_forever()",
    "os.kill(os.getpid(), signal.SIGSTOP)",
)
# What may be done without being noticed, by anybody.
_HARMLESS = (
    "os.fork()",
    "x_of(requests[0]).fill(-1)",
    "threading.Thread(target=sys.exit).start()",
    "threading.Thread(target=time.sleep, args=(600,)).start()",
    "builtins.hostile = 1; np.float32 = None; json = None",
    "os.chdir('/'); os.environ.clear()",
    "sys.path.clear(); sys.modules.pop('numpy')",
    "sys.stdout = sys.stderr = None",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "logging.disable(); logging.getLogger().handlers.clear()",
    "gc.disable(); sys.setrecursionlimit(50_000)",
    "sys.setswitchinterval(10)",
    "np.seterr(all='raise')",
)
_ANSWERS = (
    "return []",
    "return None",
    "return requests",
    "return [answer(x_of(r)) for r in requests] * 2",
    "return [None for r in requests]",
    "return 'text'",
    "return [pb_utils.InferenceResponse([])]",
    "return [answer(np.array(['text'], object))]",
    "return [answer(np.array([1, None], object))]",
    "return [answer(x_of(requests[0]).astype(np.complex64))]",
    "return [answer(x_of(requests[0]).astype(np.int8))]",
    "return [answer(np.zeros((2, 3, 4), np.float32))]",
    "return [pb_utils.InferenceResponse([pb_utils.Tensor('Z', x_of(requests[0]))])]",
    "return [pb_utils.InferenceResponse(error=pb_utils.TritonError('\\ud800'))]",
    "return [pb_utils.InferenceResponse(error=7)]",
    "return [pb_utils.InferenceResponse([pb_utils.Tensor('Y', x_of(requests[0]))], parameters={chr(0xD800): 1})]",
    "requests[0].get_response_sender(); return None",
    "s = requests[0].get_response_sender(); s.send(answer(x_of(requests[0])), 1); s.send(answer(x_of(requests[0])), 1)",
)
_FINE = "return [answer(x_of(r)) for r in requests]"
_GOOD = "return [answer(x_of(r) * 2 + 1) for r in requests]"


@dataclass(frozen=True, slots=True)
class Hostile:
    """A bad model: what it does where."""

    name: str
    source: str
    what: str
    hangs: bool


def hostile(rng: random.Random, name: str) -> Hostile:
    """A model with one evil, in its file, initialize, execute or finalize, and maybe a few that do no harm."""
    kind = rng.choice(("raises", "ends", "hangs", "answers", "harmless"))
    evil = rng.choice({"raises": _RAISES, "ends": _ENDS, "hangs": _HANGS, "answers": _ANSWERS}.get(kind, _HARMLESS))
    where = "execute" if kind in ("answers", "hangs") else rng.choice(("file", "initialize", "execute", "finalize"))
    if "requests" in evil:
        where = "execute"
    asynchronous = "async " if rng.random() < 0.2 and where == "execute" else ""
    extra = rng.sample([one for one in _HARMLESS if "fork" not in one], rng.randrange(3))
    lines = {"file": [], "initialize": [], "execute": list(extra), "finalize": []}
    lines[where].append(evil)
    body = "".join(
        f"    {asynchronous if at == 'execute' else ''}def {at}(self{arguments}):\n"
        + "".join(f"        {line}\n" for line in [*lines[at], tail])
        for at, arguments, tail in (
            ("initialize", ", args", "pass"),
            ("execute", ", requests", _FINE),
            ("finalize", "", "pass"),
        )
    )
    source = _HEAD + "".join(f"{line}\n" for line in lines["file"]) + "class TritonPythonModel:\n" + body
    return Hostile(name, source, f"{kind} in {where}: {evil}", kind == "hangs")


@dataclass
class Outcome:
    """What has come of a run."""

    good: int = 0
    wrong: list[str] = field(default_factory=list)
    bad: collections.Counter[str] = field(default_factory=collections.Counter)
    is_alive: bool = True


class _Server:
    """`tutti serve` over a repository that grows."""

    def __init__(self, root: Path, log: Path) -> None:
        self._root = root
        self._write(
            "good", _HEAD + f"class TritonPythonModel:\n    def execute(self, requests):\n        {_GOOD}\n", ""
        )
        self._http, grpc, metrics = free_ports(3)
        command = [sys.executable, "-m", "tutti.app.cli", "serve", str(root), "--model-control-mode=explicit"]
        ports = [f"--http-port={self._http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--load-model=good"]
        with log.open("wb") as file:
            self.process = subprocess.Popen([*command, *ports], stdout=file, stderr=file)
        wait_until_ready(self.process, f"http://127.0.0.1:{self._http}/v2/health/ready", log)

    def _write(self, name: str, source: str, more: str) -> None:
        (self._root / name / "1").mkdir(parents=True)
        (self._root / name / "config.pbtxt").write_text(_CONFIG + more)
        (self._root / name / "1" / "model.py").write_text(source, encoding="utf-8", errors="surrogatepass")

    def add(self, model: Hostile) -> None:
        self._write(model.name, model.source, _LIMIT if model.hangs else "")

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        """Raises OSError where no answer comes."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._http}/v2/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def infer(self, name: str, value: float) -> tuple[int, bytes]:
        tensor = {"name": "X", "datatype": "FP32", "shape": [2], "data": [value, value]}
        return self.post(f"models/{name}/infer", {"inputs": [tensor]})


def run(count: int, seed: int, folder: Path, threads: int = 4, pause_s: float = 0.0, progress: bool = False) -> Outcome:
    """Load, ask twice and unload so many models, several at a time, while the good one is asked again and again."""
    rng = random.Random(seed)
    models = iter([hostile(rng, f"bad_{number}") for number in range(count)])
    outcome = Outcome()
    lock, is_over = threading.Lock(), threading.Event()
    server = _Server(folder / "repository", folder / "server.log")

    def ask_good() -> None:
        for number in itertools.count():
            if is_over.wait(pause_s):
                return
            _ask_good(server, number % 1000, outcome)

    def try_bad() -> None:
        while True:
            with lock:
                model = next(models, None)
            if model is None:
                return
            said, wrong = _try(server, model)
            with lock:
                outcome.bad[said] += 1
                outcome.wrong += wrong
                if progress and (wrong or outcome.bad.total() % 50 == 0):
                    print(f"{outcome.bad.total()} of {count}: {outcome.good} good answers {wrong or ''}", flush=True)

    good = threading.Thread(target=ask_good)
    bad = [threading.Thread(target=try_bad) for _ in range(threads)]
    for thread in (good, *bad):
        thread.start()
    for thread in bad:
        thread.join()
    is_over.set()
    good.join()
    outcome.is_alive = server.process.poll() is None
    if not stop(server.process):
        outcome.wrong.append("the server did not stop by itself")
    return outcome


def _ask_good(server: _Server, value: int, outcome: Outcome) -> None:
    try:
        status, body = server.infer("good", value)
        got = json.loads(body)["outputs"][0]["data"] if status == 200 else body
    except (OSError, ValueError) as error:
        status, got = 0, error
    outcome.good += 1
    if got != [2 * value + 1] * 2:
        outcome.wrong.append(f"the good model: {status} {got!r}"[:300])


def _try(server: _Server, model: Hostile) -> tuple[str, list[str]]:
    """What came of it, in a word, and what is wrong with how it was told."""
    server.add(model)
    try:
        status, body = server.post(f"repository/models/{model.name}/load", {})
        if status != 200:
            return "refused at load", _told(model, status, body)
        answers = [server.infer(model.name, number) for number in (1, 2)]
        server.post(f"repository/models/{model.name}/unload", {})
    except OSError as error:
        return "no answer", [f"{model.name} ({model.what}): {error}"]
    failed = [each for each in answers if each[0] != 200]
    return "an error" if failed else "answers", [text for each in failed for text in _told(model, *each)]


def _told(model: Hostile, status: int, body: bytes) -> list[str]:
    """An error names the model, but for those that are the model's own words."""
    if status >= 400 and b"error" in body and (model.name.encode() in body or "TritonError" in model.what):
        return []
    return [f"{model.name} ({model.what}): {status} {body[:200]!r}"]


def report(outcome: Outcome) -> Sequence[str]:
    bad = ", ".join(f"{count} {said}" for said, count in outcome.bad.most_common())
    lives = "lives" if outcome.is_alive else "HAS ENDED"
    return [
        f"{outcome.bad.total()} bad models: {bad}",
        f"{outcome.good} good answers; the server {lives}",
        *outcome.wrong,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.count, options.seed, Path(folder), options.threads, progress=True)
        print("\n".join(report(outcome)))
        print(f"{time.monotonic() - began:.0f} s")
    return 1 if outcome.wrong or not outcome.is_alive else 0


if __name__ == "__main__":
    sys.exit(main())
