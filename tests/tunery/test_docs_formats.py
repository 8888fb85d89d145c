"""The examples of docs/formats.md are read as the page says."""

import re
from pathlib import Path

import pytest

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import encoder_of_any, read_rows
from tunery.rows.shapes import FileShape

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```json (.+)\n(.+)\n```$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "row"), EXAMPLES)
def test_example_is_what_the_page_calls_it(name: str, row: str) -> None:
    shape, encoder = FileShape(), encoder_of_any("assistant")
    [source] = read_rows([row.encode()], "training", shape)
    if name.startswith("refused: "):
        with pytest.raises(InvalidTrainingFile, match=re.escape(name.removeprefix("refused: "))):
            encoder.parse(source, "training")
    else:
        assert encoder.parse(source, "training").unknown_keys == []
        assert shape.name == name


def test_page_has_an_example_of_every_kind() -> None:
    kinds = {name.partition(":")[0] for name, _ in EXAMPLES}
    assert {"chat messages", "ShareGPT", "Alpaca", "ChatML text", "plain text", "refused"} < kinds
    assert len(EXAMPLES) >= 12
