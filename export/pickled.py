"""A pickle of scikit-learn's that Python serves as it is: what its model.py is told, and which outputs it has.

For what no graph holds, or holds wrongly. The program itself is steps/sklearn_model.py.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.export.columns import Column
from tutti.export.layout import STEPS

PROGRAM = STEPS / "sklearn_model.py"
PICKLE = "model.pkl"
# What config.pbtxt says of the parameters.
ABOUT = """What model.py beside the pickle reads: what rows become (numbers, texts or columns of a data frame), which
scikit-learn fitted the model, and, where texts may be missing, what an empty one stands for. A stock Triton needs
scikit-learn in its Python, or in an environment that EXECUTION_ENV_PATH names."""
# (name, Triton's type, sizes of a row)
Output = tuple[str, str, tuple[int, ...]]


def answers(model: Any, rows: Any) -> dict[str, Array]:
    """By the names of the outputs: what is predicted or transformed, and how sure the model is of it."""
    from sklearn.base import is_regressor

    if not hasattr(model, "predict"):
        by_name = {"variable": model.transform(rows)}
    else:
        by_name = {"variable" if is_regressor(model) else "label": model.predict(rows)}
    if hasattr(model, "predict_proba"):
        by_name |= _each("probabilities", model.predict_proba(rows))
    elif hasattr(model, "decision_function"):
        by_name |= _each("scores", model.decision_function(rows))
    return {name: _plain(answer) for name, answer in by_name.items()}


def _each(name: str, answer: Any) -> dict[str, Any]:
    """A model of several targets answers with a list."""
    if isinstance(answer, list):
        return {f"{name}_{index}": part for index, part in enumerate(answer)}
    return {name: answer}


def _plain(answer: Any) -> Array:
    array = np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)
    return array[:, np.newaxis] if array.ndim == 1 else array


def outputs(answers: Mapping[str, Array]) -> Iterator[Output]:
    kinds = {"f": "FP32", "i": "INT64", "u": "INT64", "b": "BOOL"}
    for name, answer in answers.items():
        yield name, kinds.get(answer.dtype.kind, "BYTES"), answer.shape[1:]


def parameters(named: Sequence[Column], is_text: bool) -> dict[str, str]:
    """What model.py reads."""
    import sklearn

    rows_are = "columns" if named else "texts" if is_text else "numbers"
    told = {"rows_are": rows_are, "fitted_with": str(sklearn.__version__)}
    gaps = [column for column in named if column.kind == "text" and column.has_gaps]
    return told | ({"empty_text_is": "none" if gaps[0].gap is None else "nan"} if gaps else {})


def copied(source: Path, work: Path) -> Path:
    """The pickle under the name that model.py reads."""
    return Path(shutil.copyfile(source, work / PICKLE))
