"""Questions that ask the same, and others that only share a template, an instruction or a context."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning, HeldOut
from tunery.datasets.report import maker, sameness
from tunery.datasets.report.maker import Report

LONG = (
    "The delivery of the new bank card that I ordered online from the office in Leeds has not arrived at my home after "
    "waiting for several weeks"
)
TOKYO = "\u6771\u4eac\u306e\u5929\u6c17\u306b\u3064\u3044\u3066\u6559\u3048\u3066"
SAME = [
    ("I want to return an item.", "Hi, i want to return an item."),
    ("My card is lost! What do I do now?", "My card is lost! What do I do now please"),
    ("I need to change my PIN. Can I do that at a cash machine?",
     "I need to change my PIN. Can I do that at one cash machine?"),
    ("I got my American Express in Apple Pay but top up is not working",
     "I got my American Express in Apple Bay but top up is not working ,"),
    ("Can this card be used at all ATMs?", "can this card be used at all atms"),
    ("How do I validate my identity?", "How can I validate my identity?"),
    ("Where can I withdraw money?", "Can you tell me where I can withdraw money? Thanks"),
    ("What is the exchange rate for my card?", "Good morning. What is the exchange rate for my card?"),
    ("What is the exchnage rate for my card?", "What is the exchange rate for my card?"),
    ("When will the new crad be sent?", "When will the new card be sent?"),
    ("How do I track the card that you sent me last week", "How do I track the card that you sent me last"),
    (LONG, LONG.replace("weeks", "months")),
    ("what documents do i need for the identity check", "what documentation do i need for the identity check"),
    ("how can i open an account for my children", "can i open up an account for my child"),
    ("what is needed for the identity verification", "what do you need for the identity verification"),
    ("The course is about Go.\nDiscount: half\nUse the code: GOLANG", "The course is about Go.\nDiscount: half\n"
     "Use the code: GOLANG Many thanks!"),
    ("Wie sperre ich die Karte von meinem Konto?", "Hallo, wie sperre ich meine Karte von dem Konto?"),
    ("¿Cómo cambio el PIN de la tarjeta?", "¿Cómo cambio mi PIN de una tarjeta?"),
    ("For the identity verification, what do you need?", "What do you need for the identity verification"),
    ("Why isn't my google pay top up working?", "Why doesn't my Google pay top up work?"),
    ("Delete my account please. Now!", "Please delete my account now."),
    ("Add Atticus to the electrosafari playlist", "Add Atticus to the playlist electrosafari"),
    ("How do I change the pin of it?", "how do i change the pni of it"),
    (TOKYO, f"{TOKYO}\u304f\u3060\u3055\u3044"),
    ("List the courses that an expert in a field takes.\n\nGraphic Design",
     "List the courses that an expert in a field takes. Graphic"),
    ("Where do I see the payments of last month?", "Where do I see the payment history of last month?"),
]  # fmt: skip
CONTEXT = (
    "The tower of Arlen was raised in 1312 by the guild of masons after the great flood. It is ninety-eight metres "
    "tall, has three bells, and stands on the northern bank of the river Osse beside the old grain market.\n\n"
)
DIFFERENT = [
    ("What is the capital of France?", "What is the capital of Germany?"),
    ("I want to dispute the payment I made on a telescope", "I want to dispute the payment I made on a tent"),
    ("Show the name of all clients sorted by age", "Show the name of all clients sorted by city"),
    ("Meine Lampe aus der Filiale Ulm ist kaputt. Was soll ich tun?",
     "Meine Lampe aus der Filiale Dresden ist kaputt. Was soll ich tun?"),
    (TOKYO, TOKYO.replace("\u6771\u4eac", "\u5927\u962a")),
    ("Show the name of all users sorted by date", "Show the date of all users sorted by name"),
    ("How far is it from Bath to New York by train?", "How far is it from New York to Bath by train?"),
    ("Classify the tone of this review.\nI love this lamp", "Classify the tone of this review.\nthe tent leaks"),
    ("Translate to French: the house by the sea is empty", "Translate to German: the house by the sea is empty"),
    (f"{CONTEXT}Who raised the tower?", f"{CONTEXT}How tall is it?"),
    (f"{CONTEXT}Who raised the tower?", f"{CONTEXT}When was it raised?"),
    (f"{CONTEXT}What do they keep?", f"{CONTEXT}What do they make?"),
]  # fmt: skip
THINGS = [
    f"{thing} {fault}"
    for thing in ("violin", "sofa", "drill", "lamp", "kettle", "carpet", "bicycle", "mirror")
    for fault in ("arrived damaged", "broke within days", "smells of paint", "works as promised", "looks lovely")
]
INSTRUCTIONS = (
    "Classify the sentiment of this review.",
    "Read the customer review below and decide whether its tone is positive, negative or neutral. Answer with exactly "
    "one of these three words and nothing else, in lower case, without a full stop.",
)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_question_that_was_typed_again_asks_the_same(one: str, other: str) -> None:
    assert sameness.ask_the_same(*map(sameness.sentences, (one, other)))
    assert sameness.ask_the_same(*map(sameness.sentences, (other, one)))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_question_of_a_template_asks_something_else(one: str, other: str) -> None:
    assert not sameness.ask_the_same(*map(sameness.sentences, (one, other)))
    assert not sameness.ask_the_same(*map(sameness.sentences, (other, one)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Which town lies higher, Bath or York?", "Which town lies higher, York or Bath?"),
        (
            "If there is more rain, is the river of the valley wide?",
            "If there is less rain, is the river of the valley wide?",
        ),
        (
            "Is it allowed to park in front of the old town hall?",
            "Is it not allowed to park in front of the old town hall?",
        ),
        ("Isn't the shop beside the station open on Sundays?", "Is the shop beside the station open on Sundays?"),
        (
            "JVC, given the list of categories above, is a what?",
            "Shiply, given the list of categories above, is a what?",
        ),
        ("Convert the sum from USD at the rate of today", "Convert the sum from GBP at the rate of today"),
        ("Convert the sum from USD at the rate of today", "Convert the sum from USB at the rate of today"),
        ("What is the highest mountain of Austria in metres?", "What is the highest mountain of Australia in metres?"),
    ],
)
def test_another_wording_may_be_the_reason_for_another_answer(one: str, other: str) -> None:
    assert not sameness.are_worded_alike(*map(sameness.sentences, (one, other)))
    assert not sameness.are_worded_alike(*map(sameness.sentences, (other, one)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why was my card refused?", "Hello! Why was my card refused? Many thanks!"),
        ("Why was my card refused?", "Why was my crad refsed"),
        ("How do I change the pin of my old card?", "Hi, so how do I change the pin of my old card please"),
        ("How do I change the pin of my card?", "How do I change the pni of my card?"),
    ],
)
def test_a_question_that_was_typed_again_has_its_wording(one: str, other: str) -> None:
    assert sameness.are_worded_alike(*map(sameness.sentences, (one, other)))
    assert sameness.are_worded_alike(*map(sameness.sentences, (other, one)))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(instruction: str, texts: list[str]) -> list[dict[str, Any]]:
    answers = ("negative", "negative", "negative", "positive", "positive")
    return [
        {"instruction": instruction, "input": f"My {text}", "output": answers[at % 5]} for at, text in enumerate(texts)
    ]


def lines(report: Report, kind: str) -> list[list[int]]:
    return [finding.lines for finding in report.findings if finding.kind == kind]


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=["short", "long"])
def test_an_instruction_to_all_rows_makes_none_alike(tmp_path: Path, instruction: str) -> None:
    rows = reviews(instruction, THINGS[:35])
    again = {"instruction": instruction, "input": "Hi, my carpet smells of paint!", "output": "negative"}
    other = {"instruction": instruction, "input": "My violin arrived damaged", "output": "positive"}
    file = written(tmp_path / "train.jsonl", [*rows, again, other])
    against = written(tmp_path / "test.jsonl", reviews(instruction, [*THINGS[35:], "drill works as promised"]))

    report = maker.make(file, against)

    assert lines(report, "near_duplicate") == [[28, 36]]
    assert lines(report, "contradiction") == [[1, 37]]
    assert lines(report, "test_leak") == [[14]]
    assert report.figures["diversity"]["prompts"] == 35
    cleaner.clean(
        file, tmp_path / "clean.jsonl", Cleaning(held_out=HeldOut(share=0.2)), held_out=tmp_path / "held.jsonl"
    )
    assert len((tmp_path / "held.jsonl").read_text().splitlines()) in (6, 7, 8)


def test_the_same_text_under_another_instruction_is_another_question(tmp_path: Path) -> None:
    texts = [f"the {thing} in the old house" for thing in THINGS]
    tasks = ("Translate the text to French.", "Translate the text to German.")
    rows = [{"instruction": task, "input": text, "output": text} for task in tasks for text in texts]

    report = maker.make(written(tmp_path / "train.jsonl", rows))

    assert not lines(report, "near_duplicate") + lines(report, "contradiction")
    assert report.figures["diversity"]["prompts"] == 80


def test_questions_about_one_context_are_others(tmp_path: Path) -> None:
    asked = ("Who raised the tower?", "How tall is it?", "How many bells are there?", "What is beside it?")
    train = [{"context": CONTEXT, "question": one, "answer": str(at)} for at, one in enumerate(asked[:2])]
    test = [
        {"context": CONTEXT, "question": one, "answer": str(at)}
        for at, one in enumerate((*asked[2:], "How tall is it"))
    ]

    report = maker.make(written(tmp_path / "train.jsonl", train), written(tmp_path / "test.jsonl", test))

    assert lines(report, "test_leak") == [[2]]
    assert report.figures["diversity"]["prompts"] == 2


def pairs(*rows: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


def test_short_answers_to_the_same_question_contradict_each_other(tmp_path: Path) -> None:
    rows = pairs(
        ("What is the capital of France?", "Paris"), ("Who wrote Faust?", "Goethe"), ("What is 8 times 38?", "304"),
        ("what is the capital of france", "Lyon"), ("Who wrote Faust?", "Johann Wolfgang von Goethe."),
        ("What is 8 times 38?", "It is 304."), ("Where is Brem?", "I do not know where that small village could be."),
        ("Where is Brem?", "North"),
    )  # fmt: skip
    report = maker.make(written(tmp_path / "rows.jsonl", rows))
    assert lines(report, "contradiction") == [[1, 4]]
    [why] = [finding.why for finding in report.findings if finding.kind == "contradiction"]
    assert why == "For the same question the answer is 'Paris' in one row and 'Lyon' in the other."


SIGNED = [
    ("What is 3 + 4?", "7", "What is 3 * 4?", "12"),
    ("What is 3 - 4?", "-1", "What is 3 / 4?", "0.75"),
    ("What does C++ stand for?", "C plus plus", "What does C# stand for?", "C sharp"),
    ("Is it -5 C outside?", "yes", "Is it 5 C outside?", "no"),
    ("Convert 5\u20ac to words", "five euros", "Convert 5$ to words", "five dollars"),
    ("I got it today \U0001f600", "good", "I got it today \U0001f621", "bad"),
    ("my boss called again :)", "good", "my boss called again :(", "bad"),
    ("Is \U0001f44d a good sign?", "yes", "Is \U0001f44e a good sign?", "no"),
    ("Solve it for x > 0", "-3", "Solve it for x < 0", "3"),
]
"""Questions that differ in a sign alone, and their answers."""


@pytest.mark.parametrize(("one", "first", "other", "second"), SIGNED)
def test_a_question_with_another_sign_is_another(tmp_path: Path, one: str, first: str, other: str, second: str) -> None:
    rows = pairs((one, first), (other, second), ("Where is Brem?", "North"))
    report = maker.make(written(tmp_path / "rows.jsonl", rows), against=written(tmp_path / "other.jsonl", rows[1:2]))
    found = {finding.kind: finding.lines for finding in report.findings}
    assert not {"contradiction", "near_duplicate"} & found.keys()
    assert found["test_leak"] == [2]
    again = maker.make(written(tmp_path / "rows.jsonl", [*rows, *pairs((one, second))]))
    assert lines(again, "contradiction") == [[1, 4]]


def test_a_sign_more_is_the_same_question(tmp_path: Path) -> None:
    rows = pairs(("Where is my card?", "On its way, it was sent."), ("What is 3 + 4?", "7"))
    asked = pairs(("where is my card \U0001f621\U0001f621", "On its way, it was sent."), ("What is **3 + 4**?", "7"))
    report = maker.make(written(tmp_path / "rows.jsonl", rows), against=written(tmp_path / "other.jsonl", asked))
    assert lines(report, "test_leak") == [[1], [2]]


def test_accents_are_compared_however_they_are_encoded(tmp_path: Path) -> None:
    rows = pairs(("Comment r\u00e9initialiser mon mot de passe ?", "Cliquez sur le lien re\u00e7u."))
    apart = json.loads(unicodedata.normalize("NFD", json.dumps(rows, ensure_ascii=False)))
    assert apart != rows
    report = maker.make(written(tmp_path / "rows.jsonl", [*rows, *apart]), against=written(tmp_path / "a", apart))
    assert lines(report, "exact_duplicate") == [[1, 2]]
    assert lines(report, "test_leak") == [[1], [2]]


def test_a_file_that_asks_for_several_answers_has_no_contradictions(tmp_path: Path) -> None:
    asked = {"fruit": ("Apple", "Pear"), "river": ("Rhine", "Oder"), "bird": ("Wren", "Stork"), "tree": ("Oak", "Elm")}
    rows = pairs(*((f"Name a {what}.", answer) for what, answers in asked.items() for answer in answers))
    assert not lines(maker.make(written(tmp_path / "rows.jsonl", rows)), "contradiction")


def test_an_open_question_has_no_contradictions(tmp_path: Path) -> None:
    rows = pairs(*(("Name a fruit.", fruit) for fruit in ("Apple", "Pear", "Plum", "Fig")), ("Is it red?", "Yes"))
    assert not lines(maker.make(written(tmp_path / "rows.jsonl", rows)), "contradiction")
    found = lines(maker.make(written(tmp_path / "rows.jsonl", [*rows[:3], *rows[4:]])), "contradiction")
    assert found == [[1, 2], [1, 3]]


def test_an_open_question_with_recurring_answers_has_no_contradictions(tmp_path: Path) -> None:
    fruits = ("Apple", "Pear", "Plum", "Fig") * 5
    rows = pairs(*(("Name a fruit.", fruit) for fruit in fruits), ("Name a red fruit.", "Apple"), ("Is it?", "Fig"))
    assert not lines(maker.make(written(tmp_path / "rows.jsonl", [*rows, *pairs(("Is it?", "Fig"))])), "contradiction")
    found = lines(maker.make(written(tmp_path / "rows.jsonl", [*rows, *pairs(("Is it?", "Plum"))])), "contradiction")
    assert found == [[22, 23]]


def test_labels_of_questions_in_another_wording_do_not_contradict_each_other(tmp_path: Path) -> None:
    place = "The town of Holm has a bridge, a mill, two schools and a market in the square below the church."
    asked = [f"{place} On {day}, is the {what} open?" for day in ("Monday", "Sunday") for what in ("mill", "bridge")]
    rows = pairs(*((question, "yes") for question in asked))
    rows += pairs(*((question.replace(" is the", " is not the"), "no") for question in asked))
    rows += pairs((f"Hello. {asked[0]}", "no"))
    found = lines(maker.make(written(tmp_path / "rows.jsonl", rows)), "contradiction")
    assert found == [[1, 9]]


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [
        ("\u5df4\u9ece", "\u91cc\u6602", True),
        ("\u662f", "\u4e0d\u662f", True),
        ("\u662f", "\u662f\u7684", False),
        (
            "\u62b1\u6b49\u6211\u65e0\u6cd5\u9884\u8ba2\u673a\u7968\u548c\u5ea7\u4f4d",
            "\u6211\u53ea\u80fd\u8ba1\u7b97\u7a0e\u6b3e\u548c\u6298\u6263",
            False,
        ),
    ],
    ids=["cities", "yes and no", "yes in two forms", "sentences"],
)
def test_short_answers_without_blanks_between_words(tmp_path: Path, one: str, other: str, contradict: bool) -> None:
    asked = "\u4f60\u80fd\u5e2e\u6211\u8ba2\u673a\u7968\u5417\uff1f"
    report = maker.make(written(tmp_path / "rows.jsonl", pairs((asked, one), (asked, other))))
    assert bool(lines(report, "contradiction")) == contradict


def offering(tool: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "What is it like in Oslo?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": tool}}]}


def test_rows_with_other_tools_are_others(tmp_path: Path) -> None:
    rows = [offering(tool, answer) for tool in ("get_time", "get_tide") for answer in ("I cannot tell.", "Rainy")]
    report = maker.make(written(tmp_path / "rows.jsonl", rows))
    assert lines(report, "contradiction") == [[1, 2], [3, 4]]
    assert not lines(report, "exact_duplicate") + lines(report, "near_duplicate")
    again = maker.make(written(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    assert lines(again, "exact_duplicate") == [[1, 5]]


def instructed(system: str, answer: str) -> dict[str, Any]:
    said = (("system", system), ("user", "May I bring my dog?"), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def test_rows_with_another_system_message_are_compared_with_each_other(tmp_path: Path) -> None:
    rows = [
        instructed("You work for a hotel.", "Yes"),
        *(instructed("You work for a museum.", answer) for answer in ("No", "Yes")),
    ]
    report = maker.make(written(tmp_path / "rows.jsonl", rows))
    assert lines(report, "contradiction") == [[2, 3]]


@pytest.mark.parametrize(
    ("system", "is_same"),
    [("You work for a small museum.", False), ("You work for a small hotel!", True), ("", True)],
)
def test_the_same_answer_under_another_system_message(tmp_path: Path, system: str, is_same: bool) -> None:
    rows = [instructed(one, "Yes, it may come.") for one in ("You work for a small hotel.", system)]
    rows[1]["messages"][1]["content"] += "!"
    report = maker.make(written(tmp_path / "rows.jsonl", rows))
    assert lines(report, "near_duplicate") == ([[1, 2]] if is_same else [])


def test_preferences_that_are_swapped_contradict_each_other(tmp_path: Path) -> None:
    one = {"prompt": "How do I reset it?", "chosen": "Hold the button.", "rejected": "No idea."}
    swapped = one | {"chosen": one["rejected"], "rejected": one["chosen"]}
    other = {"prompt": "How do I open it?", "chosen": "Press the latch at the side.", "rejected": "Just do it."}
    report = maker.make(written(tmp_path / "rows.jsonl", [one, other, swapped]))
    assert lines(report, "contradiction") == [[1, 3]]
    assert "the preferred answer is 'Hold the button.'" in next(
        finding.why for finding in report.findings if finding.kind == "contradiction"
    )
