"""The caches and packings that a run uses, its random state, and the record from which it can be repeated."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes
import tiny_models
import torch
from run_folders import chat, lay_out, plan

from tunery.spec import Evaluation, Lora, Qlora
from worker.trainer.loop import train
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress

ROWS = [chat(i) for i in range(8)]


def test_training_and_validation_keep_no_cache_and_answers_do(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(evaluation=Evaluation(max_new_tokens=4)), ROWS, ROWS[:2])
    t = prepare(folder, MessageWriter(None), StopSignal())
    kept: dict[bool, set[bool]] = {True: set(), False: set()}  # the values of use_cache, outside and inside generate
    generating = False

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        kept[generating].add(bool(given.get("use_cache")))

    t.objective.causal.base_model.register_forward_pre_hook(note, with_kwargs=True)
    train(t, Progress())
    generating = True
    t.objective.eval()
    t.objective.causal.generate(input_ids=t.objective.causal.dummy_inputs["input_ids"], max_new_tokens=2)

    assert kept == {False: {False}, True: {True}}


def test_four_bit_layers_keep_one_packing(tmp_path: Path, tiny: Path) -> None:
    """On some CPUs, bitsandbytes would repack them at the first evaluation and round their constants."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(technique=Qlora(r=2)), ROWS), MessageWriter(None), StopSignal())

    layers = [module for module in t.objective.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]

    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_record_says_what_it_takes_to_repeat_the_run(tmp_path: Path, tiny: Path) -> None:
    settled = plan(technique=Lora(r=2, dropout=0.1), seed=11)
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, facts={"source": "team/tiny"})

    assert carry_out(folder, MessageWriter(None), StopSignal())

    record = json.loads((folder / "out" / "training_config.json").read_text())
    assert record["plan"] == settled.model_dump(mode="json")
    assert record["plan"]["seed"] == 11
    assert record["base_model"] == "tiny"
    assert record["facts"] == {"source": "team/tiny"}
    assert {name: record["versions"][name] for name in ("torch", "transformers", "peft", "bitsandbytes")} == {
        name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
    }
    t = prepare(folder, MessageWriter(None), StopSignal())
    assert record["chat_template_sha256"] == t.template.sha256
    assert (folder / "out" / "chat_template.jinja").read_text() == tiny_models.CHATML


def test_seed_decides_the_first_adapters(tmp_path: Path, tiny: Path) -> None:
    """Random numbers that were drawn before make no difference."""
    first, again, other = (
        {name: p.detach().clone() for name, p in prepare(folder, MessageWriter(None), StopSignal()).parameters.items()}
        for folder in (lay_out(tmp_path / str(i), tiny, plan(seed=seed), ROWS) for i, seed in enumerate((7, 7, 8)))
    )

    assert all(torch.equal(again[name], p) for name, p in first.items())
    assert not any(torch.equal(other[name], p) for name, p in first.items() if "lora_A" in name)
