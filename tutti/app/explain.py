"""`tutti explain`: ask a model, or an ensemble, one request, and show where its time went.

Here in this process, from the repository; or with --url a server that runs, in the midst of what else it does.
"""

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutti import ensembles
from tutti.app import input_files
from tutti.app.explain_remote import Server
from tutti.backends import completion
from tutti.console import arguments
from tutti.console.arguments import Terse, positive, whole
from tutti.console.help_format import Help, examples
from tutti.console.progress import Work
from tutti.core import files
from tutti.core.errors import ConfigError, InferError, reason
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.frontends import api_keys
from tutti.observing import trace_reading
from tutti.observing.explanations import PARAMETER
from tutti.observing.waterfall import waterfall
from tutti.repository import folders, unserved
from tutti.repository.model_config import ModelConfig
from tutti.serving import local

# A model that takes longer is rare, and a server that hangs is not: whoever waits can say so.
_TIMEOUT_S = 30.0
_MOST_S = 1e6
_DESCRIPTION = "Ask a model, or an ensemble, one request, and show where its time went."


def main(arguments: Sequence[str], prog: str = "tutti explain") -> int:
    """Run the command; returns its exit status. Raises ConfigError with what cannot be asked, or was refused."""
    parser = make_parser(prog)
    options, rest = parser.parse_known_intermixed_args(arguments)  # inputs may stand behind a flag
    if rest:
        parser.unknown(rest)
    return run(options)


def make_parser(prog: str = "tutti explain") -> Terse:
    parser = Terse(prog=prog, formatter_class=Help, description=_DESCRIPTION, epilog=_examples(prog))
    _add_arguments(parser)
    return parser


def add_to(commands: Any, prog: str, text: str) -> None:
    """Put the command among others."""
    parser = commands.add_parser(
        prog.rsplit(" ", 1)[1], help=text, description=_DESCRIPTION, epilog=_examples(prog), formatter_class=Help
    )
    _add_arguments(parser)


def _examples(prog: str) -> str:
    return examples(f"{prog} text_tokenizer TEXT=hello", f"{prog} speech_vad AUDIO=@news.wav --url 127.0.0.1:8000")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="MODEL", nargs="?", default="", help="the model, or the ensemble")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT=VALUE",
        help="one row of an input: JSON or text, or @FILE: .npy, .wav or JSON for numbers, anything for BYTES",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path("model_repository"),
        metavar="FOLDER",
        help="the folder of models (default: %(default)s)",
    )
    _add_server(parser)
    parser.add_argument("--json", action="store_true", help="as the protocol's parameter has it (default: as text)")
    parser.add_argument(
        "--repeat",
        type=whole(1, 10_000),
        default=3,
        metavar="N",
        help="show the last of so many requests (default: %(default)s)",
    )
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="FILE",
        help="show the slowest requests of a server's trace file, or MODEL's, those of ensembles that ask it included "
        "(default: ask a request)",
    )
    parser.add_argument("--id", default="", metavar="ID", help="of the traces, the request with this id (default: all)")
    parser.add_argument(
        "--slowest",
        type=whole(1, 10_000),
        default=3,
        metavar="N",
        help="how many traces are shown (default: %(default)s)",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Flags for a server that runs."""
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="ask the server there (default: load the model here, and ask that)"
    )
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="with --url, a header, as of an API key (default: none)",
    )
    api_keys.add_to(parser)
    parser.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help=f"with --url, for each answer (default: {_TIMEOUT_S:g})",
    )


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.traces is not None:
        return _show_traces(options)
    if not options.name:
        raise ConfigError("explain: expected MODEL INPUT=VALUE ..., or --traces FILE")
    told = _told_by_server(options) if options.url else _told_here(options)
    print(told if options.json else waterfall(json.loads(told)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what would be ignored."""
    if options.url == "":
        raise ConfigError("explain: --url: expected HOST:PORT, got ''")
    for flag, is_given, needs, has_it in (
        ("--header", options.header, "goes with --url", options.url),
        (api_keys.FLAG, options.api_key_file, "goes with --url", options.url),
        ("--timeout", options.timeout, "goes with --url", options.url),
        ("--id", options.id, "goes with --traces", options.traces),
        ("--url", options.url, "does not go with --traces", not options.traces),
        ("INPUT=VALUE", options.inputs, "does not go with --traces", not options.traces),
    ):
        if is_given and not has_it:
            raise ConfigError(f"explain: {flag} {needs}")


def _show_traces(options: argparse.Namespace) -> int:
    path = options.traces
    try:
        text = files.read_text(path)
        requests = trace_reading.explained(text, options.name)
    except OSError as error:
        hint = f"; did you mean {unserved.near(path)}?" if unserved.near(path) and not path.exists() else ""
        raise ConfigError(f"'{path}' cannot be read: {reason(error)}{hint}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is no trace file (see --trace-config): {error}") from None
    shown = trace_reading.slowest(requests, options.name, options.id, options.slowest)
    if not shown:
        raise ConfigError(f"'{path}' has no such request; {_what_it_has(requests, text, options.name)}")
    print(json.dumps(shown) if options.json else "\n\n".join(map(waterfall, shown)))
    return 0


def _what_it_has(requests: Sequence[Mapping[str, Any]], text: str, name: str) -> str:
    """Of a trace file in which nothing was found."""
    if why := trace_reading.left_out(text).get(name):
        return f"'{name}' is a step that was left out: {why}"
    names = {request["model"] for request in requests}
    steps = {step for asked in requests for step in _steps_of(asked)} - names
    also = f", with the steps {', '.join(sorted(steps))}" if steps else ""
    told = ", ".join(sorted(names)) or "none that has ended"
    return f"it has requests to {told}{also}{arguments.near(name, names | steps)}"


def _steps_of(explained: Mapping[str, Any]) -> Iterator[str]:
    for step in [*explained.get("steps", []), *explained.get("steps_asked", [])]:
        yield step["step"]
        yield from _steps_of(step)


def _inputs(model: ModelConfig, texts: Sequence[str]) -> dict[str, Tensor]:
    try:
        tensors, notes = input_files.tensors(model.inputs, model.is_batched, texts)
    except ConfigError as error:
        raise ConfigError(f"model '{model.name}': {error}") from None
    for note in notes:
        print(note, file=sys.stderr)
    return tensors


def _told_here(options: argparse.Namespace) -> str:
    root, name = options.repository, options.name
    check_folder(root)
    folders.check_known(root, name)
    inputs = _inputs(completion.open_model(root, name).config, options.inputs)
    engine = local.make_engine(root, _timer, ensembles.load)
    with Work(f"loading '{name}'"):
        engine.load_all([name])
    try:
        if engine.failures():
            raise ConfigError("; ".join(engine.failures()))
        with Work(f"asking '{name}'", is_alike=True) as work:
            told = ""
            for number in range(options.repeat):
                work.step(f"request {number + 1}", options.repeat)
                told = _explained(engine.model(name), InferRequest(name, dict(inputs), parameters={PARAMETER: True}))
        return told
    finally:
        engine.close()


def check_folder(root: Path) -> None:
    """Raises ConfigError where there is no repository."""
    if not root.is_dir():
        raise ConfigError(f"model repository '{root}' is not a folder: name it with --repository")


def _explained(infer: Any, request: InferRequest) -> str:
    """The explanation of the request's answer; of several answers, of the last."""
    done = _Done()
    call = Call(request, done, None, done.emit)
    infer([call])
    done.event.wait()
    if isinstance(call.answer, InferError):
        raise ConfigError(call.answer.message)
    assert isinstance(call.answer, InferResponse)
    return str(call.answer.parameters[PARAMETER])


class _Done:
    """A sink for one call."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def emit(self, response: InferResponse) -> None:
        """The last answer tells of all."""

    def settle(self, calls: Sequence[Call]) -> None:
        self.event.set()


def _timer(delay_s: float, callback: Any) -> None:
    timer = threading.Timer(delay_s, callback)
    timer.daemon = True
    timer.start()


def _told_by_server(options: argparse.Namespace) -> str:
    headers = dict(map(_header, options.header))
    shows = {name: value for name, value in api_keys.headers(options.api_key_file).items() if name not in headers}
    timeout_s = _TIMEOUT_S if options.timeout is None else options.timeout
    server = Server(options.url, headers | shows, min(timeout_s, _MOST_S))
    return server.explained(options.name, lambda model: _inputs(model, options.inputs), options.repeat)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(f"--header '{text[:60]}': expected NAME: VALUE")
    return name.strip().lower(), value.strip()
