"""The demo's endings: each is one sentence with what to do, and a status that is not 0.

The server is a small one that is told how to end; the demo with the real one is what `make demo` runs.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import wait_until

ROOT = Path(__file__).parents[1]
# Takes the demo's flags; what comes before them says how it ends.
SERVER = """
import http.server, os, signal, sys
how, flags = sys.argv[1], sys.argv[2:]
port = int(flags[flags.index("--http-port") + 1])
if how == "taken":
    print("2026-11-27 05:07:54,534 E tutti: cannot listen: 127.0.0.1:1: Address already in use")
    print("2026-11-27 05:07:54,534 I tutti: stopping", flush=True)
    sys.exit(2)
if how == "killed at once":
    os.kill(os.getpid(), signal.SIGKILL)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def do_POST(self):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "silent":
            open(sys.argv[0] + ".asked", "w").close()
            signal.pause()
        self.send_response(503)
        self.send_header("content-length", "22")
        self.end_headers()
        self.wfile.write(b'{"error": "not today"}')
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# The demo in this folder, with the server above.
DEMO = """
import sys
import demo.server
from demo.__main__ import main
demo.server.COMMAND = (sys.executable, *sys.argv[1:])
sys.exit(main())
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the project's, with models built that nobody loads."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "Makefile").touch()
    (tmp_path / "server.py").write_text(SERVER)
    models = tmp_path / "model_repository"
    for one in ("speech_vad/1/model.onnx", "text_encoder/1/model.onnx", "image_classifier/1/model.onnx"):
        (models / one).parent.mkdir(parents=True)
        (models / one).touch()
    (models / "text_classifier").mkdir()
    (models / "text_classifier" / "labels.txt").write_text("safe\nharassment\nspam\nviolence\n")
    return tmp_path


def held(folder: Path, how: str, code: str = DEMO) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, "server.py", how]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=ENVIRONMENT)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("taken", "nothing could be asked: the server ended with status 2 and said: cannot listen: 127.0.0.1:1: "),
        ("killed at once", "nothing could be asked: the server was killed, by another process or by the system "),
        ("killed", "'content_intelligence', asked over http, gave no answer ("),
        ("refusing", "gave no answer (not today): the server is still there and said nothing; its log is"),
    ],
)
def test_a_server_that_ends_early_is_told_of_in_a_sentence(folder: Path, how: str, said: str) -> None:
    done = held(folder, how)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.endswith("; its log is demo/server.log: run make demo again\n")
    assert ("the server was killed" in done.stderr) == ("killed" in how)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("tutti serve", "stopping"))]
    assert line.startswith("demo: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_stopped_by_hand_stops_its_server(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", DEMO, "server.py", "silent"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=ENVIRONMENT) as process:
        wait_until((folder / "server.py.asked").exists, 60.0)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.splitlines()[-1:] == ["demo: stopped by hand, and the server with it"]
    assert "Traceback" not in said


def test_what_the_demo_lacks_is_said_before_it_serves(folder: Path) -> None:
    missing = "import sys; sys.modules['psutil'] = None\n" + DEMO.replace("import demo.server\n", "").replace(
        "demo.server.COMMAND = (sys.executable, *sys.argv[1:])\n", ""
    )
    done = held(folder, "never started", missing)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (1, [])
    assert "'psutil' is not installed: run make demo, which installs what it needs, or " in done.stderr
    (folder / "model_repository" / "speech_vad" / "1" / "model.onnx").unlink()
    done = held(folder, "never started")
    built = "model_repository/speech_vad/1/model.onnx is not built: run make demo, which builds the sample models"
    assert (done.returncode, done.stderr) == (1, f"demo: {built}\n")
    (folder / "Makefile").unlink()
    done = held(folder, "never started")
    assert (done.returncode, done.stderr) == (
        1,
        "demo: model_repository is not in this folder: run it in the project's\n",
    )


def test_where_nothing_can_be_written_that_is_said(folder: Path) -> None:
    command = [sys.executable, "-c", DEMO, "server.py", "refusing"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=folder, env=ENVIRONMENT
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (folder / "demo" / "server.log").unlink()
    (folder / "demo" / "server.log").mkdir()
    done = held(folder, "never started")
    assert done.returncode == 1
    assert done.stderr == "demo: demo/server.log: Is a directory: make that possible, then run make demo again\n"
