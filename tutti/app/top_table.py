"""What `tutti top` shows: rates as lines of text, of a terminal's width. Pure."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tutti.app.metric_rates import Device, ModelRates, PoolRates, Rates

# How text is marked on a terminal: what it is, and the codes of ANSI.
BOLD, RED, YELLOW, DIM = "1", "31", "33", "2"
_NAME_WIDTH = 16
_LEAST_NAME_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Column:
    """`show` makes a cell, and `mark` says how it is marked; where it is narrow those of a high `rank` are left out."""

    title: str
    width: int
    rank: int
    show: Callable[[ModelRates], str]
    mark: Callable[[ModelRates], str] = lambda _: ""


def number(value: float | None) -> str:
    """At most five characters, as precise as they allow; "-" for what is not known."""
    if value is None:
        return "-"
    if value >= 99_999.5:
        for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
            if value < 999.5 * size:
                return f"{value / size:.3g}{unit}"
        return f"{value / 1e12:.3g}T"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rate(value: float | None) -> str:
    """As `number`, where nothing is 0."""
    return "0" if value == 0 else number(value)


def _if_any(code: str, of: Callable[[ModelRates], float]) -> Callable[[ModelRates], str]:
    return lambda model: code if of(model) > 0 else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


COLUMNS = (
    Column("req/s", 7, 0, lambda m: rate(m.requests)),
    Column("fail/s", 7, 0, lambda m: rate(m.failed), _if_any(RED, lambda m: m.failed)),
    Column("ref/s", 6, 1, lambda m: rate(m.refused), _if_any(YELLOW, lambda m: m.refused)),
    Column("inside", 7, 3, lambda m: rate(m.in_flight)),
    Column("queued", 7, 2, lambda m: rate(m.queued)),
    Column("queue", 6, 0, lambda m: number(m.queue_ms)),
    Column("exec", 6, 0, lambda m: number(m.execution_ms)),
    Column("p50", 6, 2, lambda m: number(m.p50_ms)),
    Column("p99", 6, 1, lambda m: number(m.p99_ms)),
    Column("batch", 6, 2, lambda m: number(m.batch)),
    Column("cache", 6, 4, lambda m: _share(m.cache_hits)),
    Column("queue99", 8, 5, lambda m: number(m.queue_p99_ms)),
    Column("late/s", 7, 6, lambda m: rate(m.late), _if_any(YELLOW, lambda m: m.late or 0.0)),
    Column("cancl/s", 8, 7, lambda m: rate(m.cancelled)),
)
NOTE = "ms of a request: queue, exec (means), p50, p99; ref: refused; inside: under way"


def lines(rates: Rates, width: int, colour: bool, height: int | None = None) -> list[str]:
    """The whole table: no line is wider than `width` columns, and there are `height` at most, if that is given."""
    paint = _paint if colour else _plain
    pools, devices = _pools(rates.pools, width), [_device(device, width) for device in rates.devices]
    beside = _beside(rates)
    fixed = 4 + len(beside) + len(pools) + len(devices)
    room = None if height is None else max(1, height - fixed)
    shown = rates.models if room is None or len(rates.models) <= room else rates.models[: max(0, room - 1)]
    left_out = len(rates.models) - len(shown)
    columns, name_width = _fitting(width, [model.name for model in rates.models])
    head = f"{'model':{name_width}}" + "".join(f"{column.title:>{column.width}}" for column in columns)
    total = [line[:width] for line in (_total(rates), *beside)]
    told = [*total, paint(BOLD, head[:width]), *(_row(m, columns, name_width, paint) for m in shown)]
    if not rates.models:
        told.append("no models"[:width])
    if left_out:
        told.append(f"and {left_out} more, which do less"[:width])
    told.append(paint(DIM, NOTE[:width]))
    return [*told, *(paint(BOLD, line) if line.startswith("pool ") else line for line in pools), *devices]


def _total(rates: Rates) -> str:
    return f"{rate(rates.requests)} requests/s, {rate(rates.failed)} failed, {rate(rates.refused)} refused"


def _beside(rates: Rates) -> list[str]:
    """What the sums leave out, or have twice, in 80 columns."""
    if not rates.knows_steps and len(rates.models) > 1:
        return ["requests of ensembles count again at their steps, which this page does not tell"]
    if all(model.is_counted for model in rates.models):
        return []
    steps = rates.at_steps
    numbers = f"{rate(steps.requests)}/s, {rate(steps.failed)} failed, {rate(steps.refused)} refused"
    return [f"+ {numbers} at steps: of ensembles, or sent directly"]


def _fitting(width: int, names: Sequence[str]) -> tuple[list[Column], int]:
    """The columns that there is room for, in their order, and the width of names, which get what is left."""
    longest = max([len("model"), *map(len, names)])
    wanted = min(longest, _NAME_WIDTH)
    chosen: list[Column] = []
    for column in sorted(COLUMNS, key=lambda column: column.rank):
        used = sum(shown.width for shown in chosen) + column.width
        if used + (wanted if column.rank else _LEAST_NAME_WIDTH) <= width:
            chosen.append(column)
    room = width - sum(shown.width for shown in chosen)
    return [column for column in COLUMNS if column in chosen], max(1, min(longest, room))


Paint = Callable[[str, str], str]


def _paint(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if code and text.strip() else text


def _plain(_: str, text: str) -> str:
    return text


def _row(model: ModelRates, columns: Sequence[Column], name_width: int, paint: Paint) -> str:
    name = model.name if len(model.name) <= name_width else model.name[: name_width - 1] + "~"
    cells = [paint("" if model.is_ready else RED, f"{name:{name_width}}")]
    cells += [paint(column.mark(model), f"{column.show(model):>{column.width}}") for column in columns]
    return "".join(cells)


def _pools(pools: Sequence[PoolRates], width: int) -> list[str]:
    if not pools:
        return []
    name_width = min(_NAME_WIDTH, max(len(pool.name) for pool in pools) + 1)
    name_width = max(len("pool "), name_width)
    told = [f"{'pool':{name_width}}{'replicas':>10}{'wanted':>8}{'req/s':>8}{'fallback/s':>12}"]
    for pool in pools:
        wanted = "-" if pool.wanted is None else f"{pool.wanted:.0f}"
        told.append(
            f"{pool.name[:name_width]:{name_width}}{pool.replicas:>10.0f}{wanted:>8}{rate(pool.requests):>8}"
            f"{rate(pool.fallbacks):>12}"
        )
    return [line[:width] for line in told]


def _device(device: Device, width: int) -> str:
    name = device.name if device.name == "cpu" else f"gpu {device.name}"
    told = [f"{_share(device.utilization)} busy"] if device.utilization is not None else []
    if device.used_bytes is not None and device.total_bytes is not None:
        told.append(f"{device.used_bytes / 2**30:.1f} of {device.total_bytes / 2**30:.1f} GiB")
    text = ", ".join(told)
    room = max(0, width - len(text) - 2)
    return f"{name[:room]}  {text}"[:width]


def as_json(rates: Rates) -> dict[str, object]:
    """The same for programs, in full precision; what is not known is null."""
    return dataclasses.asdict(rates)
