"""The memory estimate, compared with recorded peaks of the trainer's own runs."""

from dataclasses import replace
from typing import Any

import pytest

from bench import memory_errors
from tunery.planning import expected
from tunery.planning.activations import find_path
from tunery.planning.expected import Load
from tunery.spec import Full, Lora

RECORDS = memory_errors.load()
ABOVE, UNDER = 0.10, 0.05
"""How far an estimate may be above a measured peak, and under it."""


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_estimate_agrees_with_the_measured_peak(record: dict[str, Any]) -> None:
    """A record outside these bounds states its error, which must still hold, and the reason."""
    error = memory_errors.error(record)
    if record["missed"] is not None:
        assert error == pytest.approx(record["missed"]["error"], abs=0.01)
        assert record["missed"]["why"]
    else:
        assert -UNDER <= error <= ABOVE


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_bound_is_under_the_measured_peak(record: dict[str, Any]) -> None:
    """What ran is never refused: the bound, which is for the shortest rows, is at most the measured peak."""
    assert memory_errors.bound(record) <= record["measured"]


def test_records_are_of_every_kind() -> None:
    gpu = [record for record in RECORDS if record.get("device", "cuda") == "cuda"]
    assert len(gpu) >= 20
    missed = [record["name"] for record in RECORDS if record["missed"] is not None]
    assert len(missed) <= 1
    assert {record["technique"]["type"] for record in gpu} == {"full", "lora", "qlora"}
    assert {bool(record["facts"]["tie_word_embeddings"]) for record in gpu} == {True, False}
    assert any(record.get("ranks", 1) > 1 for record in gpu)
    experts = {one["technique"]["type"] for one in gpu if one["facts"].get("counts", {}).get("experts")}
    assert experts == {"full", "lora"}
    assert any(record["technique"].get("use_dora") for record in gpu)
    eight_bits = {record["technique"]["type"] for record in gpu if record.get("optimizer") == "adamw_8bit"}
    assert eight_bits == {"full", "lora"}
    assert {"lora pairs", "full pairs", "lora scored", "full scored"} <= {record["name"] for record in gpu}


def test_layers_of_a_mixture_run_the_trainers_kernels_if_its_adapters_do() -> None:
    [record] = [record for record in RECORDS if record["name"] == "full moe"]
    of = memory_errors.setting(record)
    merged = replace(of.shape, unmerged=0)

    assert find_path(of.shape, Full(), of.precision) == find_path(of.shape, Lora(), of.precision) == "fused"
    assert find_path(merged, Full(), of.precision) == "fused"
    assert find_path(merged, Lora(), of.precision) == "plain"
    assert find_path(of.shape, Lora(use_dora=True), of.precision) == "plain"


def test_constants_fitted_on_half_hold_on_the_other() -> None:
    """The constants in use are the fitted ones, to within 1 % of a peak."""
    half = RECORDS[0::2]
    assert abs(memory_errors.fit(half, "cuda") - memory_errors.peak.WORKSPACE) <= 8 * memory_errors.MIB
    assert abs(memory_errors.fit(half, "cpu") - memory_errors.PROCESS_BYTES["cpu"]) <= 24 * memory_errors.MB
    for record in (one for one in RECORDS[1::2] if one["missed"] is None):
        assert -UNDER <= memory_errors.error(record) <= ABOVE


PLANS = [
    ("full 1B, a job", 1904, 7616, False, True),
    ("QLoRA 8B, a job", 1904, 7616, False, False),
    ("LoRA 8B in e4m3, a job", 1904, 7616, False, False),
    ("LoRA 1B, 32 uneven rows, a job", 1507, 10_720, False, False),
    ("QLoRA 1B, one card", 733, 4364, False, True),
    ("full 8B in pieces on two cards", 733, 2426, True, False),
]


@pytest.mark.parametrize(("name", "longest", "step", "recompute", "graphs"), PLANS, ids=[each[0] for each in PLANS])
def test_plan_is_the_one_that_the_run_took(name: str, longest: int, step: int, recompute: bool, graphs: bool) -> None:
    """Its file says which: all rows of a step at once on an H200, by what the trainer measured there."""
    [record] = [record for record in RECORDS if record["name"] == name]
    found = expected.plan(memory_errors.setting(record), Load(longest, step), int(139.8 * 2**30))
    assert found is not None
    assert (found.step.tokens, found.step.recompute > 0, found.step.graphs) == (step, recompute, graphs)
