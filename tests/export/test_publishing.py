"""An export that is killed, again and again, over a server that polls the repository: nobody notices."""

import json
import multiprocessing.process
import os
import random
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.export import apart
from tests.serving import serving, wait_until
from tutti.export import cli

SOURCE = "config:resnet,num_labels=3,embedding_size=8,hidden_sizes=[8],depths=[1],layer_type=basic"
BODY = json.dumps(
    {"inputs": [{"name": "PIXELS", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [7] * (3 * 16 * 16)}]}
).encode()


def export(repository: str) -> None:
    """The whole command; its status is the process's."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    command = ["vision", SOURCE, "--image-size", "16", "--name", "m", "--force", "--variants", "fp32,fp16"]
    os._exit(cli.main([*command, "--repository", repository]))


class Client:
    """Asks all the time; keeps what failed."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._url = f"http://{address}/v2/models/m_classifier/infer"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            try:
                with urllib.request.urlopen(urllib.request.Request(self._url, BODY), timeout=20) as answer:
                    scores = json.load(answer)["outputs"][0]["data"]
                assert len(scores) == 3
                assert abs(sum(scores) - 1) < 1e-4
                self.answers += 1
            except Exception as error:
                self.failures.append(repr(error))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_server_that_polls_never_sees_half_a_model(tmp_path: Path) -> None:
    """Twelve exports are killed at random moments; a server takes each that got as far, and fails nobody."""
    repository, log = tmp_path / "models", tmp_path / "log"
    server = apart.context()

    def start() -> multiprocessing.process.BaseProcess:
        process = server.Process(target=export, args=(str(repository),))
        process.start()
        return process

    for _ in range(2):  # the first has the server imported
        begun = time.monotonic()
        first = start()
        first.join(120)
        assert first.exitcode == 0
    takes_s = time.monotonic() - begun
    rng = random.Random(3)
    flags = ("--model-control-mode", "poll", "--repository-poll-secs", "0.2", "--log-verbose", "1")
    killed = 0
    with serving(repository, log, *flags) as served, Client(served.http) as client:
        wait_until(lambda: client.answers > 5)
        for turn in range(12):
            process = start()
            # Two of three late, where what matters happens.
            process.join(takes_s * (rng.uniform(0.7, 1.0) if turn % 3 else rng.random()))
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                killed += 1
            process.join(30)
        before = client.answers
        last = start()
        last.join(120)
        assert last.exitcode == 0, "what was killed is not in the way"
        wait_until(lambda: client.answers > before + 50)
    assert killed >= 6
    assert client.failures == []
    text = log.read_text()
    assert " E " not in text
    assert "cannot load" not in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".models.export-")] == []
