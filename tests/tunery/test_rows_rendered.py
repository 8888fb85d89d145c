"""Texts that a chat template has already rendered are refused or warned of in every shape."""

import json
from typing import Any

import pytest

from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import CHATS_OR_PAIRS, read_examples
from tunery.rows.rendered import find_marker

DOCUMENT = {"text": "A plain document about rivers."}
CHATML = {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((DOCUMENT, CHATML), "expected plain text as in example 1: this row has the shape ChatML text."),
        ((CHATML, DOCUMENT), "'text' must be whole turns of ChatML"),
        ((DOCUMENT, {"text": "<s>" + CHATML["text"]}), "this row has the shape ChatML text."),
        ((DOCUMENT, {"text": "<s>[INST] q [/INST] a</s>"}), "'text' begins with '[INST]'"),
    ],
)
def test_text_of_two_shapes_is_refused_in_either_order(rows: tuple[dict[str, str], ...], reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_examples([jsonl(*rows)], role="validation")
    assert "Example 2" in refused.value.message
    assert reason in refused.value.message


INST, IM = "<s>[INST] q [/INST]", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "marker"),
    [
        ({"prompt": INST, "completion": "a</s>"}, "[INST]"),
        ({"prompt": IM, "completion": "a"}, "<|im_start|>"),
        ({"prompt": "q", "completion": "a<|im_end|>\n"}, "<|im_end|>"),
        ({"instruction": "q", "output": "a</s>"}, "</s>"),
        ({"messages": [{"role": "user", "content": INST}, {"role": "assistant", "content": "a"}]}, "[INST]"),
        ({"conversations": [{"from": "human", "value": IM}, {"from": "gpt", "value": "a"}]}, "<|im_start|>"),
        ({"prompt": "q", "chosen": "a", "rejected": "b<|eot_id|>"}, "<|eot_id|>"),
        ({"text": "Once there was a miller.<|endoftext|>"}, "<|endoftext|>"),
    ],
)
def test_markers_of_a_template_are_warned_of_in_every_shape(row: dict[str, Any], marker: str) -> None:
    summary = check_examples([jsonl(row)], role="validation", encoder=CHATS_OR_PAIRS)
    assert summary.rendered == {1: marker}
    assert any(f"a marker of a chat template ({marker}): line 1." in warning for warning in summary.warnings(2048))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "What does [INST] mean?",
        "Explain <|im_start|> and <|im_end|> to me.",
        "Old: <s>nine</s>",
        "<s>nine</s> ten",
        "[1, 2]",
        "<p>Good.</p>",
    ],
)
def test_texts_about_markers_are_not_warned_of(text: str) -> None:
    assert find_marker(text) is None


@pytest.mark.parametrize(
    ("text", "speaker"),
    [
        ("### Human: Which way?### Assistant: Left.", "### Human:"),
        ("### Instruction:\nName it.\n\n### Response:\nIt", "### Instruction:"),
        ("Below is an instruction that describes a task.\n\n### Instruction:\nName it.", "Below is an instruction"),
        ("\n\nHuman: Which way?\n\nAssistant: Left.", "Human:"),
        ("USER: Which way?\nOr none?\nASSISTANT: Left.", "USER:"),
    ],
)
def test_plain_texts_that_are_conversations_are_warned_of(text: str, speaker: str) -> None:
    summary = check_examples([jsonl(DOCUMENT, {"text": text})], role="validation")
    [warning] = [warning for warning in summary.warnings(2048) if "are conversations" in warning]
    assert warning.startswith(f"1 of 2 texts are conversations that begin with '{speaker}': line 2.")


@pytest.mark.parametrize(
    "text",
    ["Human: an animal. The Assistant: a film.", "### Rivers\nHuman: none", "User: ana\nNew line\n" + "\n" * 50_000],
    ids=["one line", "a heading", "no answer"],
)
def test_other_texts_are_no_conversations(text: str) -> None:
    assert not check_examples([jsonl({"text": text})], role="validation").spoken


def test_chats_that_begin_like_conversations_are_not_plain_texts() -> None:
    row = {"prompt": "### Human: Which way?", "completion": "Left."}
    assert not check_examples([jsonl(row)], role="validation").spoken


def test_chatml_may_have_lines_of_windows() -> None:
    [(_, example)] = read_examples([jsonl({"text": CHATML["text"].replace("\n", "\r\n")})], "training")
    assert [(message.role, message.content) for message in example.messages] == [("user", "q"), ("assistant", "a")]
