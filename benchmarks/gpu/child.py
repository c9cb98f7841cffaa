"""One line of a part, in a process that may die: `python -m benchmarks.gpu.child JOB`, with JOB in JSON.

Rows go to the standard output, a line of JSON each; whatever libraries print there goes to the standard error instead.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context, Figures, NotThereYetError


def main() -> int:
    job: dict[str, Any] = json.loads(sys.argv[1])
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message, default=float), file=rows, flush=True)

    def emit(name: str, figures: Figures) -> None:
        send({"row": {"name": name, **figures}})

    context = Context(job["device"], job["is_short"], Path(job["out"]), Path(job["work"]), emit)
    module, _, function = job["run"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(context, **job["arguments"])
    except NotThereYetError as error:
        send({"status": "not there yet", "reason": str(error)})
    except BaseException as error:
        traceback.print_exc()
        send({"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:2000]}"})
        return 1
    else:
        send({"status": "measured", "reason": ""})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A context that is lost, or a channel that hangs, must not keep the process from its end.
    os._exit(status)
