"""The process that compiles a model (compiler.py): run as a module, it reads a job and fills a folder.

PyTorch is imported late: a lifeline and a niceness come first.
"""

import faulthandler
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutti.backends.compiler import AOT, KEPT, PACKAGE, RESULT, Job, Uncompilable, one_line
from tutti.core.lifeline import end_with
from tutti.repository import config


def main() -> None:
    """The process: a job on standard input, a folder to fill, and a pipe that closes when the server ends."""
    folder, lifeline = Path(sys.argv[1]), int(sys.argv[2])
    end_with(lifeline)
    os.nice(10)  # what serves comes first
    faulthandler.enable()  # a crash says where
    try:
        failure = _compile(Job(**json.load(sys.stdin)), folder)
    except Uncompilable as error:
        failure = str(error)
    except Exception as error:
        failure = one_line(error)
    (folder / RESULT).write_text(json.dumps(failure), encoding="utf-8")
    os._exit(0)  # what it has started ends with its group


def _compile(job: Job, folder: Path) -> str:
    """Why the model cannot be compiled so that it does the same; "" when it has been."""
    import torch._inductor

    from tutti.backends import compiled, pytorch, verification

    device = "cuda:0" if job.how == AOT and job.device != "cpu" else job.device
    exported = compiled.exported(Path(job.path), device)
    compiled.check_is_stateless(exported)
    options = dict(torch._inductor.list_mode_options(job.mode))
    if device == "cpu":  # else the number of threads of this process would be part of the code
        options["cpp.dynamic_threads"] = True
    allowed = verification.tolerance(exported) if job.tolerance < 0 else job.tolerance
    parsed = config.parse(job.config, job.model)
    fills = pytorch.fills(parsed, exported)
    pairs = compiled.expectations(exported, fills, device, job.rows)
    typical = with_rows(exported, job.rows or parsed.max_batch_size, device, is_fixed=job.rows > 0)
    if job.rows and typical is exported:
        return f"it cannot be exported with {job.rows} rows"
    if job.how == AOT:
        torch._inductor.aoti_compile_and_package(typical, package_path=str(folder / PACKAGE), inductor_configs=options)
        shutil.rmtree(folder / KEPT, ignore_errors=True)
    else:
        _keep(typical, options)
    return compiled.first_difference(compiled.opened(folder, job.how, exported, device, 1), pairs, allowed)


def with_rows(program: Any, rows: int, device: str, is_fixed: bool = False) -> Any:
    """The program as if exported with so many rows; itself where that cannot be. Dynamic dimensions stay so, but for
    that of rows where it `is_fixed`.

    How a kernel divides its work is chosen by the sizes that the program was exported with, which are small: MiniLM
    took a tenth longer for 256 rows on an H200.
    """
    import torch
    from torch.export import Dim

    inputs = [node.meta["val"] for node in program.graph_module.graph.nodes if node.name in _user_inputs(program)]
    if not rows or not all(isinstance(value, torch.Tensor) for value in inputs):
        return program
    dynamic = [{axis for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} for value in inputs]
    if not all(0 in axes for axes in dynamic):
        return program
    shapes = [(rows, *(size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape[1:]))
              for value in inputs]  # fmt: skip
    try:
        again = torch.export.export(
            program.module(check_guards=False),
            tuple([torch.zeros(shape, dtype=value.dtype, device=device)
                   for shape, value in zip(shapes, inputs, strict=True)]),
            dynamic_shapes=tuple([dict.fromkeys(axes - {0} if is_fixed else axes, Dim.DYNAMIC) for axes in dynamic]),
            strict=False,
        )  # fmt: skip
    except Exception as error:
        print(f"cannot be exported with {rows} rows: {one_line(error)}", file=sys.stderr)
        return program
    return again if _arguments(again) == _arguments(program) else program


def _user_inputs(program: Any) -> list[str]:
    return [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def _arguments(program: Any) -> list[tuple[str, str | None]]:
    """Of the graph, in order: who executes it gives them so."""
    return [(spec.kind.name, spec.target) for spec in program.graph_signature.input_specs]


def _keep(program: Any, options: Mapping[str, object]) -> None:
    """Compile with what `torch.compile` compiles with, but from the program as it was exported.

    Dynamic dimensions stay so, and no shape is ever compiled again while it is served.
    """
    import torch._inductor

    inputs = [node.meta["val"] for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    patches = {"config_patches": dict(options)}
    with torch.no_grad():
        torch._inductor.standalone_compile(program.graph_module, inputs, dynamic_shapes="from_graph", options=patches)


if __name__ == "__main__":
    main()
