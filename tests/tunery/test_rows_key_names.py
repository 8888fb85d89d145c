"""Keys of rows are known by their names, whatever their case and separators."""

import json
from typing import Any

import pytest

from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows import keys
from tunery.rows.encoding import parse_any, read_examples, read_rows
from tunery.rows.messages import Example
from tunery.rows.preferences import Pair
from tunery.rows.shapes import can_be_named

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR = {"Prompt": "q", "Completion": "a"}
TURNS = [("user", "q"), ("assistant", "a")]
BRIEF = ("system", "Be brief.")


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(row: dict[str, Any]) -> Example:
    [(_, example)] = read_examples([jsonl(row)], "training")
    return example


def turns(row: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in read(row).messages]


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([data])
    return refused.value.message


ASKED = {"question": "What is red?", "answer": "B"}
JUDGES = "marks the answer as good or bad (KTO)"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "Label": False}, f"has the key 'Label', which {JUDGES}"),
        ({**PAIR, "LABEL": "FALSE"}, f"has the key 'LABEL', which {JUDGES}"),
        ({**CHAT, "Label": False}, f"has the key 'Label', which {JUDGES}"),
        ({**CHAT, " label ": False}, f"has the key ' label ', which {JUDGES}"),
        ({**CHAT, "isDesirable": False}, f"has the key 'isDesirable', which {JUDGES}"),
        ({**CHAT, "Is desirable": True}, f"has the key 'Is desirable', which {JUDGES}"),
        ({**CHAT, "KTO-Tag": True}, f"has the key 'KTO-Tag', which {JUDGES}"),
        ({**CHAT, "is_good": False}, f"has the key 'is_good', which {JUDGES}"),
        ({**CHAT, "labels": False}, "has the key 'labels', which marks the answer as bad"),
        ({**CHAT, "feedback": False}, "has the key 'feedback', which marks the answer as bad"),
        ({**CHAT, "Feedback": "Bad"}, "has the key 'Feedback', which marks the answer as bad"),
        ({**CHAT, "isCorrect": 0}, "has the key 'isCorrect', which marks the answer as bad"),
        ({**CHAT, "isCorrect": 0.0}, "has the key 'isCorrect', which marks the answer as bad"),
        ({**CHAT, "isCorrect": "0.0"}, "has the key 'isCorrect', which marks the answer as bad"),
        ({**PAIR, "Weight": 0}, "has the key 'Weight', which weights the row"),
        ({**PAIR, "sampleWeight": 0.5}, "has the key 'sampleWeight', which weights the row"),
        ({**PAIR, "Score": 1}, "has the key 'Score', which rates the answer"),
        ({**PAIR, "Rejected": "b"}, "this is a preference row (DPO) without one of its two answers"),
        ({**PAIR, "Chosen": "a", "Rejected": "b"}, "this is a preference row (DPO), but the job's method"),
        ({**CHAT, "SYSTEM": "Be brief."}, "has the key 'SYSTEM', which would be ignored"),
        ({"text": "Good.", "Label": False}, f"has the key 'Label', which {JUDGES}"),
        ({**PAIR, "prompt": "x"}, "'Prompt' and 'prompt' are two spellings of the same key"),
        ({**CHAT, "Messages": []}, "'messages' and 'Messages' are two spellings of the same key"),
        ({**PAIR, "weight": 0, "Weight": 1}, "'weight' and 'Weight' are two spellings of the same key"),
    ],
)
def test_key_that_changes_the_meaning_is_known_in_any_case(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(jsonl(row))


@pytest.mark.parametrize("value", [True, False, "true", " False", "undesirable", "thumbs_up", "👎"])
def test_a_label_that_judges_the_answer_is_refused(value: object) -> None:
    reason = refusal(jsonl({**PAIR, "label": value}))
    assert f"has the key 'label', which {JUDGES}" in reason
    assert not can_be_named(reason)


@pytest.mark.parametrize("value", [0, 1, -1, 1.0, 0.7, "1", "No", "y", "positive", "Wrong"])
def test_a_label_that_may_judge_the_answer_is_refused_with_both_ways_out(value: object) -> None:
    reason = refusal(jsonl({**PAIR, "label": value}))
    assert "has the key 'label', which may mark the answer as good or bad (KTO)" in reason
    assert reason.endswith("If it is a class, name the columns to read in the job's 'columns'.")
    assert can_be_named(reason)


@pytest.mark.parametrize("value", ["math", "maths 1", 7, 3.0, ["a", "b"], {"topic": "math"}])
def test_a_label_that_cannot_judge_an_answer_is_its_class(value: object) -> None:
    for row in ({**PAIR, "label": value}, {**CHAT, "Label": value}):
        assert turns(row) == TURNS
        assert [keys.name(key) for key in read(row).unknown_keys] == ["label"]
    assert JUDGES in refusal(jsonl({**PAIR, "kto_tag": value}))


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "score": 1},
        {**PAIR, "weight": 0},
        {**PAIR, "images": ["x"]},
        {**ASKED, "choices": ["Grass", "Blood"]},
        {"prompt": "q", "chosen": "a"},
        {**PAIR, "prompt": "x"},
        {"Frage": "q", "Antwort": "a", "label": False},
        {"Frage": "q", "Antwort": "a", "rating": 3},
    ],
)
def test_faults_of_keys_that_a_job_can_leave_out_say_so(row: dict[str, Any]) -> None:
    reason = refusal(jsonl(row))
    assert can_be_named(reason)
    assert reason.count("'columns'") == 1


def test_bad_answers_of_a_table_are_no_good_ones() -> None:
    rows = "".join(f"Question {number}?,A bad answer,FALSE\n" for number in range(12))
    assert f"has the key 'Label', which {JUDGES}" in refusal(f"Prompt,Completion,Label\n{rows}".encode())


UNSEEN = "would be ignored, but the answer is the letter or number of a choice"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({**ASKED, "choices": ["Grass", "Blood"]}, "choices"),
        ({**ASKED, "answer": 1, "Options": ["Grass", "Blood"]}, "Options"),
        ({**ASKED, "answer": "(b)", "choices": {"text": ["Grass", "Blood"], "label": ["A", "B"]}}, "choices"),
        ({**ASKED, "choices": '["Grass", "Blood"]'}, "choices"),
        ({**ASKED, "question": "Is grass red?", "choices": ["Grass", "Blood"]}, "choices"),
        ({**ASKED, "A": "Grass", "B": "Blood"}, "B"),
        ({**ASKED, "answer": 2, "optionA": "Grass", "optionB": "Blood"}, "optionA"),
    ],
)
def test_a_choice_that_the_question_does_not_show_is_no_answer(row: dict[str, Any], key: str) -> None:
    assert f"has the key '{key}', which {UNSEEN}" in refusal(jsonl(row))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is red?\nA) grass\nB) blood", "answer": "B", "choices": ["Grass", "Blood"]},
        {"question": "What is red?", "answer": "Blood", "choices": ["Grass", "Blood"]},
        {"question": "How many are red?", "answer": "2", "a": "Colours", "candidates": 3},
        {**CHAT, "messages": [*CHAT["messages"][:1], {"role": "assistant", "content": "Blood"}], "choices": ["Grass"]},
    ],
)
def test_choices_that_are_shown_or_not_needed_are_ignored(row: dict[str, Any]) -> None:
    assert read(row).unknown_keys


def test_two_columns_of_one_name_are_refused_though_one_is_empty() -> None:
    assert "'Prompt' and 'prompt' are two spellings" in refusal(b"Prompt,prompt,completion\nq,,a\n,x,a\n")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"SYSTEM": "Be brief.", "USER": "q", "ASSISTANT": "a"}, [BRIEF, *TURNS]),
        ({"systemPrompt": "Be brief.", **PAIR}, [BRIEF, *TURNS]),
        ({"CONTEXT": "c", **PAIR}, [("user", "c\n\nq"), ("assistant", "a")]),
        ({"Messages": CHAT["messages"]}, TURNS),
        ({"Conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TURNS),
        ({"Text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"}, TURNS),
        ({"Text": "Once."}, [("assistant", "Once.")]),
        ({"Text": "q", "Label": "a"}, TURNS),
        ({"Text": "q", "Label": 3}, [("user", "q"), ("assistant", "3")]),
        ({"Text": "q", "Label Text": "a", "Label": 3}, TURNS),
        ({**CHAT, "labels": ["billing"], "feedback": True, "is_correct": "yes"}, TURNS),
        ({**CHAT, "labels": 0}, TURNS),
        ({**CHAT, "id": 1, "ID": 2}, TURNS),
    ],
)
def test_parts_of_a_row_are_known_in_any_case(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


def test_tools_are_known_in_any_case() -> None:
    tools = read({**CHAT, "Tools": [{"type": "function", "function": {"name": "f"}}]}).tools
    assert [tool.function.name for tool in tools or ()] == ["f"]


@pytest.mark.parametrize(
    "row",
    [
        {"Prompt": "q", "Chosen": "a", "Rejected": "b"},
        {
            "Input": {"messages": [{"role": "user", "content": "q"}]},
            "Preferred_Output": [{"role": "assistant", "content": "a"}],
            "Non_Preferred_Output": [{"role": "assistant", "content": "b"}],
        },
    ],
)
def test_pairs_are_known_in_any_case(row: dict[str, Any]) -> None:
    [pair] = [parse_any(source, "training") for source in read_rows([jsonl(row)], "training")]
    assert isinstance(pair, Pair)
    assert [message.content for message in (*pair.messages, pair.dispreferred)] == ["q", "a", "b"]


SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
LED = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]


@pytest.mark.parametrize(
    "row",
    [{"conversations": SHAREGPT}, {"messages": LED}, {"prompt": LED[:2], "completion": "a"}],
    ids=["ShareGPT", "chat", "prompt"],
)
def test_system_text_of_its_own_column_is_kept_or_refused(row: dict[str, Any]) -> None:
    assert turns({**row, "system": "Be brief.\n"}) == [BRIEF, *TURNS]
    assert "'system'" in refusal(jsonl({**row, "system": "Be kind."}))
