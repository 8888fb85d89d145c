"""Cleaning a file into a new one: what is dropped, changed or held out, and what stays byte for byte."""

import gzip
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import doubtful_answers
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench import injector
from bench import report as bench_report
from bench.service import ROOT
from tunery.cli.main import app
from tunery.datasets.cleaning import cleaner, conversations, redaction, splits
from tunery.datasets.cleaning.cleaner import Cleaned
from tunery.datasets.cleaning.order import ACTIONS, Action, Cleaning, HeldOut, RowChoice
from tunery.datasets.errors import CannotHoldOut, NothingLeft
from tunery.datasets.report import leaks, maker, privacy, shingles, texts, usable
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import Row, read
from tunery.datasets.report.titles import TITLES
from tunery.errors import InvalidValue
from tunery.rows import readers
from tunery.rows.answer_losses import AnswerEnd
from tunery.spec import Columns

RECOMMENDED = Cleaning(recommended=True)


def chat(*said: str, roles: str = "user assistant") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles.split(), said, strict=True)]}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def cleaned(path: Path, order: Cleaning = RECOMMENDED, **options: Any) -> tuple[Cleaned, list[dict[str, Any]]]:
    target = path.with_name("clean.jsonl")
    done = cleaner.clean(path, target, order, **options)
    return done, [json.loads(line) for line in target.read_text().splitlines()]


def dropped(done: Cleaned) -> list[tuple[int, str]]:
    return [(one.line, one.kind) for one in done.dropped]


LAST_INVALID = {
    "csv": ("prompt,completion\na,b\nc,d\ne,f,g\n", 4),
    "json": ('[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, {"prompt": NaN}]', 3),
}


@pytest.mark.parametrize("kind", LAST_INVALID)
@pytest.mark.parametrize("order", [RECOMMENDED, Cleaning(actions=[Action(kind="exact_duplicate", action="keep_one")])])
def test_a_row_that_cannot_be_written_is_counted_and_dropped(tmp_path: Path, kind: str, order: Cleaning) -> None:
    path = tmp_path / f"last.{kind}"
    content, line = LAST_INVALID[kind]
    path.write_text(content)
    done, rows = cleaned(path, order)
    assert (done.rows, done.clean.rows, dropped(done)) == (3, 2, [(line, "invalid_row")])
    assert done.kinds == {"invalid_row": {"dropped": 1, "changed": 0}}
    assert [row["prompt"] for row in rows] == ["a", "c"]


def test_an_empty_answer_of_a_table_is_one_in_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,id,system\nfirst,,1,\nsecond,b,2,\nsecond,b,3,\nask ana@example.org,,4,\n")
    actions = [Action(kind="exact_duplicate", action="keep_one"), Action(kind="pii", action="redact")]
    _, rows = cleaned(path, Cleaning(actions=actions))
    assert [(row["completion"], row["system"]) for row in rows] == [("", None), ("b", None), ("", None)]
    assert all(row.fault is None for row in read(path.with_name("clean.jsonl")))


def test_injected_faults_are_gone_and_the_file_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injector, "COUNTS", dict.fromkeys(injector.COUNTS, 4))
    dice = random.Random(3)
    taken: list[set[str]] = []
    sources = [bench_report.read(ROOT / f"examples/banking_{name}.jsonl") for name in ("test", "train")]
    test, labelled = (
        bench_report.apart(dice.sample(rows, len(rows)), count, taken)
        for rows, count in zip(sources, (8, 90), strict=True)
    )
    snips = bench_report.read(ROOT / "examples/snips_train.jsonl")
    free = bench_report.apart(dice.sample(snips, len(snips)), 40, taken)
    dirty = injector.inject(labelled, free, test, 3)
    injector.write(dirty.rows, source := tmp_path / "dirty.jsonl")
    injector.write(test, other := tmp_path / "test.jsonl")
    before = source.read_bytes()

    done, rows = cleaned(source, against=other)

    assert source.read_bytes() == before
    found = maker.make(tmp_path / "clean.jsonl", other)
    sure = {finding.kind for finding in found.findings if finding.kind != "truncated_output" or finding.score == 1}
    assert sure <= {"mislabelled", "label_imbalance", "dominant_answer"}
    assert len(rows) == done.clean.rows > 90
    # Every certain fault was handled, as its own kind or as another.
    touched = {one.line for one in (*done.dropped, *done.changed)}
    for kind in ("empty_output", "wrong_roles", "pii", "too_long", "test_leak"):
        assert dirty.lines[kind] <= touched, kind


def test_a_changed_row_ends_as_all_others_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [chat("Who are you?", "An assistant."), chat("Who wrote?", "It was ana@example.org.")]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\r\n" for row in rows))
    done = cleaner.clean(path, tmp_path / "clean.jsonl", Cleaning(actions=[Action(kind="pii", action="redact")]))
    content = (tmp_path / "clean.jsonl").read_bytes()
    assert (len(done.changed), content.count(b"\r\n"), content.count(b"\n")) == (1, 2, 2)
    assert b"ana@example.org" not in content


def test_rows_that_nothing_is_done_to_stay_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        '{"messages" : [{"role":"user","content":"caf\\u00e9 one"},{"role":"assistant","content":"a"}], "id": 7}\r',
        json.dumps(chat("a second question", "b")),
        json.dumps(chat("write to ana@example.org", "c")),
        json.dumps(chat("a second question", "b")),
        '\ufeff{"messages":[{"content":"x y","role":"user"},{"role":"assistant","content":"d"}]}',
    ]
    data = "\n".join(lines).encode()
    for name, stored in (("plain", data), ("packed", gzip.compress(data))):
        (tmp_path / name).write_bytes(stored)
        done = cleaner.clean(tmp_path / name, tmp_path / "out", RECOMMENDED)
        out = (tmp_path / "out").read_bytes().split(b"\n")
        assert [out[0], out[1], out[3], out[4]] == [
            lines[0].encode(),
            lines[1].encode(),
            lines[4].removeprefix("\ufeff").encode(),
            b"",
        ]
        assert json.loads(out[2]) == chat("write to <EMAIL_ADDRESS>", "c")
        assert dropped(done) == [(4, "exact_duplicate")]
        assert "ana@" not in json.dumps(done.as_dict())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "question,answer\r\nWho is ana@example.org?,me\r\nWhat?,that\r\nWhat?,that\r\n"),
        (
            "rows.json",
            json.dumps([{"question": q, "answer": a} for q, a in (("Who?", "me"), ("What?", "that"))], indent=1),
        ),
    ],
)
def test_other_formats_become_json_lines_that_are_read_alike(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, newline="")
    done, rows = cleaned(tmp_path / name)
    assert {tuple(row) for row in rows} == {("question", "answer")}
    expected = {row.line: row for row in read(tmp_path / name)}
    kept = [line for line in expected if line not in dict(dropped(done))]
    assert [row.answer for row in read(tmp_path / "clean.jsonl")] == [expected[line].answer for line in kept]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("spoken", "becomes"),
    [
        ("user:q gpt:a", "user:q assistant:a"),
        ("user:q Assistant:a", "user:q assistant:a"),
        ("user:q alien:a", "user:q assistant:a"),
        ("user:q user:q assistant:a", "user:q assistant:a"),
        ("user:q assistant:a assistant:a", "user:q assistant:a"),
        ("user:q assistant:a system:s", "system:s user:q assistant:a"),
        ("system:s user:q assistant:a user:more", "system:s user:q assistant:a"),
        ("system:s assistant:known user:q", "system:s user:q assistant:known"),
        ("user:q user:r assistant:a", "user:q\n\nr assistant:a"),
        ("assistant:hello user:q", None),
        ("user:q assistant:a assistant:b", None),
        ("user:q", None),
    ],
)
def test_roles_are_put_in_order_where_one_order_is_meant(tmp_path: Path, spoken: str, becomes: str | None) -> None:
    pairs = [one.split(":") for one in spoken.split(" ")]
    row = chat(*(text for _, text in pairs), roles=" ".join(role for role, _ in pairs))
    others = [chat(f"what about {word}", "known") for word in ("apples", "bridges", "comets")]
    done, rows = cleaned(
        written(tmp_path / "rows.jsonl", [row, *others]), Cleaning(actions=[Action(kind="wrong_roles", action="fix")])
    )
    if becomes is None:
        assert dropped(done) == [(1, "wrong_roles")]
    else:
        said = [one.split(":") for one in becomes.split(" ")]
        assert rows[0] == chat(*(text for _, text in said), roles=" ".join(role for role, _ in said))


@pytest.mark.parametrize(
    ("arguments", "redacted"),
    [
        ('{"user":"ana","pin": 4821}', '{"user":"ana","pin": "<SECRET>"}'),
        ({"user": "ana", "pin": 4821}, {"user": "ana", "pin": "<SECRET>"}),
        ({"a": [{"pwd": "hunter22"}], "n": 7}, {"a": [{"pwd": "<SECRET>"}], "n": 7}),
        ('{"phone": 5205550467, "say": "is <SECRET>, no"}', '{"phone": "<PHONE_NUMBER>", "say": "is <SECRET>, no"}'),
    ],
)
def test_values_of_a_call_are_redacted_by_their_names(tmp_path: Path, arguments: Any, redacted: Any) -> None:
    """A number becomes a text, so that the arguments stay JSON and a job takes the row."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    path = written(
        tmp_path / "t.jsonl",
        [{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]}],
    )
    done, (row,) = cleaned(path, Cleaning(actions=[Action(kind="pii", action="redact")]))
    assert [(one.line, one.kind) for one in done.changed] == [(1, "pii")]
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == redacted
    assert maker.make(tmp_path / "clean.jsonl").findings == []


@pytest.mark.parametrize(
    ("text", "redacted"), [("4111111111111111", "<CREDIT_CARD>"), ('[{"pin": 4821}', '[{"pin": <SECRET>}')]
)
def test_a_text_that_is_no_object_in_json_gets_no_quotes(text: str, redacted: str) -> None:
    assert redaction.redact_text(text) == redacted


def test_a_row_is_dropped_where_a_redaction_leaves_personal_data(tmp_path: Path) -> None:
    """The password stands in another part than its name; the address alone could be replaced."""
    parts = [{"type": "text", "text": text} for text in ("I am ana@example.org, password:", "hunter22")]
    question = {"role": "user", "content": parts}
    path = written(
        tmp_path / "t.jsonl", [{"messages": [question, *chat("x", roles="assistant")["messages"]]}, chat("a", "b")]
    )
    done, rows = cleaned(path, Cleaning(actions=[Action(kind="pii", action="redact")]))
    assert (dropped(done), done.changed, rows) == ([(1, "pii")], [], [chat("a", "b")])


def test_a_row_is_dropped_where_a_redaction_would_break_it(tmp_path: Path) -> None:
    """A key without its end is redacted to the end of the text, with what closes the JSON of the arguments."""
    arguments = json.dumps({"key": "-----BEGIN RSA PRIVATE KEY-----MIIE"})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    opened = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]}
    path = written(tmp_path / "t.jsonl", [opened, chat("a", "b")])
    done, rows = cleaned(path, Cleaning(actions=[Action(kind="pii", action="redact")]))
    assert (dropped(done), done.changed, rows) == ([(1, "pii")], [], [chat("a", "b")])


NAMED = Columns(prompt="Frage", completion="Antwort")


@pytest.mark.parametrize("others", ["Frage,Antwort", "prompt,completion", "prompt,completion,Antwort"])
def test_rows_of_named_columns_are_cleaned_and_keep_them(tmp_path: Path, others: str) -> None:
    """The same columns read the new file. The other file is read by its own names if these make no rows of it."""
    path, other = tmp_path / "fragen.csv", tmp_path / "test.csv"
    asked = ["Wer singt?", "wer singt", "Mail an ada@example.org?", "Wo ist Rom?", "Wie alt ist der Mond?", "Was?"]
    said = ["Ada.", "Ada.", "Ja.", "Unten.", "Alt.", ""]
    path.write_text(
        "".join(["Frage,Antwort,id\n", *(f"{q},{a},{n}\n" for n, (q, a) in enumerate(zip(asked, said, strict=True)))])
    )
    other.write_text(f"{others}\nWo ist Rom?,Unten.{',x' * (others.count(',') - 1)}\n")

    done, rows = cleaned(path, Cleaning(recommended=True, columns=NAMED), against=other)

    assert dropped(done) == [(3, "near_duplicate"), (5, "test_leak"), (7, "empty_output")]
    assert [(one.line, one.kind) for one in done.changed] == [(4, "pii")]
    assert rows == [
        {"Frage": "Wer singt?", "Antwort": "Ada.", "id": "0"},
        {"Frage": "Mail an <EMAIL_ADDRESS>?", "Antwort": "Ja.", "id": "2"},
        {"Frage": "Wie alt ist der Mond?", "Antwort": "Alt.", "id": "4"},
    ]
    assert [row.answer for row in read(tmp_path / "clean.jsonl", columns=NAMED.named)] == ["Ada.", "Ja.", "Alt."]


def test_roles_of_a_named_conversation_are_put_in_order(tmp_path: Path) -> None:
    """A column that is not named stays, also one whose name says messages."""
    turns = chat("q", "q", "a", roles="user user assistant")["messages"]
    unread = chat("x", "x", "y", roles="user user assistant")
    rows = [{"Verlauf": turns, **unread}, *({"Verlauf": chat(f"what {w}?", w)["messages"]} for w in ("now", "then"))]
    order = Cleaning(actions=[Action(kind="wrong_roles", action="fix")], columns=Columns(messages="Verlauf"))
    done, kept = cleaned(written(tmp_path / "rows.jsonl", rows), order)
    assert [(one.line, one.kind, one.after) for one in done.changed] == [(1, "wrong_roles", "user, assistant")]
    assert kept == [{"Verlauf": turns[1:], **unread}, *rows[1:]]


def test_columns_that_the_file_lacks_are_named(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}] * 3)
    with pytest.raises(InvalidValue) as refused:
        cleaned(source, Cleaning(held_out=HeldOut(), columns=NAMED))
    assert refused.value.param == "columns"
    assert "the row has none of the columns 'Frage', 'Antwort'. It has 'prompt'" in refused.value.message


def test_roles_are_corrected_in_the_spelling_of_the_file() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}, {"from": "chatbot", "value": "a"}]
    for key in ("conversations", "Conversations"):
        fixed = conversations.fix({key: turns, "id": 1}, set(), {})
        assert fixed == {key: [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 1}


@pytest.mark.parametrize(
    "secret",
    [
        "ana@example.org",
        "4111 1111 1111 1111",
        "DE89370400440532013000",
        "536-90-4399",
        "+44 20 7946 0123",
        "(415) 555-0132",
        "gb82 west 1234 5698 7654 32",
        "ghp_" + "a1B2" * 9,
        "sk_live_" + "a1B2c3" * 4,
        "AKIA" + "QRSTUVWX23456723",
        "https://bob:hunter22@example.org/x",
    ],
)
def test_nothing_of_a_secret_is_left(secret: str) -> None:
    text = redaction.redact_text(f"It is {secret} for now.")
    assert secret[4:12] not in text
    assert text.startswith("It is ")
    assert text.endswith(" for now.")
    assert list(privacy.kinds_in(text)) == []


def test_an_excerpt_is_of_the_redacted_text() -> None:
    before = (
        "Ask ann@corp.example.org, or call 0171 2345678. " + "We are here for you every day. " * 2 + "bo@example.org"
    )
    after = redaction.redact_text(before)
    assert redaction.excerpt({"a": before, "b": 1}, {"a": after, "b": 1}) == (
        "Ask <EMAIL_ADDRESS>, or call <PHONE_NUMBER> \u2026 for you every day. <EMAIL_ADDRESS>"
    )


def test_a_private_key_goes_with_its_body() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\ndef\n-----END RSA PRIVATE KEY-----"
    assert redaction.redact_text(f"See\n{key}\nthere") == "See\n<SECRET>\nthere"


def test_of_rows_in_conflict_the_one_without_another_fault_stays(tmp_path: Path) -> None:
    rows = [
        chat("please tell me where my new card is today", ""),
        chat("please tell me where my new card is today", ""),
        chat("the way to the next bank is what", "left"),
        chat("the way to the next bank is what", "left"),
    ]
    order = Cleaning(
        actions=[Action(kind="exact_duplicate", action="keep_one"), Action(kind="empty_output", action="drop")]
    )
    done, left = cleaned(written(tmp_path / "rows.jsonl", rows), order)
    assert dropped(done) == [(1, "empty_output"), (2, "empty_output"), (4, "exact_duplicate")]
    assert left == [rows[2]]


LABELS = ["card_arrival", "fee"]
_OTHERS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "juniper", "kelp", "lotus"]


@pytest.mark.parametrize(
    "answers", [["card_arrival", "card_arrival", "fee"], ["fee", "card_arrival", "card_arrival"], [*"yynnyn"]]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_all_rows_with_a_contradicted_answer_go(tmp_path: Path, answers: list[str], labelled: bool) -> None:
    others = [chat(f"{word} {word[::-1]} {word * 2}?", LABELS[at % 2]) for at, word in enumerate(_OTHERS)]
    asked = [chat("Wann kommt sie?", answer) for answer in answers]
    path = written(tmp_path / "rows.jsonl", [*asked, *(others if labelled else [])])
    found = maker.make(path)
    done = cleaner.clean(path, tmp_path / "clean.jsonl", RECOMMENDED) if labelled else None
    out = usable.left_out([one for one in found.findings if one.kind == "contradiction"])
    assert out == dict.fromkeys(range(1, len(answers) + 1), "contradiction")
    if done is not None:
        assert dropped(done) == [(line, "contradiction") for line in range(1, len(answers) + 1)]


def test_a_row_whose_rival_is_dropped_for_another_fault_stays(tmp_path: Path) -> None:
    rows = [chat("Wann kommt sie?", answer) for answer in ("today", "today", "later")]
    done, left = cleaned(written(tmp_path / "rows.jsonl", rows), Cleaning(recommended=True, rows=RowChoice(drop=[3])))
    assert dropped(done) == [(2, "exact_duplicate"), (3, "rows.drop")]
    assert left == rows[:1]


def test_a_corrected_row_is_judged_again(tmp_path: Path) -> None:
    rows = [chat("where is the nearest bank", "left"), chat("where is the nearest bank", "left", roles="user gpt")]
    done, left = cleaned(written(tmp_path / "rows.jsonl", rows))
    assert left == rows[:1]
    assert dropped(done) == [(2, "exact_duplicate")]
    assert [one.kind for one in done.changed] == ["wrong_roles"]


def test_truncated_answers_are_those_that_the_base_s_report_names(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", [chat(row.question, row.answer) for row in doubtful_answers.rows()])
    asked: list[list[int]] = []

    def ask(rows: Sequence[Row]) -> dict[int, AnswerEnd]:
        asked.append([row.line for row in rows])
        return {9: AnswerEnd(line=9, end=-4.0, goes_on=9.0), 30: AnswerEnd(line=30, end=-4.0, goes_on=-9.0)}

    drop = Cleaning(actions=[Action(kind="truncated_output", action="drop"), Action(kind="pii", action="redact")])
    known = [Finding("truncated_output", [30], 0.9, "Breaks off: 'score'.", "Complete the answer, or drop the row.")]
    assert dropped(cleaned(source, drop)[0]) == []
    assert dropped(cleaned(source, drop, ask=ask)[0]) == [(9, "truncated_output")]
    assert asked == [[9, 30]], "once, though the rest was judged again"
    assert dropped(cleaned(source, drop, known=known, ask=ask)[0]) == [(30, "truncated_output")]
    assert dropped(cleaned(source, drop, known=[])[0]) == []
    cleaned(source, Cleaning(actions=[Action(kind="pii", action="redact")]), ask=ask)
    assert len(asked) == 1, "a base is not asked about answers that stay"


def test_chosen_rows_go_and_findings_below_the_score_stay(tmp_path: Path) -> None:
    rows = [chat(f"question {word}", word) for word in ("apples", "bridges", "comets")] + [chat("eve@example.org", "x")]
    path = written(tmp_path / "rows.jsonl", rows)
    done, left = cleaned(path, Cleaning(rows=RowChoice(drop=[2])))
    assert dropped(done) == [(2, "rows.drop")]
    assert left == [rows[0], rows[2], rows[3]]
    with pytest.raises(InvalidValue, match="4 rows, but none begins on line 9; one does on line 4"):
        cleaned(path, Cleaning(rows=RowChoice(drop=[9])))
    with pytest.raises(NothingLeft, match="would remove all"):
        cleaned(path, Cleaning(rows=RowChoice(drop=[1, 2, 3, 4])))
    asked = "How do I change the code of my card?"
    near = written(tmp_path / "near.jsonl", [chat(asked, "At a machine."), chat(f"Hello! {asked}", "At a machine.")])
    for score, gone in ((0.99, []), (0.5, [(2, "near_duplicate")])):
        action = Action(kind="near_duplicate", action="keep_one", min_score=score)
        assert dropped(cleaned(near, Cleaning(actions=[action]))[0]) == gone


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Cleaning(), "The request changes nothing"),
        (Cleaning(actions=[Action(kind="duplicate", action="drop")]), "Kinds: invalid_row"),
        (Cleaning(actions=[Action(kind="pii", action="keep_one")]), "Possible actions: redact, drop"),
        (Cleaning(actions=[Action(kind="label_imbalance", action="drop")]), "other rows"),
        (Cleaning(actions=[Action(kind="test_leak", action="drop")]), "'against'"),
        (Cleaning(actions=[Action(kind="untrained", action="drop")]), "'base'"),
        (Cleaning(actions=[Action(kind="implausible_output", action="drop")]), "report that was made with a base"),
        (Cleaning(actions=[Action(kind="benchmark_overlap", action="drop")]), "Upload the file"),
        (Cleaning(actions=[Action(kind="pii", action="drop"), Action(kind="pii", action="redact")]), "two actions"),
    ],
)
def test_what_is_not_possible_is_said(order: Cleaning, said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        order.check(compared=False, measured=False, uploaded=False, judged=False)


def test_every_kind_of_the_report_has_its_actions() -> None:
    assert set(TITLES) == set(ACTIONS)


WORDS = st.sampled_from(["card", "bank", "money", "lost", "pin", "new", "app", "code", "gone", "today", "where", "how"])
TEXTS = st.lists(WORDS, min_size=3, max_size=7).map(" ".join)


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([("card card card", "a"), ("card card card card card", "b"), ("money gone today how", "a")], 0.5, 0)
@example([("card lost where", "a"), ("new app card lost where", "a"), ("money gone today how", "a")], 0.5, 0)
@example([("card card card", "a"), ("card card card", "a"), ("card card card card card", "a")], 0.5, 0)
@given(
    rows=st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b", "other"])), min_size=3, max_size=25),
    share=st.floats(0.05, 0.5),
    seed=st.integers(0, 9),
)
def test_no_group_straddles(tmp_path: Path, rows: list[tuple[str, str]], share: float, seed: int) -> None:
    path = written(tmp_path / "rows.jsonl", [chat(*row) for row in rows])
    order = Cleaning(held_out=HeldOut(share=share, seed=seed))
    apart = path.with_name("held.jsonl")
    try:
        done, kept = cleaned(path, order, held_out=apart)
    except CannotHoldOut:
        assert len(splits.group(Case(read(path)))) == 1
        return
    held = [json.loads(line) for line in apart.read_text().splitlines()]
    asked = [[texts.words(row["messages"][0]["content"]) for row in side] for side in (kept, held)]
    pairs = list(product(*asked))
    assert all(similarity < 0.7 for similarity in shingles.similarities(pairs))
    both = Case(read(written(tmp_path / "kept.jsonl", kept)), read(apart))
    assert list(leaks.find(both)) == [], "of the held-out rows the report names none"
    assert len(kept) + len(held) == len(rows) == done.rows
    first = apart.read_bytes()
    cleaned(path, order, held_out=apart)
    assert apart.read_bytes() == first


def test_as_much_of_every_label_is_held_out(tmp_path: Path) -> None:
    source = ROOT / "examples/banking_train.jsonl"
    apart = tmp_path / "held.jsonl"
    done = cleaner.clean(source, tmp_path / "kept.jsonl", Cleaning(held_out=HeldOut(share=0.2)), held_out=apart)
    assert done.held_out is not None
    assert abs(done.held_out.rows / done.rows - 0.2) < 0.02
    counts = []
    for path in (source, apart):
        answers = [row.answer for row in read(path)]
        counts.append({answer: answers.count(answer) for answer in set(answers)})
    assert all(0.1 < counts[1].get(label, 0) / count < 0.3 for label, count in counts[0].items())
    other = Cleaning(held_out=HeldOut(share=0.2, seed=1))
    assert cleaner.clean(source, tmp_path / "kept.jsonl", other, held_out=apart).held_out != done.held_out


def test_the_command_prints_what_was_done(tmp_path: Path) -> None:
    rows = [
        chat("where is the nearest bank", "left"),
        chat("where is the nearest bank", "left"),
        chat("mail e@x.org", "a"),
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    run = CliRunner().invoke(app, ["files", "clean", str(path), "-o", str(out), "--keep-one", "exact_duplicate"])
    assert run.exit_code == 0, run.output
    assert "3 rows: 1 dropped, 0 changed, out.jsonl has 2" in run.output
    assert "out.jsonl has 2 rows, but a training file needs at least 10: add rows." in run.output
    run = CliRunner().invoke(app, ["files", "clean", str(path), "-o", str(out), "--recommended", "--json"])
    said = json.loads(run.output)
    assert said["counts"] == {"rows": 3, "judged": 3, "kept": 2, "held_out": 0, "dropped": 1, "changed": 1}
    assert [row.number for row in readers.read([out.read_bytes()])] == [1, 2]
    run = CliRunner().invoke(app, ["files", "clean", str(path), "-o", str(path), "--recommended"])
    assert run.exit_code != 0
