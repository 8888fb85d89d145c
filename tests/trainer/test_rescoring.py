"""An adapter that is scored alone gets the same scorecard as from the job that trained it."""

import json
import shutil
from pathlib import Path

from run_folders import chat, lay_out, plan

from tunery.spec import Evaluation, General
from worker.trainer import run
from worker.trainer.report import MessageWriter
from worker.trainer.scoring import comparison
from worker.trainer.stop_signal import StopSignal


def test_scoring_without_training_gives_what_the_job_measured(tmp_path: Path, tiny: Path) -> None:
    rows, test = [chat(i) for i in range(12)], [chat(i) for i in range(100, 106)]
    quick = Evaluation(test_file="file-1", max_new_tokens=4, general=General(items=4, prompts=2))
    asked = plan(n_epochs=6, evaluation=quick)
    trained = lay_out(tmp_path / "trained", tiny, asked, rows, test=test)
    assert run.carry_out(trained, MessageWriter(None), StopSignal())

    alone = lay_out(tmp_path / "alone", tiny, asked, test, test=test)
    shutil.copytree(trained / "out", alone / "adapter")
    scored = run.score(alone, MessageWriter(None), StopSignal())
    (alone / "out").mkdir()
    comparison.write(scored, alone / "out")

    for name in ("answers.jsonl", "scorecard.json"):
        assert (alone / "out" / name).read_text() == (trained / "out" / name).read_text()
    answers = [json.loads(line) for line in (alone / "out" / "answers.jsonl").read_text().splitlines()]
    assert any(each["base"] != each["tuned"] for each in answers)
