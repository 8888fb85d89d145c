"""Exports are part of the run: its time estimate includes them, and a stop interrupts them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from run_folders import Ear, chat, lay_out, plan, said
from safetensors.torch import load_file

from tunery.spec import Export
from worker.trainer.export import merge
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i, words=6) for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("stopped") / "base", bf16=True, never_said=tuple(range(6, 260)))


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_exports_goes_on_and_ends_as_one_that_was_not(
    tmp_path: Path, base: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(export=Export(merged=True))
    whole = lay_out(tmp_path / "whole", base, asked, ROWS)
    assert carry_out(whole, MessageWriter(None), StopSignal())

    folder = lay_out(tmp_path / "stopped", base, asked, ROWS)
    own, stop_signal, made = merge._load, StopSignal(), []

    def load(*args: Any) -> Any:
        made.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        return own(*args)

    before = signal.getsignal(signal.SIGTERM)
    stop_signal.listen()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(merge, "_load", load)
            assert not carry_out(folder, MessageWriter(ear.descriptor), stop_signal)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(made) == 1
    assert not (folder / "out").exists()
    [paused] = said(ear, "paused")
    assert (paused.step, paused.path) == (6, "snapshots/step-6")
    [exporting] = [phase for phase in said(ear, "phase") if phase.phase == "exporting"]
    assert exporting.seconds_left > 0
    assert not said(ear, "exported"), "it was not refused"

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [finished] = said(ear, "finished")
    assert finished.spent["exports"].units == 1

    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        found, wanted = (load_file(each / "out" / name) for each in (folder, whole))
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.slow
def test_the_estimate_has_the_exports_from_the_first_step(tmp_path: Path, base: Path, ear: Ear) -> None:
    left = {}
    for name, export in (("none", Export()), ("all", Export(merged=True, gguf=["f16"], fp8=True))):
        heard = Ear()
        carry_out(
            lay_out(tmp_path / name, base, plan(export=export), ROWS), MessageWriter(heard.descriptor), StopSignal()
        )
        left[name] = max(step.seconds_left for step in said(heard, "step")[:2])
        heard.close()
    assert left["all"] > left["none"]
