"""Preference rows: every shape is read as the prompt and the two answers that it means, or refused by name."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import CHATS, PAIRS, read_rows
from tunery.rows.preferences import Pair, parse_pair

SHAPES = Path("tests/data/shapes")
Turn = tuple[str, str | None]
HELLO = ([("user", "Say hello.")], "Hello!", "Go away.")
QUESTION = {"role": "user", "content": "q"}


def rows(*given: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in given)


def read(data: bytes) -> list[Pair]:
    return [parse_pair(row) for row in read_rows([data], "training")]


def said(data: bytes) -> list[tuple[list[Turn], str | None, str | None]]:
    return [
        ([(m.role, m.content) for m in p.messages[:-1]], p.messages[-1].content, p.dispreferred.content)
        for p in read(data)
    ]


def answers(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 4, texts, strict=False)]


@pytest.mark.parametrize("name", ["preference", "preference_openai", "preference_sharegpt"])
def test_file_with_a_prompt_is_read(name: str) -> None:
    assert said((SHAPES / f"refused_{name}.jsonl").read_bytes()) == [HELLO]


TAKEN: dict[str, tuple[dict[str, Any], Any]] = {
    "whole conversations": (
        answers(turns("a", "b", "c", "d"), turns("a", "b", "c", "e")),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "d", "e"),
    ),
    "conversations beside a prompt that they repeat": (
        {"prompt": "a", "messages": turns("a", "d"), "chosen": turns("a", "d"), "rejected": turns("a", "e")},
        ([("user", "a")], "d", "e"),
    ),
    "a list as the prompt": (
        {"prompt": turns("a", "b", "c"), **answers("d", "e")},
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "d", "e"),
    ),
    "a system column": (
        {"system": "s", "question": "q", **answers("d", "e")},
        ([("system", "s"), ("user", "q")], "d", "e"),
    ),
    "a system column beside conversations": (
        {"system": "s", "chosen": turns("a", "d"), "rejected": turns("a", "e")},
        ([("system", "s"), ("user", "a")], "d", "e"),
    ),
    "an instruction and its input": (
        {"instruction": "i", "input": "x", **answers("d", "e")},
        ([("user", "i\nx")], "d", "e"),
    ),
    "an input alone": ({"input": "x", **answers("d", "e")}, ([("user", "x")], "d", "e")),
    "the schema's names": (
        {
            "input": {"messages": [QUESTION]},
            "preferred_completion": [{"role": "assistant", "content": "d"}],
            "non_preferred_completion": [{"role": "assistant", "content": "e"}],
        },
        ([("user", "q")], "d", "e"),
    ),
    "ratings beside": (
        {"prompt": "q", **answers("d", "e"), "score_chosen": 9.0, "score_rejected": 2.0, "margin": 7},
        ([("user", "q")], "d", "e"),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_shape_becomes_the_pair_that_it_means(name: str) -> None:
    row, wanted = TAKEN[name]
    assert said(rows(row)) == [wanted]


def test_only_the_answer_is_learned() -> None:
    row = openai(D, E, turns("a", "b", "c"))
    [pair] = read(rows(row))
    for chat in (pair, pair.rejected):
        assert [message.is_trained for message in chat.messages] == [False, False, False, True]


def test_tools_of_the_input_are_offered() -> None:
    tool = {"type": "function", "function": {"name": "find_train"}}
    call = {"id": "c", "type": "function", "function": {"name": "find_train", "arguments": "{}"}}
    request = {"messages": [QUESTION], "tools": [tool], "parallel_tool_calls": False}
    preferred = [{"role": "assistant", "tool_calls": [call]}]
    [pair] = read(rows({"input": request, "preferred_output": preferred, "non_preferred_output": E}))
    assert [tool.function.name for tool in pair.tools or []] == ["find_train"]
    assert pair.messages[-1].tool_calls
    assert pair.parallel_tool_calls is False


D, E = turns("", "d")[1:], turns("", "e")[1:]


def openai(preferred: Any, other: Any, messages: Any = None, **beside: Any) -> dict[str, Any]:
    request = {"messages": [QUESTION] if messages is None else messages}
    return {"input": request, "preferred_output": preferred, "non_preferred_output": other, **beside}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (openai(D, D), "has two equal answers, so there is nothing to prefer. Correct one of them, or remove the row."),
    ({"prompt": "q", **answers("d", "d")}, "has two equal answers"),
    (openai(D, turns("", " ")[1:]), "has an empty answer (the other one). Give it a text, or remove the row."),
    (openai([], E), "'preferred_output' is empty. Give it one assistant message."),
    (openai(D, E + E), "'non_preferred_output' must be one assistant message, not 2."),
    (openai(D, [QUESTION]), "'non_preferred_output' must be a message with the role 'assistant'."),
    (openai(D, ["e"]), "A message must be an object, not a string."),
    (openai([{"role": "assistant", "content": 7}], E), "'preferred_output.content' must be a string"),
    (openai(D, [{"role": "assistant", "mood": "x", "content": "e"}]), "the unknown key 'non_preferred_output.mood'"),
    (openai([{**D[0], "weight": 0}], E), "'preferred_output' has the weight 0, but both answers are compared."),
    (openai(D, E, []), "The prompt has no message to answer. Add a user message."),
    (openai(D, E, turns("a", "b")), "The prompt ends with an assistant message. End it with the message to answer."),
    (openai(D, E, [{"role": "judge", "content": "x"}]), ', message 1 has the unknown role "judge".'),
    (openai(D, E, label=True), "has the key 'label', which marks the answer as good or bad (KTO)"),
    ({"preferred_output": D, "non_preferred_output": E}, "'input' is missing beside 'preferred_output'"),
    ({**openai(D, E), "input": ["q"]}, "'input' must be an object"),
    (answers("d", "e"), "There is no prompt: add 'prompt', or begin 'chosen' and 'rejected' with the user's message."),
    (
        {"chosen": turns("a", "d"), "rejected": turns("b", "e")},
        "'chosen' and 'rejected' must have the same messages but for the last, the answer.",
    ),
    (
        {"prompt": "another", "chosen": turns("a", "d"), "rejected": turns("a", "e")},
        "'prompt' would be ignored: it is not a message of 'chosen'.",
    ),
    ({"prompt": "q", "chosen": {"a": 1}, "rejected": "e"}, "'chosen' must be a message with the role 'assistant'."),
    ({"prompt": "q", "chosen": True, "rejected": "e"}, "'chosen' must be a text, not a boolean."),
    ({"prompt": "q", "completion": "a"}, "this is not a preference row, but the method 'dpo' learns from pairs"),
    ({"messages": turns("a", "b")}, "Use the method 'supervised' (method.type) for rows with one answer."),
    ({"prompt": "q", "chosen": "a"}, "this is a preference row (DPO) without one of its two answers."),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_wrong_pair_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([rows(row)], encoder=PAIRS)
    assert "Example 1" in refused.value.message
    assert reason in refused.value.message


def test_line_of_a_wrong_pair_is_its_own() -> None:
    good = openai(D, E)
    with pytest.raises(InvalidTrainingFile, match="Example 3 has two equal answers"):
        check_examples([rows(good, good, openai(D, D), good)], encoder=PAIRS)


@pytest.mark.parametrize("row", [openai(D, E), {"prompt": "q", **answers("d", "e")}])
def test_supervised_job_on_pairs_names_the_method(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidTrainingFile, match=r"this is a preference row \(DPO\).* Use the method 'dpo'"):
        check_examples([rows(row)], encoder=CHATS)


def test_columns_and_ratings_are_named_in_a_warning() -> None:
    row = {"prompt": "q", **answers("d", "e"), "score_chosen": 9.0}
    summary = check_examples([rows(row)], role="validation", encoder=PAIRS)
    assert summary.warnings(2048) == [
        "The file has chosen/rejected rows: 'prompt' as the user's message, 'chosen' as the preferred answer, "
        "'rejected' as the other answer.",
        "The rows have keys that are ignored in training: 'score_chosen'.",
    ]


def test_pairs_in_openais_format_need_no_warning() -> None:
    assert check_examples([rows(openai(D, E))], role="validation", encoder=PAIRS).warnings(2048) == []


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
VALUES = TEXT | st.none() | st.booleans() | st.integers() | st.lists(TEXT) | st.dictionaries(TEXT, TEXT)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value"]) | TEXT, VALUES))
KEYS = st.sampled_from(["input", "preferred_output", "non_preferred_output", "prompt", "chosen", "rejected", "system"])


@settings(max_examples=40)
@given(st.dictionaries(KEYS | TEXT, VALUES | MESSAGES | st.fixed_dictionaries({"messages": MESSAGES})))
def test_any_row_is_read_or_refused(row: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidTrainingFile):
        read(rows(row))
