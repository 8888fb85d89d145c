"""Which public checkpoints a run keeps, and what a disk that fills leaves of them."""

from pathlib import Path

from run_folders import chat, lay_out, plan

from tunery.spec import Lora
from worker.trainer.report import Voice
from worker.trainer.run import carry_out
from worker.trainer.wish import Wish

ROWS = [chat(i) for i in range(8)]
FOREIGN = [{"messages": [row["messages"][0], {"role": "assistant", "content": "ZQX JVW KYB" * 2}]} for row in ROWS[:4]]
"""Answers of letters that ROWS never have: after a step or two they only become less likely."""


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_best_checkpoint_and_the_newest_stay(tmp_path: Path, tiny: Path) -> None:
    settled = plan(technique=Lora(r=4), n_epochs=5, learning_rate=5e-2)
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, FOREIGN, public_checkpoints=2)
    voice = Voice(None)

    assert carry_out(folder, voice, Wish())

    losses = {entry["step"]: entry["loss"] for entry in voice.metrics if entry["type"] == "evaluated"}
    best = min(losses, key=lambda step: losses[step])
    assert best == 2, "the best has to be none of the newest"
    assert steps_kept(folder) == [2, 8, 10]


def test_newest_checkpoints_stay_where_nothing_is_validated(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=4), ROWS, public_checkpoints=2)

    assert carry_out(folder, Voice(None), Wish())

    assert steps_kept(folder) == [6, 8]
