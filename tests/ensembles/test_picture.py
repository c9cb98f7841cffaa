"""Pictures of random graphs, deep and wide, with names of any length: nothing overlaps, and no line crosses a box."""

import random
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.browser import look, needs_browser, unreadable
from tutti.ensembles import picture
from tutti.ensembles.cli import planned
from tutti.ensembles.conditions import parse
from tutti.ensembles.graph import Each, Plan, Step, TensorType
from tutti.ensembles.picture import WIDTH, Box, Picture, Text, layout

NAMES = ("a", "text_encoder", "Whisper.large-v3", "MODERATION_SCORE", "WWW" * 30, "audio_" * 9, "模型" * 20, "i" * 64)
SHAPES = {"deep": (40, 1, 2), "wide": (40, 40, 4), "usual": (12, 4, 3), "many": (60, 15, 8)}


def plan_of(rng: random.Random, steps: int, breadth: int, most_read: int) -> Plan:
    """Steps that read of those that are at most `breadth` before them, and of inputs."""
    tensors = {f"{rng.choice(NAMES)}.{n}": any_tensor(rng) for n in range(rng.randint(1, 5))}
    tensors["S"] = TensorType("FP32", (1,))
    inputs, producer, made = list(tensors), {}, []
    for index in range(steps):
        near = [name for one in made[-breadth:] for _, name in one.outputs]
        reads = rng.sample([*near, *inputs], min(len(near) + len(inputs), rng.randint(1, most_read)))
        outputs = [f"{rng.choice(NAMES)}.{index}.{n}" for n in range(rng.randint(1, 3))]
        tensors |= {name: any_tensor(rng) for name in outputs}
        needs = frozenset(producer[name] for name in reads if name in producer)
        producer |= dict.fromkeys(outputs, index)
        each = Each((reads[0],)) if rng.random() < 0.2 else None
        when = (
            parse("max(S) > 0.25 or S < -1e9 or " * rng.randint(0, 3) + "S == 0", {"S": ("FP32", (1,))})
            if rng.random() < 0.3
            else None
        )
        made.append(
            Step(
                index, rng.choice(NAMES), "", tuple((f"x{n}", name) for n, name in enumerate(reads)),
                tuple((f"y{n}", name) for n, name in enumerate(outputs)), needs, when=when, each=each,
                gathers=("concat",) * len(outputs) if each else (),
            )
        )  # fmt: skip
    readers = {name: tuple(step.index for step in made if name in step.read) for name in tensors}
    outputs = tuple(name for name in producer if not readers[name] or rng.random() < 0.1)  # type: ignore[assignment]
    return Plan("g", tuple(made), outputs, producer, readers, tensors)


def any_tensor(rng: random.Random) -> TensorType:
    dims = tuple(rng.choice((-1, 1, 224, 100_000)) for _ in range(rng.randint(1, 5)))
    return TensorType("FP32", dims, rng.choice((None, -1.5)), rng.choice(("always", "by row")))


def area(box: Box) -> tuple[float, float, float, float]:
    """With the sheets behind it."""
    behind = 6 if box.is_stacked else 0
    return box.x, box.y, box.x + box.width + behind, box.y + box.height + behind


def area_of(text: Text) -> tuple[float, float, float, float]:
    return text.x, text.y - 12, text.x + text.width, text.y + 4


def is_within(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3]


def do_meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def wrong_of(made: Picture) -> list[str]:
    """What is wrong in a picture."""
    found: list[str] = []
    found += ["boxes" for a, b in combinations(made.boxes, 2) if do_meet(area(a), area(b))]
    for box in made.boxes:
        found += ["texts" for a, b in combinations(box.texts, 2) if do_meet(area_of(a), area_of(b))]
        found += [f"outside: {text.text}" for text in box.texts if not is_within(area_of(text), area(box))]
    for text in made.headings:
        if not is_within(area_of(text), (0, 0, made.width, made.height)):
            found.append(f"outside: {text.text}")
        found += [f"over a box: {text.text}" for box in made.boxes if do_meet(area_of(text), area(box))]
    for edge in made.edges:
        for (x1, y1), (x2, y2) in zip(edge.points, edge.points[1:], strict=False):
            assert x1 == x2 or y1 == y2
            line = (min(x1, x2), min(y1, y2) - 0.1, max(x1, x2), max(y1, y2) + 0.1)
            found += [f"crossed by {edge.name}" for box in made.boxes if do_meet(line, area(box))]
            if line[0] < 2 or line[3] > made.height:
                found.append(f"out of the picture: {edge.name}")
    return found


def apart(made: Picture) -> bool:
    """No lane holds two tensors at one height."""
    lanes: dict[float, dict[str, tuple[float, float]]] = {}
    for edge in made.edges:
        (_, first), (x, _), (_, last), _ = edge.points
        own = lanes.setdefault(x, {})
        own[edge.name] = (first, max(last, own.get(edge.name, (first, last))[1]))
    return not any(a[0] <= b[1] and b[0] <= a[1] for own in lanes.values() for a, b in combinations(own.values(), 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_graphs(shape: str) -> None:
    rng = random.Random(shape)
    for _ in range(4):
        plan = plan_of(rng, *SHAPES[shape])
        made = layout(plan)
        assert wrong_of(made) == []
        assert apart(made)
        assert sorted(edge.name for edge in made.edges) == sorted(name for step in plan.steps for name in step.read)
        assert len(made.boxes) == len(plan.steps) + sum(name not in plan.producer for name in plan.tensors)
        lanes = {edge.points[1][0] for edge in made.edges}
        assert made.width == WIDTH or len(lanes) > 50
        ElementTree.fromstring(picture.draw(plan))


def test_edges_end_beside_the_text_that_names_them() -> None:
    plan = plan_of(random.Random(1), 12, 4, 3)
    made = layout(plan)
    line = 17
    for edge in made.edges:
        for (_, y), arrow in ((edge.points[0], "→"), (edge.points[-1], "←")):
            beside = [text.text for box in made.boxes for text in box.texts if text.y - line < y < text.y]
            assert beside
            start = beside[0].removeprefix(arrow).strip()
            assert edge.told.startswith(start[: len(edge.told)]) or start.split(",")[0] in edge.told, (beside, edge)


def test_the_sample_in_the_documentation(sample_repository: Path) -> None:
    shown = Path(__file__).parents[2] / "docs" / "content_intelligence.svg"
    drawn = picture.draw(planned(sample_repository, "content_intelligence"))
    assert shown.read_text(encoding="utf-8") == drawn, "tutti ensemble draw content_intelligence --output docs/..."


@needs_browser
def test_graphs_in_a_browser(tmp_path: Path) -> None:
    """Whose letters are as wide as they are: all within their boxes, and no type smaller than ten pixels."""
    rng = random.Random(5)
    pictures = "".join(f"<p>{picture.draw(plan_of(rng, *SHAPES[shape]))}" for shape in ("usual", "deep"))
    page = f"<!doctype html><html><style>body {{ margin: 4px }} svg {{ max-width: 100% }}</style>{pictures}</html>"
    for width in (400, 1280):
        told = look(page, width, tmp_path)
        assert unreadable(told) == {}
        assert told["texts"] > 100


def test_what_the_test_would_see() -> None:
    """Boxes moved into each other, a lane moved over them, and text that is too long are all told."""
    plan = plan_of(random.Random(2), 12, 4, 3)
    made = layout(plan)
    edge = made.edges[0]
    moved = [(x + 40, y) for x, y in edge.points]
    wide = Picture(made.width, made.height, made.boxes, [picture.Edge(edge.name, "", "", moved)], [])
    assert any(one.startswith("crossed") for one in wrong_of(wide))
    made.boxes[1].y -= 20
    assert "boxes" in wrong_of(made)
    long = picture.Text(made.boxes[2].x + 8, made.boxes[2].y + 20, "long " * 40, "made")
    made.boxes[2].texts = [long]
    assert f"outside: {long.text}" in wrong_of(made)
