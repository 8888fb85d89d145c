"""Files of other programs and their guides load as they are. `datasets` 5.2.0 wrote those that have its name."""

from pathlib import Path

import pytest

from tunery.datasets.rules import check_examples
from tunery.rows.encoding import read_examples

FOREIGN = Path(__file__).parents[1] / "data/foreign"
Turns = list[tuple[str, str | None]]

HARBOUR: list[Turns] = [
    [("user", "Which way to the harbour?"), ("assistant", "Left at the mill.")],
    [("system", "Be brief."), ("user", "And back?"), ("assistant", "The same way.")],
]
QUAY: list[Turns] = [
    [("user", "What is a quay?"), ("assistant", "A place where ships are loaded,\nand unloaded.")],
    [("user", 'What is a "mole"?'), ("assistant", "A wall in the sea.")],
]
NAMED = "Hello! I am NAME, an AI assistant developed by AUTHOR. How can I assist you today?"
FILES: dict[str, tuple[str | None, list[Turns]]] = {
    "openai_cookbook.jsonl": (
        None,
        [
            [
                ("system", "You are a happy assistant that puts a positive spin on everything."),
                ("user", "I fell off my bike today."),
                ("assistant", "It's great that you're getting exercise outdoors!"),
            ]
        ],
    ),
    "llamafactory_identity.json": ("Alpaca", [[("user", "hi"), ("assistant", NAMED)]]),
    "llamafactory_toolcall.json": (
        "ShareGPT",
        [
            [
                (
                    "user",
                    "I need to calculate the area of a rectangle. The length is 5 units and the breadth is 3 units.",
                ),
                ("assistant", None),
                ("tool", '{"area": 15}'),
                ("assistant", "The area of the rectangle with length 5 units and breadth 3 units is 15 square units."),
            ]
        ],
    ),
    "datasets_chat.parquet": (None, HARBOUR),
    "datasets_chat.jsonl": (None, HARBOUR),
    "datasets_questions.csv": ("question/answer", QUAY),
    "datasets_questions.json": ("question/answer", QUAY),
}


def test_each_foreign_file_is_tried() -> None:
    assert {path.name for path in FOREIGN.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_foreign_file_loads_as_it_is(name: str) -> None:
    shape, wanted = FILES[name]
    data = (FOREIGN / name).read_bytes()
    found = [
        [(message.role, message.content) for message in example.messages]
        for _, example in read_examples([data], "training")
    ]
    for turns, begins in zip(found, wanted, strict=False):
        assert turns[: len(begins)] == begins
    summary = check_examples([data], least=1)
    assert summary.examples == len(found) >= len(wanted)
    described = summary.shape.describe()
    assert described is None if shape is None else str(described).startswith(shape)


def test_calls_and_tools_of_a_foreign_file_are_kept() -> None:
    data = (FOREIGN / "llamafactory_toolcall.json").read_bytes()
    [(_, example)] = read_examples([data], "training")
    assert [tool.function.name for tool in example.tools or ()] == ["calculate_area", "calculate_discount"]
    calls = [call.function for message in example.messages for call in message.tool_calls or ()]
    assert [call.name for call in calls] == ["calculate_area"] * 3
    assert calls[0].arguments == '{"shape": "rectangle", "dimensions": [5, 3]}'
