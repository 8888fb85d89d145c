"""The memory estimate beside recorded peaks of the trainer's own runs."""

from typing import Any

import pytest

from bench import memory_errors

RECORDS = memory_errors.load()
ABOVE, UNDER = 0.10, 0.05
"""The most that an estimate may be above a measured peak, and under it."""


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_estimate_agrees_with_the_measured_peak(record: dict[str, Any]) -> None:
    """A record that is missed says by how much, and why: it may be missed no more than that, and no less."""
    error = memory_errors.error(record)
    if record["missed"] is not None:
        assert error == pytest.approx(record["missed"]["error"], abs=0.01)
        assert record["missed"]["why"]
    else:
        assert -UNDER <= error <= ABOVE


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_bound_is_under_the_measured_peak(record: dict[str, Any]) -> None:
    """What ran is never refused: with the shortest rows the least is no more than what was measured."""
    assert memory_errors.bound(record) <= record["measured"]


def test_records_are_of_every_kind() -> None:
    gpu = [record for record in RECORDS if record.get("device", "cuda") == "cuda"]
    assert len(gpu) >= 20
    missed = [record["name"] for record in RECORDS if record["missed"] is not None]
    assert len(missed) <= 1
    assert {record["technique"]["type"] for record in gpu} == {"full", "lora", "qlora"}
    assert {bool(record["facts"]["tie_word_embeddings"]) for record in gpu} == {True, False}
    assert any(record.get("ranks", 1) > 1 for record in gpu)
    assert any(record["facts"].get("counts", {}).get("experts") for record in RECORDS)


def test_constants_fitted_on_half_hold_on_the_other() -> None:
    """Those that are used are the fitted ones, to what 1 % of a peak is."""
    half = RECORDS[0::2]
    assert abs(memory_errors.fit(half, "cuda") - memory_errors.peak.WORKSPACE) <= 8 * memory_errors.MIB
    assert abs(memory_errors.fit(half, "cpu") - memory_errors.PROCESS_BYTES["cpu"]) <= 24 * memory_errors.MB
    for record in (one for one in RECORDS[1::2] if one["missed"] is None):
        assert -UNDER <= memory_errors.error(record) <= ABOVE
