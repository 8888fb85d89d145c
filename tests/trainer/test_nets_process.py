"""A run ends with an exit code and a last message, by which its supervisor decides whether to retry it."""

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from run_folders import Ear, chat, lay_out, plan

from tunery.failures import DoesNotFit, InvalidTrainingFile
from tunery.spec import Run
from tunery.trainer_protocol import EXIT_PAUSED, EXIT_USER_ERROR
from worker.trainer.__main__ import main
from worker.trainer.process import carry_out_and_report, describe
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(4)]


def _invalid_spec() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Run.model_validate_json("{}")
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (InvalidTrainingFile(role="training", reason="Line 3."), "user_error", "invalid_training_file"),
        (DoesNotFit(what="a", needed="b", device="GPU", capacity="c", instead="d"), "gpu_oom", "does_not_fit"),
        (_invalid_spec(), "user_error", "invalid_spec"),
    ],
)
def test_errors_of_our_own_keep_their_code(error: Exception, kind: str, code: str) -> None:
    failed = describe(error)

    assert (failed.kind, failed.code) == (kind, code)
    assert failed.message.strip()


def test_error_without_words_and_one_with_many_get_one_line() -> None:
    assert describe(RuntimeError()).message == "RuntimeError: no message"
    assert describe(RuntimeError("\nfirst\nsecond")).message == "RuntimeError: first"


def _folder(path: Path, base: Path) -> Path:
    return lay_out(path, base, plan(n_epochs=2), ROWS)


def test_run_that_ends_well_says_finished(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    assert carry_out_and_report(_folder(tmp_path / "run", tiny), ear.descriptor, StopSignal()) == 0

    assert ear.messages()[-1].type == "finished"


def test_run_stopped_before_its_first_step_says_paused_without_a_snapshot(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    stop_signal = StopSignal()
    stop_signal.received = True

    assert carry_out_and_report(_folder(tmp_path / "run", tiny), ear.descriptor, stop_signal) == EXIT_PAUSED

    paused = ear.messages()[-1]
    assert paused.type == "paused"
    assert (paused.step, paused.path) == (0, None)


def test_rows_at_fault_end_the_run_for_good(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    folder = _folder(tmp_path / "run", tiny)
    (folder / "data" / "train.jsonl").write_text(json.dumps({"messages": [{"role": "person"}]}) + "\n")

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == EXIT_USER_ERROR

    failed = ear.messages()[-1]
    assert failed.type == "failed"
    assert (failed.kind, failed.code) == ("user_error", "invalid_training_file")
    assert "Example 1" in failed.message


def test_run_without_its_plug_in_ends_for_good_and_names_it(
    tmp_path: Path, tiny: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNERY_PLUGINS", "toy_that_is_nowhere")

    assert carry_out_and_report(_folder(tmp_path / "run", tiny), ear.descriptor, StopSignal()) == EXIT_USER_ERROR

    failed = ear.messages()[-1]
    assert failed.type == "failed"
    assert "The plug-in 'toy_that_is_nowhere' cannot be" in failed.message


def test_run_that_nobody_listens_to_ends_by_itself(tmp_path: Path, tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    assert carry_out_and_report(_folder(tmp_path / "run", tiny), writer, StopSignal()) == 1

    os.close(writer)
    assert not (tmp_path / "run" / "out").exists()


def test_command_without_a_folder_says_how_it_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["worker.trainer"])

    assert main() == 2

    assert capsys.readouterr().err == "usage: python -m worker.trainer (RUN_DIR | --wait)\n"
