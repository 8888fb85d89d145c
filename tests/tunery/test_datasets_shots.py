"""Prompts with examples: which examples are shown, in which order, and how many fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from run_folders import chat

from tunery.datasets.shots import choice, maker
from tunery.failures import InvalidTrainingFile
from tunery.planning.prompting import Prompts, ShotsOrder
from tunery.trainer_protocol import EXIT_USER_ERROR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.tokenizer(tmp_path / "base")
    (tmp_path / "prompts").mkdir()
    return tmp_path


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *said]}


def prompts(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in (folder / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def make(folder: Path, **order: Any) -> Prompts:
    return maker.make(folder, ShotsOrder(**{"max_rows": 100, "context": 2048, "shots": [0, 2], **order}))


def test_examples_stand_behind_the_rows_own_system_message(folder: Path) -> None:
    put(folder, "rows", [row("Where is my card?", "card", "Name the intent.")])
    put(folder, "examples", [row("My cash is gone", "cash", "Another."), row("Top up failed", "top_up", "Another.")])
    made = make(folder)
    assert [(one.name, one.error) for one in made.variants] == [("0-shot", None), ("2-shot", None)]
    [bare], [shown] = prompts(folder, "0-shot"), prompts(folder, "2-shot")
    assert shown[:1] + shown[5:] == bare
    assert [one["role"] for one in shown[1:5]] == ["user", "assistant"] * 2
    assert {one["content"] for one in shown[1:5]} == {"My cash is gone", "cash", "Top up failed", "top_up"}


def test_both_files_are_read_by_named_columns(folder: Path) -> None:
    put(folder, "rows", [{"Frage": "Where is my card?", "Antwort": "card"}])
    put(folder, "examples", [{"Frage": "My cash is gone", "Antwort": "cash", "messages": "no chat"}] * 2)
    made = make(folder, columns={"prompt": "Frage", "completion": "Antwort"})
    assert [(one.name, one.error) for one in made.variants] == [("0-shot", None), ("2-shot", None)]
    [shown] = prompts(folder, "2-shot")
    assert [one["content"] for one in shown] == ["My cash is gone", "cash"] * 2 + ["Where is my card?", "card"]
    put(folder, "examples", [row("My cash is gone", "cash")])
    with pytest.raises(InvalidTrainingFile, match="none of the columns 'Frage', 'Antwort'"):
        make(folder, columns={"prompt": "Frage", "completion": "Antwort"})


def test_any_first_examples_have_as_many_answers_as_can_be() -> None:
    answers = ["a"] * 20 + ["b"] * 3 + ["c"]
    for seed in range(8):  # a single order may be balanced by chance
        order = choice.balanced(answers, seed)
        assert sorted(order) == list(range(24))
        assert {answers[place] for place in order[:3]} == {"a", "b", "c"}
        assert sorted(answers[place] for place in order[3:5]) == ["a", "b"]
        assert order == choice.balanced(answers, seed) != choice.balanced(answers, seed + 1)


def test_the_nearest_examples_stand_last() -> None:
    known = ["where is my card", "my cash did not come", "the card did not come in the mail", "top up", "カード"]
    [first, second] = choice.nearest(["did the card come in the mail?", "カード が ない"], known, 2)
    assert [known[place] for place in first] == ["my cash did not come", "the card did not come in the mail"]
    assert known[second[-1]] == "カード"


def test_an_example_that_asks_what_an_eval_row_asks_is_never_shown(folder: Path) -> None:
    put(folder, "rows", [row("Where is my new card, please?", "card")])
    leaks = [row("Where is my new card, please?", "card"), row("where is my new card please", "another")]
    leaks.append(row("Good morning, where is my new card please", "card"))
    put(folder, "examples", [*leaks, row("Cash did not come out", "cash"), row("Top up failed again", "top_up")])
    made = make(folder, retrieval="nearest")
    assert (made.examples, made.left_out) == (2, 3)
    for name in ("2-shot", "2-nearest"):
        [shown] = prompts(folder, name)
        assert {one["content"] for one in shown[:4]} == {
            "Cash did not come out", "cash", "Top up failed again", "top_up"
        }  # fmt: skip


def test_auto_takes_as_many_as_fit_into_the_context(folder: Path) -> None:
    put(folder, "rows", [chat(i) for i in range(100, 104)])
    put(folder, "examples", [chat(i) for i in range(40)])
    assert [one.name for one in make(folder, shots="auto").variants] == ["0-shot", "32-shot"]
    few = make(folder, shots="auto", context=500).variants[-1].shots
    assert 0 < few < 16
    [_, fits, too_long] = make(folder, shots=[0, few, 2 * few], context=500).variants
    assert (fits.error, too_long.error is None) == (None, False)
    assert [one.shots for one in make(folder, shots="auto", context=90).variants] == [0]
    (folder / "examples").unlink()
    assert [one.name for one in make(folder, shots="auto").variants] == ["0-shot"]


def test_what_does_not_fit_says_so(folder: Path) -> None:
    put(folder, "rows", [chat(100)])
    put(folder, "examples", [chat(i) for i in range(12)])
    [_, too_long, too_many] = make(folder, shots=[0, 8, 30], context=300).variants
    assert "the base's context has 300" in (too_long.error or "")
    assert too_many.error is not None
    assert too_many.error.startswith("30 examples are requested, but only ")


def test_a_file_that_cannot_be_asked_is_the_users_fault(folder: Path) -> None:
    put(folder, "rows", [{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(InvalidTrainingFile, match="assistant"):
        make(folder)
    (folder / "prompts").rmdir()
    (folder / "shots_order.json").write_text(ShotsOrder(shots="auto", max_rows=1).model_dump_json())
    command = [sys.executable, "-m", "tunery.datasets.shots", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (EXIT_USER_ERROR, 1)
