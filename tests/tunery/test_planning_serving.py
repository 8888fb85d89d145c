"""The expected cost of answers, from a card's memory bandwidth and FLOPS."""

from typing import Any

import pytest

from bench.textbook import BASES
from tunery.planning import serving_quote
from tunery.planning.quote import Range
from tunery.planning.serving_quote import ServingQuote
from tunery.serving import Rate, Rates, Way
from tunery.settings import Settings
from tunery.spec import Full, Lora, Technique

SETTINGS = Settings(gpu_hour_prices={"H200": 3.6})


def make(technique: Technique | None = None, model_info: dict[str, Any] = BASES["7B"], **asked: Any) -> ServingQuote:
    found = serving_quote.make(model_info, technique or Lora(), "NVIDIA H200", SETTINGS, **asked)
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
    assert (found.models, found.many_adapters.gpus, found.many_merged.gpus) == (20, 1, 2)  # 10 of 13.5 GB fit on each
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


def rate(way: Way, *, base: str = "llama", tokens: int = 1000, seconds: float = 10, passes: int = 250) -> Rate:
    return Rate(base=base, way=way, tokens=tokens, seconds=seconds, passes=passes)


def of_rates(*measured: Rate, device: str = "NVIDIA H200") -> ServingQuote | None:
    found = Rates(device=device, rates=list(measured))
    return serving_quote.of_rates(found, "llama", BASES["7B"], Lora(), SETTINGS)


def test_what_the_model_server_has_measured_takes_the_guess_s_place() -> None:
    found, guessed = of_rates(rate("adapter"), rate("many_adapters", seconds=20)), make()
    assert found is not None
    assert found.adapter is not None
    assert (found.basis, found.adapter.basis, found.adapter.answers) == ("measured", "measured", 4.0)
    assert found.adapter.tokens_per_second == Range(low=100, expected=100, high=100)
    assert found.adapter.price_per_million_tokens == Range(low=10, expected=10, high=10)  # 3.6 an hour, 100 a second
    assert found.many_adapters is not None
    assert found.many_adapters.tokens_per_second.expected == 50
    assert (found.merged, found.many_merged) == (guessed.merged, guessed.many_merged)
    assert guessed.merged is not None
    assert (guessed.basis, guessed.merged.basis) == ("memory_bandwidth", "memory_bandwidth")


def test_a_cpu_is_quoted_by_what_it_has_answered_alone() -> None:
    found = of_rates(rate("merged"), device="cpu")
    assert found is not None
    assert found.merged is not None
    assert (found.device, found.merged.tokens_per_second.expected, found.adapter) == ("cpu", 100, None)
    assert found.merged.price_per_million_tokens is None


def test_rates_of_other_bases_and_of_few_tokens_are_no_measure() -> None:
    assert of_rates() is None
    assert of_rates(rate("merged", base="other")) is None
    assert of_rates(rate("merged", tokens=serving_quote.LEAST_TOKENS - 1)) is None
    assert serving_quote.of_rates(None, "llama", BASES["7B"], Lora(), SETTINGS) is None


def test_adapters_that_were_measured_are_no_quote_of_a_full_fine_tune() -> None:
    measured = Rates(device="cpu", rates=[rate("adapter"), rate("many_adapters"), rate("merged")])
    found = serving_quote.of_rates(measured, "llama", BASES["7B"], Full(), SETTINGS)
    assert found is not None
    assert (found.adapter, found.many_adapters) == (None, None)
    assert found.merged is not None


def test_a_quote_in_words_says_speed_price_and_where_they_are_from() -> None:
    found = dict(serving_quote.in_words(of_rates(rate("adapter"))))
    assert found["adapter"] == "100 tokens/s, 10 USD per million tokens, measured"
    assert list(found) == ["merged", "adapter", "20 models, merged", "20 models, adapters"]
    assert found["20 models, merged"].endswith("by the card's rates")
    assert "tokens/s, on 2 GPUs, " in found["20 models, merged"]
    alone = serving_quote.in_words(of_rates(rate("merged"), device="cpu"))
    assert alone == [("merged", "100 tokens/s, measured")]
    assert serving_quote.in_words(None) == []


def test_a_tiny_model_is_not_served_for_nothing() -> None:
    """A base of 40,000 weights answers some 300 million tokens a second on an H200."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 260, "params": 40_000}
    found = make(Full(), tiny)
    price = found.merged.price_per_million_tokens if found.merged else None
    assert price is not None
    assert 0 < price.low < price.expected < price.high < 0.001
    said = dict(serving_quote.in_words(found))["merged"]
    assert " 0 " not in said
    assert "e-" not in said
