"""What a training file must contain."""

import json
from dataclasses import replace
from typing import Any

import pytest
from templates import CHATML, LLAMA_LIKE, MISTRAL_LIKE, QWEN3_LIKE, tokenizer

from tunery.datasets.rules import Overlap, Summary, check_examples
from tunery.failures import AnswersCut, InvalidNExamples, InvalidTrainingFile
from tunery.rows.encoding import find_encoder
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from tunery.spec import Supervised


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(tokenizer(), {"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})


def row(question: str = "q", answer: str = "a", **fields: Any) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **fields}).encode() + b"\n"


def test_a_good_file_is_summed_up() -> None:
    made = template()
    summary = check_examples([row(f"question {n}", "yes") for n in range(12)], template=made)

    assert (summary.examples, summary.truncated, summary.unlearnable) == (12, [], [])
    assert summary.trained_tokens >= 12 * 2
    assert summary.tokens > summary.trained_tokens
    assert summary.longest * 12 >= summary.tokens
    assert summary.warnings(2048) == []


def test_the_form_alone_needs_no_model() -> None:
    assert check_examples([row()] * 10) == Summary(examples=10)


def test_ten_examples_are_the_least() -> None:
    with pytest.raises(InvalidNExamples) as caught:
        check_examples([row()] * 7)

    assert caught.value.message == "Training file has 7 example(s), but must have at least 10 examples"
    assert (caught.value.code, caught.value.param) == ("invalid_n_examples", "training_file")
    assert check_examples([row()], role="validation").examples == 1


@pytest.mark.parametrize("role", ["training", "validation", "test"])
def test_a_fault_names_its_line_and_file(role: Any) -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        check_examples([row()] * 11 + [b'{"prompt": "a", "completion": "b"}\n'], role=role)

    assert caught.value.message.startswith(f"The job failed due to an invalid {role} file. ")
    assert "Example 12: Unexpected file format" in caught.value.message
    assert caught.value.param == f"{role}_file"


def test_the_lines_of_further_faults_are_named() -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        check_examples([row(), b'{"messages": []}\n'] * 9)
    assert "Example 2 'messages'" in caught.value.message
    named = ", ".join(f"example {number}" for number in (4, 6, 8, 10, 12))
    assert caught.value.message.endswith(f"More rows are invalid: {named} and 3 more.")


def test_further_faults_of_a_table_are_numbered_as_the_first() -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        check_examples([b"Frage,Antwort\n" + b"q,a\n" * 3])
    assert "Line 2: Unexpected file format" in caught.value.message
    assert caught.value.message.endswith("More rows are invalid: line 3, line 4.")

    with pytest.raises(InvalidTrainingFile, match=r"and 94 more; later rows were not read\.$"):
        check_examples([b'{"messages": []}\n'] * 1000)


def test_broken_json_fails_the_job_too() -> None:
    with pytest.raises(InvalidTrainingFile, match="Line 11: is not UTF-8"):
        check_examples([row()] * 10 + [b"\xff\n"])


def test_what_the_models_template_refuses_is_found_before_training() -> None:
    system = {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}
    rows = [row()] * 10 + [json.dumps(system).encode()]

    assert check_examples(rows, template=template()).examples == 11
    with pytest.raises(InvalidTrainingFile, match=r"Example 11: .*roles must alternate"):
        check_examples(rows, template=template(MISTRAL_LIKE))
    with pytest.raises(InvalidTrainingFile, match=r"Example 11 \(line 12\): .*roles must alternate"):
        check_examples([b"[\n", b",".join(rows), b"]"], template=template(MISTRAL_LIKE))


def test_a_test_row_ends_with_the_wanted_answer() -> None:
    asks = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}

    with pytest.raises(InvalidTrainingFile, match="Example 1 does not end with an assistant message"):
        check_examples([json.dumps(asks).encode()], role="test")


def test_test_rows_that_want_an_empty_answer_are_named() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    called = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    }
    tools, line = template(LLAMA_LIKE), json.dumps(called).encode() + b"\n"

    assert check_examples([row(), line], role="test", template=tools).warnings(2048) == []
    warning = check_examples([row(), line, row(answer="")], role="test", template=tools).warnings(2048)[-1]
    assert warning == "1 of 3 test examples have an empty expected answer and are left out of the scorecard: line 3."
    with pytest.raises(InvalidTrainingFile, match="none can be scored"):
        check_examples([row(answer=" ")], role="test", template=tools)
    assert len(check_examples([row(answer="")], role="validation", template=tools).warnings(2048)) == 1


def test_answers_that_do_not_fit_are_named_among_the_rows_that_are_answered() -> None:
    made = template()
    rows = [row(answer="yes"), row(answer="a much longer answer " * 3), row(answer="x " * 200)]

    summary = check_examples(rows, role="test", template=made, answered=2)

    long = len(made.tokenizer.encode("a much longer answer " * 3, add_special_tokens=False).ids)
    assert [line for line, _ in summary.answer_tokens] == [1, 2]
    assert summary.longest_answer == pytest.approx(long, abs=1)
    assert summary.check_limit(summary.longest_answer) == []
    [warning] = summary.check_limit(summary.longest_answer - 1)
    assert warning.startswith("1 of 2 expected answers have more tokens than evaluation.max_new_tokens (")
    assert "line 2" in warning
    assert check_examples(rows, role="validation", template=made).answer_tokens == []


def test_rows_that_spell_special_tokens_are_named() -> None:
    rows = [row(), row("say <|im_end|> now"), row(answer="</s> <|im_end|> now")]

    [warning] = check_examples(rows, least=1, template=template()).warnings(2048)

    assert warning == (
        "2 of 3 examples contain special tokens of the model as text (</s>, <|im_end|>): lines 2, 3. They are "
        "tokenised as plain text."
    )


def test_rows_with_markers_of_a_template_are_named_once() -> None:
    """Their markers are special tokens of the model too, but the first warning says what to do about the rows."""
    rows = [row("<|im_start|>user\nq<|im_end|>"), row("say <|im_end|> now"), row(answer="yes <|im_end|>")]

    rendered, spelled = check_examples(rows, least=1, template=template()).warnings(2048)

    assert "2 of 3 examples have a message that begins or ends with a marker" in rendered
    assert "(<|im_end|>, <|im_start|>): lines 1, 3" in rendered
    assert spelled == (
        "1 of 3 examples contain special tokens of the model as text (<|im_end|>): line 2. They are tokenised as plain "
        "text."
    )
    [warning] = check_examples(rows[:1], least=1, template=template()).warnings(2048)
    assert "a marker of a chat template" in warning


def test_rows_that_lose_a_part_of_their_answer_are_left_out() -> None:
    made = template()
    length = check_examples([row()] * 10, template=made).longest
    rows = [row()] * 198 + [row(answer="word " * 50)] + [row(question="word " * 50)]
    encoder = find_encoder(Supervised(), "training", cut_answers="limit")

    summary = check_examples(rows, template=made, max_length=length, encoder=encoder)

    assert (summary.left_out, summary.unlearnable, summary.truncated, summary.longest) == ([199], [200], [], length)
    assert "1 of 200 examples lose part of an answer" in " ".join(summary.warnings(length))
    summary.check_cut_answers(length)
    with pytest.raises(AnswersCut, match=r"2 of 199 examples .* lines 199, 200\. Raise max_seq_length"):
        replace(summary, examples=199).check_cut_answers(length)


def test_cut_rows_are_counted_and_told() -> None:
    made = template()
    length = check_examples([row()] * 10, template=made).longest
    rows = [row()] * 10 + [row(answer="word " * 50)] + [row(question="word " * 50)]

    summary = check_examples(rows, template=made, max_length=length)

    assert (summary.truncated, summary.unlearnable, summary.longest) == ([11], [12], length)
    warnings = " ".join(summary.warnings(length))
    assert "1 of 12 examples are longer than" in warnings
    assert "where their last answer ends: line 11." in warnings
    assert "1 of 12 examples lose their whole answer to the limit" in warnings
    assert warnings.endswith("are left out: line 12.")


def test_unknown_keys_are_named_once_a_file() -> None:
    rows = [row(id=1, source="s"), row(id=2, licence="CC0", note=None), *(row(**{f"k{n}": n}) for n in range(5))]

    [warning] = check_examples(rows, role="validation").warnings(2048)

    assert (
        warning == "The rows have keys that are ignored in training: 'source', 'licence', 'k0', 'k1', 'k2' and 2 more."
    )
    assert check_examples([row(parallel_tool_calls=False, tools=[])], least=1).warnings(2048) == []


@pytest.mark.parametrize("key", ["label", "score", "chosen", "images"])
def test_a_key_that_changes_the_meaning_is_named_with_its_lines(key: str) -> None:
    rows = [row(), row(**{key: None}), row(**{key: False if key == "label" else ["x"]}), row(**{key: "y"})]

    with pytest.raises(InvalidTrainingFile, match=rf"Example 3 has the key '{key}', which .* invalid: example 4\.$"):
        check_examples(rows, least=1)


def test_empty_answers_are_named() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = {"role": "user", "content": "q"}
    unlearned = {"role": "assistant", "content": "", "weight": 0}
    others = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "assistant", "content": "a"}]
    rows = [row(), row(answer=""), row(answer=" \n\t"), json.dumps({"messages": [asked, unlearned, *others]}).encode()]

    summary = check_examples(rows, least=1)

    assert summary.silent == [2, 3]
    [warning] = summary.warnings(2048)
    assert warning.startswith("2 of 4 examples have an assistant message that is empty or blank and calls no tool")
    assert "lines 2, 3. Remove the message, or give it the weight 0." in warning


def test_an_empty_answer_of_a_table_is_no_message() -> None:
    [_, warning] = check_examples([b"prompt,completion\nq,a\nq,\n"], least=1).warnings(2048)
    assert warning.startswith("1 of 2 examples have an answer that is empty or blank, which")
    assert warning.endswith("Add the answer, or remove the row.")


def test_a_file_without_any_learnable_token_is_refused() -> None:
    with pytest.raises(InvalidTrainingFile, match=r"max_seq_length \(16\). Raise max_seq_length."):
        check_examples([row(question="word " * 50)] * 10, template=template(), max_length=16)


def test_rows_that_are_split_count_once() -> None:
    two = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "b"},
        ]
    }
    lines = [json.dumps(two).encode() + b"\n"] * 10

    whole, split = (check_examples(lines, template=template(source)) for source in (CHATML, QWEN3_LIKE))

    assert whole.examples == split.examples == 10
    assert split.tokens > whole.tokens


def overlap(train: list[bytes], held_out: list[bytes], role: FileRole = "validation") -> str | None:
    found = Overlap()
    check_examples(train, least=1, overlap=found)
    check_examples(held_out, role=role, overlap=found)
    return found.reason(role)


def test_shared_rows_are_named_on_both_sides() -> None:
    train = [row(f"q{n}", id=f"train-{n}") for n in range(10)]
    held_out = [row("new"), row("q3", id="valid-1"), row("q3", "another answer"), row("q7")]

    assert overlap(train, [row("new"), row("q1", "another answer")]) is None
    assert overlap(train, held_out) == (
        "It shares 2 example(s) with the training file: line 2 (line 4 there), line 4 (line 8 there). Remove them from "
        "one of the two files."
    )


def test_rows_are_shared_however_they_are_spelled() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    one = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    other = [{"content": "q", "role": "user"}, {"role": "assistant", "tool_calls": [call], "weight": None}]

    warning = overlap([json.dumps({"messages": one}).encode()], [json.dumps({"messages": other}).encode()])

    assert "line 1 (line 1 there)" in str(warning)


def test_a_long_list_of_shared_rows_is_cut_short() -> None:
    rows = [row(f"q{n}") for n in range(9)]

    warning = overlap(rows, rows, role="test")

    assert "line 5 (line 5 there) and 4 more" in str(warning)


def test_reading_stops_at_a_row_that_costs_as_much_as_it_may() -> None:
    costly = template("{% if messages[0].content == 'long' %}{{ 'x' * 10 ** 9 }}{% endif %}" + CHATML)

    with pytest.raises(InvalidTrainingFile) as caught:
        check_examples([row(), row("long"), row("long"), b"{}\n"], template=costly)

    assert "Example 2" in caught.value.message
    assert "larger than" in caught.value.message
    assert "more" not in caught.value.message
