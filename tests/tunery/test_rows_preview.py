"""The preview of a file: its tokens are the trainer's, and its checks fail where the tokens are wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from templates import CHATML, SHAPES, model_folder

from tunery.rows import preview, preview_page
from tunery.rows.encoding import CHATS, PAIRS, RowEncoder, find_encoder
from tunery.rows.preview_checks import SEQUENCE_CHECKS, Marked
from tunery.rows.preview_model import Preview
from tunery.rows.template import IGNORED, ChatTemplate
from tunery.spec import Supervised
from worker.trainer.data import read_rows

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Capital of <b>France</b>? 🗼"},
            {"role": "assistant", "content": "Paris.\n\nOn the Seine."},
            {"role": "user", "content": "Of Italy?"},
            {"role": "assistant", "content": "Rome."},
        ]
    },
    {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "<|im_end|>"}]},
]
Load = Callable[[str], ChatTemplate]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda source: ChatTemplate.load(model_folder(tmp_path / "model", source))


def lines(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def make(template: ChatTemplate, rows: list[dict[str, Any]], encoder: RowEncoder = CHATS, **options: Any) -> Preview:
    return preview.make(lines(rows), template, encoder, model="tiny", **options)


def failed(made: Preview) -> dict[str, list[int]]:
    return {check.name: check.rows for check in made.checks if not check.passed}


@pytest.mark.parametrize("shape", sorted(SHAPES.keys() - {"mistral"}))
@pytest.mark.parametrize("length", [125, 2048])
def test_tokens_are_those_that_the_trainer_reads(load: Load, shape: str, length: int, tmp_path: Path) -> None:
    template = load(SHAPES[shape])
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(lines(ROWS)))
    read = read_rows(path, template, length).rows
    made = make(template, ROWS, max_tokens=length)

    shown = [
        ([token.id for token in kept], [token.id if token.state == "trained" else IGNORED for token in kept])
        for row in made.rows
        for sequence in row.sequences
        for kept in [[token for token in sequence.tokens if token.state != "cut"]]
    ]
    assert [one for one in shown if any(label != IGNORED for label in one[1])] == [
        (row.input_ids, row.labels) for row in read
    ]


def test_texts_of_all_tokens_are_what_the_template_writes(load: Load) -> None:
    template = load(CHATML)
    made = make(template, ROWS)

    messages = CHATS.parse(next(iter(preview.read_rows(lines(ROWS), "training"))), "training").messages
    assert "".join(token.text for token in made.rows[0].sequences[0].tokens) == template.render(messages)
    assert (made.passed, made.shape, failed(made)) == (True, "chat messages", {})


def test_cut_counts_what_is_behind_it(load: Load) -> None:
    whole = make(load(CHATML), ROWS[:1]).rows[0].sequences[0]
    cut = make(load(CHATML), ROWS[:1], max_tokens=30).rows[0].sequences[0]

    assert (cut.trained + cut.masked, cut.cut) == (30, len(whole.tokens) - 30)
    assert [token.text for token in cut.tokens] == [token.text for token in whole.tokens]


def test_cut_that_takes_an_end_or_an_answer_fails(load: Load) -> None:
    template = load(CHATML)
    tokens = make(template, ROWS[:1]).rows[0].sequences[0].tokens
    last = max(place for place, token in enumerate(tokens) if token.state == "trained")
    first = min(place for place, token in enumerate(tokens) if token.state == "trained")

    assert failed(make(template, ROWS[:1], max_tokens=last + 1)) == {}
    assert failed(make(template, ROWS[:1], max_tokens=last)) == {"end_of_turn_trained": [1]}
    assert failed(make(template, ROWS[:1], max_tokens=first)) == {"rows_have_labels": [1]}


def test_row_that_cannot_be_read_has_its_reason(load: Load) -> None:
    made = make(load(CHATML), [ROWS[1], {"messages": [{"role": "user", "content": "x"}]}])

    assert failed(made) == {"rows_are_read": [2]}
    assert "has no assistant message" in (made.rows[1].error or "")


def test_long_row_is_not_tokenised(load: Load) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 2**20}, {"role": "assistant", "content": "y"}]}
    assert "too long for a preview" in (make(load(CHATML), [long]).rows[0].error or "")


def test_tokens_beyond_those_shown_are_counted(load: Load) -> None:
    long = {"messages": [{"role": "user", "content": "7 " * 4000}, {"role": "assistant", "content": "y"}]}
    [sequence] = make(load(CHATML), [long], max_tokens=5000).rows[0].sequences

    assert len(sequence.tokens) == preview.MOST_SHOWN
    assert sequence.omitted == sequence.trained + sequence.masked + sequence.cut - preview.MOST_SHOWN > 0


def test_template_without_roles_fails(load: Load) -> None:
    source = "{% for message in messages %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    assert failed(make(load(source), ROWS)) == {"roles_shown": [1, 2]}


def test_template_that_writes_two_bos_fails(load: Load) -> None:
    assert failed(make(load("{{ bos_token }}{{ bos_token }}" + CHATML), ROWS)) == {"one_bos": [1, 2]}


def test_every_answer_of_a_pair_is_shown(load: Load) -> None:
    made = make(load(CHATML), [{"prompt": "A?", "chosen": "Yes.", "rejected": "No."}], PAIRS)

    texts = [[token.text for token in one.tokens if token.state == "trained"] for one in made.rows[0].sequences]
    assert ["".join(text) for text in texts] == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert made.passed


@pytest.mark.parametrize("loss_on", ["last_assistant", "all"])
def test_loss_on_passes_its_checks(load: Load, loss_on: Any) -> None:
    rows = [ROWS[0], {"messages": [*ROWS[0]["messages"][:2], {**ROWS[0]["messages"][2], "weight": 0},
                                   *ROWS[0]["messages"][3:]]}]  # fmt: skip
    made = make(load(CHATML), rows, find_encoder(Supervised(loss_on=loss_on), "training"))

    assert made.passed
    masked = [sequence.masked for row in made.rows for sequence in row.sequences]
    assert (masked[0] == 1) == (loss_on == "all")  # the first token has nothing before it


def test_a_last_message_of_weight_0_needs_no_end(load: Load) -> None:
    last = {**ROWS[0]["messages"][-1], "weight": 0}
    rows = [{"messages": [*ROWS[0]["messages"][:-1], last]}]
    encoder = find_encoder(Supervised(loss_on="all"), "training")
    template = load(CHATML)
    whole = make(template, rows, encoder)

    assert whole.passed
    cut = make(template, rows, encoder, max_tokens=whole.rows[0].sequences[0].masked)
    assert failed(cut) == {"end_of_turn_trained": [1]}


def marked(template: ChatTemplate) -> Marked:
    rendered = CHATS.encode(template, CHATS.parse(next(iter(preview.read_rows(lines(ROWS), "training"))), "training"),
                            "example 1", max_length=10_000).sequences[0]  # fmt: skip
    return Marked(rendered.input_ids, rendered.labels, 10_000)


def test_end_that_is_masked_as_padding_fails(load: Load) -> None:
    """Masking labels by the pad token's id also masks the ends of turns where the pad token ends a turn."""
    template = load(CHATML)
    good = marked(template)
    [pad] = template.eos_ids - {template.tokenizer.token_to_id("</s>")}
    bad = replace(good, labels=[IGNORED if label == pad else label for label in good.labels])

    assert {name for name, check in SEQUENCE_CHECKS.items() if not check(template, good)} == set()
    assert {name for name, check in SEQUENCE_CHECKS.items() if not check(template, bad)} == {
        "end_of_turn_trained",
        "pad_is_not_end",
    }


def test_page_runs_nothing_and_shows_each_state(load: Load) -> None:
    asked = {"role": "user", "content": "<script>x</script>\x1b[2J"}
    turns = [asked, {"role": "assistant", "content": "&"}]
    made = make(load(CHATML), [{"messages": turns}], max_tokens=90)
    page = preview_page.draw(made, "<img src=x>")

    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert preview_page.POLICY in page.replace("&#39;", "'")
    for state in ("t", "m"):
        assert f'<span class="{state}" title=' in page
