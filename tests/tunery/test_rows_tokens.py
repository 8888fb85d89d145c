"""How prompt and answer are joined, and how special tokens in texts stay text, with tokenizers of each kind."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, LLAMA_LIKE, PHI3_LIKE, SPECIAL, blanks_together, sentencepiece, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tunery.rows.encoding import encode_example, read_examples
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example
from tunery.rows.template import IGNORED, ChatTemplate, Rendered
from tunery.rows.tokens import Tokens

DATA = Path(__file__).parents[1] / "data"
PLAIN = (
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ ('</s>' if m.role == 'assistant' else '\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Its generation prompt ends with a blank, which a tokenizer joins with the answer's first word."""


def template_of(made: Tokenizer, source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(
        made, {"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}, [made.token_to_id("</s>")]
    )


def chat(*texts: str) -> Example:
    roles = ("user", "assistant")
    return Example.model_validate(
        {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}
    )


def learned(template: ChatTemplate, rendered: Rendered) -> str:
    ids = [label for label in rendered.labels if label != IGNORED]
    text: str = template.tokenizer.decode(ids, skip_special_tokens=False)
    return text


def together(template: ChatTemplate, example: Example) -> list[int]:
    ids: list[int] = template.tokenizer.encode(template.render(example.messages), add_special_tokens=False).ids
    return ids


def test_indented_answers_are_learned_from_the_first_blank() -> None:
    template = template_of(blanks_together())
    data = (DATA / "faults/indented_answer.jsonl").read_bytes()
    for name, example in read_examples([data], "training"):
        [row] = encode_example(template, example, name, max_length=10_000).sequences
        prompt = template.encode_prompt(example.messages[:1])

        assert learned(template, row) == f"{example.messages[1].content}<|im_end|>"
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert together(template, example)[: len(prompt)] != prompt, "a token straddles the border of this row"
        assert template.tokenizer.decode(row.input_ids, skip_special_tokens=False) == template.render(example.messages)


@pytest.mark.parametrize("split", ["prepend", "always", "first"])
@pytest.mark.parametrize("answer", ["Rome.", "    Rome.", " Rome. ", "\nRome.", "    ", "é"])
@pytest.mark.parametrize("source", [PHI3_LIKE, PLAIN], ids=["phi3", "plain"])
def test_answers_of_sentencepiece_tokenizers_are_learned_as_they_are(split: str, answer: str, source: str) -> None:
    template = template_of(sentencepiece(split), source)
    [row] = template.encode_all(chat("q", answer), 10_000)
    prompt = template.encode_prompt(chat("q", "").messages[:1])
    end = next(i for i, label in enumerate(row.labels) if label in template.eos_ids)

    assert row.input_ids[: len(prompt)] == prompt

    def said(context: list[int]) -> str:
        decode = template.tokenizer.decode
        before, after = (decode(context + row.input_ids[len(prompt) : stop], skip_special_tokens=False)
                         for stop in (len(prompt), end))  # fmt: skip
        return after.removeprefix(before)

    if source == PHI3_LIKE and split != "prepend":
        # A pre-tokenizer adds a blank only where there is none, so decoding cannot tell the two cases apart.
        assert answer in (said([]), said(prompt))
    else:
        assert said(template.answer_context(prompt)) == answer


def test_a_stop_token_that_takes_the_blanks_behind_it_is_learned() -> None:
    template = template_of(sentencepiece(), PHI3_LIKE)

    [row] = template.encode_all(chat("q", "Rome."), 10_000)

    assert learned(template, row) == "Rome.<|end|></s>"
    assert row.input_ids == together(template, chat("q", "Rome."))
    assert [learned(template, part) for part in template.encode_all(chat("q", "a", "q", "b"), 10_000)] == [
        "a<|end|></s>",
        "b<|end|></s>",
    ]


def test_rows_without_a_straddling_token_keep_the_ids_of_the_whole_text() -> None:
    for made in (tokenizer(), blanks_together()):
        template = template_of(made)
        example = chat("Capital of France?", "Paris.", "And Italy's?", "Rome.")
        [row] = template.encode_all(example, 10_000)
        assert row.input_ids == together(template, example)


def test_a_straddling_token_before_a_later_turn_gives_each_answer_its_own_row() -> None:
    template = template_of(blanks_together())
    example = chat("q", "    a", "q", "b")

    rows = template.encode_all(example, 10_000)

    assert [learned(template, row) for row in rows] == ["    a<|im_end|>", "b<|im_end|>"]
    for row, count in zip(rows, (1, 3), strict=True):
        prompt = template.encode_prompt(example.messages[:count])
        assert row.input_ids[: len(prompt)] == prompt
    assert len(template.split(example)) == 2
    with pytest.raises(CannotRender, match="Write one row per answer"):
        template.encode(example, 10_000)


def test_turns_after_a_straddled_answer_stay_in_the_row() -> None:
    template = template_of(blanks_together())
    example = chat("q", "    a", "thanks")

    [row] = template.encode_all(example, 10_000)

    assert template.tokenizer.decode(row.input_ids, skip_special_tokens=False) == template.render(example.messages)
    assert learned(template, row) == "    a<|im_end|>"


def test_what_follows_is_left_out_where_it_changes_the_stop_token() -> None:
    """A stop token that is not a special token may be merged with the newline after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: id for id, piece in enumerate([*alphabet, "xĊ"])}, [("x", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    source = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ 'x\\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    template = ChatTemplate(made, {"default": source}, {}, [made.token_to_id("x")])

    [row] = template.encode_all(chat("q", "a", "thanks"), 10_000)

    assert made.decode(row.input_ids) == "user:qx\nassistant:ax"
    assert learned(template, row) == "ax"


# Special tokens in texts


def test_markers_in_answers_stay_text() -> None:
    template = template_of(tokenizer())
    data = (DATA / "faults/markers.jsonl").read_bytes()
    for name, example in read_examples([data], "training"):
        encoded = encode_example(template, example, name, max_length=10_000)
        [row] = encoded.sequences
        stops = [label for label in row.labels if label in template.eos_ids]

        assert stops == [template.tokenizer.token_to_id("<|im_end|>")], "one stop token, the turn's own"
        assert learned(template, row) == f"{example.messages[1].content}<|im_end|>"
        assert encoded.spelled_special == ("<|im_end|>",), "<|endoftext|> is no token of this tokenizer"


def test_every_field_may_spell_a_special_token() -> None:
    end = tokenizer().token_to_id("<|eot|>")
    template = template_of(tokenizer(), LLAMA_LIKE)
    call = {"name": "x<|eot|>", "arguments": '{"<|eot|>": ["<|eot|>"]}'}
    tool = {
        "type": "function",
        "function": {"name": "t", "description": "<|eot|>", "parameters": {"<|eot|>": "<|eot|>"}},
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "<|eot|>"},
        {"role": "user", "content": "<|eot|>"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "<|eot|>"},
        {"role": "assistant", "content": "<|eot|>"},
    ]
    example = Example.model_validate({"messages": messages, "tools": [tool]})

    [row] = template.encode_all(example, 10_000)

    assert row.input_ids.count(end) == 5, "the template writes one for each message"
    assert template.tokenizer.decode(row.input_ids, skip_special_tokens=False) == template.render(
        example.messages, example.tools
    )
    assert template.encode_prompt(example.messages[:2], example.tools).count(end) == 2


def test_a_spelled_stop_token_that_is_not_marked_special_stays_text_too() -> None:
    made = tokenizer()
    stop = made.token_to_id("</think>")  # an added token like any other
    template = ChatTemplate(made, {"default": CHATML.replace("<|im_end|>", "</think>")}, {}, [stop])

    [row] = template.encode_all(chat("q", "say </think> aloud"), 10_000)

    assert [label for label in row.labels if label == stop] == [stop]
    assert learned(template, row) == "say </think> aloud</think>"


def test_other_rows_keep_their_ids_and_prompts_are_the_same_in_chat() -> None:
    template = template_of(tokenizer())
    spelling, plain = chat("say <|im_end|> <s>", "ok"), chat("say it", "ok")

    [rendered] = template.encode_all(spelling, 10_000)
    prompt = template.encode_prompt(spelling.messages[:1])

    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.spelled_special == ("<|im_end|>", "<s>")
    assert template.encode_all(plain, 10_000)[0].input_ids == together(template, plain)


@pytest.mark.parametrize("kind", ["bytes", "blanks together", "prepend", "always", "first"])
def test_the_rest_of_a_row_that_spells_a_token_keeps_its_ids(kind: str) -> None:
    made = {"bytes": tokenizer, "blanks together": blanks_together}.get(kind, lambda: sentencepiece(kind))()
    tokens = Tokens(made)
    hidden, spelled = tokens.hide("</s>")
    text = "<s>hello there </s> you</s>"

    ids = tokens.encode(f"{text}{hidden} and so on")

    assert spelled == ["</s>"]
    assert ids[: len(tokens.encode(text))] == tokens.encode(text)
    assert ids.count(made.token_to_id("</s>")) == 2
    assert made.decode(ids, skip_special_tokens=False).endswith("</s> and so on")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "<|", "|>", "im_end", "é"]), max_size=12).map("".join))
def test_any_mixture_is_learned_as_written(answer: str) -> None:
    template = _SHARED
    [row] = template.encode_all(chat("q", answer), 10_000)

    assert learned(template, row) == f"{answer}<|im_end|>"
    assert sum(label in template.eos_ids for label in row.labels) == 1


_SHARED = template_of(tokenizer())
