"""The report of a file's rows: each kind of finding, tested on rows of which one has the fault."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

from tunery.cli.main import app
from tunery.datasets.report import (
    answers,
    benchmark,
    diversity,
    elsewhere,
    labels,
    languages,
    leaks,
    length,
    maker,
    neighbours,
    output_format,
    page,
    plausibility,
    privacy,
    roles,
    scripts,
    texts,
    truncation,
)
from tunery.datasets.report.case import Case, Check
from tunery.datasets.report.rows import Row, Turn, of_source, read
from tunery.rows.answer_losses import AnswerLoss
from tunery.rows.formats import SourceRow
from tunery.rows.messages import parse_row
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

LABELS = ("refund", "card lost", "change pin")
WORDS = {
    "refund": "money back purchase return order shop cancelled item",
    "card lost": "lost stolen wallet missing card street gone thief",
    "change pin": "pin code number digits new secret atm change",
}


def row(line: int, question: str, answer: str, system: str = "") -> Row:
    said = [Turn("system", system)] if system else []
    return Row(line, (*said, Turn("user", question), Turn("assistant", answer)))


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def lines(check: Check, case: Case) -> list[list[int]]:
    return [finding.lines for finding in check(case)]


def labelled(count: int = 60) -> list[dict[str, Any]]:
    """Rows whose questions have words of their label; the answers give it in JSON."""
    dice = random.Random(1)
    made = []
    for at in range(count):
        label = LABELS[at % len(LABELS)]
        question = " ".join(dice.sample(WORDS[label].split(), 5)) + f" {'abcdefghij'[at % 10] * 3}"
        made.append(chat(question, json.dumps({"intent": label})))
    return made


@pytest.mark.parametrize(
    ("spoken", "said"),
    [
        ("user bot", "unknown role"),
        ("system user", "no assistant"),
        ("user assistant system", "after the first turn"),
        ("assistant user", "user must speak first"),
        ("user assistant user", "answer is missing"),
        ("user user assistant", "two messages"),
        ("user assistant assistant", "two messages"),
        ("user tool assistant", "called no tool"),
        ("system user assistant user assistant", None),
    ],
)
def test_roles(spoken: str, said: str | None) -> None:
    why = roles.describe([Turn(role, "x") for role in spoken.split()])
    assert why is None if said is None else said in (why or "")


def test_tool_calls_are_in_order() -> None:
    turns = [
        Turn("user", "x"),
        Turn("assistant", "", True),
        Turn("tool", "1"),
        Turn("tool", "2"),
        Turn("assistant", "x"),
    ]
    assert roles.describe(turns) is None


@pytest.mark.parametrize("answer", ["", "  \n", "\u200b\ufeff"])
def test_empty_answers(answer: str) -> None:
    assert lines(answers.find_empty, Case([row(1, "a", answer), row(2, "a", "b")])) == [[1]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to ana.b@example.org", "an e-mail address"),
        ("call (415) 555-2671 now", "a phone number"),
        ("call +44 7700 900738 now", "a phone number"),
        ("card 4111 1111 1111 1111, please", "a card number"),
        ("card 4111 1111 1111 1111 12/27 123", "a card number"),
        ("card 4111 1111 1111 1111 0327 123", "a card number"),
        ("on 2026-05-01 4111 1111 1111 1111 was charged", "a card number"),
        ("no 12 4111-1111-1111-1111", "a card number"),
        ("pay GB82 WEST 1234 5698 7654 32 TODAY", "an account number"),
        ("my order 1234 was paid with 4111 1111 1111 1111", "a card number"),
        ("paid 4111 1111 1111 1111 12/27 123", "a card number"),
        ("paid by 378282246310005", "a card number"),
        ("paid by 3056 930902 5904", "a card number"),
        ("paid by 6011 1111 1111 1117", "a card number"),
        ("paid by 3530111333300000", "a card number"),
        ("paid by 2223 0031 2200 3222", "a card number"),
        ("paid by 2200123456789019", "a card number"),
        ("paid by 6200000000000005", "a card number"),
        ("paid by 6759649826438453", "a card number"),
        ("paid by 4000 0000 0000 0000 006", "a card number"),
        ("by reference DE89 3704 0044 0532 0130 00", "an account number"),
        ("card 4111\u00a01111\u00a01111\u00a01111, please", "a card number"),
        ("pay gb82 west 1234 5698 7654 32 today", "an account number"),
        ("pay DE89-3704-0044-0532-0130-00 today", "an account number"),
        ("pay DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000 today", "an account number"),
        ("pay BE68 5390 0754 7034 today", "an account number"),
        ("my number is 373-35-1954.", "a social security number"),
        ("my social security number is 373-35-1954.", "a social security number"),
        ("call 415\u2011555\u20112671, 06\u202f12\u202f34\u202f56\u202f78", "a phone number"),
        ("the passwort ist Geheim123!", "a key or password"),
        ("api_key = '9f8a7b6c5d4e3f2a1b0c'", "a key or password"),
        ("key AKIAIOSFODNN7EXAMPLQ is set", "a key or password"),
        (f"token ghp_{'a1B2' * 9}", "a key or password"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a key or password"),
        ("Bearer abcdef0123456789abcdef0123456789", "a key or password"),
        ("curl -H 'Authorization: Bearer abcdef0123456789abcdef0123456789'", "a key or password"),
        ('{"Authorization": "Basic dXNlcjE6cGFzc3dvcmQx"}', "a key or password"),
    ],
)
def test_personal_data(text: str, kind: str) -> None:
    assert list(privacy.kinds_in(f"Well:\n{text}")) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "from 2016-2017 to 1999",
        "3.14159265358979",
        "4111 1111 1111 1112 is no card, nor is 0000000000000000",
        "de89-3704-0044-0532-0130-01",
        "IBAN GB82 NWBK 4111 1111 1111 1111",
        "groups 1234 4111 1111 1111 1111 and 4111 1111 1111 1111 2222 3333",
        "Authorization: Bearer YOUR_TOKEN_1234567890 or Bearer xxxxxxxxxxxxxxx1234",
        "Bearer settings.api_token_v2 or Bearer create_token_1234(user)",
        "the bearer of this letter is a friend",
        "1234567890123 and 100 + 200 = 300",
        "def some_long_function_name_with_words(argument): return 1",
        "GB00WEST12345698765432",
        "Open an account. Reference DE89 3704 0044 0532 0130 01",
        "DE89 3704 0044 0532 0130 01 and no IBAN",
        "IBAN DE89 3704 0044 0532 0130 017",
        "IBAN ZZ89 3704 0044 0532 0130 01",
        "order 4111 1111 1111 1112 and account 4111 1111 1111 1112",
        "Call <CREDIT_CARD> 4111 1111 1111 1112",
        "the card is 1234 5678 9012 3456",
        "at 3456789012342 ms, 4222222222222 pieces, 5000000000005 and 6006381333930 in the table",
        "see 40123456789017, 3112345678901230 and 45123456789012342",
        "code FR76 4111 1111 1111 1111",
        "order number: 4111111111111111, Rechnung 4111 1111 1111 1111",
        "product 373-35-1954, part 912-34-5678",
        "order an12 words of the text that are long enough to be read",
        "API_KEY=your_api_key_123456 and api_key = get_key_of_user1(abc)",
        "auth_token = newToken12ForUser(abc) or api_key = tokens12OfAllUsers['x']",
        "api_key = settings.OPENAI_API_KEY_V2",
        "private_key: id_rsa_deploy_2024_key",
    ],
)
def test_no_personal_data(text: str) -> None:
    assert list(privacy.kinds_in(text)) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("IBAN DE89 3704 0044 0532 0130 01", "an account number"),
        ("Transfer it from my account de89-3704-0044-0532-0130-01 today", "an account number"),
        ("Bitte buche es auf das Konto von Erika Muster: DE88370400440532013000.", "an account number"),
        ("La cuenta es ES91 2100 0418 4502 0005 1333", "an account number"),
        ("IBAN:\nGB00WEST12345698765432", "an account number"),
        ("card 4111 1111 1111 1112", "a card number"),
        ("Meine Kreditkarte ist 5555-5555-5555-4445", "a card number"),
        ('{"card_number": "378282246310006"}', "a card number"),
        ("my SSN is 900-35-1954", "a social security number"),
        ("social security number: 000-12-3456", "a social security number"),
    ],
)
def test_numbers_with_wrong_check_digits_by_their_name(text: str, kind: str) -> None:
    """One wrong digit does not make it nobody's. The whole number is redacted, and nothing else."""
    (place,) = privacy.places_in(text)
    assert place.kind == kind
    assert re.sub(r"\W", "", text[place.begin : place.end]).isalnum()
    assert not re.search(r"\d", text[: place.begin] + text[place.end :])


def test_personal_data_in_every_part_of_a_row() -> None:
    """A system message, a call's arguments, a rejected answer and the columns of Alpaca are searched alike."""
    said = "Call 020 7946 0018 or log in, the password is hunter2."
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"note": said})}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = [
        {"messages": [{"role": "system", "content": said}, *chat]},
        {"messages": [*turns, {"role": "tool", "tool_call_id": "c", "content": "r"}, chat[1]]},
        {"messages": [*turns[:1], {"role": "assistant", "content": said}]},
        {"prompt": "q", "chosen": "a", "rejected": said},
        {"instruction": "q", "input": said, "output": "a"},
    ]
    rows = [of_source(SourceRow(at, one, shape=FileShape())) for at, one in enumerate(found, 1)]
    why = "Contains a phone number and a key or password."
    assert [(one.lines, one.why) for one in privacy.find(Case(rows))] == [([at], why) for at in range(1, 6)]


def test_a_key_in_a_long_line_is_found_where_it_is() -> None:
    """Detectors read only what is near it, as their time may grow with the square of what they read."""
    key = f"ghp_{'a1B2' * 9}"
    text = f"{'some words ' * 500}{key} {'and more ' * 500}"
    (place,) = privacy.places_in(text)
    assert text[place.begin : place.end] == key


def test_an_address_after_a_long_run_of_letters() -> None:
    """From each letter of a run an address is looked for no further than the longest name of an account."""
    text = f"{'0123456789abcdef' * 20_000}@example.org"
    (place,) = privacy.places_in(text)
    assert text[place.begin : place.end] == f"{('0123456789abcdef' * 20_000)[-64:]}@example.org"


@pytest.mark.parametrize(
    "part", ["Bearer ", "Authorization: ", "authorization:\t", "bearer a1", "4111 ", "4111-", "DE89 3704 ", "12 / "]
)
def test_parts_of_keys_and_cards_in_a_long_run(part: str) -> None:
    """The time grows with a text's length, not with the square of it."""
    assert list(privacy.places_in(part * 50_000)) == []


def test_names_of_keys_in_a_long_run() -> None:
    """A value is read once, whatever stands after it: the time of a line is not the square of its length."""
    name = "api_key="
    for text in (name * 100_000, name * 100_000 + "("):
        assert list(privacy.places_in(text)) == []
    (place,) = privacy.places_in(text[:-1] + "a1b2")
    assert (place.begin, place.end) == (len(name), len(text) + 3)


def test_answers_cut_inside_json_code_and_labels() -> None:
    whole = [row(at, f"question {at}", LABELS[at % 3]) for at in range(1, 31)]
    cut = [row(40, "a b", '{"intent": "ref'), row(41, "c d", "```python\nx = 1"), row(42, "e f", "card lo")]
    case = Case([*whole, *cut, row(43, "g h", '{"a": "}"}')])
    assert lines(truncation.find, case) == [[40], [41], [42]]


def test_a_number_is_no_beginning_of_another_one() -> None:
    sums = [(one, other) for one in range(1, 20) for other in range(1, 20)]
    rows = [row(at, f"What is {one} plus {other}?", str(one + other)) for at, (one, other) in enumerate(sums, 1)]
    assert lines(truncation.find, Case(rows)) == []


def test_text_that_breaks_off() -> None:
    dice = random.Random(3)
    words = [
        "the",
        "small",
        "dog",
        "runs",
        "over",
        "every",
        "green",
        "hill",
        "while",
        "many",
        "birds",
        "sing",
        "about",
        "summer",
    ]
    whole = [
        " ".join(" ".join(dice.choices(words, k=8)).capitalize() + "." for _ in range(dice.randint(2, 4)))
        for _ in range(60)
    ]
    rows = [row(at, f"Tell {at} me {at * 7} more", text) for at, text in enumerate(whole, 1)]
    cut = row(99, "And now", whole[7][:-30] + " ru")
    assert lines(truncation.find, Case([*rows, cut])) == [[99]]


def sentences(count: int) -> list[str]:
    dice = random.Random(3)
    words = ["the", "small", "dog", "runs", "over", "every", "green", "hill", "while", "many", "birds", "sing"]
    made = (" ".join(dice.choices(words, k=8)).capitalize() + "." for _ in range(2 * count))
    return [f"{one} {other}" for one, other in zip(made, made, strict=True)]


@pytest.mark.parametrize(
    "end",
    [
        "That is the way \u2600\ufe0f",
        "It shows a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "Well done \U0001f44d\U0001f3fd",
        "```go\nfunc main() {\n\tprintln(1)\n}\n```",
        "\u092e\u0947\u0930\u093e \u0911\u0930\u094d\u0921\u0930 \u0939\u0948\u0964",
        "\u0e1b\u0e01\u0e15\u0e34\u0e2a\u0e34\u0e19\u0e04\u0e49\u0e32\u0e08\u0e30\u0e21\u0e32\u0e16\u0e36\u0e07",
    ],
    ids=["emoji", "family", "skin", "code", "Hindi", "Thai"],
)
def test_an_end_without_a_full_stop_is_no_break(end: str) -> None:
    rows = [row(at, f"Tell {at} me {at * 7} more", text) for at, text in enumerate(sentences(60), 1)]
    cut = row(99, "And now", "The small dog runs over the gre")
    assert lines(truncation.find, Case([*rows, row(101, "And then", end), cut])) == [[99]]


THAI = [
    "\u0e1b\u0e01\u0e15\u0e34",
    "\u0e2a\u0e34\u0e19\u0e04\u0e49\u0e32",
    "\u0e21\u0e32\u0e16\u0e36\u0e07",
    "\u0e20\u0e32\u0e22\u0e43\u0e19",
    "\u0e2a\u0e32\u0e21",
    "\u0e27\u0e31\u0e19",
    "\u0e43\u0e1a\u0e40\u0e2a\u0e23\u0e47\u0e08",
    "\u0e2d\u0e22\u0e39\u0e48\u0e43\u0e19",
    "\u0e2b\u0e19\u0e49\u0e32",
    "\u0e04\u0e33\u0e2a\u0e31\u0e48\u0e07\u0e0b\u0e37\u0e49\u0e2d",
    "\u0e01\u0e23\u0e38\u0e13\u0e32",
    "\u0e15\u0e34\u0e14\u0e15\u0e48\u0e2d",
    "\u0e1d\u0e48\u0e32\u0e22",
    "\u0e1a\u0e23\u0e34\u0e01\u0e32\u0e23",
]


def test_a_file_in_thai_is_judged() -> None:
    dice = random.Random(3)
    parts = ("".join(dice.choices(THAI, k=count)) for _ in range(60) for count in (5, 3, 3))
    said = [
        f"{one} ({other}) {last}\u0e04\u0e23\u0e31\u0e1a" for one, other, last in zip(parts, parts, parts, strict=True)
    ]
    rows = [row(at, f"Tell {at} me {at * 7} more", text) for at, text in enumerate(said, 1)]
    cut = row(99, "And now", said[7][: said[7].index(")") - 2])
    assert lines(truncation.find, Case([*rows, cut])) == [[99]]


def test_white_space_at_an_end_is_named_as_such() -> None:
    rows = [row(at, f"Tell {at} me {at * 7} more", text) for at, text in enumerate(sentences(60), 1)]
    [found] = truncation.find(Case([*rows, row(99, "And now", "The small dog runs over the green hill. ")]))
    assert found.why == "Ends with white space, as few answers do: ' dog runs over the green hill.'."


def test_too_long_by_a_base_and_by_estimate() -> None:
    rows = [row(1, "word " * 100, "short"), row(2, "short", "short")]
    assert lines(length.find, Case(rows, max_tokens=50)) == [[1]]
    assert lines(length.find, Case(rows, max_tokens=150)) == []
    assert lines(length.find, Case(rows, max_tokens=150, count=len)) == [[1]]


def test_pairs_of_like_questions() -> None:
    rows = [
        row(1, "How do I change the code of my card?", "a"),
        row(2, "Hello! How do I change the code of my card", "b"),
        row(3, "Where is the next office of this bank?", "c"),
        row(4, "how do i change the code of my card", "d"),
        row(5, "Add 12 and 17 for me please", "e"),
        row(6, "Add 12 and 18 for me please", "f"),
    ]
    against = [row(1, "Where is the next office of this bank then?", "c")]
    pairs = {(pair.first.line, pair.second.line, pair.leaked) for pair in neighbours.find(rows, against)}
    assert pairs == {(1, 4, False), (1, 2, False), (4, 2, False), (3, 1, True)}


def test_leaks_of_short_questions_with_a_greeting() -> None:
    """The shingles of a short question differ too much from those of the same question with a greeting."""
    against = [row(1, "I have lost my card", "lost"), row(2, "Hello there. Set a pin of 4 digits", "pin")]
    rows = [
        row(1, "Good morning. I have lost my card!", "lost"),
        row(2, "I have lost my card, many thanks", "blocked"),
        row(3, "set a pin of 4 digits", "pin"),
        row(4, "4 more. Set a pin of 4 digits", "pin"),
        row(5, "I have found your card", "lost"),
    ]
    found = {finding.lines[0]: finding.against for finding in leaks.find(Case(rows, against))}
    assert found == {1: [1], 3: [2]}


def test_a_short_question_that_another_one_contains_is_another() -> None:
    """As much is added as is shared: `Change my pin` is a part of many questions."""
    against = [row(1, "Where do I change my PIN?", "pin"), row(2, "Delete this account!", "close")]
    rows = [row(1, "Change my pin?", "pin"), row(2, "Please help me delete this account.", "close")]
    assert list(leaks.find(Case(rows, against))) == []


def test_labels_are_values_that_come_often() -> None:
    rows = [row(at, "q", json.dumps({"intent": LABELS[at % 3], "text": f"free {at}"})) for at in range(30)]
    assert [task.key for task in labels.find(rows)] == ["intent"]


def test_answers_in_another_format() -> None:
    rows = [row(at, f"q{at}", '{"a": 1}', "Reply in JSON.") for at in range(1, 41)]
    odd = [row(50, "x", "It is a.", "Reply in JSON."), row(51, "y", '{"b": 1}', "Reply in JSON.")]
    assert lines(output_format.find, Case([*rows, *odd, row(52, "z", "Free text.", "Talk.")])) == [[50], [51]]


def test_answers_that_teach_little() -> None:
    rows = [
        row(at, f"Question {at}", "I cannot help with that." if at % 3 == 0 else f"Answer {at}") for at in range(1, 91)
    ]
    case = Case([*rows, row(100, "Say this", "say  this")])
    assert lines(answers.find_echoes, case) == [[100]]
    assert lines(answers.find_dominant, case) == [list(range(3, 91, 3))]
    uneven = [row(at, f"q{at}", "rare" if at < 3 else "often") for at in range(100)]
    assert lines(answers.find_imbalance, Case(uneven)) == [[0, 1, 2]]


def test_a_whole_report(tmp_path: Path) -> None:
    """The file has a fault of each kind. The report names lines of the file, and no row without a fault."""
    rows = labelled()
    wrong = chat("is the card lost; thief in the street took wallet", '{"intent": "refund"}')
    same = [chat("my item order was cancelled", f'{{"intent": "{label}"}}') for label in LABELS[:2]]
    bad_role = {"messages": [{"role": "user", "content": "hm"}, {"role": "bot", "content": "hm"}]}
    other = chat("shop order purchase money held out", '{"intent": "refund"}')
    file = written(tmp_path / "f.jsonl", [*rows, wrong, *same, rows[0], bad_role, other, {"messages": 1}])
    report = maker.make(file, written(tmp_path / "t.jsonl", [chat("Shop order purchase money, held out?", "x")]))
    found = {kind: [one.lines for one in report.findings if one.kind == kind] for kind in report.counts()}
    assert found["exact_duplicate"] == [[1, 64]]
    assert found["contradiction"] == [[62, 63]]
    assert found["wrong_roles"] == [[65]]
    assert found["test_leak"] == [[66]]
    assert found["invalid_row"] == [[67]]
    assert found["mislabelled"][0] == [61]
    assert [one.against for one in report.findings if one.kind == "test_leak"] == [[1]]


def test_rows_are_read_as_jobs_read_them(tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    file = written(
        tmp_path / "f.jsonl", [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, message]}]
    )
    assert read(file)[0].turns == (Turn("user", "a"), Turn("assistant", "add({})", True))


@pytest.mark.parametrize("content", [[{"type": "text", "value": "Press it."}], {"parts": ["Press it."]}, 7])
def test_an_answer_that_a_job_could_not_read_is_not_empty(tmp_path: Path, content: object) -> None:
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": content}]
    report = maker.make(written(tmp_path / "f.jsonl", [{"messages": turns}]))
    assert [finding.kind for finding in report.findings] == ["invalid_row"]


def plain(n: int) -> dict[str, Any]:
    letters = random.Random(n)
    return {"text": " ".join("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(20))}


def test_plain_texts_have_no_roles_and_are_compared_as_a_whole(tmp_path: Path) -> None:
    texts = [plain(n) for n in range(12)]
    near, leaked = {"text": texts[3]["text"] + " again"}, {"text": texts[5]["text"].upper()}
    mail = {"text": "Write to anna@example.org."}
    file = written(tmp_path / "f.jsonl", [*texts, texts[1], near, mail, {"text": " "}])
    report = maker.make(file, written(tmp_path / "v.jsonl", [plain(99), leaked]))

    assert [(one.kind, one.lines) for one in report.findings] == [
        ("empty_output", [16]),
        ("pii", [15]),
        ("exact_duplicate", [2, 13]),
        ("near_duplicate", [4, 14]),
        ("test_leak", [6]),
    ]
    assert "The text is empty" in report.findings[0].why
    assert [one.why for one in report.findings[3:]] == [
        "Texts are nearly the same.",
        "Has the text of line 2 of the other file.",
    ]
    kept = [row for row in read(file) if row.line not in (16, 13, 14, 6)]
    assert report.usable["rows"] == len(kept) == 12
    assert report.usable["answer_bytes"] == sum(len(row.turns[0].text.encode()) for row in kept)
    assert report.figures["diversity"]["prompts"] == 13


def test_the_command_prints_json_and_a_page(tmp_path: Path) -> None:
    rows = [chat("How do I pay?", "Here."), chat("how do I  pay?", "here."), chat("Mail x@example.org", "Yes.")]
    file = str(written(tmp_path / "f.jsonl", rows))
    printed = CliRunner().invoke(app, ["files", "report", file, "--json"])
    assert printed.exit_code == 0
    findings = json.loads(printed.stdout)["findings"]
    assert [(one["kind"], one["lines"], one["score"]) for one in findings] == [
        ("pii", [3], 1.0),
        ("exact_duplicate", [1, 2], 1.0),
    ]
    shown = CliRunner().invoke(app, ["files", "report", file]).stdout
    assert "f.jsonl has 3 rows: 2 findings in 3 of them.\nJSONL; chat messages rows\n" in shown
    assert "Exact duplicates" in shown
    assert "x@example.org" not in shown


def test_a_report_says_what_a_table_is_and_how_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text('Question,Answer\n"How do I\npay?",Here.\nWhere?,There,too\n')
    said = maker.make(file).as_dict()
    described = "CSV; question/answer rows: 'Question' as the user's message, 'Answer' as the answer"
    assert said["shape"] is None, "the last row is invalid"
    assert page.describe({**said, "shape": described[5:]}) == described
    [invalid] = said["findings"]
    assert (invalid["kind"], invalid["lines"]) == ("invalid_row", [4])
    assert invalid["why"].startswith("Invalid file format. Line 4: has 3 values")
    for kind in ("JSON array", "JSON array, compressed with gzip", "Parquet", "cards", "unknown"):
        assert page.describe({"format": kind, "shape": None}) == f"{kind}; lines are counted by rows"
    for kind in ("JSONL", "TSV", "CSV, compressed with zstd"):
        assert page.describe({"format": kind, "shape": None}) == kind


def test_pairs_are_reported_on_with_their_preferred_answers(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Is {n} even?", "chosen": "yes" if n % 2 == 0 else "no", "rejected": "maybe"} for n in range(9)
    ]
    found = read(written(tmp_path / "pairs.jsonl", [*pairs, {"prompt": "q", "chosen": "a", "rejected": "a"}]))

    assert [(row.question, row.answer) for row in found[:2]] == [("Is 0 even?", "yes"), ("Is 1 even?", "no")]
    assert [row.line for row in found if row.fault] == [10]
    assert "two equal answers" in (found[9].fault or "")


def test_a_pair_is_more_than_its_preferred_answer(tmp_path: Path) -> None:
    """The same answer may be preferred to several others, and what is learned against may hold personal data."""
    asked = {"prompt": "Which way to the old harbour?", "chosen": "Left at the mill, then straight on."}
    others = ["No idea.", "Ask me later.", "NO  idea.", "Ring Anna: anna@example.org."]
    file = written(tmp_path / "pairs.jsonl", [{**asked, "rejected": text} for text in others])
    report = maker.make(file)
    assert [(one.kind, one.lines) for one in report.findings] == [("pii", [4]), ("exact_duplicate", [1, 3])]
    assert report.usable["rows"] == 3


def test_answers_too_short_to_be_cut_are_no_fault_of_the_report() -> None:
    rows = [row(n, f"What comes after {n}?", str(n + 1)) for n in range(300)]
    assert lines(truncation.find, Case(rows)) == []


def test_like_prompts_count_as_one() -> None:
    asked = ["How do I change my pin?"] * 3 + ["How do I change my  PIN"] + ["Where is the card that I ordered?"]
    found = diversity.figures(Case([row(n, question, "x") for n, question in enumerate(asked, 1)]))
    assert (found["prompts"], found["largest_cluster"]) == (2, 0.8)
    assert found["effective_prompts"] == pytest.approx(1.6, abs=0.05)  # exp(-0.8 ln 0.8 - 0.2 ln 0.2) = 1.65


def test_a_large_group_of_like_prompts_is_named() -> None:
    asked = ["Say hello to me please"] * 25 + [f"{word} question about {word}" for word in ("tax", "sea", "art")]
    (finding,) = diversity.find(Case([row(n, question, f"a{n}") for n, question in enumerate(asked, 1)]))
    assert (finding.kind, len(finding.lines)) == ("low_diversity", 25)


def test_rows_in_another_script() -> None:
    rows = [row(n, "Where is it?", "Here it is.") for n in range(1, 30)] + [row(30, "Где это?", "Here it is.")]
    (finding,) = scripts.find(Case(rows))
    assert (finding.lines, "Cyrillic" in finding.why) == ([30], True)
    assert [scripts.script_of(text) for text in ("東京へ行く", "مرحبا", "123", "Ünïcode")] == [
        "East Asian",
        "Arabic",
        None,
        "Latin",
    ]
    assert [scripts.script_of(text) for text in ("plain", "1 + 1")] == ["Latin", None]


ASKED = ("Where is my new card, please?", "I would like to close my account today.", "How do I change the PIN here?")
SAID = ("It will arrive within five days.", "We have closed the account for you.", "You can change it at any machine.")


@pytest.mark.parametrize("sampled", [4000, 30])  # no row with a finding is among the 30
def test_rows_in_another_language(sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "SAMPLED", sampled)
    rows = [row(at, f"{ASKED[at % 3]} {at}", f"{SAID[at % 3]} {at}") for at in range(1, 90)]
    rows.append(row(90, ASKED[0], "Votre nouvelle carte arrivera dans les cinq jours."))
    rows.append(row(91, "Ich habe meine Karte verloren, was soll ich tun?", SAID[1]))
    rows.append(row(92, "SELECT name FROM users WHERE id = 3;", "Berlin"))
    rows.append(row(93, "show weather forcast for MS on jan. the 9th, 2034", SAID[0]))  # Nigerian Pidgin or English
    case = Case(rows)
    assert {finding.lines[0]: finding.why.split("'")[1] for finding in languages.find(case)} == {90: "fr", 91: "de"}
    mix = languages.figures(case)
    assert mix["sampled"] == min(sampled, 93)
    assert mix["question"]["en"] >= mix["sampled"] - 3
    assert sum(mix["answer"].values()) == mix["sampled"]


def test_a_file_of_two_languages_names_no_rows() -> None:
    said = (SAID[0], "Votre nouvelle carte arrivera dans les cinq jours.")
    case = Case([row(at, f"{ASKED[0]} {at}", said[at % 2]) for at in range(60)])
    assert list(languages.find(case)) == []
    assert languages.figures(case)["answer"] == {"en": 30, "fr": 30}


def test_rows_of_the_general_benchmark(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"question": "What is 2 + 2?", "choices": ["4", "5"]}])
    written(tmp_path / "b.jsonl", [chat("Name a colour.", "Red")])
    known = benchmark.read(tmp_path)
    rows = [row(1, "what is 2 + 2", "4"), row(2, "Name a colour!", "Blue"), row(3, "Name a fruit.", "Apple")]
    assert lines(benchmark.find, Case(rows, benchmark=known)) == [[1], [2]]
    assert lines(benchmark.find, Case(rows)) == []


@pytest.mark.parametrize(
    ("question", "is_one"),
    [
        ("What knife is best to cut a melon?\nA) a large one\nB) a small one", True),
        ("What knife is best to cut a melon? A) a large one B) a small one", True),
        ("Answer the following question.\nWhat knife is best to cut a melon?", True),
        ("Question: what knife is best to cut a melon\nAnswer:", True),
        ("Polar bears live in A) snow B) sand", True),
        ("Complete the sentence: Polar bears live in (a) snow (b) sand", True),
        ("Polar bears live in\nsnow\nsand", True),
        ("Hello\nThank you.\nWhere is my card?", False),
        ("What knife is best to cut a melon, a pear and a plum?", False),
        ("Do you know what knife is best to cut a melon?", False),
        ("Some polar bears live in zoos.", False),
        ("What knife is best to cut a lemon?", False),
    ],
)
def test_questions_of_the_benchmark_between_other_sentences(question: str, is_one: bool) -> None:
    known = frozenset({"what knife is best to cut a melon", "polar bears live in", "hello"})
    assert bool(lines(benchmark.find, Case([row(1, question, "A")], benchmark=known))) is is_one


def test_a_question_of_the_benchmark_many_times_in_one_sentence() -> None:
    """Each of them is judged in the same time, however long the text is."""
    known = frozenset({"polar bears live in"})
    said = "they say " + "polar bears live in " * 50_000
    rows = [row(1, f"{said}zoos", "A"), row(2, f"{said}zoos. Polar bears live in\nsnow", "A")]
    assert lines(benchmark.find, Case(rows, benchmark=known)) == [[2]]


def test_every_question_of_the_general_benchmark_is_found_with_its_choices() -> None:
    folder = Path("worker/trainer/general/data")
    known = benchmark.read(folder)
    items = [json.loads(line) for line in (folder / "multiple_choice.jsonl").read_text().splitlines()]
    items = [item for item in items if len(texts.words(item["question"]).split()) >= 4]
    rows = [
        row(at, f"Answer the question.\n{item['question']}\nA) {item['choices'][0]}\nB) {item['choices'][1]}", "A")
        for at, item in enumerate(items, 1)
    ]
    assert len(lines(benchmark.find, Case(rows, benchmark=known))) == len(items) == 790


def test_tokens_of_a_base(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    rows = [chat("a b c", "d e"), chat("x " * 400, "y"), {"messages": [{"role": "user", "content": "q"}]}]
    made = maker.make(written(tmp_path / "f.jsonl", rows), base=base, max_tokens=256)
    figures = made.figures["tokens"]
    template = ChatTemplate.load(base)
    whole = len(template.encode_all(read_row(rows[0]), 2**20)[0].input_ids)
    assert figures["spreads"]["row"]["count"] == 2
    assert figures["spreads"]["user"]["count"] == figures["spreads"]["turn 1 user"]["count"] == 2
    long = len(template.encode_all(read_row(rows[1]), 2**20)[0].input_ids)
    assert made.summary()["tokens"] == {"rows": 2, "total": whole + long}
    assert "tokens" not in maker.make(tmp_path / "f.jsonl").summary()
    first, *_, last = figures["lengths"]
    assert (first["length"], first["truncated"], first["answer_cut"], first["answer_lost"]) == (256, 1, 1, 1)
    assert last["truncated"] == last["answer_cut"] == 0
    assert [one.lines for one in made.findings if one.kind == "answer_cut"] == [[2]]
    shown = page.render("f.jsonl", made.as_dict())
    assert "What a length limit cuts" in shown
    assert "Answers that the token limit cuts" in shown
    assert whole < 256
    for counts, is_shown in (({"en": 3}, True), ({"unknown": 3}, False)):  # no language is identified in JSON labels
        said = made.as_dict()
        said["figures"]["languages"] = {"question": {"en": 3}, "answer": counts}
        assert ("languages of the answers" in page.render("f.jsonl", said)) is is_shown


def test_a_row_that_a_bases_template_loses_a_part_of_is_named(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    calls = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    file = written(tmp_path / "f.jsonl", [chat("a b c", "d e"), calls, {"messages": 1}])
    assert [one.lines for one in maker.make(file).findings] == [[3]]
    made = maker.make(file, base=base)
    reasons = {one.lines[0]: one.why for one in made.findings if one.kind == "invalid_row"}
    assert sorted(reasons) == [2, 3]
    assert "does not render tool calls" in reasons[2]
    assert (made.usable["rows"], made.figures["tokens"]["spreads"]["row"]["count"]) == (1, 1)


def read_row(fields: dict[str, Any]) -> Any:
    return parse_row(SourceRow(1, fields), "training")


def test_a_file_of_another_project_row_by_row() -> None:
    known = elsewhere.unpack(elsewhere.pack([row(7, "Who?", "Ann"), row(8, "who? ", "ann"), row(9, "Why?", "So")]))
    other = elsewhere.Other("file-x", "valid.jsonl", known)
    (finding,) = elsewhere.find(Case([row(1, "Who?", "Ann"), row(2, "Where?", "Oslo")], others=[other]))
    assert (finding.lines, finding.against, finding.score) == ([1], [7], 0.5)


def test_a_mark_of_a_list_without_its_item_is_a_break() -> None:
    rows = [
        row(1, "Name two.", "1- Paris\n2- Rome"),
        row(2, "Name three.", "1- Paris\n2- Rome\n3"),
        row(3, "How many?", "3"),
    ]
    assert lines(truncation.find, Case(rows)) == [[2]]


def judged(line: int, loss: float, alone: float, end: float = -1.0) -> AnswerLoss:
    return AnswerLoss(line=line, tokens=20, loss=loss, alone=alone, end=end)


def test_answers_that_a_base_finds_implausible() -> None:
    free = [row(at, f"question {at}", f"answer with many words {at}") for at in range(1, 41)]
    losses = {at: judged(at, 2 + at % 5 / 10, 4) for at in range(1, 41)}
    losses |= {7: judged(7, 4.5, 4), 8: judged(8, 9, 20)}  # the second is rare, and helped by its question
    (finding,) = plausibility.find(Case(free, losses=losses))
    assert (finding.kind, finding.lines, 0 < finding.score < 1) == ("implausible_output", [7], True)
    assert list(plausibility.find(Case(free[:29], losses={at: losses[at] for at in range(1, 30)}))) == []
    assert list(plausibility.find(Case(free))) == []
    assert plausibility.figures(losses)["judged"] == 40


def test_labels_are_not_judged_by_a_base(tmp_path: Path) -> None:
    case = Case(read(written(tmp_path / "a.jsonl", labelled())))
    case.losses = {at: judged(at, 2 + at % 5 / 10 + 5 * (at == 7), 4) for at in range(1, 61)}
    assert list(plausibility.find(case)) == []
