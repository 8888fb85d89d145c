"""Two ranks of one run have their own rows and random numbers, but the same loss and weights, and end together.

On a CPU over gloo, and with `-m gpu` on two GPUs over NCCL.
"""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import two_ranks
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file

from tunery.spec import Dpo, Evaluation, Export, General, Lora, Plan, Replay, Resources
from worker.trainer import layout
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i, words=2 + i % 9) for i in range(9)]  # of different lengths; rank 1 has none in an epoch's last step
PAIRS = [
    {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": f"no {number}"}
    for number, row in enumerate(ROWS)
]
EVALUATION = Evaluation(test_file="file-test", max_new_tokens=6, general=General(items=7, prompts=3))
WITH_TASK = EVALUATION.model_copy(update={"task_rows": 2})
REPLAY = Replay(share=0.3, max_new_tokens=32)
ADAPTER = "adapter_model.safetensors"


def _preferring(gpus: Literal[1, 2]) -> Plan:
    return plan(method=Dpo(), n_epochs=2, resources=Resources(gpus=gpus))


class Runs:
    """The runs' folders, and the report of each of the two ranks by the run's name."""

    def __init__(self, folder: Path, base: Path, gpus: bool) -> None:
        self.folder, self.base, self.gpus = folder, base, gpus
        self.exact = 1e-3 if gpus else 0.0  # the order of a GPU's sums may vary
        self.seen: dict[str, list[dict[str, Any]]] = {}

    def lay_out(self, name: str, **changes: Any) -> Path:
        settled = plan(**{"resources": Resources(gpus=2), "n_epochs": 2, "evaluation": EVALUATION} | changes)
        return lay_out(self.folder / name, self.base, settled, ROWS, ROWS[:3], ROWS[:3])

    def difference(self, first: Path, second: Path) -> float:
        """Returns the largest difference between the exported weights of two runs."""
        found, wanted = (load_file(folder / "out" / ADAPTER) for folder in (first, second))
        return max(float((found[name] - tensor).abs().max()) for name, tensor in wanted.items())

    def learned_alike(self, name: str, alone: Path) -> bool:
        """Whether the weights are those of one rank alone; on a GPU, bf16 sums make Adam's steps differ a little."""
        if not self.gpus:
            return self.difference(self.folder / name, alone) < 1e-4
        found, wanted = (load_file(folder / "out" / ADAPTER) for folder in (self.folder / name, alone))
        return two_ranks.relative_difference(found, wanted) < 0.2


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    gpus = request.param == "nccl"
    made = Runs(tmp_path_factory.mktemp("ranks"), tiny, gpus)
    made.lay_out("plain", evaluation=WITH_TASK)
    for name in ("dropout", "again", "stopped", "loading", "answering", "due"):
        made.lay_out(name, technique=Lora(r=4, dropout=0.3))
    made.lay_out("replay", replay=REPLAY)
    made.lay_out("exporting", technique=Lora(r=4, dropout=0.3), export=Export(adapter_gguf=True))
    lay_out(made.folder / "pairs", tiny, _preferring(gpus=2), PAIRS, PAIRS[:3])
    commands = [
        ("pairs", "whole"), ("replay", "whole"), ("plain", "whole"), ("dropout", "whole"), ("again", "whole"),
        ("stopped", "step-2"), ("stopped", "whole"), ("loading", "loading"), ("answering", "answering"), ("due", "due"),
        ("exporting", "exporting"), ("exporting", "whole"),
    ]  # fmt: skip
    found = two_ranks.spawn(made.folder, *(f"{how}:{made.folder / name}" for name, how in commands), gpus=gpus)
    for (name, how), *ranks in zip(commands, *found, strict=True):
        made.seen[f"{name} {how}"] = ranks
    return made


def test_two_ranks_share_the_rows_of_each_step(runs: Runs) -> None:
    ranks = runs.seen["plain whole"]

    assert [rank["world"] for rank in ranks] == [2, 2]
    assert [rank["device"] for rank in ranks] == (["cuda:0", "cuda:1"] if runs.gpus else ["cpu:0", "cpu:0"])
    for step, (first, second) in enumerate(zip(*(rank["seen"][:6] for rank in ranks), strict=True)):
        assert len(first) + len(second) == (4 if step % 3 < 2 else 1)
        assert all(row not in first for row in second)
        tokens = [sum(map(len, rows)) for rows in (first, second)]
        longest = max(map(len, first + second))
        assert abs(tokens[0] - tokens[1]) <= longest, "the ranks have work of unequal size"


def test_two_ranks_learn_what_one_does(runs: Runs, tmp_path: Path) -> None:
    alone = lay_out(tmp_path / "alone", runs.base, plan(n_epochs=2, evaluation=WITH_TASK), ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, writer := MessageWriter(None), StopSignal())

    assert sum(entry.get("task_score") is not None for entry in writer.metrics) == 2
    for rank in runs.seen["plain whole"]:
        two_ranks.check_metrics(rank["metrics"], writer.metrics, runs.gpus)
    assert runs.learned_alike("plain", alone)
    if not runs.gpus:  # in bf16, two answers of a random model may be equally likely
        answers = [(folder / "out" / "answers.jsonl").read_text() for folder in (alone, runs.folder / "plain")]
        assert answers[0] == answers[1]
        ours, theirs = (json.loads((folder / "out" / "scorecard.json").read_text())["general"]
                        for folder in (alone, runs.folder / "plain"))  # fmt: skip
        assert ours["base_accuracy"] == theirs["base_accuracy"]
        assert ours["forgetting"] == pytest.approx(theirs["forgetting"], rel=1e-3)


def test_new_weights_depend_on_the_seed_alone(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several GPUs first decide whether the model is sharded, which draws random numbers; one has nothing to decide."""

    def drawing(*_: Any) -> bool:
        torch.rand(3)
        return False

    found = []
    for name, decide in (("one", layout.is_cut), ("several", drawing)):
        monkeypatch.setattr(layout, "is_cut", decide)
        folder = lay_out(tmp_path / name, tiny, plan(), ROWS)
        found.append(prepare(folder, MessageWriter(None), StopSignal()).parameters)

    assert all(torch.equal(found[1][name], parameter) for name, parameter in found[0].items())


def test_two_ranks_replay_what_one_does(runs: Runs, tmp_path: Path) -> None:
    """Each rank samples its own blocks, and a block's random numbers depend on the block alone."""
    settled = plan(n_epochs=2, evaluation=EVALUATION, replay=REPLAY)
    alone = lay_out(tmp_path / "alone", runs.base, settled, ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, MessageWriter(None), StopSignal())

    one, two = (json.loads((folder / "out" / "training_config.json").read_text())["replay"]
                for folder in (alone, runs.folder / "replay"))  # fmt: skip
    assert one["rows_an_epoch"] == two["rows_an_epoch"] == 4
    assert runs.learned_alike("replay", alone)


def test_two_ranks_prefer_what_one_does(runs: Runs, tmp_path: Path) -> None:
    """Each rank measures the reference of its share of the pairs, and then has that of all pairs."""
    alone = lay_out(tmp_path / "alone", runs.base, _preferring(gpus=1), PAIRS, PAIRS[:3])

    carry_out(alone, writer := MessageWriter(None), StopSignal())

    for metrics in (rank["metrics"] for rank in runs.seen["pairs whole"]):
        for entry, wanted in zip(metrics, writer.metrics, strict=True):
            name = "train_" if entry["type"] == "step" else ""
            assert entry[f"{name}loss"] == pytest.approx(wanted[f"{name}loss"], rel=0.05 if runs.gpus else 1e-3)
            found, margins = (each[f"{name}metrics"]["rewards_margin"] for each in (entry, wanted))
            assert runs.gpus or found == pytest.approx(margins, rel=1e-3, abs=1e-4)
    assert runs.learned_alike("pairs", alone)


def test_each_rank_draws_its_own_dropout_and_the_same_in_every_run(runs: Runs) -> None:
    first, second = (rank["stream"] for rank in runs.seen["dropout whole"])

    assert first != second
    dropout, again, plain = (runs.folder / name for name in ("dropout", "again", "plain"))
    assert runs.difference(again, dropout) <= runs.exact
    assert runs.difference(dropout, plain) > 1e-3


def test_run_stopped_by_one_rank_goes_on_to_the_bit(runs: Runs) -> None:
    """Only rank 1 is asked to stop, and both stop at the same step."""
    assert [rank["done"] for rank in runs.seen["stopped step-2"]] == [False, False]
    assert [len(rank["metrics"]) for rank in runs.seen["stopped step-2"]] == [4, 4]  # 3 steps and an evaluation
    assert [rank["done"] for rank in runs.seen["stopped whole"]] == [True, True]
    assert runs.difference(runs.folder / "stopped", runs.folder / "dropout") <= runs.exact


def test_stop_while_loading_is_agreed_on(runs: Runs) -> None:
    assert [rank["done"] for rank in runs.seen["loading loading"]] == [None, None]


def test_stop_while_answering_is_agreed_on(runs: Runs) -> None:
    """Rank 0 has two test rows. Rank 1 has one, is asked to stop at it, and waits for rank 0 at the next one."""
    ranks = runs.seen["answering answering"]

    assert [rank["done"] for rank in ranks] == [False, False]
    assert [rank["answered"] for rank in ranks] == [1, 1]
    assert (runs.folder / "answering" / "snapshots" / "step-6" / "state.json").exists()


def test_stop_while_rank_0_exports_is_agreed_on(runs: Runs) -> None:
    """The other rank exports nothing and waits, so it must learn of the stop."""
    stopped, again = runs.seen["exporting exporting"], runs.seen["exporting whole"]

    assert [rank["done"] for rank in stopped] == [False, False]
    assert [rank.get("exported", 0) for rank in stopped] == [1, 0]
    assert (runs.folder / "exporting" / "snapshots" / "step-6" / "state.json").exists()
    assert [rank["done"] for rank in again] == [True, True]
    assert [len(rank["seen"]) for rank in again] == [1, 1], "no step is made again"
    assert (runs.folder / "exporting" / "out" / "gguf" / "adapter-f32.gguf").exists()
    assert runs.difference(runs.folder / "exporting", runs.folder / "dropout") <= runs.exact


def test_snapshot_that_is_due_on_one_rank_is_saved_by_all(runs: Runs) -> None:
    assert [rank["done"] for rank in runs.seen["due due"]] == [True, True]
    assert (runs.folder / "due" / "snapshots" / "step-6" / "state.json").exists()
    assert runs.difference(runs.folder / "due", runs.folder / "dropout") <= runs.exact
