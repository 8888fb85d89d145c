"""The table of docs/quotes.md is what its command prints, and the textbook's figures lie in our ranges."""

from pathlib import Path

import pytest

from bench import textbook
from tunery.planning.precision import BYTES, decide
from tunery.planning.prices import HOUR
from tunery.spec import Full

PAGE = Path(__file__).parents[2] / "docs/quotes.md"


def test_the_page_has_the_table_that_the_command_prints() -> None:
    assert "\n".join(textbook.table()) in PAGE.read_text()


@pytest.mark.parametrize("said", textbook.TEXTBOOK, ids=lambda said: f"{said.technique.type}-{said.base}")
def test_the_textbooks_figures_lie_in_the_quoted_ranges(said: textbook.Said) -> None:
    quote = textbook.quoted(said)
    assert quote.speed_from == "estimated"
    assert quote.tokens == said.rows * 2048 * 3
    assert quote.seconds.low <= said.hours * HOUR <= quote.seconds.high
    assert quote.cost is not None
    assert quote.cost.low <= said.dollars <= quote.cost.high


@pytest.mark.parametrize(("dtype", "gigabytes"), [("float32", 840), ("bfloat16", 420)])
def test_the_70b_line_needs_what_the_page_says(dtype: str, gigabytes: int) -> None:
    """The figures count weights and moments in fp32, and weights, gradients and 8-bit moments with weights in bf16."""
    precision = decide(Full.model_validate({"weights_dtype": dtype}), "cuda")
    gradients = 0 if dtype == "float32" else precision.trained_bytes
    assert 70 * (BYTES[precision.trained] + precision.moment_bytes + gradients) == gigabytes
