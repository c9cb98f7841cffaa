"""What a process of its own costs a python model, beside one that executes in the server's: both in one server."""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import clients
from benchmarks.clients import Figures
from tests.serving import serving

MODES = ("process", "no")
_CODE = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        made = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            made.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", {expression})]))
        return made
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A model: as many FP32 values in a request, an expression of x, and the values in its answer."""

    name: str
    values: int
    expression: str
    answers: int
    clients: Sequence[int]


CASES = (
    Case("tiny", 16, "x + np.float32(1)", 16, (1, 64)),
    Case("image", 150_528, "x[:, :16].copy()", 16, (8, 64)),
    Case("image_both_ways", 150_528, "x + np.float32(1)", 150_528, (8, 64)),
)


def write(root: Path, case: Case, mode: str) -> None:
    folder = root / f"{case.name}_{mode}"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(_CODE.format(expression=case.expression))
    (folder / "config.pbtxt").write_text(
        f'name: "{folder.name}" backend: "python" max_batch_size: 64 dynamic_batching {{ }}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: {case.values} }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: {case.answers} }}\n'
        f'parameters {{ key: "tutti.isolate" value {{ string_value: "{mode}" }} }}\n'
    )


def script(folder: Path, case: Case) -> Path:
    item = np.full(case.values, 0.5, np.float32).tobytes()
    header = (
        f'{{"inputs":[{{"name":"x","shape":[1,{case.values}],"datatype":"FP32",'
        f'"parameters":{{"binary_data_size":{len(item)}}}}}],'
        '"outputs":[{"name":"y","parameters":{"binary_data":true}}]}'
    ).encode()
    return clients.http_script(folder / f"{case.name}.lua", header + item, len(header))


def measured(address: str, case: Case, load: Path, count: int, rounds: int, seconds: int) -> dict[str, Figures]:
    """The median of each mode, of interleaved rounds after one that warms up."""
    made: dict[str, list[Figures]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode in MODES:
            url = f"http://{address}/v2/models/{case.name}_{mode}/infer"
            figures = clients.wrk(url, load, count, seconds if number else 1)
            if number:
                made[mode].append(figures)
    return {mode: _median(figures) for mode, figures in made.items()}


def _median(figures: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(getattr(each, name) for each in figures) for name in Figures.__slots__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    options = parser.parse_args()
    clients.require_tools()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for case in CASES:
            for mode in MODES:
                write(folder / "repository", case, mode)
        print("| HTTP | a process of its own | in the server's | ratio |\n|---|---|---|---|")
        with serving(folder / "repository", folder / "log") as server:
            for case in CASES:
                load = script(folder, case)
                for count in case.clients:
                    got = measured(server.http, case, load, count, options.rounds, options.seconds)
                    own, here = (got[mode] for mode in MODES)
                    cells = [f"{each.rate:,.0f} /s, p50 {each.p50_ms:.2f} ms" for each in (own, here)]
                    print(
                        f"| {case.name}, {count} clients | {' | '.join(cells)} | {own.rate / here.rate:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
