"""Which tokens `loss_on` trains, compared with transformers' own rendering of the same rows."""

from pathlib import Path
from typing import Any

import pytest
from templates import SHAPES, model_folder
from transformers import AutoTokenizer

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import encode_example, find_encoder
from tunery.rows.messages import Example, FileRole
from tunery.rows.template import IGNORED, ChatTemplate
from tunery.spec import LossOn, Supervised

TURNS = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
IN_ONE = sorted(SHAPES.keys() - {"qwen3"})
"""Templates that render earlier answers in the same way as the last one."""


def labels(template: ChatTemplate, turns: list[dict[str, Any]], loss_on: LossOn) -> list[tuple[list[int], list[int]]]:
    example = Example.model_validate({"messages": turns})
    encoder = find_encoder(Supervised(loss_on=loss_on), "training")
    encoded = encoder.encode(template, example, "example 1", max_length=1000)
    return [(row.input_ids, row.labels) for row in encoded.sequences]


@pytest.fixture(params=sorted(SHAPES))
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTemplate, Any]:
    folder = model_folder(tmp_path / "model", SHAPES[request.param])
    return ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)


def text_between(theirs: Any, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """The text of an answer in transformers' rendering, up to its end of turn."""
    prompt = theirs.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    return str(theirs.apply_chat_template(after, tokenize=False)).rstrip().removeprefix(prompt)


def test_last_assistant_teaches_the_last_answer_alone(both: tuple[ChatTemplate, Any]) -> None:
    template, theirs = both
    [(ids, found)] = labels(template, TURNS, "last_assistant")

    learned = [label for label in found if label != IGNORED]
    asked = theirs.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked
    assert found[: len(asked)] == [IGNORED] * len(asked)
    assert theirs.decode(learned) == text_between(theirs, TURNS[:3], TURNS)


def test_all_teaches_each_token_that_transformers_writes(both: tuple[ChatTemplate, Any]) -> None:
    template, theirs = both
    [(ids, found)] = labels(template, TURNS, "all")

    assert ids == theirs.apply_chat_template(TURNS, return_dict=False)
    assert found == ids


@pytest.mark.parametrize("both", IN_ONE, indirect=True)
def test_all_leaves_out_an_answer_of_weight_0(both: tuple[ChatTemplate, Any]) -> None:
    template, theirs = both
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    [(ids, found)] = labels(template, turns, "all")

    masked = [token for token, label in zip(ids, found, strict=True) if label == IGNORED]
    assert theirs.decode(masked) == text_between(theirs, TURNS[:1], TURNS[:2])
    assert [label for label in found if label != IGNORED] + masked != ids  # it lies in the middle


@pytest.mark.parametrize("both", ["qwen3"], indirect=True)
def test_all_names_a_row_whose_masked_answer_the_template_writes_twice(both: tuple[ChatTemplate, Any]) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]

    with pytest.raises(InvalidTrainingFile, match=r"Example 1: .* Write one row per answer"):
        labels(both[0], turns, "all")


def test_last_assistant_refuses_a_last_answer_of_weight_0(both: tuple[ChatTemplate, Any]) -> None:
    with pytest.raises(InvalidTrainingFile, match="Message 4, the last answer, has the weight 0"):
        labels(both[0], [*TURNS[:3], {**TURNS[3], "weight": 0}], "last_assistant")


@pytest.mark.parametrize("role", ["training", "validation"])
def test_default_is_what_encode_example_does(both: tuple[ChatTemplate, Any], role: FileRole) -> None:
    example = Example.model_validate({"messages": TURNS})
    found = find_encoder(Supervised(), role).encode(both[0], example, "example 1", max_length=1000, role=role)

    assert found == encode_example(both[0], example, "example 1", max_length=1000, role=role)
