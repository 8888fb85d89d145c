"""Rows that are rendered together are encoded as each is alone."""

import json
import sys
from typing import Any

import pytest
from templates import CHATML, SPECIAL, tokenizer

from tunery.failures import InvalidTrainingFile
from tunery.rows import bulk, sandbox
from tunery.rows.encoding import CHATS, PAIRS, RowEncoder, read_rows
from tunery.rows.messages import Example
from tunery.rows.template import ChatTemplate

REFUSING = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('never') }}{% endif %}{% endfor %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"


def chat(asked: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": asked[::-1]}]
    return {"messages": turns * (1 + len(asked) % 3), **more}


def template(source: str) -> ChatTemplate:
    made = tokenizer()
    return ChatTemplate(
        made, {"default": source}, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}, [made.token_to_id(SPECIAL[2])]
    )


def spelled(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def one_by_one(made: ChatTemplate, data: bytes, encoder: RowEncoder) -> list[Any]:
    found: list[Any] = []
    for source in read_rows([data], "training"):
        try:
            parsed = encoder.parse(source, "training")
            found.append(encoder.encode(made, parsed, source.name, max_length=90, role="training"))
        except InvalidTrainingFile as fault:
            found.append(fault.message)
    return found


def together(made: ChatTemplate, data: bytes, encoder: RowEncoder) -> list[Any]:
    rows = bulk.encode_rows([data], "training", encoder, made, max_length=90)
    return [row.fault.message if row.fault else row.encoded for row in rows]


FUNCTION = {"type": "function", "function": {"name": "trains"}}
ASKED = [f"{word} {number}?" for number in range(20) for word in ("to Brugg", "why", "how far", "")]
CHAT_ROWS = [chat(asked, **({"tools": [FUNCTION]} if len(asked) % 2 else {})) for asked in ASKED]
PAIR_ROWS = [{"prompt": asked, "chosen": "yes", "rejected": "never" if "why" in asked else "nay"} for asked in ASKED]


@pytest.mark.parametrize("source", [CHATML, TOOLS + CHATML, REFUSING + CHATML])
@pytest.mark.parametrize(("encoder", "rows"), [(CHATS, CHAT_ROWS), (PAIRS, PAIR_ROWS)], ids=["chats", "pairs"])
def test_rows_together_equal_rows_alone(source: str, encoder: RowEncoder, rows: list[dict[str, Any]]) -> None:
    data = spelled([*rows, {"messages": []}, chat("no 1?"), *rows])
    made = template(source)
    assert together(made, data, encoder) == one_by_one(made, data, encoder)


def test_a_fault_of_one_row_is_no_other_rows() -> None:
    data = spelled([chat("yes 1?"), chat("no 2?"), chat("yes 3?")])
    rows = list(bulk.encode_rows([data], "training", CHATS, template(REFUSING + CHATML), max_length=90))
    assert [row.fault is None for row in rows] == [True, False, True]
    assert "Example 2" in rows[1].fault.message
    assert "never" in rows[1].fault.message


def test_texts_of_rows_that_are_gone_are_no_other_rows() -> None:
    """The id() of a list is reused once the list is gone, so texts rendered ahead keep it alive."""
    messages = Example.model_validate(chat("why?")).messages
    before = sys.getrefcount(messages)
    ahead = template(CHATML).render_ahead([Example.model_construct(messages=messages)])
    assert sys.getrefcount(messages) == before + 1
    del ahead
    assert sys.getrefcount(messages) == before


@pytest.mark.parametrize(("encoder", "rows"), [(CHATS, CHAT_ROWS), (PAIRS, PAIR_ROWS)], ids=["chats", "pairs"])
def test_no_row_renders_again_what_was_rendered_ahead(
    encoder: RowEncoder, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = template(CHATML)
    together(made, spelled(rows), encoder)  # so that the trials of these shapes are over
    sizes: list[int] = []
    plain = sandbox._render
    monkeypatch.setattr(
        sandbox, "_render", lambda made, batch, now: (sizes.append(len(batch)), plain(made, batch, now))[1]
    )
    together(made, spelled(rows), encoder)
    assert len(sizes) < len(rows) / 4, sizes


def test_many_rows_take_few_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges: list[int] = []
    plain = sandbox._render

    def counted(made: Any, batch: Any, now: Any) -> list[str]:
        exchanges.append(len(batch))
        return plain(made, batch, now)

    made, data = template(CHATML), spelled([chat("why?")] * 320)
    list(bulk.encode_rows([data], "training", CHATS, made, max_length=90))
    monkeypatch.setattr(sandbox, "_render", counted)
    list(bulk.encode_rows([data], "training", CHATS, made, max_length=90))
    assert len(exchanges) <= 320 * 5 / 32, exchanges


def test_rows_above_what_cannot_be_read_are_given() -> None:
    data = spelled([chat("why?")] * 3) + b"\xff\n"
    rows = bulk.encode_rows([data], "training", CHATS, template(CHATML), max_length=90)
    assert [next(rows).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(InvalidTrainingFile, match="Line 4: is not UTF-8"):
        next(rows)


@pytest.mark.parametrize("row", [chat("x" * 300_000), chat("why?", ranks=[0] * 30_000)], ids=["text", "numbers"])
def test_long_rows_are_not_held_together(row: dict[str, Any]) -> None:
    rows = [row] * 12
    held: list[int] = []

    def chunks() -> Any:
        for at, row in enumerate(rows):
            held.append(at)
            yield spelled([row])

    found = bulk.encode_rows(chunks(), "training", CHATS, None, max_length=90)
    next(found)
    assert len(held) <= 3
