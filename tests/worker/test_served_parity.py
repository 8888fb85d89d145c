"""The check that the model server, on the files of a run, answers as the run's evaluation did."""

import errno
import gc
import io
import itertools
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import zoo
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file, save_file

from tunery.spec import Evaluation, Full, Lora, Qlora, Technique
from tunery.trainer_protocol import GREEDY, Served, TokenDifference
from worker.server import check, parity
from worker.server.batch import Batch
from worker.server.parity import Compared, judge
from worker.server.rendering import Rendering
from worker.server.streams import Alone
from worker.supervisor import served_note
from worker.trainer.convert import convert
from worker.trainer.decoding import graphs
from worker.trainer.decoding.ties import tie
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(12)]
MOE = "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"


def _train(folder: Path, base: Path, technique: Technique, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Trains and scores a run; returns its directory."""
    settled = plan(
        technique=technique,
        n_epochs=2,
        evaluation=Evaluation(test_file="file-test", max_new_tokens=12, general={"enabled": False}),
    )
    run = lay_out(folder, base, settled, rows, test=rows)
    assert carry_out(run, MessageWriter(None), StopSignal())
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    return _train(root / "run", tiny_models.llama(root / "base"), Lora(r=4, alpha=8))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Returns a copy of the run directory, whose artifact a test may change."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def _check(run: Path, rows: int = 64, tokens: int = 64) -> Served:
    return parity.check(run, rows, tokens, "cpu")


def _first(found: Served) -> TokenDifference:
    assert found.status == "differs"
    assert found.withheld
    assert found.first_difference is not None
    return found.first_difference


def test_answers_are_equal_and_the_artifact_says_so(run: Path) -> None:
    found = _check(run)
    assert (found.status, found.rows, found.equal, found.ties) == ("equal", 12, 12, 0)
    assert (found.precision, found.first_difference, found.withheld) == ("float32", None, False)
    answers = [json.loads(line) for line in (run / GREEDY).read_text().splitlines()]
    assert found.tokens == sum(len(answer["ids"]) for answer in answers) > 12
    assert len({tuple(answer["ids"]) for answer in answers}) > 1

    served_note.write(found, run / "out")

    assert Served.model_validate_json((run / "out" / "served.json").read_text()) == found
    readme = (run / "out" / "README.md").read_text()
    assert readme.endswith(f"to 12 of 12 test rows ({found.tokens} tokens, float32).\n")
    assert readme.index("## Measured") < readme.index("## Served")


def test_rows_and_tokens_are_bounded(run: Path) -> None:
    found = _check(run, rows=5, tokens=1)
    assert (found.status, found.rows, found.tokens) == ("equal", 4, 4)  # every third row, the first token


def test_template_that_was_changed_after_training_names_the_prompts_token(run: Path) -> None:
    template = run / "out" / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    found = _first(_check(run))
    before = json.loads((run / GREEDY).read_text().splitlines()[0])["prompt_ids"]
    assert (found.row, found.place, found.position, found.gap) == (1, "prompt", 1, None)
    assert found.served != found.trained
    assert len(before) > 1


def test_server_that_knows_no_stop_token_names_what_it_goes_on_with(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Rendering.__init__

    def without_stops(self: Rendering, template: Any) -> None:
        plain(self, template)
        self.eos_ids = frozenset()

    monkeypatch.setattr(Rendering, "__init__", without_stops)
    found = _first(_check(run))
    ended = json.loads((run / GREEDY).read_text().splitlines()[found.row - 1])["ids"]
    assert (found.place, found.position, found.trained, found.gap) == ("answer", len(ended) + 1, None, None)
    assert found.served is not None


def test_adapter_of_another_scale_names_the_tokens_and_their_gap(run: Path) -> None:
    config = run / "out" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 800}))
    found = _first(_check(run))
    assert found.place == "answer"
    assert found.served != found.trained
    assert found.gap is not None
    assert found.gap > 0.05
    lines = (run / GREEDY).read_text().splitlines(keepends=True)
    (run / GREEDY).write_text(next(line for line in lines if json.loads(line)["row"] == found.row))
    assert _first(_check(run)).gap == pytest.approx(found.gap, rel=1e-3)  # its own, also among those of other rows


def test_rows_that_have_room_one_after_the_other_are_all_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run / "out" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 800}))
    wanted, step, steps = _check(run), Batch.step, itertools.count()

    def bounded(batch: Batch) -> None:
        assert next(steps) < 1000, "no row has room"
        step(batch)

    monkeypatch.setattr(Batch, "step", bounded)
    monkeypatch.setattr(parity, "Engine", partial(parity.Engine, cache_bytes=1))
    found = _check(run)
    assert _first(found).position == _first(wanted).position
    assert (found.rows, found.equal, found.reason) == (wanted.rows, wanted.equal, None)


def test_rows_that_no_batch_can_hold_have_keys_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _train(tmp_path / "run", tiny_models.llama(tmp_path / "base"), Lora(r=4, alpha=8, use_dora=True))
    held, most = set[Alone](), list[int]()
    logits, close = Alone.logits, Alone.close

    def noted(stream: Alone) -> Any:
        held.add(stream)
        most.append(len(held))
        return logits(stream)

    monkeypatch.setattr(Alone, "logits", noted)
    monkeypatch.setattr(Alone, "close", lambda stream: held.discard(stream) or close(stream))
    monkeypatch.setattr(parity, "Engine", partial(parity.Engine, streams=2))
    found = _check(run)
    assert (found.status, found.equal) == ("equal", 12)
    assert max(most) == 2


def test_adapter_that_cannot_be_loaded_is_refused(run: Path) -> None:
    weights = run / "out" / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(weights).items()}, weights)
    found = _check(run)
    assert (found.status, found.withheld, found.rows) == ("refused", True, 12)
    assert found.reason is not None
    assert "cannot be loaded onto its base" in found.reason


def test_a_host_that_fails_says_nothing_about_the_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as change:
        change.setattr(parity.manifest, "describe", full)
        with pytest.raises(OSError, match="No space left"):
            _check(run)
    (run / "out" / "adapter_config.json").unlink()
    assert _check(run).status == "refused", "a file that is missing is missing for the model server, too"


@pytest.mark.parametrize(
    ("logit", "precision", "apart"),
    [
        (28.4, "bfloat16", 0.5),  # four times 2**-3
        (-16.0, "bfloat16", 0.5),
        (15.9, "bfloat16", 0.25),
        (1.0, "bfloat16", 0.05),
        (0.0, "bfloat16", 0.05),
        (28.4, "float32", 1e-4),
    ],
)
def test_ties_are_as_far_apart_as_rounding_makes_them(logit: float, precision: Any, apart: float) -> None:
    assert tie(logit, precision) == apart


ROW = TokenDifference(row=3, place="answer", position=2, trained="a", served="b", gap=0.2)
EQUAL, TIED, OTHER = Compared(4), Compared(4, ROW, is_tie=True), Compared(4, ROW)
ENDLESS = Compared(4, ROW.model_copy(update={"trained": None, "gap": None}))
PROMPT = Compared(4, ROW.model_copy(update={"place": "prompt", "gap": None}))


@pytest.mark.parametrize(
    ("compared", "precision", "status"),
    [
        ([EQUAL] * 50, "float32", "equal"),
        ([EQUAL] * 49 + [OTHER], "float32", "differs"),
        ([EQUAL] * 10 + [TIED] * 40, "bfloat16", "equal"),
        ([EQUAL] * 48 + [OTHER] * 2, "bfloat16", "equal"),
        ([EQUAL] * 47 + [OTHER] * 3, "bfloat16", "differs"),
        ([EQUAL] * 9 + [OTHER], "bfloat16", "equal"),
        ([EQUAL] * 8 + [OTHER] * 2, "bfloat16", "differs"),
        ([EQUAL] * 8 + [OTHER], "bfloat16", "differs"),
        ([EQUAL] * 49 + [ENDLESS], "bfloat16", "differs"),
        ([EQUAL] * 49 + [PROMPT], "bfloat16", "differs"),
    ],
)
def test_rounding_is_forgiven_and_nothing_else(compared: list[Compared], precision: str, status: str) -> None:
    found = judge(compared, precision)
    assert found.status == status
    assert found.equal + found.ties == len(compared) - sum(one in (OTHER, ENDLESS, PROMPT) for one in compared)
    assert found.ties == compared.count(TIED)


@pytest.mark.slow
@pytest.mark.filterwarnings(MOE)
@pytest.mark.parametrize(
    ("family", "technique"),
    [
        ("Llama", Lora(r=4, alpha=8, use_dora=True)),
        ("Llama", Lora(r=4, alpha=8, modules_to_save=["lm_head"])),
        ("Llama", Qlora(r=4, alpha=8, compute_dtype="float32")),
        ("Llama", Full()),
        ("Qwen3-MoE", Lora(r=4, alpha=8)),
        ("Gemma 3", Lora(r=4, alpha=8)),
        ("Phi-3 longrope", Lora(r=4, alpha=8)),
        ("GPT-2", Lora(r=4, alpha=8)),
    ],
    ids=["dora", "modules-to-save", "qlora", "full", "experts", "windows", "longrope", "gpt2"],
)
def test_families_and_kinds_of_adapters_are_equal(tmp_path: Path, family: str, technique: Technique) -> None:
    convert(str(zoo.make(family, tmp_path / "source")), tmp_path / "base")
    found = _check(_train(tmp_path / "run", tmp_path / "base", technique))
    assert (found.status, found.equal) == ("equal", 12)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # of bitsandbytes: the model is tiny
@pytest.mark.parametrize("technique", [Lora(r=4, alpha=8), Qlora(r=4, alpha=8), Full()], ids=["lora", "qlora", "full"])
def test_answers_on_a_gpu_are_equal_up_to_ties_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, technique: Technique
) -> None:
    run = _train(tmp_path / "run", tiny_models.llama(tmp_path / "base", bf16=True), technique)
    recorded, record = list[object](), graphs.CudaRecorder.record
    monkeypatch.setattr(graphs.CudaRecorder, "record", lambda *given: recorded.append(given) or record(*given))
    found = parity.check(run, 64, 64, "cuda")
    assert (found.status, found.precision) == ("equal", "bfloat16"), found.summary
    assert recorded


def test_a_check_that_waits_ends_with_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["check", "--wait"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        assert check.main() == 0
    finally:
        gc.unfreeze()
