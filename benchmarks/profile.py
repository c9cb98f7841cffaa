"""Where a request's CPU time goes: the server under full load, sampled by py-spy, by what its code was doing.

Only the thread that holds the interpreter's lock is sampled: that is what bounds the server's rate. A sample belongs to
the innermost frame of ours; what libraries do for it with the lock held counts as its own.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks import clients
from benchmarks.models import MLP, write_repository
from tests.serving import serving

RESULTS = Path(__file__).parent
# The first pattern that fits "file:function" names the stage.
STAGES = (
    ("read the socket, wait for events", r"cli\.py:.*|runners\.py:.*|__init__\.py:run.*"),
    ("write the socket", r"http_connection\.py:_write"),
    ("receive and answer gRPC calls (the library)", r"grpc\.py:_receive"),
    ("read and answer HTTP/1.1", r"http_connection\.py:.*"),
    ("decode requests", r"(http|grpc)_codec\.py:(decode|_decode|request|fits|get|remember|__init__)"),
    ("decode requests", r"http\.py:(_flush|_decode|_route|handle)|grpc\.py:_accept"),
    ("check and queue", r"(model|engine|api|batching|cost)\.py:(?!complete).*"),
    ("check and queue", r"scheduler\.py:(__call__|_dispatch|_take|next_batch)"),
    ("join inputs", r"rows\.py:join|onnxruntime\.py:_input"),
    ("run the model (onnxruntime)", r"onnxruntime\.py:_?run|onnxruntime_inference_collection\.py.*"),
    ("split outputs", r"rows\.py:.*|(onnxruntime|joined)\.py:.*"),
    ("count statistics", r"statistics\.py:.*"),
    ("encode answers", r"(http|grpc)_codec\.py:.*|http\.py:(_encode|_response|_pieces|_binary_head|settle|_deliver)"),
    ("encode answers", r"grpc\.py:settle|(types|answers)\.py:.*|api\.py:complete"),
    ("schedule threads", r"scheduler\.py:.*|.*threading\.py.*"),
)  # fmt: skip
FRAME = re.compile(r"(.+) \((?:.*/)?([^/:]+\.py)(?::\d+)?\)")


def stage_of(stack: str) -> str:
    """The stage of one folded stack, outermost frame first."""
    for part in reversed(stack.split(";")):
        found = FRAME.fullmatch(part.strip())
        frame = f"{found[2]}:{_function(found[1])}" if found else part
        for stage, pattern in STAGES:
            if re.fullmatch(pattern, frame):
                return stage
    return "other"


def _function(qualified: str) -> str:
    """Of "Class.method.<locals>.<listcomp>" the method."""
    return qualified.partition(".<locals>")[0].rpartition(".")[2]


def sample(pid: int, seconds: int, folder: Path) -> Counter[str]:
    """Samples by stage."""
    out = folder / "stacks"
    command = [
        "py-spy",
        "record",
        "--gil",
        "-r",
        "400",
        "-f",
        "raw",
        "-p",
        str(pid),
        "-d",
        str(seconds),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    counts: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        counts[stage_of(stack)] += int(count)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--label", default="now")
    options = parser.parse_args()
    clients.require_tools()
    if shutil.which("py-spy") is None:
        raise SystemExit("the profile needs py-spy: pip install py-spy")
    lines = []
    with tempfile.TemporaryDirectory(prefix="tutti-profile-") as name:
        folder = Path(name)
        write_repository(folder / "repository", MLP)
        script = clients.http_script(folder / "mlp.lua", *clients.infer_body())
        message = clients.grpc_message(folder / "mlp.grpc")
        with serving(folder / "repository", folder / "log") as served:
            loads = {
                "HTTP": ["wrk", "-t1", "-c64", f"-d{options.seconds + 3}s", "-s", str(script),
                         f"http://{served.http}/v2/models/mlp/infer"],
                "gRPC": clients.h2load_command(served.grpc, message, 64, options.seconds + 3),
            }  # fmt: skip
            for protocol, command in loads.items():
                load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                try:
                    subprocess.run(["sleep", "1"], check=True)
                    counts = sample(served.process.pid, options.seconds, folder)
                finally:
                    text, _ = load.communicate(timeout=60)
                found = re.search(r"Requests/sec:\s+([\d.]+)", text) or re.search(r", ([\d.]+) req/s", text)
                assert found is not None, text
                lines += table(protocol, options.label, counts, float(found[1]), options.seconds)
    print("\n".join(lines))
    return 0


def table(protocol: str, label: str, counts: Counter[str], rate: float, seconds: int) -> list[str]:
    total = counts.total()
    busy_us = total / 400 / seconds / rate * 1e6
    what = f"{rate:,.0f} requests/s, {busy_us:.1f} us of the interpreter's lock each"
    lines = [f"### {protocol}, 64 clients, {label}: {what}", "", "| stage | share | us a request |", "|---|---|---|"]
    for stage, count in counts.most_common():
        lines.append(f"| {stage} | {count / total:.0%} | {busy_us * count / total:.2f} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
