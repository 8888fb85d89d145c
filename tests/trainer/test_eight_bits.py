"""Runs with frozen products in eight bits: which layers use them, how they are checked, recorded and exported."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import Ear, chat, lay_out, plan, said, steps_of

from tunery.spec import Lora, Qlora
from worker.trainer import eight_bits, loop, paths
from worker.trainer import objective as objective_module
from worker.trainer.kernels import fp8
from worker.trainer.parallel import Ranks
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i) for i in range(24)]
NARROW = Lora(r=4, alpha=8, precision="fp8")
KINDS = dict.fromkeys(("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), 2)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def any_size_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows 8-bit products on a CPU, by their plain reference, and in layers as small as the tiny model's."""
    monkeypatch.setattr(fp8, "LEAST_SIDE", 16)
    monkeypatch.setattr(fp8, "available", lambda _device: True)


def begin(folder: Path, base: Path, **changes: Any) -> Training:
    made = lay_out(folder, base, plan(technique=NARROW, **changes), ROWS, ROWS[:4], ROWS[:4])
    return prepare(made, MessageWriter(None), StopSignal())


@pytest.mark.usefixtures("any_size_and_device")
def test_training_in_eight_bits_learns_as_it_does_without(tmp_path: Path, tiny: Path) -> None:
    last: dict[str, Any] = {}
    for name, technique in (("wide", Lora(r=4, alpha=8)), ("narrow", NARROW)):
        folder = lay_out(tmp_path / name, tiny, plan(technique=technique, n_epochs=4), ROWS, ROWS[:4], ROWS[:4])
        assert carry_out(folder, MessageWriter(None), StopSignal())
        last[name] = json.loads((folder / "out/training_config.json").read_text())["paths"]["frozen products"]
        last[name + " losses"] = [step["train_loss"] for step in steps_of(folder) if "train_loss" in step]
        assert json.loads((folder / "out/parity.json").read_text())["difference"] < 1e-3

    assert last["narrow losses"] != last["wide losses"]
    assert last["narrow losses"] == pytest.approx(last["wide losses"], rel=0.1)
    assert last["narrow"] == {"path": "fp8", "forward and gradient of the input": KINDS}
    assert last["wide"] == {"path": "float32"}


@pytest.mark.usefixtures("any_size_and_device")
def test_base_in_four_bits_multiplies_in_eight(tmp_path: Path, tiny: Path) -> None:
    technique = Qlora(r=4, alpha=8, precision="fp8")
    folder = lay_out(tmp_path / "run", tiny, plan(technique=technique, n_epochs=2), ROWS, ROWS[:4], ROWS[:4])

    assert carry_out(folder, MessageWriter(None), StopSignal())

    config = json.loads((folder / "out/training_config.json").read_text())
    # The tiny model's other rows end within a block of four bits.
    wanted = {"path": "fp8", "forward and gradient of the input": {"down_proj": 2}}
    assert config["paths"]["frozen products"] == wanted
    losses = [step["train_loss"] for step in steps_of(folder) if "train_loss" in step]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("any_size_and_device")
def test_comparison_recomputes_layers_where_memory_is_short(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = begin(tmp_path / "run", tiny)
    assert t.eight_bits is not None
    wanted = eight_bits.compare(t.objective, t.eight_bits._batch, t.eight_bits.names)
    usual, passes = t.objective.sums, list[Any]()
    monkeypatch.setattr(objective_module, "release", lambda _: passes.append("released"))

    def sums(*of: Any) -> Any:
        passes.append(t.objective.recomputes)
        if not t.objective.recomputes:
            raise RuntimeError("CUDA error: out of memory\nwhere a kernel is loaded")
        return usual(*of)

    monkeypatch.setattr(t.objective, "sums", sums)
    found = eight_bits.compare(t.objective, t.eight_bits._batch, t.eight_bits.names)

    assert passes == [0, "released", t.objective.layers]
    assert found == {name: pytest.approx(product) for name, product in wanted.items()}
    assert t.objective.recomputes == 0

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("made for this test")

    t.objective.recompute(offload=True)
    monkeypatch.setattr(t.objective, "sums", full)
    with pytest.raises(torch.OutOfMemoryError):
        eight_bits.compare(t.objective, t.eight_bits._batch, t.eight_bits.names)


@pytest.mark.usefixtures("any_size_and_device")
def test_comparison_leaves_weights_gradients_and_random_numbers_as_they_are(tmp_path: Path, tiny: Path) -> None:
    t = begin(tmp_path / "run", tiny)
    assert t.eight_bits is not None
    before = {name: p.detach().clone() for name, p in t.parameters.items()}
    state = torch.get_rng_state()

    assert t.eight_bits.check(t.ranks)

    assert all(torch.equal(before[name], p) and p.grad is None for name, p in t.parameters.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("any_size_and_device")
def test_layer_whose_product_differs_is_given_up_and_stays_so(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's weight is changed after its 8-bit copy was made, so the products differ."""
    t = begin(tmp_path / "run", tiny)
    assert t.eight_bits is not None
    monkeypatch.setattr(eight_bits, "EARLY_CHECK", 3)
    t.objective.model.get_submodule(Q).base_layer.weight.data *= 1.5  # type: ignore[union-attr,operator]

    progress = Progress()
    loop.train(t, progress)

    described = paths.describe(t)["frozen products"]
    assert described["forward and gradient of the input"] == KINDS | {"q_proj": 1}
    assert list(described["given up"]) == list(progress.wide) == [Q]
    cosine, ratio = map(float, re.findall(r"\d\.\d+", progress.wide[Q]))
    assert cosine > 0.998
    assert ratio == pytest.approx(1 / 1.5, abs=0.01)
    again = begin(tmp_path / "again", tiny)
    assert again.eight_bits is not None
    again.eight_bits.widen(progress.wide)
    assert paths.describe(again)["frozen products"] == described


@pytest.mark.usefixtures("any_size_and_device")
def test_run_that_goes_on_leaves_wide_what_was_given_up(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(technique=NARROW, n_epochs=2), ROWS)
    stop_signal = StopSignal()
    first = prepare(folder, MessageWriter(None), stop_signal)
    stop_signal.received = True
    progress = Progress(wide={Q: "for the test"})
    assert not loop.train(first, progress)

    assert carry_out(folder, MessageWriter(None), StopSignal())

    described = json.loads((folder / "out/training_config.json").read_text())["paths"]["frozen products"]
    assert described["given up"] == {Q: "for the test"}


@pytest.mark.parametrize(
    ("available", "least", "why"),
    [
        (False, 16, "this device has no fp8 matrix products"),
        (True, 1024, "no adapted layer has both sides of at least 1024 and a plain LoRA update"),
    ],
)
def test_run_that_cannot_use_eight_bits_says_so(
    tmp_path: Path, tiny: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch, available: bool, least: int, why: str
) -> None:
    monkeypatch.setattr(fp8, "LEAST_SIDE", least)
    monkeypatch.setattr(fp8, "available", lambda _device: available)
    folder = lay_out(tmp_path / "run", tiny, plan(technique=NARROW), ROWS)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [started] = said(ear, "started")
    assert started.warnings == [f"precision fp8 was not used: {why}."]


@pytest.mark.usefixtures("any_size_and_device")
def test_no_rank_uses_eight_bits_where_another_cannot(tmp_path: Path, tiny: Path) -> None:
    """A rank that compares its products would wait for one that has none to compare."""
    t = begin(tmp_path / "run", tiny)
    warnings: list[str] = []

    class WithOlderCard(Ranks):
        count = 2

        def any(self, flag: bool) -> bool:
            return True

    ranks = WithOlderCard(t.ranks.accelerator)

    assert eight_bits.install(t.objective, t.precision, t.rows.examples, ranks, warnings) is None
    assert warnings == ["precision fp8 was not used: one or more of the devices have no fp8 matrix products."]


@pytest.mark.parametrize(
    ("cosine", "ratio", "close"),
    [(0.991, 0.99, True), (0.989, 1.0, False), (0.999, 0.97, False), (0.999, 1.03, False), (math.nan, 1.0, False)],
)
def test_what_is_too_different(cosine: float, ratio: float, close: bool) -> None:
    assert eight_bits.close(cosine, ratio) is close
