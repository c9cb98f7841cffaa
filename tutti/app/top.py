"""`tutti top`: what a server does, in a terminal, looked at again and again until it is interrupted.

It asks for the metrics page, or for the statistics where there is none. A server that goes away is waited for.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol, TextIO
from urllib.parse import urlsplit

from tutti.app import metric_rates, top_table
from tutti.app.metric_rates import NotAServer, Rates, Scrape
from tutti.app.restarts import UNUSABLE
from tutti.console.arguments import Parser, server_url
from tutti.console.help_format import Help, examples
from tutti.core.errors import ConfigError
from tutti.frontends import api_keys

_DEFAULT = "127.0.0.1:8002"
# A server that has not answered within this is away.
_TIMEOUT_S = 5.0
_LEAST_INTERVAL_S = 0.1
# What an ensemble has begun is taken to have ended when it has answered nothing for so long.
_LATELY_S = 30.0
_MOST_BYTES = 256 << 20
_EXAMPLES = examples(
    "tutti top  # the server on this machine",
    "tutti top gpu-box:8002 --once  # one table, for a report",
    "tutti top --json | jq .requests",
)


class Away(Exception):
    """The server does not answer now; says why."""


class Ask(Protocol):
    """One look at the server. Raises Away, or NotAServer."""

    def __call__(self) -> Scrape: ...


def main(arguments: Sequence[str]) -> int:
    """Show what is asked for; returns the exit status: 0 once it is interrupted, UNUSABLE where there is no server."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    server = Server(_url(parser, options.url), _shown(parser, options.api_key_file))
    try:
        with _ended_by_signals():
            return watch(server, options, sys.stdout)
    except BrokenPipeError:  # as of `tutti top | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 0
    except (Away, NotAServer) as error:
        expected = "expected the metrics of a server, which 'tutti serve' has at port 8002"
        print(f"tutti top: {server.url}: {error}; {expected}", file=sys.stderr)
        return UNUSABLE


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti top",
        description="Show what a server does, by model and by pool, the busiest first: requests, failures and refusals "
        "a second, time in the queue and in execution, batches, replicas and devices. Ctrl-C ends it.",
        epilog=_EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument(
        "url",
        nargs="?",
        default=_DEFAULT,
        metavar="URL",
        help="the metrics of tutti or Triton, HOST:PORT will do; or the HTTP port, which tells less "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="SECONDS", help="between two looks (default: %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="show what one interval brings, and end (default: go on)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each interval (default: a table)")
    api_keys.add_to(parser)
    return parser


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _LEAST_INTERVAL_S <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, {_LEAST_INTERVAL_S:g} or more, got '{text}'")
    return seconds


def _url(parser: argparse.ArgumentParser, text: str) -> str:
    """With scheme and host, without a path where none is given."""
    if not (url := server_url(text)):
        parser.error(f"expected HOST:PORT or http://HOST:PORT/PATH, got {text!r}")
    return url


def _shown(parser: argparse.ArgumentParser, key_file: Path | None) -> Mapping[str, str]:
    """Headers that show a key."""
    try:
        return api_keys.headers(key_file)
    except ConfigError as error:
        parser.error(str(error))


class Server:
    """Asks over HTTP, and remembers which page it is that the server has."""

    def __init__(
        self, url: str, headers: Mapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = url
        self._clock = clock
        self._headers = dict(headers or {})
        # None is between this machine and the server that is asked: a proxy of the environment would be.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        has_path = urlsplit(url).path not in ("", "/")
        page = (url if has_path else f"{url}/metrics", metric_rates.parse_page)
        self._pages = [page] if has_path else [page, (f"{url}/v2/models/stats", metric_rates.parse_statistics)]

    def __call__(self) -> Scrape:
        refusals = []
        for page in self._pages:
            try:
                text = self._read(page[0])
                scrape = page[1](text, self._clock())
            except NotAServer as error:
                refusals.append(error)
            else:
                self._pages = [page]
                return scrape
        raise refusals[0]

    def _read(self, url: str) -> str:
        request = urllib.request.Request(url, headers=self._headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return str(answer.read(_MOST_BYTES).decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            error.close()
            wants = ": it wants a key (--api-key-file)" if error.code in (401, 403) else ""
            raise (Away if error.code >= 500 else NotAServer)(f"HTTP {error.code}{wants}") from None
        except urllib.error.URLError as error:
            raise Away(_words(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Away(_words(error)) from None


def _words(error: object) -> str:
    if isinstance(error, http.client.BadStatusLine):
        return "what answers speaks no HTTP"
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def watch(
    ask: Ask,
    options: argparse.Namespace,
    out: TextIO,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Look, wait, look and show; the first look must succeed, later ones are waited for. Raises Away or NotAServer."""
    before = ask()
    ensembles = _Ensembles()
    with _screen(out, options) as show:
        while True:
            pause(options.interval)
            try:
                after = ask()
                rates = metric_rates.rates(before, after, ensembles.busy(before.time_s))
            except (Away, NotAServer) as error:
                if options.once:
                    raise
                show.away(str(error))
                continue
            before = after
            ensembles.note(rates, after.time_s)
            show.rates(rates)
            if options.once:
                return 0


class _Ensembles:
    """When each was busy last: one that answers now and then asks its steps all the while."""

    def __init__(self) -> None:
        self._busy_s: dict[str, float] = {}

    def note(self, rates: Rates, now_s: float) -> None:
        self._busy_s |= {model.name: now_s for model in rates.models if model.is_busy_ensemble}

    def busy(self, now_s: float) -> list[str]:
        return [name for name, at_s in self._busy_s.items() if now_s - at_s < _LATELY_S]


class Show(Protocol):
    """Where it goes."""

    def rates(self, rates: Rates) -> None: ...

    def away(self, why: str) -> None: ...


class Lines:
    """One line of JSON, or one plain table, after the other: for files, pipes and --once."""

    def __init__(self, out: TextIO, is_json: bool, colour: bool, width: int) -> None:
        self._out = out
        self._is_json = is_json
        self._colour = colour
        self._width = width
        self._is_first = True
        self._said = ""

    def rates(self, rates: Rates) -> None:
        self._said = ""
        if self._is_json:
            self._write(json.dumps({"time": time.time(), **top_table.as_json(rates)}))
            return
        table = top_table.lines(rates, self._width, self._colour)
        self._write("\n".join([*([] if self._is_first else [""]), *table]))
        self._is_first = False

    def away(self, why: str) -> None:
        if self._is_json:
            self._write(json.dumps({"time": time.time(), "error": why}))
        elif why != self._said:
            self._write(f"waiting for the server: {why}")
        self._said = why

    def _write(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Screen:
    """A terminal's other screen, written over at each look."""

    def __init__(self, out: TextIO, colour: bool) -> None:
        self._out = out
        self._colour = colour
        self._last: Rates | None = None
        self._draw(["looking for an interval ..."])

    def rates(self, rates: Rates) -> None:
        self._last = rates
        self._draw(self._lines(time.strftime("%H:%M:%S")))

    def away(self, why: str) -> None:
        self._draw(self._lines(f"{time.strftime('%H:%M:%S')} waiting for the server: {why}"))

    def last(self) -> str:
        """What stays on the terminal when this ends."""
        if self._last is None:
            return ""
        width = shutil.get_terminal_size().columns
        return "".join(f"{line}\n" for line in top_table.lines(self._last, width, self._colour))

    def _lines(self, status: str) -> list[str]:
        width, height = shutil.get_terminal_size()
        table = top_table.lines(self._last, width, self._colour, height - 2) if self._last is not None else []
        return [status[:width], *table][: height - 1]

    def _draw(self, lines: Sequence[str]) -> None:
        # Home; each line cleared and written; all below cleared. Clearing behind a full line would take its last cell.
        self._out.write("\x1b[H" + "".join(f"\x1b[2K{line}\r\n" for line in lines) + "\x1b[J")
        self._out.flush()


@contextmanager
def _screen(out: TextIO, options: argparse.Namespace) -> Iterator[Show]:
    is_terminal = out.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    colour = is_terminal and not os.environ.get("NO_COLOR") and not options.json
    if not is_terminal or options.once or options.json:
        yield Lines(out, options.json, colour, shutil.get_terminal_size().columns)
        return
    out.write("\x1b[?1049h\x1b[?25l")  # the other screen, without a cursor
    screen = Screen(out, colour)
    try:
        yield screen
    finally:
        with contextlib.suppress(OSError):  # a terminal that is gone
            out.write("\x1b[?25h\x1b[?1049l" + screen.last())
            out.flush()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a terminal that is closed end it as Ctrl-C does: with the terminal as it was."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
