"""Which models are too large for baselines on a CPU."""

import pytest
from known_models import LLAMA_8B
from rows import MODEL_INFO

from tunery.baselines.duration import warnings
from tunery.baselines.order import Order
from tunery.models.model import Model

LLAMA, TINY = Model(id="llama-8b", model_info=LLAMA_8B), Model(id="tiny", model_info=MODEL_INFO)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        # An answer has 400 tokens, of 2 x 7.5e9 operations each, at 40e9 a second: 150 s.
        (Order(max_rows=200), "about 17 hours; the limit is 4. Set max_rows to 10 for about an hour"),
        (Order(max_rows=200, shots=[0]), "about 8 hours; the limit is 4. Set max_rows to 22"),
        (Order(max_rows=24, shots=[0, 4], retrieval="nearest"), "about 3 hours; the limit is 4. Set max_rows to 6 "),
        (Order(max_rows=22, shots=[0]), None),
    ],
)
def test_a_large_model_is_warned_of(order: Order, said: str | None) -> None:
    found = warnings(order, [TINY, LLAMA])
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and found[0].startswith("'llama-8b' runs on the CPU"))


def test_a_model_of_unknown_sizes_is_not_judged() -> None:
    assert warnings(Order(), [Model(id="m", model_info={})]) == []
