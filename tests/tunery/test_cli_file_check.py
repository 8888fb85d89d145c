"""`tunery files check` judges a file without a server, for people and for CI."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tunery.cli.files import app

SHAPES = Path(__file__).parents[1] / "data/shapes"


def test_good_file_is_described_and_ends_with_0(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Question,Answer\n" + "q,a\n" * 12)
    result = CliRunner().invoke(app, ["check", str(path)])
    wanted = "CSV; question/answer rows: 'Question' as the user's message, 'Answer' as the answer; 12 examples"
    assert (result.exit_code, wanted in result.output) == (0, True)


def test_json_has_the_verdicts_of_all_files(tmp_path: Path) -> None:
    good, few = tmp_path / "rows.csv", tmp_path / "few.csv"
    good.write_text("Question,Answer\n" + "q,a\n" * 12)
    few.write_text("Question,Answer\n" + "q,a\n" * 3)
    result = CliRunner().invoke(app, ["check", str(good), str(few), "--json"])
    first, second = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (first["format"], first["examples"], first["trainable"], first["reason"]) == ("CSV", 12, True, None)
    assert (second["trainable"], "at least 10" in second["reason"]) == (False, True)


def test_pairs_are_checked_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 12)
    good = CliRunner().invoke(app, ["check", str(path)])
    path.write_text(
        '{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q", "chosen": "a", "rejected": "a"}\n'
    )
    bad = CliRunner().invoke(app, ["check", str(path)])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "chosen/rejected rows: 'prompt' as the user's message" in good.output
    assert "Example 2 has two equal answers" in bad.output


def test_faults_are_named_and_end_with_1(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "q", "completion": "a"}, {"prompt": "q"}], indent=1))
    result = CliRunner().invoke(app, ["check", str(path), str(SHAPES / "refused_kto.jsonl")])
    assert result.exit_code == 1
    assert "Example 2 (line 6): Unexpected file format, expected prompt/completion as in example 1" in result.output
    assert "marks the answer as good or bad (KTO)" in result.output


def test_a_wrong_call_ends_with_2(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["check", str(tmp_path / "nowhere.jsonl")]).exit_code == 2
