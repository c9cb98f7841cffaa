"""Fitted models of scikit-learn's, taken apart: what of them answers, what is in it, and what skl2onnx is told of it.

Says why one is not converted. Knows nothing of files or of graphs.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from tutti.export import texts
from tutti.export.errors import ExportError, first_line

# Where models keep those that they are made of.
_PARTS = (
    "steps", "transformer_list", "transformers_", "estimators_", "estimators", "estimator_", "estimator", "regressor_",
    "final_estimator_", "best_estimator_", "calibrated_classifiers_",
)  # fmt: skip


def answering(model: Any) -> Any:
    """The fitted model that answers: of a search, its best. Raises ExportError with what it holds where none does."""
    while hasattr(model, "best_estimator_"):
        model = model.best_estimator_
    kind = type(model).__name__
    if hasattr(model, "cv_results_"):
        raise ExportError(f"holds a {kind} with refit=False, which keeps no model: fit it with refit=True")
    if not hasattr(type(model), "fit"):
        raise ExportError(f"holds a {kind}: expected a fitted model of scikit-learn's")
    if not _is_fitted(model):
        raise ExportError(f"holds a {kind} that is not fitted: fit it before it is dumped")
    if not hasattr(model, "predict") and not hasattr(model, "transform"):
        raise ExportError(
            f"holds a {kind}, which has no predict and no transform: it tells of the rows that it was fitted on "
            "only, and cannot be served"
        )
    if hasattr(model, "steps"):
        model.steps = [(name, getattr(step, "best_estimator_", step)) for name, step in model.steps]
    return model


def _is_fitted(model: Any) -> bool:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(model)
    except NotFittedError:
        return False
    except TypeError:  # no estimator of scikit-learn's, but like one
        return True
    return True


def within(model: Any) -> Iterator[Any]:
    """It, and all that it is made of."""
    yield model
    for name in _PARTS:
        for part in _listed(getattr(model, name, None)):
            yield from within(part)


def _listed(value: Any) -> list[Any]:
    """Models of a list, which may be named, or of an array, or the one that it is."""
    if isinstance(value, np.ndarray):
        value = list(value.ravel())
    models = []
    for entry in value if isinstance(value, list | tuple) else [value]:
        parts = entry if isinstance(entry, tuple) else [entry]
        models += [part for part in parts if hasattr(part, "fit") or hasattr(part, "predict_proba")]
    return [part for part in models if not isinstance(part, type)]


def vocabulary(model: Any) -> list[str]:
    """Words that it knows; none where it takes no texts."""
    return sorted({str(word) for part in within(model) for word in getattr(part, "vocabulary_", ())})


def make_convertible(model: Any) -> None:
    """Change what skl2onnx stumbles over, and what no answer depends on."""
    for part in within(model):
        if hasattr(part, "flatten_transform"):  # of what VotingClassifier.transform returns
            part.flatten_transform = False
        if type(part).__name__.startswith("Voting") and isinstance(part.weights, list | tuple):
            part.weights = np.asarray(part.weights)


def to_onnx(model: Any, types: Sequence[tuple[str, Any]]) -> Any:
    """The graph of a model that takes inputs of these types. Raises ExportError where it is not converted."""
    import skl2onnx

    if any(hasattr(part, "best_threshold_") for part in within(model)):
        raise ExportError("skl2onnx leaves its threshold out, and its labels would be others")
    make_convertible(model)
    options = {id(part): _text_options(part) for part in within(model) if hasattr(part, "vocabulary_")}
    has_scores = hasattr(model, "predict_proba") or hasattr(model, "decision_function")
    as_tensors = {id(model): {"zipmap": False}} if has_scores else {}
    # The newest of these operators that all its converters know.
    opset = {"": skl2onnx.__max_supported_opset__, "ai.onnx.ml": 3}
    convert = partial(skl2onnx.to_onnx, model, initial_types=list(types), target_opset=opset)
    try:
        try:
            return convert(options={**options, **as_tensors})
        except Exception as error:
            if "Option 'zipmap'" not in str(error):
                raise
            steps: dict[int, dict[str, object]] = {
                id(part): {} for part in within(model) if part is not model
            }  # else it sets one for a pipeline's
            return convert(options=steps | options)  # its probabilities are a tensor anyway
    except Exception as error:
        raise ExportError(why_not(error)) from None


def _text_options(vectorizer: Any) -> dict[str, object]:
    """A locale that every Linux has, and words as scikit-learn finds them: the converter's are ASCII's only."""
    tokenexp = texts.expression(vectorizer)
    return {"locale": "C.UTF-8", **({} if tokenexp is None else {"tokenexp": tokenexp})}


def why_not(error: Exception) -> str:
    """What skl2onnx says of a model that it does not convert."""
    match = re.search(r"(?:shape calculator|converter) for type '<class '(?:[\w.]+\.)?(\w+)'>'", str(error))
    told = f"it has no converter for {match[1]}" if match else first_line(error)
    told = re.sub(r"\.? *You may raise an issue at.*", "", told)
    return f"skl2onnx does not convert it: {told}"
