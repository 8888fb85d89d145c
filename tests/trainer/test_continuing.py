"""Jobs that continue from an adapter: the request decides the dropout, the adapter its shape."""

from pathlib import Path

import pytest
import tiny_models
from run_folders import chat, lay_out, plan
from torch import nn

from tunery.spec import Lora
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(4)]


def prepared(folder: Path, tiny: Path, technique: Lora) -> nn.Module:
    lay_out(folder, tiny, plan(technique=technique), ROWS)
    tiny_models.lora(folder / "adapter", tiny)  # r 4, alpha 8, no dropout
    return prepare(folder, MessageWriter(None), StopSignal()).objective.model


def test_jobs_own_dropout_holds_on_an_earlier_adapter(tmp_path: Path, tiny: Path) -> None:
    model = prepared(tmp_path / "run", tiny, Lora(r=4, alpha=8, dropout=0.25))

    found = {module.p for name, module in model.named_modules() if "lora_dropout.default" in name}
    assert found == {0.25}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (Lora(r=8, alpha=8), "has r 4, but the job has 8"),
        (Lora(r=4, alpha=16), "has alpha 8, but the job has 16.0"),
        (Lora(r=4, alpha=8, use_dora=True), "has use_dora False, but the job has True"),
        (Lora(r=4, alpha=8, use_rslora=True), "has use_rslora False, but the job has True"),
    ],
)
def test_job_that_asks_for_another_shape_than_the_adapters_is_refused(
    tmp_path: Path, tiny: Path, wrong: Lora, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        prepared(tmp_path, tiny, wrong)
