"""What was measured, and on what; and benchmarks in parts, each with a folder of its own."""

import argparse
import inspect
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def hardware() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU, Python {platform.python_version()}"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def run_parts(module: str, title: str, about: str, parts: Mapping[str, Callable[[Path], list[str]]]) -> int:
    """The command of a benchmark: the parts asked for, their lines shown and, with --report, kept in a file."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--only", action="append", choices=parts, help="a part; default: all")
    parser.add_argument("--report", type=Path, help="write the report there, too")
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.only or parts:
        with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as folder:
            found = [f"## {name}", "", inspect.cleandoc(parts[name].__doc__ or ""), "", *parts[name](Path(folder)), ""]
        print("\n".join(found), flush=True)
        lines += found
        if options.report is not None:  # after each part: the next may fail
            head = f"`python -m benchmarks.{module}`, commit {commit()}, on {hardware()}"
            options.report.write_text("\n".join([f"# {title}", "", head, "", *lines]).rstrip() + "\n")
    return 0
