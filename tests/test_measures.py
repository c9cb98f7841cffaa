"""The code stays readable: no figure of tests/measures.py gets worse."""

from pathlib import Path

import pytest

from tests.measures import LONG_FUNCTION, Measures, measures, sources


@pytest.fixture(scope="module")
def figures() -> Measures:
    return measures(sources())


def test_files_are_of_a_size_that_can_be_read(figures: Measures) -> None:
    assert len(figures.files) <= 5
    assert max(figures.files, default=(0, ""))[0] <= 550


def test_few_functions_are_long(figures: Measures) -> None:
    assert len(figures.functions) <= 10


def test_nothing_is_written_twice(figures: Measures) -> None:
    assert not figures.repeats


def test_names_that_say_nothing_become_fewer(figures: Measures) -> None:
    assert len(figures.names) < 60, "a noun says what it is"


def test_what_is_counted_is_found(tmp_path: Path) -> None:
    body = "\n".join(f"    value_{number} = compute_the_next({number})" for number in range(LONG_FUNCTION + 1))
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"def work(found):\n{body}\n" + "\n" * 400)
    found = measures(iter([tmp_path / "a.py", tmp_path / "b.py"]), tmp_path)
    assert [name for _, name in found.files] == ["a.py", "b.py"]
    assert [name for _, name in found.functions] == ["a.py: work", "b.py: work"]
    assert found.names == ["a.py:1 found", "b.py:1 found"]
    assert len(found.repeats) == 1
