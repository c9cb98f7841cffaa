"""Who may execute next where instances share resources: tables, and random runs against a slow, obvious oracle."""

import math
import random
from collections import Counter, defaultdict

import pytest

from tutti.core.errors import ConfigError
from tutti.repository.policies import GLOBAL, NO_LIMIT, Place, RateLimit, Resource
from tutti.scheduling.rate_limiting import RateLimiter, parse_supply


def limit(priority: int = 1, **needs: int) -> RateLimit:
    """Resources by name; those with a capital G are global."""
    resources = tuple(Resource(name, count, name.startswith("G")) for name, count in needs.items())
    return RateLimit(resources, priority)


def limiter(*limits: RateLimit, supply: list[str] | None = None, device: int = 0) -> RateLimiter:
    """Instances 0, 1, and so on."""
    made = RateLimiter(parse_supply(supply or []))
    for key, each in enumerate(limits):
        made.add(key, each, device)
    return made


def test_there_is_as_much_as_the_neediest_needs() -> None:
    made = limiter(limit(R1=4, R2=4), limit(R2=5, R3=10, R4=5), limit(R1=1, R3=7, R4=2))
    assert made.supply() == {("R1", 0): 4, ("R2", 0): 5, ("R3", 0): 10, ("R4", 0): 5}
    made.remove(1)
    assert made.supply() == {("R1", 0): 4, ("R2", 0): 4, ("R3", 0): 7, ("R4", 0): 2}


def test_what_is_given_holds_for_a_device_or_for_each() -> None:
    made = RateLimiter(parse_supply(["R1:10", "R2:5:0", "R2:8:1", "G3:2"]))
    for device in (0, 1):
        made.add(device, limit(R1=1, R2=1, G3=1), device)
    assert made.supply() == {
        ("R1", 0): 10, ("R2", 0): 5, ("R1", 1): 10, ("R2", 1): 8, ("G3", GLOBAL): 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "supply"),
    [
        ([], {}),
        (["a:1"], {("a", None): 1}),
        (["a:1:0", "a:2:0", "a:3:1", "b:0"], {("a", 0): 2, ("a", 1): 3, ("b", None): 0}),
    ],
)
def test_supply_is_parsed(texts: list[str], supply: dict[tuple[str, int | None], int]) -> None:
    assert parse_supply(texts) == supply


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:x", "a:-1", "a:1:", "a:1:x", "a:1:2:3", "a:1.5", "a:²"])
def test_supply_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME:COUNT or NAME:COUNT:DEVICE, got '"):
        parse_supply([text])


def test_a_need_that_can_never_be_met_is_refused_and_forgotten() -> None:
    made = limiter(limit(R=1), supply=["R:3"])
    with pytest.raises(ConfigError, match="resource 'R': an execution needs 4 on device 0, and --rate-limit-resource "):
        made.add("greedy", limit(R=4))
    assert made.ask(0) == [0] and made.supply() == {("R", 0): 3}


def test_a_resource_is_global_or_the_devices() -> None:
    made = limiter(RateLimit((Resource("R", 1),)))
    with pytest.raises(ConfigError, match="resource 'R' is global for one instance and a device's for another"):
        made.add("other", RateLimit((Resource("R", 1, is_global=True),)))
    with pytest.raises(ConfigError, match="is global for one"):
        limiter(RateLimit((Resource("Q", 1), Resource("Q", 1, is_global=True))))


def test_without_resources_nobody_waits() -> None:
    made = limiter(limit(R=1), limit(R=1), NO_LIMIT, NO_LIMIT)
    assert [made.ask(key) for key in (0, 1, 2, 3)] == [[0], [], [2], [3]]


def test_devices_have_their_own_and_share_what_is_global() -> None:
    made = RateLimiter()
    for device in (0, 1):
        made.add(("local", device), limit(R=1), device)
        made.add(("global", device), limit(G=1), device)
    assert made.ask(("local", 0)) == [("local", 0)] and made.ask(("local", 1)) == [("local", 1)]
    assert made.ask(("global", 0)) == [("global", 0)] and made.ask(("global", 1)) == []
    assert made.end(("global", 0)) == [("global", 1)]


def test_a_large_need_is_met_though_small_ones_never_cease() -> None:
    made = limiter(limit(R=4), limit(R=1), limit(R=1), limit(R=1))
    assert [made.ask(key) for key in (1, 2, 3, 0)] == [[1], [2], [3], []]
    assert made.end(1) == [] and made.ask(1) == []  # though one is free: it is kept for the one that needs four
    assert made.end(2) == [] and made.ask(2) == []
    assert made.end(3) == [0]
    assert made.end(0) == [1, 2]


def test_who_shares_nothing_with_one_that_waits_goes_on() -> None:
    made = limiter(limit(R=2), limit(R=2, Q=1), limit(Q=1), limit(S=1))
    assert made.ask(0) == [0]
    assert made.ask(1) == []
    assert made.ask(2) == []  # what 1 needs is kept for it
    assert made.ask(3) == [3]
    assert made.withdraw(1) == [2]


def test_who_has_paused_is_not_owed_anything() -> None:
    made = limiter(limit(R=1), limit(R=1))
    for _ in range(100):
        assert made.ask(0) == [0] and made.end(0) == []
    assert made.ask(0) == [0] and made.ask(1) == []
    turns = []
    executing = 0
    for _ in range(10):
        (executing,) = made.end(executing, asks_again=True)  # type: ignore[assignment]
        turns.append(executing)
    assert Counter(turns) == {0: 5, 1: 5}


def test_who_comes_late_begins_where_the_others_are() -> None:
    made = limiter(limit(R=1))
    (executing,) = made.ask(0)
    for _ in range(100):
        (executing,) = made.end(executing, asks_again=True)
    made.add(1, limit(R=1))
    assert made.ask(1) == []
    turns = []
    for _ in range(10):
        (executing,) = made.end(executing, asks_again=True)
        turns.append(executing)
    assert Counter(turns) == {0: 5, 1: 5}


def test_one_that_executes_may_be_removed() -> None:
    made = limiter(limit(R=1), limit(R=1))
    assert made.ask(0) == [0] and made.ask(1) == []
    assert made.remove(0) == [1]
    assert made.in_use() == {("R", 0): 1}
    assert made.remove(1) == [] and made.in_use() == {} and made.supply() == {}


def saturate(limits: list[RateLimit], executions: int, seed: int, devices: int = 1) -> Counter[int]:
    """Everybody asks again as soon as it has ended; executions end in random order."""
    rng = random.Random(seed)
    made = RateLimiter()
    for key, each in enumerate(limits):
        made.add(key, each, key % devices)
    executing = [begun for key in range(len(limits)) for begun in made.ask(key)]
    counts: Counter[int] = Counter()
    for _ in range(executions):
        key = executing.pop(rng.randrange(len(executing)))  # type: ignore[assignment]
        counts[key] += 1
        executing += made.end(key, asks_again=True)
    return counts


def test_one_that_goes_on_keeps_its_turn_by_its_priority() -> None:
    made = limiter(limit(1, R=1), limit(2, R=1))
    (executing,) = made.ask(0)
    assert made.ask(1) == []
    turns = []
    for _ in range(9):
        turns.append(executing)
        (executing,) = made.end(executing, asks_again=True)
    assert turns == [0, 1, 0, 1, 0, 0, 1, 0, 0]


def test_priority_2_has_half_of_the_chances_of_1_and_0_is_1() -> None:
    counts = saturate([limit(1, R=1), limit(2, R=1), limit(0, R=1)], 5_000, seed=1)
    assert [round(counts[key] / 1000, 2) for key in range(3)] == [2.0, 1.0, 2.0]


@pytest.mark.parametrize("seed", range(20))
def test_chances_under_saturation_are_those_of_the_priorities(seed: int) -> None:
    rng = random.Random(seed)
    priorities = [rng.randint(1, 5) for _ in range(rng.randint(2, 6))]
    counts = saturate([limit(priority, R=1) for priority in priorities], 6_000, seed)
    chances = sum(1 / priority for priority in priorities)
    for key, priority in enumerate(priorities):
        assert abs(counts[key] - 6_000 / priority / chances) <= 2


def test_a_busy_device_leaves_the_priorities_of_another_alone() -> None:
    """Executions on device 0 are many more than on device 1: each device has a clock of its own."""
    made = RateLimiter()
    for key, (priority, device) in enumerate([(1, 0), (2, 0), (1, 1), (2, 1)]):
        made.add(key, limit(priority, R=1), device)
    executing = {0: made.ask(0)[0], 1: made.ask(2)[0]}
    assert made.ask(1) == [] and made.ask(3) == []
    counts: Counter[int] = Counter()
    for step in range(31 * 300):
        device = int(step % 31 == 30)
        key = executing[device]  # type: ignore[assignment]
        counts[key] += 1
        (executing[device],) = made.end(key, asks_again=True)
    assert abs(counts[0] - 2 * counts[1]) <= 2 and abs(counts[2] - 2 * counts[3]) <= 2


class Oracle:
    """The same rules from the history alone: nothing is kept that could be worked out."""

    def __init__(
        self, needs: dict[int, dict[Place, int]], priorities: dict[int, int], supply: dict[Place, int]
    ) -> None:
        self.needs, self.priorities, self.supply = needs, priorities, supply
        self.waiting: list[tuple[int, int, int]] = []  # (count, number of the question, who)
        self.executing: list[int] = []
        self.begins: list[tuple[int, int]] = []  # (who, with which count)
        self.questions = 0

    def meets(self, key: int) -> set[int]:
        met = {key}
        while True:
            places = {place for each in met for place in self.needs[each]}
            more = met | {other for other, needs in self.needs.items() if places & set(needs)}
            if more == met:
                return met
            met = more

    def ask(self, key: int) -> list[int]:
        self.questions += 1
        met = self.meets(key)
        own = max((count + self.priorities[key] for who, count in self.begins if who == key), default=0)
        others = max((count for who, count in self.begins if who in met), default=0)
        self.waiting.append((max(own, others), self.questions, key))
        return self.begin()

    def withdraw(self, key: int) -> list[int]:
        self.waiting = [each for each in self.waiting if each[2] != key]
        return self.begin()

    def end(self, key: int, asks_again: bool = False) -> list[int]:
        self.executing.remove(key)
        return self.ask(key) if asks_again else self.begin()

    def begin(self) -> list[int]:
        begun: list[int] = []
        for each in sorted(self.waiting):
            count, _, key = each
            before = {place for other in sorted(self.waiting) if other < each for place in self.needs[other[2]]}
            used: Counter[Place] = Counter()
            for other in self.executing:
                used.update(self.needs[other])
            if before & set(self.needs[key]):
                continue
            if all(used[place] + needed <= self.supply[place] for place, needed in self.needs[key].items()):
                self.waiting.remove(each)
                self.executing.append(key)
                self.begins.append((key, count))
                begun.append(key)
        return begun


def random_limits(rng: random.Random) -> list[tuple[RateLimit, int]]:
    """(what it needs, its device)."""
    names = ["R", "Q", "S", "G", "GG"][: rng.randint(1, 5)]
    return [
        (
            limit(rng.randint(0, 3), **{name: rng.randint(1, 3) for name in names if rng.random() < 0.5}),
            rng.randint(0, 1),
        )
        for _ in range(rng.randint(1, 7))
    ]


@pytest.mark.parametrize("seed", range(300))
def test_random_runs_are_the_oracles(seed: int) -> None:
    rng = random.Random(seed)
    instances = random_limits(rng)
    supply = [f"{name}:{rng.randint(3, 5)}" for name in ("R", "G") if rng.random() < 0.5]
    made = RateLimiter(parse_supply(supply))
    for key, (each, device) in enumerate(instances):
        made.add(key, each, device)
    needs = {key: each.needs(device) for key, (each, device) in enumerate(instances)}
    priorities = {key: max(1, each.priority) for key, (each, _) in enumerate(instances)}
    oracle = Oracle(needs, priorities, made.supply())
    overtaken: dict[int, Counter[int]] = defaultdict(Counter)
    for _ in range(150):
        waiting = [key for _, _, key in oracle.waiting]
        idle = [key for key in needs if key not in waiting and key not in oracle.executing]
        choices = [("ask", (key,)) for key in idle] * 2 + [("end", (key,)) for key in oracle.executing]
        choices += [("end", (key, True)) for key in oracle.executing] * 2
        choices += [("withdraw", (key,)) for key in waiting if rng.random() < 0.1]
        action, given = rng.choice(choices)
        begun = getattr(made, action)(*given)
        assert begun == getattr(oracle, action)(*given)
        used: Counter[Place] = Counter()
        for executing in oracle.executing:
            used.update(needs[executing])
        assert made.in_use() == dict(used)
        assert all(count <= oracle.supply[place] for place, count in used.items())
        # Nobody is overtaken by another for long.
        overtaken.pop(given[0], None)
        for winner in begun:
            overtaken.pop(winner, None)
            for _, _, loser in oracle.waiting:
                if set(needs[winner]) & set(needs[loser]):
                    overtaken[loser][winner] += 1
                    most = 1 + math.ceil(priorities[loser] / priorities[winner])
                    assert overtaken[loser][winner] <= most
    while oracle.executing or oracle.waiting:
        assert oracle.executing, "those that wait would wait for ever"
        key = rng.choice(oracle.executing)
        assert made.end(key) == oracle.end(key)
    assert made.in_use() == {}


@pytest.mark.parametrize("seed", range(100))
def test_instances_may_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    made = RateLimiter()
    needs: dict[int, dict[Place, int]] = {}
    executing: set[int] = set()
    waiting: set[int] = set()
    for step in range(200):
        idle = needs.keys() - executing - waiting
        actions = ["add"] * (len(needs) < 6) + ["ask"] * bool(idle) * 3 + ["end"] * bool(executing) * 3
        action = rng.choice(actions + ["remove"] * bool(needs))
        before = made.in_use()
        if action == "add":
            ((each, device), *_) = random_limits(rng)
            needs[step] = each.needs(device)
            begun = made.add(step, each, device)
        elif action == "ask":
            key = rng.choice(sorted(idle))
            waiting.add(key)
            begun = made.ask(key)
        elif action == "end":
            key = rng.choice(sorted(executing))
            executing.remove(key)
            begun = made.end(key)
        else:
            key = rng.choice(sorted(needs))
            executing.discard(key)
            waiting.discard(key)
            begun = made.remove(key)
            del needs[key]
        assert set(begun) <= waiting
        waiting -= set(begun)
        executing |= set(begun)
        used: Counter[Place] = Counter()
        for each_key in executing:
            used.update(needs[each_key])
        assert made.in_use() == dict(used)
        # What was held when the neediest went may be more than there is now; nothing is added to it.
        assert all(used[place] <= max(made.supply()[place], before.get(place, 0)) for place in used)
        assert executing or not waiting
