"""From a model's file to a repository that serves it: five kinds of files, and what is none."""

import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import onnxruntime
import pyarrow
import pytest
import skl2onnx
import torch
from onnx import TensorProto, helper
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import DBSCAN, KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, TunedThresholdClassifierCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC

from tests.export import checkpoints
from tests.models import onnx_add_one
from tests.serving import serving
from tests.tutti.test_help import EXTRAS, WITHOUT_EXTRAS
from tutti.app import cli
from tutti.export import columns, init, initial, maps, pickled, served
from tutti.export.errors import ExportError
from tutti.repository import config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(180)]


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)
        self.linear = torch.nn.Linear(4, 5)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convolution(picture).mean((2, 3)))


def iris(path: Path, features: int = 4) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, features))
    joblib.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, (rows[:, 0] > 0) + 1), path)


def clusters(path: Path) -> None:
    joblib.dump(KMeans(3, n_init=1).fit(np.random.default_rng(0).standard_normal((60, 4))), path)


def outliers(path: Path) -> None:
    joblib.dump(IsolationForest(n_estimators=5).fit(np.random.default_rng(0).standard_normal((60, 4))), path)


def texts(path: Path) -> None:
    said = ["a good day", "what a good night", "one bad day", "a bad, bad night"]
    with path.open("wb") as file:
        pickle.dump(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(said, ["+", "+", "-", "-"]), file)


def scaler(path: Path) -> None:
    joblib.dump(StandardScaler().fit(np.arange(12.0).reshape(4, 3)), path)


def churn(path: Path) -> None:
    """Fitted on columns with names, of numbers, texts and whole numbers."""
    rng = np.random.default_rng(0)
    drawn = {"age": rng.normal(0, 1, 80), "plan": rng.choice(["basic", "gold"], 80), "door": rng.choice([2, 4], 80)}
    picking = ColumnTransformer([("n", StandardScaler(), ["age"]), ("c", OneHotEncoder(), ["plan", "door"])])
    fitted = make_pipeline(picking, LogisticRegression()).fit(pyarrow.table(drawn), drawn["age"] > 0)
    joblib.dump(fitted, path)


ROWS = np.random.default_rng(0).standard_normal((120, 4))
THREE = np.array(["a", "b", "c"])[np.digitize(ROWS[:, 0] + 0.3 * ROWS[:, 1], [-0.5, 0.5])]
SUM = 2 * ROWS[:, 0] + ROWS[:, 1]
SAID = ["a good day", "what a good night", "one bad day", "a bad, bad night"] * 3
MOOD = ["+", "+", "-", "-"] * 3
_WORDS = "click free family a b I prize day 3 good the and don't über straße schön Öl der win"
_TEXTS = [" ".join(np.random.default_rng(seed).choice(_WORDS.split(), 8)) for seed in range(150)]
SPAM = (_TEXTS, ["spam" if "free" in text or "über" in text else "ham" for text in _TEXTS])
PLANS = [None if index % 5 == 0 else ("basic", "gold")[index % 2] for index in range(len(ROWS))]


def members(of_classes: bool) -> list[tuple[str, Any]]:
    if of_classes:
        return [("line", LogisticRegression()), ("trees", RandomForestClassifier(5, random_state=0))]
    return [("line", Ridge()), ("trees", RandomForestRegressor(5, random_state=0))]


class Strict(BaseEstimator):  # type: ignore[misc]
    """Like a model of scikit-learn's, and never content."""

    n_features_in_ = 4

    def fit(self) -> "Strict":
        self.fitted_ = True
        return self

    def predict(self, rows: Any) -> Any:
        raise ValueError("only on Sundays")


def text_pipeline() -> Any:
    return make_pipeline(TfidfVectorizer(), LogisticRegression())


# Models that are made of others, as people have them.
MADE_OF_OTHERS: dict[str, Callable[[], Any]] = {
    "voting, hard": lambda: VotingClassifier(members(True)).fit(ROWS, THREE),
    "voting, soft": lambda: VotingClassifier(members(True), voting="soft", weights=[1, 2]).fit(ROWS, THREE),
    "voting, numbers": lambda: VotingRegressor(members(False), weights=[1, 2]).fit(ROWS, SUM),
    "voting in a pipeline": lambda: make_pipeline(StandardScaler(), VotingClassifier(members(True), voting="soft")).fit(
        ROWS, THREE
    ),
    "voting on texts": lambda: VotingClassifier([("a", text_pipeline()), ("b", text_pipeline())], voting="soft").fit(
        SAID, MOOD
    ),
    "stacking": lambda: StackingClassifier(members(True), cv=2).fit(ROWS, THREE),
    "stacking, numbers": lambda: StackingRegressor(members(False), cv=2, passthrough=True).fit(ROWS, SUM),
    "calibrated": lambda: CalibratedClassifierCV(LinearSVC(), cv=2).fit(ROWS, THREE),
    "a search": lambda: GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}, cv=2).fit(ROWS, THREE),
    "a random search": lambda: RandomizedSearchCV(Ridge(), {"alpha": [0.1, 1]}, n_iter=2, cv=2).fit(ROWS, SUM),
    "a search of texts": lambda: GridSearchCV(text_pipeline(), {"logisticregression__C": [1, 9]}, cv=2).fit(SAID, MOOD),
    "a search in a pipeline": lambda: make_pipeline(
        StandardScaler(), RandomizedSearchCV(Ridge(), {"alpha": [0.1, 1]}, n_iter=2, cv=2)
    ).fit(ROWS, SUM),
    "several targets": lambda: RandomForestRegressor(5).fit(ROWS, np.stack([SUM, -SUM], 1)),
    "a mixture": lambda: GaussianMixture(3, random_state=0).fit(ROWS),
}


@pytest.mark.parametrize("case", MADE_OF_OTHERS)
def test_models_that_are_made_of_others_answer_as_scikit_learn(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joblib.dump(MADE_OF_OTHERS[case](), tmp_path / "m.pkl")
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 0, capsys.readouterr().err
    assert "its answers to 100 random rows are scikit-learn's" in capsys.readouterr().out


SEVERAL = np.stack([SUM > 0, SUM > 1], 1)

# What no graph holds, and why.
IN_PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    "no converter": (
        lambda: TransformedTargetRegressor(Ridge(), func=np.cbrt, inverse_func=np.sinh).fit(ROWS, SUM),
        "skl2onnx does not convert it: it has no converter for TransformedTargetRegressor; Python serves the pickle",
    ),
    "a function": (
        lambda: make_pipeline(FunctionTransformer(np.cbrt), Ridge()).fit(ROWS, SUM),
        "unless the transform function is None (= identity); Python serves the pickle",
    ),
    "a threshold": (
        lambda: TunedThresholdClassifierCV(LogisticRegression(), cv=2).fit(ROWS, SUM > 1.5),
        "skl2onnx leaves its threshold out, and its labels would be others; Python serves",
    ),
    "lists of answers": (
        lambda: MultiOutputClassifier(LogisticRegression()).fit(ROWS, SEVERAL),
        "has type seq(tensor(float)), which is no tensor of Triton's; Python serves",
    ),
    "other shapes": (lambda: RandomForestClassifier(5).fit(ROWS, SEVERAL), "scikit-learn's is [2, 100, 2]; Python"),
    "words left out between others": (
        lambda: make_pipeline(TfidfVectorizer(ngram_range=(1, 2), stop_words="english"), LogisticRegression()).fit(
            *SPAM
        ),
        "differs from scikit-learn's in ",
    ),
    "categories that are missing": (
        lambda: make_pipeline(
            ColumnTransformer([("n", SimpleImputer(), ["age"]), ("c", OneHotEncoder(), ["plan"])]), LogisticRegression()
        ).fit(pyarrow.table({"age": ROWS[:, 0], "plan": PLANS}), ROWS[:, 0] > 0),
        "Unknown Category",
    ),
}


@pytest.mark.parametrize("case", IN_PYTHON)
def test_models_that_are_no_graph_are_served_by_python(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, why = IN_PYTHON[case]
    joblib.dump(make(), tmp_path / "m.pkl", compress=3)
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "note: it is not served as ONNX: " in said
    assert why in said
    assert "its answers to 100 random rows are scikit-learn's" in said
    assert sorted(path.name for path in (tmp_path / "models" / "m" / "1").iterdir()) == ["model.pkl", "model.py"]
    made = config.load(tmp_path / "models" / "m" / "config.pbtxt")
    assert (made.backend, made.max_batch_size) == ("python", 8)


REFUSED_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a search that keeps none": (
        lambda: GridSearchCV(Ridge(), {"alpha": [0.1, 1]}, cv=2, refit=False).fit(ROWS, SUM),
        "'m.pkl' holds a GridSearchCV with refit=False, which keeps no model: fit it with refit=True",
    ),
    "not fitted": (LogisticRegression, "'m.pkl' holds a LogisticRegression that is not fitted: fit it before"),
    "of its rows only": (lambda: DBSCAN().fit(ROWS), "'m.pkl' holds a DBSCAN, which has no predict and no transform"),
    "of rows that nobody knows": (
        lambda: Strict().fit(),
        "'m.pkl': asked with values like those it was fitted on, scikit-learn itself fails (ValueError: only on",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_models_that_cannot_be_asked_are_told_why(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = REFUSED_MODELS[case]
    joblib.dump(make(), tmp_path / "m.pkl")
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_pickle_may_be_served_by_python_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With several rows of several callers in one call; another version is Python's, too."""
    iris(tmp_path / "m.pkl")
    command = [str(tmp_path / "models"), str(tmp_path / "m.pkl")]
    assert init.main([*command, "--python"]) == 0, capsys.readouterr().err
    assert "note: --python; Python serves the pickle itself" in capsys.readouterr().out
    model = joblib.load(tmp_path / "m.pkl")
    with served.staged(tmp_path / "models") as models:
        answer = models.ask("m", {"X": ROWS[:5].astype(np.float32)})
    assert answer["label"].tolist() == model.predict(ROWS[:5])[:, np.newaxis].tolist()
    np.testing.assert_allclose(answer["probabilities"], model.predict_proba(ROWS[:5]), atol=1e-5)
    assert init.main([*command, "--version", "2"]) == 0, capsys.readouterr().err
    assert (tmp_path / "models" / "m" / "2" / "model.py").is_file()


def test_what_python_serves_is_no_version_of_what_onnx_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iris(tmp_path / "m.pkl")
    command = [str(tmp_path / "models"), str(tmp_path / "m.pkl")]
    assert init.main(command) == 0
    assert init.main([*command, "--version", "2", "--python"]) == 1
    assert "the configuration is of onnxruntime; version 1 goes by it: --name gives" in capsys.readouterr().err


def test_python_is_for_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd(tmp_path / "o.onnx")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "o.onnx"), "--python"]) == 1
    assert "--python is for pickles of scikit-learn's: 'o.onnx' is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "package"),
    [("joblib", "scikit-learn=="), ("sklearn", "scikit-learn=="), ("my_features", "my_features")],
)
def test_what_is_not_installed_where_a_pickle_is_served_is_said(missing: str, package: str, tmp_path: Path) -> None:
    shutil.copy(pickled.PROGRAM, tmp_path / "model.py")
    (tmp_path / "model.pkl").write_bytes(b"csklearn.dummy\nx\n." if missing != "my_features" else b"cmy_features\nx\n.")
    code = (
        f"import sys, types; sys.modules[{missing!r}] = None\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('triton_python_backend_utils')\n"
        "import model; model.load('1.2.3')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert f"RuntimeError: model.pkl needs '{missing}', which is not installed where it is served: " in done.stderr
    assert f" -m pip install '{package}" in done.stderr


def test_one_callers_row_that_fails_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iris(tmp_path / "m.pkl")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "m.pkl"), "--python"]) == 0, capsys.readouterr().err
    row = np.zeros((1, 4), np.float32)
    with served.staged(tmp_path / "models") as models:
        with pytest.raises(ExportError, match="Input X contains NaN"):
            models.ask("m", {"X": row * np.nan})
        assert models.ask("m", {"X": row})["label"].shape == (1, 1)


# Vectorizers whose words are found as scikit-learn finds them.
WORDS: dict[str, TfidfVectorizer] = {
    "default": TfidfVectorizer(),
    "pairs": TfidfVectorizer(ngram_range=(1, 2)),
    "one letter": TfidfVectorizer(token_pattern=r"(?u)\b\w+\b"),
    "long ones": TfidfVectorizer(token_pattern=r"\b\w{3,}\b", lowercase=False),
}


@pytest.mark.parametrize("case", WORDS)
def test_texts_of_any_alphabet_are_split_as_by_scikit_learn(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joblib.dump(make_pipeline(WORDS[case], LogisticRegression()).fit(*SPAM), tmp_path / "m.pkl")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 0, capsys.readouterr().err
    assert "model.onnx (onnxruntime)" in capsys.readouterr().out
    said = ["click a family", "KLICK ÜBER Straße x", "I do not", "", "日本語 テスト", "free-prize, 7 don't"]
    with served.staged(tmp_path / "models") as models:
        answer = models.ask("m", {"X": np.array([[text.encode()] for text in said], object)})
    model = joblib.load(tmp_path / "m.pkl")
    np.testing.assert_allclose(answer["probabilities"], model.predict_proba(said), atol=1e-5)


def test_linear_classifiers_become_graphs_in_pipelines_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joblib.dump(make_pipeline(StandardScaler(), LinearSVC()).fit(ROWS, THREE), tmp_path / "m.pkl")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 0, capsys.readouterr().err
    assert "model.onnx (onnxruntime)" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--python"]])
def test_distances_are_not_called_probabilities(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("linear", LinearSVC()), ("kernels", SVC()), ("one", make_pipeline(StandardScaler(), SVC()))):
        model.fit(ROWS, THREE)
        joblib.dump(model, tmp_path / f"{name}.pkl")
        assert init.main([str(tmp_path / "models"), str(tmp_path / f"{name}.pkl"), *flags]) == 0
        told = capsys.readouterr().out
        assert "output scores  FP" in told
        assert "probabilities" not in told
        with served.staged(tmp_path / "models") as models:
            answer = models.ask(name, {"X": ROWS[:5].astype(np.float32)})
        np.testing.assert_allclose(answer["scores"], model.decision_function(ROWS[:5]), atol=1e-4)


def test_a_module_of_ones_own_goes_where_its_pickle_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_ratio.py").write_text("def ratio(rows):\n    return rows / 2\n")
    fit = (
        "import joblib, numpy, own_ratio; from sklearn.linear_model import Ridge\n"
        "from sklearn.pipeline import make_pipeline; from sklearn.preprocessing import FunctionTransformer\n"
        "x = numpy.random.default_rng(0).normal(size=(30, 2))\n"
        "joblib.dump(make_pipeline(FunctionTransformer(own_ratio.ratio), Ridge()).fit(x, x[:, 0]), 'price.pkl')"
    )
    subprocess.run([sys.executable, "-c", fit], cwd=tmp_path, check=True, timeout=120)
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "price.pkl")]) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "models" / "price" / "1").iterdir()} == {
        "model.pkl", "model.py", "own_ratio.py"
    }  # fmt: skip


def test_what_columns_of_numbers_stand_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pyarrow.table({"length": ROWS[:, 0], "urgent": ROWS[:, 1]})
    joblib.dump(LogisticRegression().fit(frame, np.where(THREE == "a", "leaves", "stays")), tmp_path / "m.pkl")
    for flags in ([], ["--python", "--force"]):
        assert init.main([str(tmp_path / "models"), str(tmp_path / "m.pkl"), *flags]) == 0
        told = capsys.readouterr().out
        assert "note: probabilities: one for each class, in the order leaves, stays" in told
        assert "note: X has the columns length, urgent, in this order" in told


def test_a_locale_that_is_not_here_is_told_with_how_to_install_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_lower_case(tmp_path / "m.onnx", "tlh_KL.UTF-8")
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "m.onnx")]) == 1
    told = capfd.readouterr().err
    assert "needs the locale 'tlh_KL.UTF-8', which this machine lacks" in told
    assert "localedef -i tlh_KL -f UTF-8 tlh_KL.UTF-8" in told
    assert len(told.strip().splitlines()) == 1  # and nothing of ONNX Runtime's own


def test_a_pickle_of_another_version_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module, name in (("sklearn.ensemble.forest", "RandomForestClassifier"), ("sklearn.svm._classes", "OldSVC")):
        (tmp_path / "m.pkl").write_bytes(f"c{module}\n{name}\n.".encode())
        assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 1
        assert "another version of scikit-learn than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "packed"),
    [
        ("wine.pkl", 3), ("wine.joblib", ("bz2", 3)), ("wine.sav", ("lzma", 3)), ("wine.p", 0), ("wine.pkl.gz", 0),
        ("wine.joblib.z", 3), ("wine.PKL.xz", ("xz", 1)),
    ],
)  # fmt: skip
def test_pickles_may_be_packed(file: str, packed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joblib.dump(LogisticRegression().fit(ROWS, THREE), tmp_path / file, compress=packed)
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / file)]) == 0, capsys.readouterr().err
    assert "-> " + str(tmp_path / "models" / "wine" / "1" / "model.onnx") in capsys.readouterr().out


def exported(path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.zeros(2, 3, 16, 16),)
    program = torch.export.export(Convolution().eval(), example, dynamic_shapes={"picture": {0: batch}})
    torch.export.save(program, path)


def fixed(path: Path) -> None:
    torch.export.save(torch.export.export(Convolution().eval(), (torch.zeros(2, 3, 16, 16),)), path)


def scripted(path: Path) -> None:
    torch.jit.trace(Convolution().eval(), torch.zeros(2, 3, 16, 16)).save(str(path))  # type: ignore[no-untyped-call]


def with_maps(path: Path) -> None:
    iris(path)
    path.write_bytes(skl2onnx.to_onnx(joblib.load(path), np.zeros((1, 4), np.float32)).SerializeToString())


def write(path: Path, graph: onnx.GraphProto) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def odd(path: Path) -> None:
    """Somebody else's, with names that are no words."""
    x = helper.make_tensor_value_info("in/x:0", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("Ident ity:0", TensorProto.FLOAT, ["N", 4])
    graph = helper.make_graph([helper.make_node("Relu", ["in/x:0"], ["Ident ity:0"])], "g", [x], [y])
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    )


def rows_made_one(path: Path) -> None:
    """Its first axis is free, and no batch: rows that are alike become one."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", 4])
    write(path, helper.make_graph([helper.make_node("Unique", ["x"], ["y"], axis=0)], "g", [x], [y]))


def with_weights_beside(path: Path) -> None:
    model = onnx.load_from_string(onnx_add_one())
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


class Words(torch.nn.Module):
    """Answers with a dict; of texts of at least 8 words, and no more than 4 at a time."""

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean score": ids.float().mean(dim=1), "ids": ids * 2}


def words(path: Path) -> None:
    sizes = {"ids": {0: torch.export.Dim("batch", max=4), 1: torch.export.Dim("words", min=8, max=512)}}
    program = torch.export.export(Words(), (torch.ones(2, 16, dtype=torch.int64),), dynamic_shapes=sizes)
    torch.export.save(program, path)


def of_any_size(path: Path) -> None:
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2, 5),), dynamic_shapes=sizes), path)


def only_large_batches(path: Path) -> None:
    sizes = {"x": {0: torch.export.Dim("batch", min=4, max=64)}}
    module = torch.nn.Identity()
    torch.export.save(torch.export.export(module, (torch.ones(5, 4),), dynamic_shapes=({0: sizes["x"][0]},)), path)


def in_lower_case(path: Path, locale: str = "C.UTF-8") -> None:
    x = helper.make_tensor_value_info("text", TensorProto.STRING, ["N"])
    y = helper.make_tensor_value_info("lower", TensorProto.STRING, ["N"])
    node = helper.make_node("StringNormalizer", ["text"], ["lower"], case_change_action="LOWER", locale=locale)
    write(path, helper.make_graph([node], "g", [x], [y]))


class Ranked(torch.nn.Module):
    """Of a number for each row, without an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, item: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return (self.table(item) * features).sum(dim=1)


def ranked(path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.ones(2, dtype=torch.int64), torch.ones(2, 4))
    program = torch.export.export(Ranked().eval(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, path)


def looked_up(path: Path) -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["N", 2])
    table = onnx.numpy_helper.from_array(np.ones((5, 2), np.float32), "table")
    node = helper.make_node("Gather", ["table", "ids"], ["rows"])
    write(path, helper.make_graph([node], "g", [ids], [rows], [table]))


# file, how it is made, more flags, what is said, the largest batch
COVERED: dict[str, tuple[str, Any, list[str], str, int]] = {
    "scikit-learn": ("iris.pkl", iris, [], "its answers to 100 random rows are scikit-learn's", 8),
    "scikit-learn, texts": ("texts.pickle", texts, [], "its answers to 100 random rows are scikit-learn's", 8),
    "scikit-learn, no classifier": ("scaler.joblib", scaler, [], "rows are scikit-learn's", 8),
    "scikit-learn, columns": ("churn.pkl", churn, [], "its answers to 100 random rows are scikit-learn's", 8),
    "clusters": ("clusters.pkl", clusters, [], "its answers to 100 random rows are scikit-learn's", 8),
    "outliers": ("outliers.pkl", outliers, [], "its answers to 100 random rows are scikit-learn's", 8),
    "maps of classes": ("iris.onnx", with_maps, [], "the numbers now, in the order 1, 2", 8),
    "torch.export": ("picture.pt2", exported, [], "input  picture  FP32  [3, 16, 16]", 8),
    "torch.export, fixed": ("picture.pt2", fixed, [], "(torch.export's dynamic_shapes frees them)", 0),
    "torch.export, misnamed": ("picture.pt", exported, [], "OUTPUT__0 [1, 5]; and with 3 rows", 8),
    "torch.export, a dict": ("words.pt2", words, [], "output mean score  FP32  [1]", 4),
    "torch.export, many rows only": ("many.pt2", only_large_batches, [], "requests are not joined", 0),
    "torch.export, any size": ("any.pt2", of_any_size, [], "OUTPUT__0 [1, 1]; and with 3 rows", 8),
    "torch.export, numbers alone": ("ranked.pt2", ranked, [], "OUTPUT__0 [1, 1]; and with 3 rows", 8),
    "numbers alone": ("ids.onnx", looked_up, [], "rows [1, 2]; and with 3 rows", 8),
    "texts": ("lower.onnx", in_lower_case, [], 'asked with the text "text", it answered', 8),
    "TorchScript": ("picture.pt", scripted, ["--input", "picture:FP32:3,16,16"], "OUTPUT__0 [1, 5]", 8),
    "odd names": ("odd.onnx", odd, [], "Ident ity:0 [1, 4]; and with 3 rows", 8),
    "no batch": ("odd.onnx", odd, ["--max-batch-size", "0"], "input  in/x:0  FP32  [-1, 4]", 0),
    "a batch of ones own": ("odd.onnx", odd, ["--max-batch-size", "64"], "batch  up to 64 rows", 64),
    "rows become one": ("sum.onnx", rows_made_one, [], "requests are not joined: with 3 rows at a time it fails", 0),
    "weights beside": ("large.onnx", with_weights_beside, [], "y [1, 4]; and with 3 rows", 8),
}


@pytest.mark.parametrize("case", COVERED)
def test_a_file_becomes_a_model_that_answers(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, make, flags, says, batch = COVERED[case]
    make(tmp_path / name)
    status = cli.main(["init", str(tmp_path / "models"), str(tmp_path / name), *flags])
    told = capsys.readouterr()
    assert (status, told.err) == (0, "")
    assert says in told.out
    assert f"tutti serve {tmp_path / 'models'}" in told.out
    (folder,) = (tmp_path / "models").iterdir()
    assert config.load(folder / "config.pbtxt").max_batch_size == batch


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_that_ask_work_as_they_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}
    for name, make, expected in (
        ("iris.pkl", iris, '"name":"probabilities"'),
        ("churn.pkl", churn, '"name":"probabilities"'),
        ("words.pt2", words, '"name":"mean score"'),
        ("lower.onnx", in_lower_case, '"data":["text"]'),
        ("picture.pt2", exported, "OUTPUT__0 [["),
    ):
        make(tmp_path / name)
        assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / name)]) == 0
        asked[capsys.readouterr().out.partition("ask it:")[2].strip()] = expected
    assert any(command.startswith("python - <<") for command in asked)
    with serving(tmp_path / "models", tmp_path / "log") as server:
        for command, expected in asked.items():
            here = command.replace("127.0.0.1:8000", server.http).replace("127.0.0.1:8001", server.grpc)
            here = here.replace("python -", f"{shlex.quote(sys.executable)} -")
            told = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=False, timeout=60)
            assert told.returncode == 0, told.stderr
            assert expected in told.stdout


def test_a_checkpoint_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    checkpoints.text(tmp_path / "sentiment", "bert", is_classifier=True)
    assert cli.main(["init", "models", "sentiment"]) == 0
    said = capsys.readouterr().out
    assert "'sentiment' is a checkpoint: tutti export text sentiment --name sentiment" in said
    assert '/v2/models/sentiment_ensemble/generate -d \'{"TEXT": "a text"}\'' in said
    assert any(path.name.startswith("sentiment") for path in (tmp_path / "models").iterdir())


def weights(path: Path) -> None:
    torch.save(Convolution().state_dict(), path)


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        return {"y": x * scale, "within": {"x": x}}


def by_keyword(path: Path) -> None:
    torch.export.save(torch.export.export(Scaled(), (torch.ones(2, 3),), {"scale": torch.ones(2, 1)}), path)


def nested(path: Path) -> None:
    torch.export.save(torch.export.export(Scaled(), (torch.ones(2, 3), torch.ones(2, 1))), path)


def nonsense(path: Path) -> None:
    path.write_bytes(b"nonsense")


def pickled_list(path: Path) -> None:
    joblib.dump([1, 2], path)


def folder(path: Path) -> None:
    path.mkdir()
    odd(path / "odd.onnx")


REFUSED: dict[str, tuple[str, Any, list[str], str]] = {
    "weights alone": ("w.pt", weights, [], "'w.pt' holds weights without a program, as torch.save makes it"),
    "no graph": ("x.onnx", nonsense, [], "model 'x': onnxruntime cannot load x.onnx"),
    "no program": ("x.pt2", nonsense, [], "'x.pt2' is a text: expected what torch.export.save or"),
    "inputs by keyword": ("k.pt2", by_keyword, [], "'k.pt2' was exported with inputs by keyword (scale): pass them by"),
    "a dict in a dict": ("n.pt2", nested, [], "'n.pt2': forward returns what holds more than tensors"),
    "no pickle": ("x.pkl", nonsense, [], "'x.pkl': expected a pickle of scikit-learn's"),
    "another pickle": ("x.pkl", pickled_list, [], "'x.pkl' holds a list: expected a fitted model"),
    "another file": ("x.csv", nonsense, [], "'x.csv': expected a file that ends with one of .onnx, .pt2"),
    "a folder": ("net", folder, [], "is a folder without config.json"),
    "inputs not told": ("p.pt", scripted, [], "say them, as in --input picture:FP32:3,224,224"),
    "another input": ("p.pt", scripted, ["--input", "x:FP32:3,16,16"], "--input x: forward takes picture"),
    "no input": ("p.pt", scripted, ["--input", "picture"], "--input: expected NAME:TYPE:DIMS, as x:FP32:3,224,224"),
    "another type": ("p.pt", scripted, ["--input", "picture:FLOAT:3"], "got 'picture:FLOAT:3'"),
    "a wrong size": ("p.pt", scripted, ["--input", "picture:FP32:4,16,16"], "with 2 rows of zeros, forward fails"),
    "inputs told twice": ("o.onnx", odd, ["--input", "x:FP32:4"], "--input is for TorchScript"),
    "a batch where none is": ("p.pt2", fixed, ["--max-batch-size", "4"], "not all tensors have a free first axis"),
    "a batch that fails": ("s.onnx", rows_made_one, ["--max-batch-size", "4"], "model 's'"),
    "a path as name": ("o.onnx", odd, ["--name", "../o"], "--name: expected what a folder can be called, got '../o'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_in_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make, flags, says = REFUSED[case]
    make(tmp_path / name)
    assert cli.main(["init", str(tmp_path / "models"), str(tmp_path / name), *flags]) == 1
    told = capsys.readouterr().err
    assert told.startswith("tutti init: ")
    assert says in told
    assert "Traceback" not in told
    assert not (tmp_path / "models").exists()


def test_a_near_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd(tmp_path / "model.onnx")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "modle.onnx")]) == 1
    assert f"did you mean '{tmp_path / 'model.onnx'}'?" in capsys.readouterr().err


def test_a_name_that_says_nothing_gives_way_to_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wine").mkdir()
    odd(tmp_path / "wine" / "model.onnx")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "wine" / "model.onnx")]) == 0
    assert "it is called 'wine' after its folder: --name gives another" in capsys.readouterr().out


def test_what_is_there_is_written_over_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd(tmp_path / "m.onnx")
    command = [str(tmp_path / "models"), str(tmp_path / "m.onnx")]
    assert init.main(command) == 0
    assert "--name gives another" not in capsys.readouterr().out
    assert init.main(command) == 1
    assert "--force writes over it" in capsys.readouterr().err
    version = tmp_path / "models" / "m" / "1"
    (version / "stale").write_text("of the model that was there")
    assert init.main([*command, "--force"]) == 0
    assert [path.name for path in version.iterdir()] == ["model.onnx"]
    assert init.main([*command, "--version", "2", "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "models" / "m").iterdir()) == ["1", "2", "config.pbtxt"]


def other_model(tmp_path: Path, features: int) -> list[str]:
    """A command that gives model 'm' the pickle of another one."""
    iris(tmp_path / "other.pkl", features)
    return [str(tmp_path / "models"), str(tmp_path / "other.pkl"), "--name", "m"]


@pytest.mark.parametrize("version", ["1", "2"])
def test_force_leaves_a_configuration_that_fits_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    assert init.main(other_model(tmp_path, 4)) == 0
    path = tmp_path / "models" / "m" / "config.pbtxt"
    edited = path.read_text().replace("max_batch_size: 8", "max_batch_size: 5") + "# Mine.\n"
    path.write_text(edited)
    (path.parent / "1" / "before").touch()
    capsys.readouterr()
    assert init.main([*other_model(tmp_path, 4), "--version", version, "--force"]) == 0
    told = capsys.readouterr().out
    assert "config.pbtxt is as it was: change it there" in told and "up to 5 rows" in told
    assert path.read_text() == edited
    assert (path.parent / "1" / "before").exists() == (version == "2")


def test_force_breaks_no_other_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init.main(other_model(tmp_path, 4)) == 0
    folder = tmp_path / "models" / "m"
    before = (folder / "config.pbtxt").read_bytes()
    for flags in (["--version", "2"], ["--version", "2", "--force"]):
        assert init.main([*other_model(tmp_path, 2), *flags]) == 1
        told = capsys.readouterr().err
        assert "version 2 does not fit it: input 'X': FP32 [4] there, FP32 [2] in the file" in told
        assert "version 1 goes by it: --name gives the new one a model of its own" in told
    assert init.main([*other_model(tmp_path, 4), "--version", "2", "--force", "--max-batch-size", "3"]) == 1
    assert "--max-batch-size 3: the configuration that is there has 8" in capsys.readouterr().err
    assert (folder / "config.pbtxt").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt"]


@pytest.mark.parametrize("before", ["", "# Mine.\n", "name: "])
def test_a_configuration_that_no_version_goes_by_is_put_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str
) -> None:
    assert init.main(other_model(tmp_path, 4)) == 0
    path = tmp_path / "models" / "m" / "config.pbtxt"
    path.write_text(edited := before + path.read_text())
    assert init.main([*other_model(tmp_path, 2), "--version", "1", "--force"]) == 0
    told = capsys.readouterr().out
    assert "config.pbtxt is a new one, the old one is beside it as config.pbtxt.before: " in told
    assert (path.parent / "config.pbtxt.before").read_text() == edited
    assert [list(one.dims) for one in config.load(path).inputs] == [[2]]
    assert init.main([*other_model(tmp_path, 3), "--force"]) == 0
    assert (path.parent / "config.pbtxt.before").read_text() == edited, "nothing is lost by doing it again"
    assert (path.parent / "config.pbtxt.before-2").exists()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd(tmp_path / "m.onnx")
    (tmp_path / "models" / "m").mkdir(parents=True)
    assert init.main([str(tmp_path / "models"), str(tmp_path / "m.onnx")]) == 1
    assert f"'{tmp_path}/models/m' exists, and has no config.pbtxt" in capsys.readouterr().err


@pytest.mark.parametrize("most", [0, 5])
def test_another_version_leaves_the_configuration_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int
) -> None:
    iris(tmp_path / "m.pkl")
    command = [str(tmp_path / "models"), str(tmp_path / "m.pkl")]
    assert init.main([*command, "--max-batch-size", str(most)]) == 0
    path = tmp_path / "models" / "m" / "config.pbtxt"
    edited = path.read_text() + "# Mine.\n"
    path.write_text(edited)
    assert init.main([*command, "--version", "2"]) == 0
    assert "config.pbtxt is as it was: change it there" in capsys.readouterr().out
    assert path.read_text() == edited
    assert (path.parent / "2" / "model.onnx").is_file()
    iris(tmp_path / "other.pkl", features=2)
    other = [str(tmp_path / "models"), str(tmp_path / "other.pkl"), "--name", "m", "--version", "3"]
    assert init.main(other) == 1, "it does not fit"
    assert "input 'X': configured with shape" in capsys.readouterr().err
    assert not (path.parent / "3").exists()


def test_what_a_checkpoint_says_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.text(tmp_path / "tone", "bert", is_classifier=True)
    assert init.main([str(tmp_path / "models"), str(tmp_path / "tone"), "--max-batch-size", "4"]) == 1
    assert "--max-batch-size is of files, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("resnet.onnx", "resnet"),
        ("net.onnx", "models"),
        ("bert/model.onnx", "bert"),
        ("my net (2).onnx", "my_net__2"),
        ("ü.onnx", "ü"),
        ("-x.pt", "x"),
    ],
)
def test_a_model_is_called_as_its_file(path: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "models" / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert init._name_of(file) == name


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"preprocessor_config.json": '{"sampling_rate": 16000}', "vocab.txt": ""}, "audio"),
        ({"preprocessor_config.json": '{"image_mean": [0.5]}'}, "vision"),
        ({"tokenizer.json": "{}"}, "text"),
    ],
)
def test_a_checkpoint_is_of_what_prepares_its_inputs(files: dict[str, str], kind: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert initial.checkpoint_kind(tmp_path) == kind


@pytest.mark.parametrize(
    "names", [("monthly spend", "plan"), ("Age (years)", "größe"), ("2024", "c.d"), ("a b", "a_b")]
)
def test_columns_keep_their_names(names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    values, kinds = rng.standard_normal(60), rng.choice(["basic", "gold"], 60)
    frame = pyarrow.table(dict(zip(names, (values, kinds), strict=True)))
    encode = OneHotEncoder(handle_unknown="ignore")
    picking = ColumnTransformer([("n", StandardScaler(), [names[0]]), ("k", encode, [names[1]])])
    joblib.dump(make_pipeline(picking, LogisticRegression()).fit(frame, values > 0), tmp_path / "m.pkl")
    assert init.main([str(tmp_path / "models"), str(tmp_path / "m.pkl")]) == 0, capsys.readouterr().err
    made = config.load(tmp_path / "models" / "m" / "config.pbtxt")
    assert [one.name for one in made.inputs] == list(names)


def test_a_map_becomes_the_tensor_that_it_was_made_of(tmp_path: Path) -> None:
    with_maps(tmp_path / "iris.onnx")
    (told,) = maps.taken_off(tmp_path / "iris.onnx", tmp_path / "plain.onnx")
    assert told.startswith("'output_probability' was a map")
    given = {"X": np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)}
    _, mapped = onnxruntime.InferenceSession(tmp_path / "iris.onnx").run(None, given)
    _, plain = onnxruntime.InferenceSession(tmp_path / "plain.onnx").run(None, given)
    assert [[row[1], row[2]] for row in mapped] == plain.tolist()


def test_a_graph_without_maps_is_left_alone(tmp_path: Path) -> None:
    odd(tmp_path / "odd.onnx")
    assert maps.taken_off(tmp_path / "odd.onnx", tmp_path / "plain.onnx") == []
    assert not (tmp_path / "plain.onnx").exists()


def test_a_frames_columns_are_inputs_of_their_own_kind(tmp_path: Path) -> None:
    churn(tmp_path / "churn.pkl")
    made = columns.of(joblib.load(tmp_path / "churn.pkl"))
    assert [(one.name, one.kind, one.known) for one in made] == [
        ("age", "float", ()),
        ("plan", "text", ("basic", "gold")),
        ("door", "int64", (2, 4)),
    ]
    iris(tmp_path / "iris.pkl")
    assert columns.of(joblib.load(tmp_path / "iris.pkl")) == []


def test_an_onnx_file_needs_no_pytorch(tmp_path: Path) -> None:
    """Nor any other library of the extras'."""
    (tmp_path / "adder.onnx").write_bytes(onnx_add_one())
    arguments = ["init", str(tmp_path / "models"), str(tmp_path / "adder.onnx")]
    code = WITHOUT_EXTRAS % (EXTRAS, [arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "adder" / "config.pbtxt").is_file()
    assert "it answered in" in done.stdout
