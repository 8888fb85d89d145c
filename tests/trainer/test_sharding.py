"""A model in pieces on two ranks learns, answers, is saved and exported as a whole one on one rank.

On a CPU over gloo, and with `-m gpu` on two GPUs over NCCL.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file

from tunery.spec import Evaluation, Full, General, Lora, Resources
from worker.trainer.report import Voice
from worker.trainer.run import carry_out
from worker.trainer.wish import Wish

ROWS = [chat(i, words=2 + i % 9) for i in range(9)]  # of unlike length, and none for rank 1 in an epoch's last step
EVALUATION = Evaluation(test_file="file-test", max_new_tokens=6, general=General(items=7, prompts=3), task_rows=2)
PIECES = Resources(gpus=2, sharding="full_shard")
COMMON: dict[str, Any] = {"n_epochs": 2, "evaluation": EVALUATION}
FULL: dict[str, Any] = COMMON | {"technique": Full(), "learning_rate": 3e-3}
LORA: dict[str, Any] = COMMON | {"technique": Lora(r=4)}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Runs:
    """The folders of the runs, and by their command what each of the two ranks saw."""

    def __init__(self, folder: Path, base: Path, gpus: bool) -> None:
        self.folder, self.base, self.gpus = folder, base, gpus
        self.seen: dict[str, list[dict[str, Any]]] = {}

    def lay_out(self, name: str, **changes: Any) -> Path:
        settled = plan(**{"resources": PIECES} | changes)
        return lay_out(self.folder / name, self.base, settled, ROWS, ROWS[:3], ROWS[:3])

    def check_metrics(self, command: str, wanted: list[dict[str, Any]]) -> None:
        for found in (rank["metrics"] for rank in self.seen[command]):
            assert len(found) == len(wanted)
            for entry, numbers in zip(found, wanted, strict=True):
                for name, value in numbers.items():
                    if not name.startswith("seconds") and isinstance(value, float):
                        assert entry[name] == pytest.approx(value, rel=0.05 if self.gpus else 1e-3), name


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Runs:
    gpus = request.param == "nccl"
    made = Runs(tmp_path_factory.mktemp("pieces"), tiny, gpus)
    made.lay_out("full", **FULL)
    commands = [("full", "whole")]
    found = two_ranks.spawn(made.folder, *(f"{how}:{made.folder / name}" for name, how in commands), gpus=gpus)
    for (name, how), *ranks in zip(commands, *found, strict=True):
        made.seen[f"{name} {how}"] = ranks
    return made


def exported(folder: Path) -> dict[str, torch.Tensor]:
    [file] = (folder / "out").glob("*model*.safetensors")
    return load_file(file)


def test_each_rank_keeps_half_of_every_weight(runs: Runs) -> None:
    ranks = runs.seen["full whole"]

    assert [rank["world"] for rank in ranks] == [2, 2]
    for rank in ranks:
        kinds = {kind for kind, _, _ in rank["weights"].values()}
        assert kinds == {"DTensor"}
        assert all(kept * 2 == whole for _, kept, whole in rank["weights"].values())


def test_pieces_learn_what_a_whole_model_does(runs: Runs, tmp_path: Path) -> None:
    alone = lay_out(tmp_path / "alone", runs.base, plan(**FULL), ROWS, ROWS[:3], ROWS[:3])

    carry_out(alone, voice := Voice(None), Wish())

    runs.check_metrics("full whole", voice.metrics)
    found, wanted = exported(runs.folder / "full"), exported(alone)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name].float() - tensor.float()).abs().max() < (5e-3 if runs.gpus else 1e-3), name
