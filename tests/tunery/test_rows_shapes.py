"""Shapes of rows: one fixture each, read as in the trainer and compared with the conversation that it means."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import read_examples
from tunery.rows.shapes import can_be_named

SHAPES = Path(__file__).parents[1] / "data/shapes"
Turn = tuple[str, str | None]

HARBOUR = ("user", "Which way to the harbour?")
BRIEF = ("system", "Be brief.")
WAY = [("user", "Which way?"), ("assistant", "Left.")]
TRAIN = [("user", "A train to Brugg?"), ("assistant", None), ("tool", "08:12"), ("assistant", "At 08:12.")]

TAKEN: dict[str, tuple[str | None, list[list[Turn]]]] = {
    "chat": (
        None,
        [
            [HARBOUR, ("assistant", "Left at the mill, then straight on.")],
            [BRIEF, ("user", "And back?"), ("assistant", "The same way.")],
        ],
    ),
    "chat_tools": (None, [TRAIN]),
    "sharegpt": (
        "ShareGPT rows: 'conversations' as the conversation, 'system' as the system message",
        [
            [BRIEF, HARBOUR, ("assistant", "Left at the mill.")],
            [("system", "Answer in rhyme."), ("user", "Moon?"), ("assistant", "Soon.")],
        ],
    ),
    "sharegpt_roles": ("ShareGPT rows: 'conversations' as the conversation", [WAY]),
    "sharegpt_messages": ("ShareGPT rows: 'messages' as the conversation", [WAY]),
    "sharegpt_tools": (
        "ShareGPT rows: 'conversations' as the conversation",
        [
            TRAIN,
            [
                ("user", "To Brugg and to Olten?"),
                ("assistant", None),
                ("tool", "08:12"),
                ("tool", "08:40"),
                ("assistant", "At 08:12 and 08:40."),
            ],
        ],
    ),
    "alpaca": (
        "Alpaca rows: 'system' as the system message, 'history' as earlier turns, 'instruction' as the user's message, "
        "'input' as text after it, 'output' as the answer",
        [
            [("user", "Name the plural.\nmouse"), ("assistant", "mice")],
            [
                BRIEF,
                ("user", "Name a lake."),
                ("assistant", "The Maschsee."),
                ("user", "Name a river in Lower Saxony."),
                ("assistant", "The Leine."),
            ],
        ],
    ),
    "prompt_completion": (
        "prompt/completion rows: 'system' as the system message, 'prompt' as the user's message, 'completion' as the "
        "answer",
        [
            [("user", "The sky is"), ("assistant", " blue.")],
            [("system", "Finish the sentence."), ("user", "Snow is"), ("assistant", " white.")],
        ],
    ),
    "prompt_completion_messages": (
        "prompt/completion rows: 'prompt' as the user's message, 'completion' as the answer",
        [[("user", "Two?"), ("assistant", "Three."), ("user", "Four?"), ("assistant", "Five.")]],
    ),
    "prompt_response": (
        "prompt/response rows: 'prompt' as the user's message, 'response' as the answer",
        [[("user", "Say hello in Danish."), ("assistant", "Hej!")]],
    ),
    "instruction_response": (
        "instruction/response rows: 'context' as text before the question, 'instruction' as the user's message, "
        "'response' as the answer",
        [
            [("user", "She put a plum on the plate.\n\nWhich word names the fruit?"), ("assistant", "plum")],
            [("user", "Name a fruit."), ("assistant", "Pear.")],
        ],
    ),
    "input_output": (
        "input/output rows: 'input' as the user's message, 'output' as the answer",
        [[("user", "3 + 4"), ("assistant", "7")]],
    ),
    "question_answer": (
        "question/answer rows: 'context' as text before the question, 'question' as the user's message, 'answer' as "
        "the answer",
        [
            [("user", "The tower is 98 m high.\n\nHow high is it?"), ("assistant", "98 m")],
            [("user", "What is 6 times 7?"), ("assistant", "42")],
        ],
    ),
    "question_answer_columns": (
        "question/answer rows: 'Question' as the user's message, 'Answer' as the answer",
        [[("user", "What is a quay?"), ("assistant", "A place where ships are loaded.")]],
    ),
    "query_response": (
        "query/response rows: 'query' as the user's message, 'response' as the answer",
        [[("user", "opening hours"), ("assistant", "Nine to five.")]],
    ),
    "system_user_assistant": (
        "user/assistant rows: 'system' as the system message, 'user' as the user's message, 'assistant' as the answer",
        [[BRIEF, *WAY]],
    ),
    "text_label": (
        "text/label rows: 'text' as the user's message, 'label' as the answer",
        [
            [("user", "The card was swallowed by the machine."), ("assistant", "card_swallowed")],
            [("user", "Where is my transfer?"), ("assistant", "transfer_pending")],
        ],
    ),
    "text_label_numbers": (
        "text/label_text rows: 'text' as the user's message, 'label_text' as the answer",
        [[("user", "Where is my transfer?"), ("assistant", "transfer_pending")]],
    ),
    "plain_text": (
        "plain text rows: every token of 'text' is learned, and the end token after it",
        [[("assistant", "Once there was a miller who had three sons.")]],
    ),
    "sharegpt_weights": ("ShareGPT rows: 'conversations' as the conversation", [[BRIEF, *WAY]]),
    "sharegpt_exchanges": (
        "ShareGPT rows: 'conversation' as the conversation",
        [[BRIEF, *WAY, ("user", "And back?"), ("assistant", "The same way.")]],
    ),
    "alpaca_blank": (
        "Alpaca rows: 'system' as the system message, 'history' as earlier turns, 'instruction' as the user's message, "
        "'input' as text after it, 'output' as the answer",
        [
            [("user", "Name a fruit."), ("assistant", "Pear.")],
            [("user", "Name a lake."), ("assistant", "The Maschsee.")],
        ],
    ),
    "chatml": ("ChatML text rows: 'text' as the conversation", [[BRIEF, *WAY]]),
    "chatml_marked": ("ChatML text rows: 'text' as the conversation", [[BRIEF, *WAY], WAY]),
}


def said(data: bytes) -> list[list[Turn]]:
    examples = (example for _, example in read_examples([data], "training"))
    return [[(message.role, message.content) for message in example.messages] for example in examples]


def fixture(name: str) -> bytes:
    return (SHAPES / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", TAKEN)
def test_shape_becomes_the_conversation_that_it_means(name: str) -> None:
    described, conversations = TAKEN[name]
    assert said(fixture(name)) == conversations
    assert check_examples([fixture(name)], role="validation").shape.describe() == described


REFUSED = {
    "refused_preference": "this is a preference row (DPO)",
    "refused_preference_openai": "this is a preference row (DPO)",
    "refused_preference_lists": "this is a preference row (DPO)",
    "refused_preference_sharegpt": "this is a preference row (DPO)",
    "refused_kto": "has the key 'label', which marks the answer as good or bad (KTO)",
    "refused_kto_chat": "has the key 'kto_tag', which marks the answer as good or bad (KTO)",
    "refused_label_true": "has the key 'label', which marks the answer as good or bad (KTO)",
    "refused_two_answers": "each of 'response', 'answer' may be the answer. Keep one and remove",
    "refused_two_questions": "each of 'prompt', 'instruction' may be the question. Keep one and remove the others, or "
    "name the columns to use in the job's 'columns'.",
    "refused_rendered_llama2": "'text' begins with '[INST]', so a chat template has already rendered it.",
    "refused_rendered_llama3": "'text' begins with '<|start_header_id|>', so a chat template has already rendered it.",
    "refused_message_a_line": 'the row is a single message. Write each conversation as one row, {"messages": [...]}.',
    "refused_text_of_a_role": "the row is a single message. Write each conversation as one row",
    "refused_text_intent": "'intent' may be the class of 'text', or only describe it. Name 'text' as the prompt and",
    "refused_sentence_label": "The row has 'sentence', 'label'; pairs such as prompt/completion",
    "refused_rows_in_object": "'data' is a list of rows: send this list alone, as a JSON array.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_shape_that_cannot_be_trained_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        said(fixture(name))
    assert "Example 1" in refused.value.message
    assert REFUSED[name] in refused.value.message


@pytest.mark.parametrize("name", ["refused_two_answers", "refused_two_questions", "refused_text_intent"])
def test_a_file_whose_columns_a_job_can_name_may_be_uploaded(name: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        said(fixture(name))
    assert can_be_named(refused.value.message)


def test_every_fixture_is_judged() -> None:
    assert {path.stem for path in SHAPES.iterdir()} == {*TAKEN, *REFUSED}


def rows(*given: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in given)


PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PAIR, CHAT, "expected prompt/completion as in example 1: this row has the shape chat messages."),
        (CHAT, PAIR, "expected chat messages as in example 1: this row has the shape prompt/completion."),
        (PAIR, {"prompt": "q"}, "expected prompt/completion as in example 1: the key 'completion' is missing."),
        (PAIR, {"prompt": "q", "completion": None}, "the key 'completion' is missing."),
        (PAIR, {"prompt": "q", "chosen": "a", "rejected": "b"}, "this row has the shape chosen/rejected."),
        (PAIR, {"prompt": "q", "chosen": "a"}, "this is a preference row (DPO) without one of its two answers."),
        (PAIR, {**PAIR, "label": False}, "marks the answer as good or bad (KTO)"),
        (PAIR, {**PAIR, "completion": {"a": 1}}, "'completion' must be a text, not an object."),
        (PAIR, {**PAIR, "completion": True}, "'completion' must be a text, not a boolean."),
        (PAIR, {**PAIR, "history": "q"}, "'history' must be a list, or a JSON list written as a string"),
        (PAIR, {**PAIR, "history": [["q"]]}, "'history' must be a list of pairs"),
    ],
)
def test_first_row_decides_for_the_file(first: dict[str, Any], second: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        said(rows(first, second))
    assert "Example 2" in refused.value.message
    assert reason in refused.value.message


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"from": "narrator", "value": "x"}], "message 1 of 'conversations' has the unknown speaker 'narrator'"),
        ([{"value": "x"}], "message 1 of 'conversations' has no speaker"),
        (["x"], "message 1 of 'conversations' must be an object, not a string."),
        ([{"from": "human", "value": {"a": 1}}], "message 1 of 'conversations' must have a text in 'value', not an"),
        ([{"from": "function_call", "value": "f(1)"}], "message 1 of 'conversations' 'function_call' must be a list"),
        ([{"from": "function_call", "value": "[1]"}], "message 1 of 'conversations' must be a call"),
        ([{"from": "human", "value": "q", "mood": "x"}], "message 1 has the unknown key 'mood'"),
        ("x", "'conversations' must be a list, or a JSON list written as a string"),
        (7, "'conversations' must be a list of messages, not a number."),
    ],
)
def test_fault_of_a_conversation_names_its_message(turns: Any, reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        said(rows({"conversations": turns}))
    assert reason in refused.value.message


def test_result_of_a_call_may_be_any_value() -> None:
    for value, text in (({"é": 1}, '{"é": 1}'), ([1, 2], "[1, 2]"), (7, "7"), ("x", "x")):
        turns = [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": {"name": "f", "arguments": {}}},
            {"from": "observation", "value": value},
            {"from": "gpt", "value": "a"},
        ]
        assert said(rows({"conversations": turns})) == [
            [("user", "q"), ("assistant", None), ("tool", text), ("assistant", "a")]
        ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "'prompt' must be a text or a list of messages, but is a"),
        (
            {"instruction": "q", "output": ["a", "b"]},
            "'output' must be a text or a list of messages, but is a",
        ),
        ({"prompt": {"0": "a"}, "completion": {"0": "b"}}, "must be a text, not a column of texts."),
        ({"text": ["a", "b"]}, "every value of the row ('text') is a list."),
        ({"messages": [CHAT["messages"]]}, "'messages' is a list of conversations."),
    ],
)
def test_a_table_by_its_columns_is_called_that(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        said(rows(row))
    assert reason in refused.value.message
    assert "write an object for each row" in refused.value.message


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("<|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>", [("user", "q"), ("assistant", "a")]),
        (
            " <|im_start|>user\n q \n<|im_end|>\n\n<|im_start|>assistant\na<|im_end|>\n ",
            [("user", " q \n"), ("assistant", "a")],
        ),
        (
            "<|im_start|>user\nWhat is <|im_start|>?<|im_end|>\n<|im_start|>assistant\n<|im_end|>",
            [("user", "What is <|im_start|>?"), ("assistant", "")],
        ),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na", None),
        ("<|im_start|>user\nq<|im_end|> x <|im_start|>assistant\na<|im_end|>", None),
        ("<|im_start|>user q<|im_end|>", None),
    ],
)
def test_chatml_is_whole_turns(text: str, turns: list[Turn] | None) -> None:
    if turns is None:
        with pytest.raises(InvalidTrainingFile, match="must be whole turns of ChatML"):
            said(rows({"text": text}))
    else:
        assert said(rows({"text": text})) == [turns]


def test_calls_and_their_answers_have_the_same_ids() -> None:
    _, (_, example) = read_examples([fixture("sharegpt_tools")], "training")
    calls = example.messages[1].tool_calls or []
    assert [call.id for call in calls] == [message.tool_call_id for message in example.messages[2:4]]
    assert [call.function.arguments for call in calls] == ['{"to": "Brugg"}', '{"to": "Olten"}']
    assert [tool.function.name for tool in example.tools or []] == ["find_train"]


def test_answers_that_a_prompt_holds_are_not_learned() -> None:
    [(_, example)] = read_examples([fixture("prompt_completion_messages")], "training")
    assert [message.is_trained for message in example.messages] == [False, False, False, True]


def test_mapping_is_a_warning_of_the_file() -> None:
    summary = check_examples([fixture("question_answer")], role="validation")
    assert summary.warnings(2048)[0].startswith("The file has question/answer rows: 'context' as text before")


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
VALUES = TEXT | st.none() | st.booleans() | st.integers() | st.lists(TEXT) | st.dictionaries(TEXT, TEXT)
KEYS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "label", "history"]
)


@settings(max_examples=40)
@given(st.dictionaries(KEYS | TEXT, VALUES | st.lists(st.dictionaries(TEXT, VALUES))))
def test_any_row_is_read_or_refused(row: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidTrainingFile):
        said(rows(row))


@given(TEXT.filter(str.strip), TEXT.filter(str.strip), st.sampled_from(["completion", "response", "output", "answer"]))
def test_texts_come_through_unchanged(asked: str, answer: str, key: str) -> None:
    if asked.lstrip().startswith("<|im_start|>"):
        return
    assert said(rows({"prompt": asked, key: answer})) == [[("user", asked), ("assistant", answer)]]
