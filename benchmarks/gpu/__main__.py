"""`python -m benchmarks.gpu PART --out FOLDER [--device cpu] [--minutes 8.5]`, and `... report FOLDER...`."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu import check, frame, limits, machine, onnx_cuda, report, served, triton

PARTS = {
    "check": check.lines,
    "limits": limits.lines,
    "served": served.lines,
    "triton": triton.lines,
    "onnxruntime": onnx_cuda.lines,
}
WORK = Path(os.environ.get("TUTTI_WORK", "/tmp/tutti-gpu"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    for part in PARTS:
        command = commands.add_parser(part)
        command.add_argument("--out", type=Path, required=True, help="folder for the part's JSON")
        command.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        command.add_argument("--minutes", type=float, default=8.5, help="lines that do not fit are not measured")
        command.add_argument("--short", action="store_true", help="tiny models, to see that all works; always on cpu")
        command.add_argument("--only", action="append", metavar="TEXT", help="lines whose name contains TEXT")
        command.add_argument("--work", type=Path, default=WORK, help="folder for models, logs and unpacked programs")
    command = commands.add_parser("report")
    command.add_argument("folders", type=Path, nargs="+", help="folders with the parts' JSON; later ones win")
    command.add_argument("--to", type=Path, default=report.PATH)
    options = parser.parse_args()
    if options.part == "report":
        options.to.write_text(report.render(report.read(options.folders)))
        print(f"wrote {options.to}")
        return 0
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Whether all lines that could be measured were, and were right, is the exit status."""
    is_short = options.short or options.device == "cpu"
    settings = frame.Settings(options.device, is_short, options.out.resolve(), options.work.resolve(), options.minutes)
    settings.work.mkdir(parents=True, exist_ok=True)
    about = machine.about(options.device)
    print(machine.sentence(about), file=sys.stderr)
    lines = PARTS[options.part](is_short)
    kept = []
    if options.only:
        lines = [line for line in lines if any(text in line.name for text in options.only)]
        kept = frame.earlier(options.part, lines, settings, about)
    record = frame.run(options.part, lines, settings, about, kept)
    print(machine.sentence(about))
    print(frame.table(record))
    wrong = [row for entry in record.lines for row in entry["rows"] if row.get("right") is False]
    return 1 if wrong or any(entry["status"] == "failed" for entry in record.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
