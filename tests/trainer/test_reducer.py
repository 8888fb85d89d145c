"""Tests that two ranks have the sum of their gradients, each sent as soon as it is computed."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from reducing_rank import LOOKED_UP, SCENARIOS, VOCABULARY, WIDTH, backward, layers, spawn
from torch import nn

from tunery import processes
from worker.trainer import reducer
from worker.trainer.kernels import accumulation
from worker.trainer.parallel import Ranks

PARTS = {
    "plain": ((2, True), (2, True)),
    "uneven": ((0, True), (3, True)),
    "unused by one": ((1, False), (1, True)),
    "unused": ((1, False), (1, False)),
    "again": ((2, True), (2, True)),
    "twice again": ((2, True), (2, True)),
    "no room to send": ((2, True), (2, True)),
    "no room for rows": ((2, True), (2, True)),
    "head of one": ((2, True), (2, True)),
}
"""For each rank, its passes and whether they use the last layer."""
EARLY = {"plain": {0, 1}, "uneven": {1}, "unused by one": {1}, "unused": set(), "again": {0, 1},
         "twice again": {0, 1}, "no room to send": {0, 1}, "no room for rows": {0, 1},
         "head of one": {0, 1}}  # fmt: skip
"""The ranks that send some gradients during the last pass."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what each rank found in every scenario."""
    return spawn(tmp_path_factory.mktemp("ranks"), processes.free_port())


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_both_ranks_have_the_sum(found: list[dict[str, Any]], scenario: str) -> None:
    wanted = layers()
    for rank, (parts, odd) in enumerate(PARTS[scenario]):
        for part in range(parts):
            backward(wanted, rank, part, odd=odd, head=scenario == "head of one" and rank == 1)

    for rank, seen in enumerate(each[scenario] for each in found):
        for name, parameter in wanted.named_parameters():
            if parameter.grad is None:
                assert seen["grads"][name] is None, name
            else:
                torch.testing.assert_close(torch.tensor(seen["grads"][name]), parameter.grad)
        assert bool(seen["early"]) == (rank in EARLY[scenario])


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_rows_that_were_looked_up_are_sent_alone(found: list[dict[str, Any]], scenario: str) -> None:
    """To the bit as if the whole embedding were sent; as it is where one rank's passes use it otherwise too."""
    whole, rows = VOCABULARY * WIDTH, len(LOOKED_UP) * WIDTH
    for each in found:
        assert each[scenario]["grads"] == each[f"{scenario} whole"]["grads"]
        sent = [size for size in each[scenario]["sent"] if size in (whole, rows)]
        assert sent == [whole if scenario == "head of one" else rows]
        assert whole in each[f"{scenario} whole"]["sent"]


def test_gradients_are_put_off_until_a_pass_sends_them() -> None:
    """Recorded passes, in which nothing is sent, add those of adapters together on several ranks, too."""
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.zeros(3)
    ranks = cast(Ranks, SimpleNamespace(count=2, device=torch.device("cpu")))
    sends = reducer.Reducer(ranks, [parameter])
    with accumulation.together():
        assert accumulation.of(parameter, torch.ones(3)) is None
    assert parameter.grad.tolist() == [1, 1, 1]
    with sends.overlapping(), accumulation.together():
        assert accumulation.of(parameter, torch.ones(3)) is not None


def test_small_gradients_are_sent_together() -> None:
    """A group is complete with its last gradient, and must not keep those that are complete before it."""
    small = [nn.Parameter(torch.zeros(2**18)) for _ in range(40)]  # 1 MiB each
    large = [nn.Parameter(torch.zeros(2**20)) for _ in range(2)]

    found = reducer.buckets([large[0], *small[:20], large[1], *small[20:]])

    assert [len(bucket) for bucket in found] == [1, 32, 8, 1]
    assert found[0][0] is large[1]
    assert found[3][0] is large[0]
