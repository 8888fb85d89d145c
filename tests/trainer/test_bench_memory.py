"""The benchmark of peak memory: the order of its runs, the results that it stores, and how it resumes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models

from bench import memory, memory_errors
from bench.memory_kinds import CPU_KINDS, GPU_KINDS, KINDS, SHAPES, Kind
from bench.memory_phases import MARK, read_phases
from bench.process_memory import host_bytes
from tunery.spec import Dpo, Lora

ROOT = Path(__file__).parents[2]
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 260}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}


def test_kinds_of_few_records_come_first() -> None:
    """On one GPU, experts, DoRA, 8-bit moments of adapters, pairs and scorecards are among the first seven."""
    first = list(GPU_KINDS.values())[:7]
    assert all(kind.gpus == 1 for kind in first)
    assert {kind.technique.type for kind in first if "moe" in kind.shape} == {"full", "lora"}
    assert any(isinstance(kind.technique, Lora) and kind.technique.use_dora for kind in first)
    assert any(isinstance(kind.technique, Lora) and "optimizer" in kind.options for kind in first)
    assert any(kind.method.type == "dpo" for kind in first)
    assert {kind.technique.type for kind in first if kind.scores} == {"full", "lora"}
    for kinds in (CPU_KINDS, GPU_KINDS):
        assert {bool(SHAPES[kind.shape].get("tie_word_embeddings")) for kind in kinds.values()} == {True, False}


def test_phases_are_those_that_raised_the_peak() -> None:
    said = ["unrelated", f"x: {MARK}prepare: 5", f"x: {MARK}step: 7", f"x: {MARK}prepare: 9"]
    assert list(read_phases(said).items()) == [("step", 7), ("prepare", 9)]


def test_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    held = b"1" * 2**28
    assert host_bytes() > len(held)
    program = "from bench.process_memory import host_bytes; print(host_bytes())"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < len(held) / 4


def test_a_process_that_has_ended_holds_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert host_bytes(pid=ended.pid) == 0


@pytest.mark.slow
def test_runs_are_kept_one_by_one_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out.json"
    tiny_models.tokenizer(source)
    (source / "config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 0}))
    monkeypatch.setitem(SHAPES, "tiny", _TINY)
    monkeypatch.setitem(KINDS, "broken", Kind("tiny", Lora(), words=5, options={"max_seq_length": 16}))
    monkeypatch.setitem(KINDS, "pairs", Kind("tiny", Lora(), Dpo(), words=5, batch=2))
    memory.measure_all(source, out, ["broken", "pairs"], time.monotonic() + 600)
    broken, pairs = json.loads(out.read_text())["runs"]
    assert broken["failed"][0]["type"] == "failed"
    # A pair is two sequences with the same prompt, of which the shorter one is at most half.
    assert 0 < pairs["prompt"] + pairs["shortest"] <= pairs["longest"] / 2
    assert pairs["labels"] < pairs["step_tokens"]
    assert 0 < pairs["phases"]["step"] <= pairs["peak_bytes"]
    [record] = memory_errors.load(out)
    assert record["step"]["shortest"] == pairs["shortest"]
    assert memory_errors.estimate(record).bytes > 0
    memory.measure_all(source, out, ["pairs", "broken"], time.monotonic() - 1)
    assert json.loads(out.read_text())["runs"] == [broken, pairs]
