"""What answers should cost, by what a card reads and multiplies."""

from typing import Any

import pytest

from bench.textbook import BASES
from tunery.planning import serving_quote
from tunery.planning.serving_quote import ServingQuote
from tunery.settings import Settings
from tunery.spec import Full, Lora, Technique

SETTINGS = Settings(gpu_hour_prices={"H200": 3.6})


def make(technique: Technique | None = None, facts: dict[str, Any] = BASES["7B"], **asked: Any) -> ServingQuote:
    found = serving_quote.make(facts, technique or Lora(), "NVIDIA H200", SETTINGS, **asked)
    assert found is not None
    return found


def test_one_answer_at_a_time_reads_all_weights_for_each_token() -> None:
    weights, cache = 2 * 6_738_415_616, 1024 * 2 * 32 * 4096 * 2
    found = make(batch=1).merged
    assert found.tokens_per_second.expected == pytest.approx(0.6 * 4.8e12 / (weights + cache), abs=0.1)
    assert found.price_per_million_tokens is not None
    assert found.price_per_million_tokens.expected == pytest.approx(1000 / found.tokens_per_second.expected, rel=1e-3)


def test_a_batch_shares_the_reading_until_the_products_take_longer() -> None:
    one, many, most = (make(batch=batch).merged.tokens_per_second.expected for batch in (1, 16, 4096))
    assert 8 * one < many < 16 * one
    assert most <= 0.6 * 989e12 / (2 * 6_738_415_616) * 1.01


def test_a_merged_model_is_faster_and_many_adapters_share_one_base() -> None:
    found = make()
    assert found.adapter is not None
    assert found.many_adapters is not None
    assert found.merged.tokens_per_second.expected > found.adapter.tokens_per_second.expected
    assert (found.models, found.many_adapters.gpus, found.many_merged.gpus) == (20, 1, 2)  # 9 of 13.5 GB fit
    assert found.many_adapters.price_per_million_tokens is not None
    assert found.many_merged.price_per_million_tokens is not None
    ratio = found.many_merged.price_per_million_tokens.expected / found.many_adapters.price_per_million_tokens.expected
    assert 4 < ratio < 16


def test_a_full_fine_tune_has_no_adapter() -> None:
    found = make(Full())
    assert (found.adapter, found.many_adapters) == (None, None)


def test_what_is_not_known_is_not_quoted() -> None:
    assert serving_quote.make(BASES["7B"], Lora(), "CPU", SETTINGS) is None
    assert serving_quote.make(BASES["70B"], Lora(), "NVIDIA A10G", SETTINGS) is None
    abroad = serving_quote.make(BASES["7B"], Lora(), "NVIDIA H200", Settings(currency="EUR"))
    assert abroad is not None
    assert (abroad.merged.price_per_million_tokens, abroad.currency) == (None, "EUR")
