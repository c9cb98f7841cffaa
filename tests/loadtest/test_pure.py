"""Arrivals, histograms, verdicts and searches: no server, no clock."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy import stats

from tutti.loadtest import arrivals, charts, comparison, report, runner, sampler, scenario, search, slo
from tutti.loadtest.errors import RunError
from tutti.loadtest.histogram import Histogram
from tutti.loadtest.payloads import Payloads, TensorInfo, messages
from tutti.loadtest.scenario import Goal, Scenario, ScenarioError, Sizes, Stage
from tutti.loadtest.slo import Seen, Verdict, judge


def given(**more: Any) -> Scenario:
    return Scenario(**{"payloads": [{"model": "m"}], "stages": [{"seconds": 100, "rate": 50}], "warmup_s": 0, **more})


def test_poisson_arrivals_are_poisson() -> None:
    """Gaps are exponential, by Kolmogorov and Smirnov; in a ramp after time is rescaled by its rate."""
    made = arrivals.schedule(given(), [1.0])
    assert len(made) == pytest.approx(5000, abs=4 * 5000**0.5)
    assert stats.kstest(np.diff(made.due_s) * 50, "expon").pvalue > 0.01
    ramp = arrivals.schedule(given(stages=[{"kind": "ramp", "seconds": 100, "rate": 10, "to": 90}]), [1.0])
    rescaled = np.diff(10 * ramp.due_s + 0.4 * ramp.due_s**2)
    assert stats.kstest(rescaled, "expon").pvalue > 0.01
    bursts = arrivals.schedule(given(arrivals={"process": "gamma", "cv": 3}), [1.0])
    gaps = np.diff(bursts.due_s)
    assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.15)
    assert stats.kstest(np.diff(bursts.due_s) * 50, "expon").pvalue < 1e-6
    even = arrivals.schedule(given(arrivals={"process": "constant"}), [1.0])
    np.testing.assert_allclose(np.diff(even.due_s), 0.02)


def test_a_day_is_busiest_at_noon() -> None:
    made = arrivals.schedule(given(stages=[{"kind": "diurnal", "seconds": 100, "rate": 0, "to": 200}]), [1.0])
    counts, _ = np.histogram(made.due_s, bins=5, range=(0, 100))
    assert counts[2] > 1.3 * max(counts[1], counts[3]) > 3 * max(counts[0], counts[4])
    assert len(made) == pytest.approx(10_000, rel=0.05)


def test_one_seed_is_one_schedule_and_shards_change_nothing_but_the_shard() -> None:
    whole, again = (arrivals.schedule(given(seed=3), [1.0, 3.0]) for _ in range(2))
    np.testing.assert_array_equal(whole.due_s, again.due_s)
    np.testing.assert_array_equal(whole.payloads, again.payloads)
    assert not np.array_equal(whole.due_s[:100], arrivals.schedule(given(seed=4), [1.0, 3.0]).due_s[:100])
    assert (whole.payloads == 1).mean() == pytest.approx(0.75, abs=0.03)
    parts = [whole.shard(number, 4) for number in range(4)]
    for name in ("due_s", "payloads", "stages"):
        joined = np.empty_like(getattr(whole, name))
        for number, part in enumerate(parts):
            joined[number::4] = getattr(part, name)
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_warm_up_comes_before_and_does_not_count() -> None:
    made = arrivals.schedule(given(warmup_s=10), [1.0])
    assert (made.due_s[made.stages == -1] < 10).all()
    assert (made.due_s[made.stages == 0] >= 10).all()
    assert (made.stages == -1).sum() == pytest.approx(500, abs=100)


def test_traces(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("second\n10.5\n10\n12\n")
    own = given(arrivals={"trace": "t.csv", "speed": 2}, stages=[], folder=tmp_path)
    assert arrivals.schedule(own, [1.0]).due_s.tolist() == [0, 0.25, 1]
    (tmp_path / "t.csv").write_text("\ufeffpool,second\na,3\nb,1\n")
    assert arrivals.schedule(own, [1.0]).due_s.tolist() == [0, 1], "a column by its name"


RATES = "0,100\n10,0\n20,50\n30,0\n"


@pytest.mark.parametrize("text", [RATES, "second,rate\n" + RATES])
def test_traces_of_rates(tmp_path: Path, text: str) -> None:
    """As `tutti cluster simulate` reads them: from each second to the next."""
    (tmp_path / "t.csv").write_text(text)
    own = given(arrivals={"trace": "t.csv", "speed": 2}, stages=[], folder=tmp_path)
    made = arrivals.schedule(own, [1.0])
    counts, _ = np.histogram(made.due_s, bins=3, range=(0, 15))
    assert counts[0] == pytest.approx(1000, rel=0.2)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(500, rel=0.2)
    assert made.seconds == 15
    assert set(made.stages.tolist()) == {0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1\nx\n", "t.csv:2: expected a second, got 'x'"),
        (b"", "expected seconds of arrivals, got none"),
        (b"a,b\n1,2\n", "t.csv:1: expected a column second .* got 'a, b'"),
        (b"1,2,3\n", "got 3 columns without a heading"),
        (b"0,1\n", "expected two lines of SECOND,RATE or more"),
        (b"0,1\n0,2\n", "t.csv:2: expected rising seconds"),
        (b"0,1\n1,nan\n", "t.csv:2: expected SECOND,RATE, got '1,nan'"),
        (b"\xff\xfe1\n", "byte 0 is no UTF-8"),
        (b"PAR1 or so", "no Parquet"),
        (b"1700000000000\n1700009999999\n", "are its times milliseconds"),
        (b"0,1e9\n10,0\n", "20,000,000 at most"),
    ],
)
def test_traces_that_are_none(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    own = given(arrivals={"trace": "t.csv"}, stages=[], folder=tmp_path)
    with pytest.raises(ScenarioError, match=says):
        arrivals.schedule(own, [1.0])


def test_histograms_keep_three_digits_and_add_up() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([np.arange(5000), (10 ** rng.uniform(0, 12.5, 50_000)).astype(np.int64)])
    halves = [Histogram(), Histogram()]
    for one, own in zip(halves, (values[::2], values[1::2]), strict=True):
        one.add(own)
    whole = Histogram.of_json(halves[0].as_json())
    whole.merge(halves[1])
    assert whole.total == len(values)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert whole.quantile_ns(share) == pytest.approx(exact, rel=1 / 2000, abs=1)
    assert whole.mean_ns() == pytest.approx(values.mean(), rel=1e-3)
    assert whole.above(1e6) == pytest.approx((values > 1e6).sum(), rel=0.001)
    assert math.isnan(Histogram().quantile_ns(0.5))


@pytest.mark.parametrize(
    ("seen", "goal", "verdict"),
    [
        (Seen(10_000, 0, 20, 10), Goal(p99_ms=5), Verdict.PASS),
        (Seen(10_000, 0, 200, 10), Goal(p99_ms=5), Verdict.FAIL),
        (Seen(1_000, 0, 10, 10), Goal(p99_ms=5, error_rate=0.01), Verdict.INCONCLUSIVE),
        (Seen(10_000, 100, 0, 10), Goal(error_rate=0.001), Verdict.FAIL),
        (Seen(500, 0, 0, 10), Goal(error_rate=0), Verdict.PASS),
        (Seen(500, 1, 0, 10), Goal(error_rate=0), Verdict.FAIL),
        (Seen(10_000, 0, 0, 10), Goal(min_goodput=900), Verdict.PASS),
        (Seen(10_000, 0, 2000, 10), Goal(min_goodput=900), Verdict.FAIL),
        (Seen(10_000, 0, 0, 10, late=200), Goal(), Verdict.INVALID),
        (Seen(10_000, 0, 0, 10, late=5, cpu=1.0), Goal(), Verdict.INVALID),
        (Seen(10_000, 0, 0, 10, unsent=1), Goal(), Verdict.INVALID),
        (Seen(0, 0, 0, 10), Goal(), Verdict.INVALID),
    ],
)
def test_verdicts(seen: Seen, goal: Goal, verdict: Verdict) -> None:
    judgement = judge(seen, goal)
    assert judgement.verdict is verdict, judgement
    assert judgement.reasons


def test_intervals_hold_what_they_promise() -> None:
    """A share of 1% is in its 95% interval about 19 times in 20."""
    rng = np.random.default_rng(0)
    inside = 0
    for count in rng.binomial(5000, 0.01, 1000):
        low, high = slo.interval(int(count), 5000)
        inside += low <= 0.01 <= high
    assert 925 <= inside <= 975


def test_a_search_ends_at_the_capacity() -> None:
    asked: list[float] = []

    def probe(rate: float, _: float) -> Verdict:
        asked.append(rate)
        return Verdict.PASS if rate <= 437 else Verdict.FAIL

    found = search.saturate(probe, 10, 0.03)
    assert found.low <= 437 <= found.high
    assert found.high - found.low <= 0.03 * found.high
    assert len(asked) < 16
    open_ended = search.saturate(lambda rate, _: Verdict.INVALID if rate > 100 else Verdict.PASS, 10)
    assert (open_ended.low, open_ended.high) == (80, math.inf)
    nothing = search.saturate(lambda *_: Verdict.FAIL, 10)
    assert nothing.low == 0
    certain = search.saturate(lambda rate, times: Verdict.PASS if times > 1 and rate < 50 else Verdict.INCONCLUSIVE, 10)
    assert certain.low < 50 <= certain.high, "longer probes settle what shorter ones leave open"
    unsure = search.saturate(lambda rate, _: Verdict.INCONCLUSIVE if rate > 50 else Verdict.PASS, 10)
    assert unsure.low <= 50 <= unsure.high


def test_differences_are_found_and_none_are_invented() -> None:
    rng = random.Random(1)
    found = {1.0: 0, 1.1: 0}
    for ratio in found:
        for _ in range(200):
            a = [5 * rng.gauss(1, 0.03) for _ in range(10)]
            b = [5 * ratio * rng.gauss(1, 0.03) for _ in range(10)]
            found[ratio] += search.difference(a, b).is_different
    assert found[1.0] <= 10, "two in a hundred, give or take"
    assert found[1.1] >= 198


def test_runs_that_are_over_are_compared_by_what_they_have_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name, ms in (("before", 10.0), ("after", 10.0), ("slower", 13.0)):
        (tmp_path / name).mkdir()
        due = np.sort(rng.uniform(0, 12, 3000))
        done = due + ms / 1e3 * rng.lognormal(0, 0.2, len(due))
        table = pyarrow.table({"scheduled_s": due, "done_s": done, "error": [""] * len(due)})
        pyarrow.parquet.write_table(table, tmp_path / name / "requests.0.parquet")
        told = {"scenario": {"warmup_s": 2.0}, "stages": [{"seconds": 10.0}]}
        (tmp_path / name / "report.json").write_text(json.dumps(told))
    alike = comparison.of_runs(tmp_path / "before", tmp_path / "after")
    assert alike.verdict is Verdict.PASS
    assert alike.reasons[0].startswith("no difference shown, between -")
    slower = comparison.of_runs(tmp_path / "before", tmp_path / "slower")
    assert slower.verdict is Verdict.FAIL
    assert slower.difference is not None
    assert slower.difference.low < 1.3 < slower.difference.high
    assert comparison.of_runs(tmp_path / "slower", tmp_path / "before").verdict is Verdict.PASS
    (tmp_path / "before" / "requests.0.parquet").unlink()
    with pytest.raises(RunError, match=r"before: has report.json, and no requests"):
        comparison.of_runs(tmp_path / "before", tmp_path / "after")
    with pytest.raises(RunError, match=r"nothing: expected what `run SCENARIO --output .*nothing` leaves"):
        comparison.of_runs(tmp_path / "nothing", tmp_path / "after")


def test_what_is_late_goes_by_the_goal() -> None:
    assert [Goal(p99_ms=ms).late_s for ms in (None, 20, 1000)] == [0.01, 0.01, 0.1]
    (reason,) = slo.judge(Seen(100, 0, 0, 10, late=20, cpu=0.05), Goal(p99_ms=1000)).reasons
    assert "others kept the processor from it" in reason, "more processes would be no help"
    (reason,) = slo.judge(Seen(100, 0, 0, 10, late=20, cpu=0.9), Goal(p99_ms=1000)).reasons
    assert "20 of 100 requests were sent over 100 ms after they were due" in reason
    assert "raise --processes" in reason
    (reason,) = slo.judge(Seen(100, 0, 0, 10, late=20, waited=20), Goal()).reasons
    assert "20 waited for a connection: raise target.connections" in reason


def test_an_open_run_says_how_much_longer_would_tell() -> None:
    judgement = slo.judge(Seen(200, 0, 0, 10), Goal(p99_ms=5))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "some 400 requests would tell (--seconds 20 at this rate)" in judgement.reasons[0]
    assert slo.judge(Seen(400, 0, 0, 20), Goal(p99_ms=5)).verdict is Verdict.PASS, "and so it is"
    at_the_limit = slo.judge(Seen(1000, 0, 10, 10), Goal(p99_ms=5)).reasons[0]
    assert "it is at the limit" in at_the_limit


PAGE = """
nv_inference_request_success{{model="m",version="1"}} {success}
nv_inference_request_success{{model="other",version="1"}} 1000000
nv_inference_count{{model="m",version="1"}} {rows}
nv_inference_exec_count{{model="m",version="1"}} {batches}
nv_inference_queue_duration_us{{model="m",version="1"}} {queue}
nv_inference_compute_infer_duration_us{{model="m",version="1"}} 1.5e+03
tutti_pool_replicas{{pool="gpu"}} 3.0
tutti_pool_wanted_replicas{{pool="gpu"}} 2.5
tutti_pool_requests_total{{pool="gpu"}} {gpu}
tutti_pool_requests_total{{pool="cpu"}} {cpu}
tutti_fallback_requests_total{{pool="cpu"}} {cpu}
"""


def test_the_servers_side_is_read_from_its_metrics() -> None:
    before = sampler.parse([PAGE.format(success=0, rows=0, batches=0, queue=0, gpu=0, cpu=0)], ["m"], 10.0)
    after = sampler.parse([PAGE.format(success=100, rows=200, batches=50, queue=4e5, gpu=75, cpu=25)], ["m"], 12.0)
    row = sampler.between(before, after, ["m"], ["m"])
    assert (row["success_per_s"], row["batch"], row["queue_ms"]) == (50, 4, 4)
    assert row["fallback"] == 0.25
    assert row["replicas"] == {"gpu": 3, "cpu": 0}


def seen_by(count: int, stage: str = "0") -> dict[str, Any]:
    histogram = Histogram()
    histogram.add(np.full(count, 5_000_000))
    stages = {
        stage: {
            "requests": count,
            "errors": 1,
            "lost": 0,
            "late": 0,
            "unsent": 0,
            "slow": 0,
            "histogram": histogram.as_json(),
        }
    }
    second = {"second": 0, "due": count, "answered": count, "errors": 1, "histogram": histogram.as_json()}
    return {
        "stages": stages,
        "errors": {"HTTP <503>": 1},
        "reasons": {"HTTP <503>": "<b>no"},
        "began_at": 5.0,
        "cpu": 0.2,
        "lateness_ms": {"p99": 0.1},
        "seconds": [second],
    }


def test_what_workers_saw_is_added_up_and_shown() -> None:
    own = given(
        slo={"p99_ms": 10, "error_rate": 0.1},
        stages=[{"seconds": 10, "rate": 50, "name": "<first>"}, {"seconds": 5, "rate": 9}],
    )
    result = runner.gather(own, [seen_by(300), {**seen_by(200), "cpu": 0.4}, seen_by(100, "1")])
    assert [stage.requests for stage in result.stages] == [500, 100]
    assert (result.seen.requests, result.seen.errors, result.cpu) == (600, 3, 0.4)
    assert result.judgement.verdict is Verdict.PASS
    told = result.as_json()
    assert told["verdict"] == "PASS"
    assert told["latency_ms"]["p50"] == pytest.approx(5, rel=1e-3)
    page = report.page(result, "tutti loadtest run x.yaml")
    assert "&lt;first&gt;" in page
    assert "<first>" not in page
    assert "HTTP &lt;503&gt;" in page
    assert page.count("<svg") >= 4
    assert "<script" not in page


def test_payloads_are_seeded_and_fit_their_tensors() -> None:
    infos = [
        TensorInfo("AUDIO", "FP32", (-1, -1)),
        TensorInfo("TEXT", "BYTES", (-1, 1)),
        TensorInfo("IMAGE", "BYTES", (-1, 1)),
        TensorInfo("ids", "INT64", (-1, -1)),
        TensorInfo("pixels", "UINT8", (-1, 3, 8, 8)),
    ]
    first, again = Payloads(5).draw(infos), Payloads(5).draw(infos)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert first["AUDIO"].shape == (1, 32_000)
    assert first["IMAGE"][0, 0][:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    assert first["pixels"].shape == (1, 3, 8, 8)
    assert first["ids"].dtype == np.int64
    sized = [
        Payloads(n).draw(infos, 3, {"ids": Sizes(low=8, high=64, kind="lognormal", multiple_of=8)})["ids"]
        for n in range(40)
    ]
    assert {array.shape[0] for array in sized} == {3}
    sizes = {array.shape[1] for array in sized}
    assert len(sizes) > 3
    assert all(8 <= size <= 64 and size % 8 == 0 for size in sizes)


def test_parameters_that_are_tritons_own_are_sent_as_such() -> None:
    """Over HTTP its client takes some of them by name only, and one not at all."""
    info = [TensorInfo("x", "FP32", (-1, 2))]
    own = {"priority": 2, "timeout": 5_000, "mine": "yes"}
    (made,), _ = messages(given(payloads=[{"model": "m", "count": 1, "parameters": own}]), lambda *_: info)
    length = int(re.findall(rb"Inference-Header-Content-Length: (\d+)", made.head)[0])
    sent = json.loads(made.body[:length])["parameters"]
    assert {name: sent[name] for name in own} == own
    with pytest.raises(ScenarioError, match=r"payloads: model 'm': .*binary_data_output.* is a reserved parameter"):
        messages(given(payloads=[{"model": "m", "parameters": {"binary_data_output": True}}]), lambda *_: info)


def test_messages_take_files_and_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    infos = {"m": [TensorInfo("TEXT", "BYTES", (-1, 1)), TensorInfo("more", "FP32", (-1, 2))]}
    own = given(payloads=[{"model": "m", "files": {"TEXT": "lines.txt"}, "count": 4, "weight": 3}], folder=tmp_path)
    made, weights = messages(own, lambda model, _: infos[model])
    assert len(made) == 4
    assert sum(weights) == pytest.approx(3)
    assert b"one" in made[0].body
    assert b"two" in made[1].body
    assert made[0].head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\n")
    for change, says in (
        ({"files": {"TEXT": "none.*"}}, "nothing matches 'none.*'"),
        ({"sizes": {"nothing": {"low": 1, "high": 2}}}, "model 'm' has the inputs TEXT, more, and no 'nothing'"),
    ):
        with pytest.raises(ScenarioError, match=says.replace("*", r"\*")):
            messages(given(payloads=[{"model": "m", **change}], folder=tmp_path), lambda model, _: infos[model])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("payloads: []", "payloads: List should have at least 1 item"),
        ("payloads: [{model: m}]", "stages: expected at least one, or arrivals.trace"),
        ("payloads: [{model: m}]\nstages: [{seconds: 1, rate: -1}]", "stages.0.rate"),
        (
            "payloads: [{model: m}]\nstages: [{seconds: 1, rate: 1}]\nslo: {p98_ms: 1}",
            "slo.p98_ms: no such field; did you mean 'p99_ms'",
        ),
        (
            "payloads: [{model: m}]\nstages: [{seconds: 1, rate: 1}]\np99_ms: 1",
            "p99_ms: no such field here: it belongs into slo",
        ),
        ("payloads: [{model: m}]\nstages: [{seconds: .inf, rate: 1}]", "stages.0.seconds: Input should be a finite"),
        (
            "payloads: [{model: m}]\nstages: [{seconds: 1, rate: 1}]\ntarget: {urls: ['x:99999']}",
            "target.urls.0: expected a port from 1 to 65535, got '99999'",
        ),
        (
            "payloads: [{model: m, sizes: {x: {low: 5, high: 2}}}]\nstages: [{seconds: 1, rate: 1}]",
            "expected low <= high",
        ),
        ("- 1", "expected a mapping"),
        ("a: [", "s.yaml:1:5: no YAML: expected"),
        ("", "got an empty file"),
        ("a: 2024-99-99", "no YAML: month must be in 1..12"),
    ],
)
def test_scenarios_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=says):
        scenario.load(file)


@pytest.mark.parametrize(
    "path", sorted((Path(scenario.__file__).parent / "scenarios").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_scenarios_that_come_along_can_be_read(path: Path) -> None:
    own = scenario.load(path)
    assert own.name == path.stem
    assert len(arrivals.schedule(own, [payload.weight for payload in own.payloads])) > 10
    assert isinstance(own.stages[0], Stage)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.6, "0.6"), (0.0123, "0.0123"), (1.5e-7, "0.00000015"), (40.4, "40.4"), (5, "5"), (12.34, "12.3"),
        (999.6, "1,000"), (1234, "1,234"), (6e6, "6,000,000"), (-3, "-3"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_numbers_are_plain(value: float, text: str) -> None:
    assert charts.plain(value) == text


def test_axes_have_round_marks_that_hold_everything() -> None:
    """Seeded: marks are 1, 2 or 5 times a power of ten apart, a few of them, and no value lies beyond."""
    rng = random.Random(0)
    for _ in range(500):
        low, high = sorted(10 ** rng.uniform(-6, 6) for _ in range(2))
        for axis in (charts.even(0, high), charts.even(low, high), charts.logarithmic(low, high)):
            assert axis.low <= low * (1 + 1e-6) or axis.low == 0
            assert axis.high >= high * (1 - 1e-6)
            assert 2 <= len(axis.marks) <= 16
            assert all(0 <= axis.part(value) <= 1 + 1e-6 for value in (low, high))
        step = charts.even(0, high).marks[1]
        assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(
            round(step / 10 ** math.floor(math.log10(step) + 1e-9))
        )
    assert charts.even(0, 0).marks[-1] == 1, "where nothing was, up to one"
    assert list(charts.logarithmic(3, 400).marks) == [1, 10, 100, 1000]
    assert list(charts.logarithmic(30, 400).marks) == [20, 50, 100, 200, 500]


def test_errors_are_red_and_the_goal_is_drawn() -> None:
    lines = {name: [(0.0, 1.0), (1.0, 2.0)] for name in ("due", "answered", "errors")}
    drawn = charts.chart("T", lines, "s", "", goal=("goal", 7.5))
    colours = re.findall(r"<polyline [^>]*stroke=(#\w+)", drawn)
    assert colours[2] == charts.RED
    assert charts.RED not in colours[:2]
    assert "<line class=goal " in drawn
    assert ">8</text>" in drawn, "the axis reaches the goal"
    assert "goal" not in charts.chart("T", lines, "s", "")


def test_axes_leave_room_for_long_numbers() -> None:
    short, long = (charts.chart("T", {"x": [(0, 0), (1, high)]}, "s", "") for high in (5.0, 12_345_678.0))
    lefts = [float(re.findall(r"<text class=y x=([\d.]+)", drawn)[0]) for drawn in (short, long)]
    assert ",000,000</text>" in long
    assert lefts[1] >= len("10,000,000") * 7
    assert lefts[0] < 50


def test_percentiles_end_where_requests_do() -> None:
    """Of a hundred requests nobody knows the 99.9th."""
    for requests, most in ((100, 2.0), (5_000, math.log10(5_000))):
        points = report._percentiles(made_result_of(requests).histogram)
        assert most - 0.1 < points[-1][0] <= most + 0.01


def made_result_of(requests: int) -> runner.Result:
    own = given(stages=[{"seconds": 10, "rate": requests / 10}])
    return runner.gather(own, [seen_by(requests)])


def made_result(**more: Any) -> runner.Result:
    own = given(slo={"p99_ms": 10, "error_rate": 0.1, "min_goodput": 5}, stages=[{"seconds": 10, "rate": 50}])
    return runner.gather(own, [{**seen_by(600), **more}])


def test_a_run_without_an_answer_has_whole_sentences() -> None:
    """As of one that was ended because its first requests failed alike."""
    seen = seen_by(0)
    seen["stages"]["0"] |= {"requests": 20, "errors": 20}
    told = {"errors": {"HTTP 400": 20}, "reasons": {"HTTP 400": '{"error":"no picture"}'}, "stopped": "HTTP 400"}
    result = made_result(**{**seen, **told})
    assert result.judgement.verdict is Verdict.INVALID
    (reason,) = result.judgement.reasons
    assert "HTTP 400: no picture; the inputs do not fit" in reason
    page = report.page(result)
    assert "<span class=error>20 errors</span>. No latency is known: nothing was answered without an error. The" in page
    assert "; ." not in page


def test_the_work_of_an_ensemble_is_its_steps() -> None:
    """The ensemble itself neither queues nor computes."""
    page = "\n".join(
        f'{name}{{{{model="{model}",version="1"}}}} {{{model}_{name}}}'
        for model in ("whole", "a", "b")
        for name in ("nv_inference_request_success", "nv_inference_queue_duration_us", "nv_inference_exec_count")
    )
    numbers = dict.fromkeys(re.findall(r"\{(\w+_nv_\w+)\}", page), 0)
    before = sampler.parse([page.format(**numbers)], ["whole", "a", "b"], 0.0)
    numbers |= {f"{model}_nv_inference_request_success": 10 for model in ("whole", "a", "b")}
    numbers |= {"a_nv_inference_queue_duration_us": 40_000, "b_nv_inference_queue_duration_us": 20_000}
    row = sampler.between(
        before, sampler.parse([page.format(**numbers)], ["whole", "a", "b"], 1.0), ["whole"], ["a", "b"]
    )
    assert row["success_per_s"] == 10
    assert {model: means["queue_ms"] for model, means in row["models"].items()} == {"a": 4, "b": 2}
    result = made_result()
    result.server = [row, {**row, "at_s": 2.0}]
    shown = report.page(result)
    assert "Queue: models and steps" in shown
    assert "></i>a</span>" in shown


def test_searches_know_how_many_probes_are_left() -> None:
    assert search.probes_left(0.0, math.inf, 0.03) is None
    assert search.probes_left(100, math.inf, 0.03) is None
    assert search.probes_left(100, 200, 0.03) == 5
    assert search.probes_left(195, 200, 0.03) == 0
