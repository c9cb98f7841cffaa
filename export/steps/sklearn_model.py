"""A fitted model of scikit-learn's, asked as it is: model.pkl beside this file, which joblib or pickle wrote.

`tutti init` wrote this, and it is yours to change: `_rows` is what a request becomes, `_answers` what comes back.
Where it is served scikit-learn has to be installed, best in the version that fitted the model; modules of your own
that the pickle names may stand beside it. A pickle executes what is in it: serve your own only.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
# Outputs by the method that makes them; of any other name is what the model predicts, or what it transforms rows to.
METHODS = {"probabilities": "predict_proba", "scores": "decision_function"}
MISSING = {"nan": float("nan"), "none": None}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._inputs = [field["name"] for field in config["input"]]
        self._outputs = [
            (field["name"], pb_utils.triton_string_to_numpy(field["data_type"])) for field in config["output"]
        ]
        self._rows_are = parameters["rows_are"]
        self._has_gaps = parameters.get("empty_text_is", "") in MISSING
        self._missing = MISSING.get(parameters.get("empty_text_is", ""))
        self._model = load(parameters["fitted_with"])

    def execute(self, requests):
        try:
            return self._answered(requests)
        except Exception as error:
            if len(requests) > 1:  # only the request that is at fault shall fail
                return [self.execute([request])[0] for request in requests]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))]

    def _answered(self, requests):
        """The rows of all requests are one call of the model's."""
        given = [[pb_utils.get_input_tensor_by_name(one, name).as_numpy() for name in self._inputs] for one in requests]
        ends = np.cumsum([len(tensors[0]) for tensors in given])
        answers = self._answers(self._rows([np.concatenate(column) for column in zip(*given, strict=True)]))
        parts = [np.split(answer, ends[:-1]) for answer in answers]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, part[at]) for (name, _), part in zip(self._outputs, parts, strict=True)]
            )
            for at in range(len(requests))
        ]

    def _rows(self, tensors):
        """Numbers as an array of 64 bits, texts as a list, and columns as a data frame."""
        if self._rows_are == "numbers":
            return tensors[0].astype(np.float64)
        if self._rows_are == "texts":
            return [text.decode() for text in tensors[0].ravel()]
        return frame({name: self._column(tensor.ravel()) for name, tensor in zip(self._inputs, tensors, strict=True)})

    def _column(self, values):
        if values.dtype != object:
            return values.astype(np.float64) if values.dtype == np.float32 else values
        texts = [text.decode() for text in values]
        if self._has_gaps:
            texts = [text if text else self._missing for text in texts]
        return np.array(texts, object)

    def _answers(self, rows):
        """One for each output: [rows, ...]."""
        answers = []
        for name, dtype in self._outputs:
            kind, _, target = name.partition("_")
            other = "predict" if hasattr(self._model, "predict") else "transform"
            answer = getattr(self._model, METHODS.get(kind, other))(rows)
            if kind in METHODS and target:  # of a model of several targets
                answer = answer[int(target)]
            answers.append(tensor(answer, dtype))
        return answers


def load(fitted_with):
    """The model. Raises RuntimeError with what is missing here."""
    sys.path.append(str(HERE))
    try:
        import joblib

        return joblib.load(HERE / "model.pkl")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = f"scikit-learn=={fitted_with}" if missing in ("joblib", "sklearn") else missing
        install = f"{sys.executable} -m pip install '{package}'"
        raise RuntimeError(
            f"model.pkl needs '{missing}', which is not installed where it is served: {install} (a module of your own "
            f"goes beside it, as {HERE / missing}.py)"
        ) from None
    except AttributeError as error:
        what = f"it was fitted with scikit-learn {fitted_with}; another version may be installed in {sys.executable}"
        raise RuntimeError(f"model.pkl cannot be loaded: {error}: {what}") from None


def frame(columns):
    try:
        import pandas
    except ModuleNotFoundError:
        import pyarrow

        return pyarrow.table(columns)
    return pandas.DataFrame(columns)


def tensor(answer, dtype):
    """[rows, ...] of the output's type; a number or text for each row is a column."""
    array = np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)
    array = array[:, np.newaxis] if array.ndim == 1 else array
    if dtype == np.object_:
        texts = [str(value).encode() for value in array.ravel()]
        return np.array(texts, object).reshape(array.shape)
    return array.astype(dtype)
