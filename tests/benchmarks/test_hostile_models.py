"""Random bad models beside a good one, in miniature."""

import random
from pathlib import Path

from benchmarks import hostile_models


def test_bad_models_cost_themselves_only(tmp_path: Path) -> None:
    outcome = hostile_models.run(count=10, seed=2, folder=tmp_path, pause_s=0.01)
    assert outcome.is_alive
    assert not outcome.wrong
    assert outcome.bad.total() == 10 and outcome.good > 10
    assert set(outcome.bad) == {"refused at load", "an error", "answers"}


def test_models_are_drawn_with_the_seed() -> None:
    drawn = [[hostile_models.hostile(rng, "m") for _ in range(30)] for rng in map(random.Random, (5, 5, 6))]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {one.what.split(" ")[0] for one in drawn[0]} == {"raises", "ends", "hangs", "answers", "harmless"}
