"""The model server's measurements of its own answers."""

from typing import Any

import pytest

from tunery.serving import Chosen, Way
from worker.server.meter import Meter, way_of


def chosen(base: str = "b", *, adapter: str | None = None, full: str | None = None) -> Chosen:
    def files(id: str, **more: Any) -> dict[str, Any]:
        return {"id": id, "prefix": id, "manifest_sha256": "0" * 64, **more}

    named = adapter or full
    technique = "full" if full else "lora"
    return Chosen.model_validate({"base": files(base), "tuned": named and files(named, technique=technique)})


@pytest.mark.parametrize(
    ("together", "way"),
    [
        ([chosen(), chosen()], "merged"),
        ([chosen(full="f")], "merged"),
        ([chosen(adapter="x"), chosen(adapter="x")], "adapter"),
        ([chosen(adapter="x"), chosen(adapter="y")], "many_adapters"),
        ([chosen(adapter="x"), chosen()], "many_adapters"),
        ([chosen(full="f"), chosen(full="g")], "many_merged"),
        ([chosen(full="f"), chosen(adapter="x")], None),
    ],
)
def test_a_pass_counts_as_what_shared_it(together: list[Chosen], way: Way | None) -> None:
    assert way_of(together) == way


def test_passes_add_up_by_base_and_way() -> None:
    meter = Meter()
    for tokens, seconds in ((0, 1.0), (3, 0.5), (2, 0.5)):  # the first step reads prompts
        meter.count([chosen(), chosen()], tokens, seconds)
    meter.count([chosen(adapter="x")], 1, 0.25)
    meter.count([chosen("b"), chosen("other")], 2, 0.25)  # two bases: the time cannot be attributed to either
    assert [rate.model_dump() for rate in meter.rates] == [
        {"base": "b", "way": "merged", "tokens": 5, "seconds": 2.0, "passes": 3},
        {"base": "b", "way": "adapter", "tokens": 1, "seconds": 0.25, "passes": 1},
    ]
