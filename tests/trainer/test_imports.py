"""Quick imports: what is put aside for them is there again afterwards."""

import gc
import os

import pytest
import torch

from worker.trainer import imports


def double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("chosen", [None, "0"])
def test_compiler_and_collector_are_back_after_the_imports(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", chosen)

    with imports.quickly():
        assert torch.compile(double, backend="eager") is double
        assert not gc.isenabled()

    assert torch.compile(double, backend="eager") is not double
    assert gc.isenabled()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == chosen
