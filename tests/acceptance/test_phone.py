"""Pages fit the screen of a phone: nothing is wider than it, and no text is too small to read."""

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from known_models import LLAMA_8B
from selenium import webdriver

from tunery.baselines import verdict
from tunery.baselines.table import Row
from tunery.planning import advice_page, serving_quote
from tunery.planning.advisor import advise
from tunery.planning.recommendation import Rows
from tunery.settings import Settings
from tunery.spec import Lora

pytestmark = [chromium.NEEDED, pytest.mark.slow]
WIDTH, SMALLEST = 360, 12
"""In CSS pixels: the narrowest usual screen, and the smallest readable font."""
WIDER = """
return [...document.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 120));
"""
SMALLER = """
return [...document.querySelectorAll("body *")]
    .filter(one => one.innerText && parseFloat(getComputedStyle(one).fontSize) < arguments[0])
    .map(one => one.outerHTML.slice(0, 120));
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    driver = chromium.start(tmp_path, phone=(WIDTH, 740))
    yield driver
    driver.quit()


def measured(model: str, **changes: object) -> Row:
    figures = {
        "way": "nearest", "model": model, "shots": 32, "rows": 200, "metric": "label_accuracy", "score": 0.985,
        "low": 0.951, "high": 0.996, "metrics": {}, "prompt_tokens": 12_345.6, "answer_tokens": 17,
        "cost_per_1000": 123.456, "p50_seconds": 1234.56, "device": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "verdict": "unsure",
    }  # fmt: skip
    return Row.model_validate(figures | changes)


def test_advice_can_be_read_on_a_phone(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Long cells break layouts, so the page has all its parts: reasons, table, settings, cards, prices of serving."""
    made = advise(Rows(total=12_345_678, usable=9_876_543, left_out={"duplicate": 7}, answer_tokens=10**9), "latency",
                  model_info=LLAMA_8B, bf16_fits=True)  # fmt: skip
    long = measured("ft:a-base-with-a-very-long-name:an-organisation:and-a-suffix-too:8fJ2kd91")
    rows = [long, measured("m", way="zero_shot", score=None, error="A prompt is longer than the model's context.")]
    serving = serving_quote.make(LLAMA_8B, Lora(), "NVIDIA H200", Settings())
    page = tmp_path / "advice.html"
    page.write_text(
        advice_page.render(
            "a-file-whose-name-has-no-blank-in-it-and-goes-on-and-on-2026-11-29.jsonl",
            "latency",
            made,
            measured=[verdict.cells(row) for row in rows],
            currency="USD",
            serving=serving,
        )
    )
    browser.get(page.as_uri())
    assert browser.execute_script("return innerWidth") == WIDTH
    assert browser.execute_script("return document.documentElement.scrollWidth") == WIDTH
    assert browser.execute_script(WIDER) == []
    assert browser.execute_script(SMALLER, SMALLEST) == []
    assert all(text in browser.page_source for text in ("Measured", "technique.type", "H200", "per million"))
