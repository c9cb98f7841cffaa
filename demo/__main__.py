"""`make demo`: serve the sample repository on Ray, send real samples with tritonclient, check, print and draw.

Exits non-zero if any answer is wrong, if the server leaves a process behind, and with a sentence that says what to do
where the demo cannot be held. Light, so that it can say what is not installed.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tutti.console.progress import Work
from tutti.core import extras
from tutti.core.errors import reason

if TYPE_CHECKING:
    from demo.server import Server

REPOSITORY = Path("model_repository")
# What `make models` makes last of each modality.
BUILT = ("speech_vad/1/model.onnx", "text_encoder/1/model.onnx", "image_classifier/1/model.onnx")
LABELS = REPOSITORY / "text_classifier" / "labels.txt"
PICTURE = Path("demo/content_intelligence.png")
LOG = Path("demo/server.log")
# An answer takes less than a second; one that has not come by then never will.
TIMEOUT_S = 60.0


def main() -> int:
    """Hold the demo; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        status = _run()
        sys.stdout.flush()
        return status
    except _Stopped as error:
        print("demo: stopped by hand, and the server with it", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # as of `| head`: who reads has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        print(f"demo: {_sentence(error)}", file=sys.stderr)
        _forget_output()
        return 1


class _Stopped(SystemExit):
    """The demo was asked to end. A SystemExit, since gevent tells of a KeyboardInterrupt with a traceback."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise _Stopped(number)


def _forget_output() -> None:
    """What could not be written would be tried again as the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, ImportError):
        what = f"'{error.name}' is not installed" if isinstance(error, ModuleNotFoundError) else reason(error)
        return f"{what}: run make demo, which installs what it needs, or {extras.install('ray,export,demo')}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else "what it prints cannot be written: "
        return f"{where}{reason(error)}: make that possible, then run make demo again"
    if type(error).__module__ == "demo.server":
        return str(error)
    with contextlib.suppress(OSError), LOG.open("a", encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    return f"{type(error).__name__}: {reason(error)}: a fault of the demo's own, whose place {LOG} ends with"


def _run() -> int:
    from demo.server import Server

    _check_built()
    with LOG.open("w+", encoding="utf-8") as log:
        started = time.monotonic()
        server = Server(REPOSITORY, log)
        try:
            server.wait_until_ready()
            print(f"tutti serve {REPOSITORY} --ray: ready after {time.monotonic() - started:.1f} s")
            failures = _ask(server)
        finally:
            left = _stop(server)
    failures += left
    for failure in failures:
        print(f"WRONG: {failure}")
    print("all answers are right" if not failures else f"{len(failures)} checks failed; the server's log is {LOG}")
    return 1 if failures else 0


def _check_built() -> None:
    """Raises DemoError where there is nothing to serve."""
    from demo.server import DemoError

    missing = [path for path in (LABELS, *(REPOSITORY / one for one in BUILT)) if not path.is_file()]
    if missing and not Path("Makefile").is_file():
        raise DemoError(f"{REPOSITORY} is not in this folder: run it in the project's")
    if missing:
        raise DemoError(f"{missing[0]} is not built: run make demo, which builds the sample models")


def _ask(server: "Server") -> list[str]:
    """What was wrong with the answers. Raises DemoError where there are none, or no picture can be drawn of them."""
    from demo import checks
    from demo.client import Client
    from demo.picture import draw
    from demo.server import DemoError

    labels, found = LABELS.read_text().split(), checks.Checks()
    addresses = ("http", server.http_port), ("grpc", server.grpc_port)
    clients = [Client(protocol, f"127.0.0.1:{port}", TIMEOUT_S) for protocol, port in addresses]
    try:
        answered = checks.run_items(clients, labels, found)
        checks.check_quality(clients, answered, labels, found)
    except checks.NoAnswer as error:
        raise DemoError(server.why(str(error))) from error
    try:
        with Work("drawing"):
            draw(answered, labels, PICTURE)
    except OSError as error:
        raise DemoError(
            f"{PICTURE} cannot be written: {reason(error)}: make room for it, then run make demo again"
        ) from None
    print(f"\npicture: {PICTURE}")
    return found.failures


def _stop(server: "Server") -> list[str]:
    """As the server's; asked again meanwhile, at once."""
    try:
        with Work("stopping the server"):
            return server.stop()
    except _Stopped:
        server.kill()
        raise


if __name__ == "__main__":
    sys.exit(main())
