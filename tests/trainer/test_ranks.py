"""Two ranks of one run, over gloo: each its own rows and random numbers, one loss, one set of weights, one end."""

from pathlib import Path
from typing import Any

import pytest
import two_ranks
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file

from tunery.spec import Evaluation, Lora, Resources
from worker.trainer.report import Voice
from worker.trainer.run import carry_out
from worker.trainer.wish import Wish

ROWS = [chat(i, words=2 + i % 9) for i in range(9)]  # of unlike length, and none for rank 1 in an epoch's last step
EVALUATION = Evaluation(test_file="file-test", max_new_tokens=6)
ADAPTER = "adapter_model.safetensors"


class Runs:
    """The folders of the runs, and by their name what each of the two ranks saw."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.seen: dict[str, list[dict[str, Any]]] = {}

    def lay_out(self, name: str, **changes: Any) -> Path:
        settled = plan(resources=Resources(gpus=2), n_epochs=2, evaluation=EVALUATION, **changes)
        return lay_out(self.folder / name, self.base, settled, ROWS, ROWS[:3], ROWS[:3])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("ranks"), tiny)
    made.lay_out("plain")
    for name in ("dropout", "again", "stopped", "loading", "answering"):
        made.lay_out(name, technique=Lora(r=4, dropout=0.3))
    commands = [
        ("plain", "whole"), ("dropout", "whole"), ("again", "whole"), ("stopped", "step-2"), ("stopped", "whole"),
        ("loading", "loading"), ("answering", "answering"),
    ]  # fmt: skip
    found = two_ranks.spawn(made.folder, *(f"{how}:{made.folder / name}" for name, how in commands))
    for (name, how), *ranks in zip(commands, *found, strict=True):
        made.seen[f"{name} {how}"] = ranks
    return made


def test_two_ranks_share_the_rows_of_each_step(runs: Runs) -> None:
    ranks = runs.seen["plain whole"]

    assert [rank["world"] for rank in ranks] == [2, 2]
    for step, (first, second) in enumerate(zip(*(rank["seen"][:6] for rank in ranks), strict=True)):
        assert (len(first), len(second)) == ((2, 2) if step % 3 < 2 else (1, 0))
        assert all(row not in first for row in second)


def test_two_ranks_learn_what_one_does(runs: Runs, tmp_path: Path) -> None:
    alone = lay_out(tmp_path / "alone", runs.base, plan(n_epochs=2, evaluation=EVALUATION), ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, voice := Voice(None), Wish())

    for metrics in (rank["metrics"] for rank in runs.seen["plain whole"]):
        assert len(metrics) == len(voice.metrics)
        for entry, wanted in zip(metrics, voice.metrics, strict=True):
            for name, value in wanted.items():
                if not name.startswith("seconds") and isinstance(value, float):
                    assert entry[name] == pytest.approx(value, rel=1e-3), name
    answers = [(folder / "out" / "answers.jsonl").read_text() for folder in (alone, runs.folder / "plain")]
    assert answers[0] == answers[1]
    found, wanted = (load_file(folder / "out" / ADAPTER) for folder in (runs.folder / "plain", alone))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name


def test_each_rank_draws_its_own_dropout_and_the_same_in_every_run(runs: Runs) -> None:
    first, second = (rank["stream"] for rank in runs.seen["dropout whole"])

    assert first != second
    assert exported(runs, "again") == exported(runs, "dropout")
    assert exported(runs, "dropout") != exported(runs, "plain")


def test_run_stopped_by_one_rank_goes_on_to_the_bit(runs: Runs) -> None:
    """Rank 1 alone is asked to stop, and both stop at the same step."""
    assert [rank["done"] for rank in runs.seen["stopped step-2"]] == [False, False]
    assert [len(rank["metrics"]) for rank in runs.seen["stopped step-2"]] == [4, 4]  # 3 steps and an evaluation
    assert [rank["done"] for rank in runs.seen["stopped whole"]] == [True, True]
    assert exported(runs, "stopped") == exported(runs, "dropout")


def test_stop_while_loading_is_agreed_on(runs: Runs) -> None:
    assert [rank["done"] for rank in runs.seen["loading loading"]] == [None, None]


def test_stop_while_answering_is_agreed_on(runs: Runs) -> None:
    """Rank 0 has two test rows and rank 1 one: asked at its only one, it waits for the other at the next turn."""
    ranks = runs.seen["answering answering"]

    assert [rank["done"] for rank in ranks] == [False, False]
    assert [rank["answered"] for rank in ranks] == [1, 1]
    assert (runs.folder / "answering" / "snapshots" / "step-6" / "state.json").exists()


def exported(runs: Runs, name: str) -> bytes:
    return (runs.folder / name / "out" / ADAPTER).read_bytes()
