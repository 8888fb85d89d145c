"""The rows under examples/ are all valid training rows, and no two splits share a question."""

import ast
import json
import re
from pathlib import Path

import pytest

from tunery.rows.messages import parse_line

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = {"banking": (1215, 200, 479), "snips": (3500, 350, 695)}


def _lines(name: str) -> list[str]:
    return (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def _questions(name: str) -> set[str]:
    texts = (json.loads(line)["messages"][-2]["content"] for line in _lines(name))
    return {re.sub(r"[^a-z0-9]", "", text.lower()) for text in texts}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_row_is_a_training_row_with_a_json_answer(name: str) -> None:
    for split, count in zip(("train", "valid", "test"), ROWS[name], strict=True):
        lines = _lines(f"{name}_{split}")
        assert len(lines) == count
        for number, line in enumerate(lines, start=1):
            last = parse_line(line, number).messages[-1]
            assert last.role == "assistant"
            assert "intent" in json.loads(str(last.content))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_splits_share_no_question(name: str) -> None:
    train, valid, test = (_questions(f"{name}_{split}") for split in ("train", "valid", "test"))
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_the_client_example_differs_from_openai_by_one_argument() -> None:
    tree = ast.parse((EXAMPLES / "openai_client.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "OpenAI"]
    assert [[keyword.arg for keyword in call.keywords] for call in calls] == [["base_url"]]


def test_the_plain_peft_example_imports_nothing_of_ours() -> None:
    tree = ast.parse((EXAMPLES / "plain_peft.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in {"tunery", "api", "worker"}}


def test_the_notice_names_both_sources() -> None:
    notice = (EXAMPLES.parent / "NOTICE").read_text(encoding="utf-8")
    for words in ("CC0 1.0", "arXiv:1805.10190", "Attribution 4.0", "arXiv:2003.04807"):
        assert words in notice
