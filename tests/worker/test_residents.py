"""Models that are in memory, and those that make room for others."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from tunery import processes
from worker.server.residents import Residents


@dataclass
class Model:
    """A model of ten bytes."""

    nbytes: int = 10
    left: list[int] = field(default_factory=list)

    def leave(self) -> None:
        self.left.append(1)


def use(residents: Residents, name: str) -> Model:
    """Holds a model and releases it."""
    model = residents.hold(f"sha256 of {name}", name, 10, Model)
    residents.release(f"sha256 of {name}")
    return model


def test_least_recently_used_leaves() -> None:
    residents = Residents(budget=30)
    first = {name: use(residents, name) for name in "abc"}
    assert use(residents, "a") is first["a"]

    use(residents, "d")

    assert residents.names == ["c", "a", "d"]
    assert residents.nbytes == 30
    assert [first[name].left for name in "abc"] == [[], [1], []]
    assert use(residents, "b") is not first["b"]


def test_pinned_ones_stay() -> None:
    residents = Residents(budget=20, pinned=frozenset("a"))
    for name in "abcd":
        use(residents, name)
    assert residents.names == ["a", "d"]


def test_what_is_in_use_stays_even_above_the_budget() -> None:
    residents = Residents(budget=20)
    for name in "abc":
        residents.hold(name, name, 10, Model)
    assert residents.names == ["a", "b", "c"]
    for name in "abc":
        residents.release(name)
    use(residents, "d")
    assert residents.names == ["c", "d"]


def test_model_that_waits_is_loaded_once_others_are_released() -> None:
    residents = Residents(budget=10)
    residents.hold("a", "a", 10, Model)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(residents.hold, "b", "b", 10, Model, waits=True)
        assert not waits.done()
        residents.release("a")
        assert waits.result(timeout=20)
    assert residents.names == ["b"]


def test_versions_of_a_name_are_models_of_their_own() -> None:
    residents = Residents(budget=100)
    one = residents.hold("sha256 of the old files", "support", 10, Model)
    other = residents.hold("sha256 of the new files", "support", 10, Model)
    assert one is not other
    assert residents.hold("sha256 of the old files", "support", 10, Model) is one


def test_model_is_loaded_once_for_all_who_ask() -> None:
    residents, may_go = Residents(budget=100), threading.Event()
    loads: list[int] = []

    def load() -> Model:
        loads.append(1)
        assert may_go.wait(20)
        return Model()

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(residents.hold, "a", "a", 10, load) for _ in range(3)]
        assert processes.wait_until(lambda: bool(loads), seconds=20, alive=lambda: True)
        may_go.set()
        assert len({id(one.result(timeout=20)) for one in asked}) == 1
    assert len(loads) == 1


def test_load_that_breaks_is_tried_again_by_the_next() -> None:
    residents = Residents(budget=100)

    def broken() -> Model:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        residents.hold("a", "a", 10, broken)
    assert residents.nbytes == 0
    assert residents.hold("a", "a", 10, Model)
