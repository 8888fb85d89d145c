"""Carries out whole runs in this process, and checks their messages, their files and their resumption."""

import csv
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from peft.tuners.lora.layer import LoraLayer
from pydantic import BaseModel
from run_folders import Ear, Interrupting, chat, lay_out, plan, said, steps_of
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tunery.failures import InvalidTrainingFile, NotFinite
from tunery.planning.peak import VERIFIED
from tunery.rows.preview_model import Preview
from tunery.rows.template import IGNORED, ChatTemplate
from tunery.spec import EarlyStopping, Evaluation, Full, Lora, Qlora, Schedule
from tunery.trainer_protocol import Evaluated
from worker.trainer import artifact, checkpoints, paths, previews, validation
from worker.trainer.data import Row, Rows, collate, singles
from worker.trainer.loading import short_row
from worker.trainer.loop import train
from worker.trainer.report import CSV_HEADER, MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.scoring import comparison
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i) for i in range(10)]


@pytest.mark.parametrize(
    "technique",
    [
        Lora(r=8, alpha=32, dropout=0.1, target_modules=["q_proj", "v_proj"]),
        Qlora(r=4, quant_type="nf4", double_quant=True, compute_dtype="bfloat16"),
    ],
    ids=["lora as in the textbook", "qlora as in the textbook"],
)
def test_adapter_is_exported_as_peft_loads_it(tmp_path: Path, tiny: Path, ear: Ear, technique: Lora) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(technique=technique, n_epochs=2), ROWS)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["r"] == technique.r
    weights = load_file(folder / "out" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    [started], [finished] = said(ear, "started"), said(ear, "finished")
    assert (started.total_steps, finished.steps, finished.step) == (6, 6, 6)
    assert started.trainable_params == sum(tensor.numel() for tensor in weights.values())
    assert [message.step for message in said(ear, "step")] == [1, 2, 3, 4, 5, 6]
    assert [(c.kind, c.path) for c in said(ear, "checkpoint_saved")] == [
        ("public", "checkpoints/step-3"),
        ("public", "checkpoints/step-6"),
    ]
    assert (folder / "checkpoints" / "step-3" / "adapter_model.safetensors").exists()
    assert (folder / "out" / "preview.html").exists()
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template


def test_model_comes_with_a_preview_of_its_rows(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(max_seq_length=48), ROWS)
    t = prepare(folder, MessageWriter(None), StopSignal())

    previews.write(t, tmp_path)

    made = Preview.model_validate_json((tmp_path / "preview.json").read_text())
    tokens = [[token.id for token in row.sequences[0].tokens if token.state != "cut"] for row in made.rows
              if row.sequences[0].trained]  # fmt: skip
    assert tokens == [row.input_ids for row in t.rows.rows[:10]]
    assert t.rows.truncated
    assert t.rows.unlearnable
    assert {check.name: check.passed for check in made.checks}["rows_of_the_run"]
    assert "of ftjob-test" in (tmp_path / "preview.html").read_text()


def test_preview_of_other_rows_than_the_runs_fails(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    t.rows.rows[3].labels[-2] = IGNORED

    [check] = [check for check in previews.make(t).checks if check.name == "rows_of_the_run"]
    assert (check.passed, check.rows) == (False, [4])


@pytest.mark.parametrize(
    ("dropout", "path"),
    [
        (0.0, {"path": "adapters"}),
        (0.1, {"path": "adapters, update apart", "why": "dropout on the adapter's input"}),
    ],
)
def test_record_says_which_way_each_part_took(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture, dropout: float, path: dict[str, str]
) -> None:
    caplog.set_level("INFO")
    folder = lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4, dropout=dropout), packing=True), ROWS)

    carry_out(folder, MessageWriter(None), StopSignal())

    record = json.loads((folder / "out" / "training_config.json").read_text())
    assert record["paths"] == {
        "modules": [
            {"kind": "LlamaDecoderLayer", "count": 2, "path": "decoder"},
            {"kind": "LlamaMLP", "count": 2, "path": "decoder"},
            {"kind": "LlamaRMSNorm", "count": 5, "path": "decoder"},
            {"kind": "lora.Linear", "count": 14, **path},
        ],
        "frozen products": {"path": "float32"},
        "loss": {"path": "chunked"},
        "attention": "sdpa",
        "packing": {"path": "packed"},
        "rows": "padded",
        "recompute": 0,
        "graphs": {"path": "plain", "why": "not on a GPU"},
        "answers": {"path": "decoder"},
        "ranks": 1,
        "sharding": "replicate",
    }
    plan_kept = {"max_tokens": 1024, "packed_tokens": 128, "recompute": 0, "offload": False, "graphs": False}
    assert record["memory"] == plan_kept | {"host_embedding": False}
    assert '"loss": {"path": "chunked"}' in caplog.text


def test_record_says_why_a_kernel_was_not_taken(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(packing=True), ROWS), MessageWriter(None), StopSignal())
    adapted: Any = next(module for module in t.objective.modules() if isinstance(module, LoraLayer))
    del adapted.forward
    t.objective.chunked = False
    t.stepper.memory = replace(t.stepper.memory, packed_tokens=None)

    found = paths.describe(t)

    assert {"kind": "lora.Linear", "count": 1, "path": "plain", "why": "a kind of adapter without a kernel"} in found[
        "modules"
    ]
    assert found["loss"]["why"] == "the logits are more than one product of the head"
    assert found["packing"]["why"] == "packed rows see each other in this model"


def test_full_fine_tune_is_exported_as_transformers_loads_it(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    test = [chat(100 + i) for i in range(4)]
    evaluation = Evaluation(test_file="file-test", max_new_tokens=8)
    folder = lay_out(
        tmp_path / "run", tiny, plan(technique=Full(), learning_rate=1e-3, evaluation=evaluation), ROWS, test=test
    )

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    assert all(t.dtype == torch.bfloat16 for t in load_file(folder / "out" / "model.safetensors").values())
    [started] = said(ear, "started")
    assert started.trainable_params == started.all_params
    rows = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert any(row["base"] != row["tuned"] for row in rows)  # the base has answered before the training


def test_templates_besides_the_default_are_in_the_artifact(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    folder = lay_out(tmp_path / "run", base, plan(), ROWS)

    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert (folder / "out/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    described = json.loads((folder / "out/training_config.json").read_text())
    assert ChatTemplate.load(folder / "out").sha256 == described["chat_template_sha256"]


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    tied = tiny_models.llama(tmp_path / "base", tie_word_embeddings=True)
    folder = lay_out(tmp_path / "run", tied, plan(technique=Full(), learning_rate=1e-3), ROWS)

    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert "lm_head.weight" not in load_file(folder / "out" / "model.safetensors")


def test_run_measures_itself(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """The few rows are memorised, so the tuned model must answer them and the random base must not."""
    evaluation = Evaluation(test_file="file-test", max_new_tokens=12)
    rows = [chat(i) for i in range(4)]
    folder = lay_out(
        tmp_path / "run", tiny, plan(n_epochs=40, technique=Lora(r=16), evaluation=evaluation), rows, rows, rows
    )

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [score] = said(ear, "score")
    assert score.rows == 4
    assert score.base_exact == 0
    assert score.tuned_exact == 1
    assert score.gain_low > 0
    assert len(score.samples) == 4
    assert (score.task, score.primary) == ("text", "chrf")
    assert score.metrics["exact"].gain == 1
    assert score.metrics["chrf"].tuned == 1 > score.metrics["chrf"].base
    assert score.metrics["chrf"].low > 0
    assert json.loads((folder / "out" / "scorecard.json").read_text())["gain"] == 1
    evaluated = said(ear, "evaluated")
    assert [message.step for message in evaluated] == list(range(1, 41))
    assert evaluated[-1].loss < 0.1 < evaluated[0].loss
    with (folder / "out" / "results.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == CSV_HEADER
    assert len(table) == 41
    assert table[1][3:] == ["", ""]
    assert float(table[40][3]) == pytest.approx(evaluated[-1].loss, rel=0.2)


@pytest.mark.parametrize(
    "technique",
    [pytest.param(Lora(r=4, dropout=0.2), marks=pytest.mark.slow), Qlora(r=4), Full()],
    ids=["lora with dropout", "qlora", "full"],
)
@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["killed", "asked to stop"])
def test_broken_run_goes_on_to_the_bit(
    tmp_path: Path, tiny: Path, ear: Ear, technique: Lora | Full, killed: bool
) -> None:
    settled = plan(technique=technique, n_epochs=2, learning_rate=3e-3, select="best", batch_size=3)
    whole, broken = (
        lay_out(tmp_path / name, tiny, settled, ROWS, ROWS[:3], snapshot_seconds=1e-9 if killed else 300)
        for name in ("whole", "broken")
    )
    assert carry_out(whole, MessageWriter(None), StopSignal())

    stop_signal = StopSignal()
    if killed:
        with pytest.raises(ConnectionError):
            carry_out(broken, Interrupting(6), stop_signal)
    else:
        assert not carry_out(broken, Interrupting(6, stop_signal), stop_signal)
    assert carry_out(broken, MessageWriter(ear.descriptor), StopSignal())

    name = "model.safetensors" if isinstance(technique, Full) else "adapter_model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    assert steps_of(broken) == steps_of(whole)
    assert said(ear, "started")[0].first_step == (6 if killed else 8)


def test_training_and_validation_rows_are_read_once(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=2), ROWS, ROWS[:3])
    opened: list[str] = []
    watched = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if watched and event == "open" and str(arguments[0]).startswith(str(folder / "data")):
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)  # sees every way of opening a file, and cannot be removed again
    assert carry_out(folder, MessageWriter(None), StopSignal())
    watched.clear()

    assert sorted(opened) == ["train.jsonl", "train.jsonl", "valid.jsonl"], "once, and a few rows for the preview"


def test_loss_that_is_no_number_ends_the_run_before_the_weights_are_touched(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(learning_rate=1.0, n_epochs=3), ROWS)
    t = prepare(folder, MessageWriter(None), StopSignal())
    poisoned = t.objective.causal.base_model.layers[0].input_layernorm.weight
    poisoned.data[0] = float("nan")
    before = {name: p.detach().clone() for name, p in t.parameters.items()}

    with pytest.raises(NotFinite, match=r"at step 1, .* Lower the learning rate .* No checkpoint had been saved"):
        train(t, Progress())

    assert all(torch.equal(p, before[name]) for name, p in t.parameters.items())
    assert caplog.text.count("step 1 drew example") == t.plan.batch_size
    assert all(word in caplog.text for word in ("<|im_start|>user", "alpha"))
    assert not list((folder).glob("checkpoints/*"))


def test_early_stopping_ends_the_run_and_exports_the_best_step(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """No epoch gains 100 nats, so patience runs out; the best step is still the one with the lowest loss."""
    settled = plan(n_epochs=12, early_stopping=EarlyStopping(patience=2, min_delta=100))
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, [chat(200 + i) for i in range(6)])

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [finished] = said(ear, "finished")
    assert finished.stopped_early
    losses = {message.step: message.loss for message in said(ear, "evaluated")}
    assert list(losses) == [3, 6, 9]
    assert finished.steps == 9
    assert finished.step == min(losses, key=losses.__getitem__) != 3
    exported = load_file(folder / "out" / "adapter_model.safetensors")
    public = folder / "checkpoints" / f"step-{finished.step}" / "adapter_model.safetensors"
    assert all(torch.equal(tensor, load_file(public)[name]) for name, tensor in exported.items())


def test_best_step_may_be_before_the_last(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    kept_up = Schedule(type="constant", warmup_ratio=0)
    settled = plan(n_epochs=12, select="best", learning_rate=0.01, technique=Lora(r=16), schedule=kept_up)
    others = [{"messages": [one["messages"][0], other["messages"][1]]} for one, other in pairwise(ROWS[:4])]
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS[:4], others)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [finished] = said(ear, "finished")
    losses = {message.step: message.loss for message in said(ear, "evaluated")}
    assert finished.step == min(losses, key=losses.__getitem__) < 12
    t = prepare(folder, MessageWriter(None), StopSignal())
    checkpoints.restore_best(t, Progress(best_step=finished.step))
    assert validation.loss(t.stepper, t.valid.examples)[0] == pytest.approx(losses[finished.step], rel=1e-5)


def test_lost_best_weights_are_an_error(tmp_path: Path, tiny: Path) -> None:
    """Otherwise the last weights would be exported under the number of the best step."""
    settled = plan(n_epochs=2, select="best")
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, ROWS[:3], public_checkpoints=0)

    class Losing(MessageWriter):
        def write(self, message: BaseModel) -> None:
            super().write(message)
            if isinstance(message, Evaluated) and message.step == 6:
                (folder / "snapshots" / "best.safetensors").unlink()

    t = prepare(folder, Losing(None), StopSignal())
    t.optimizer.step = _rising(t, t.optimizer.step)

    with pytest.raises(RuntimeError, match="step 3, the best, are missing"):
        train(t, Progress())

    assert not (folder / "out").exists()


@pytest.mark.parametrize("snapshots", [300.0, 1e-9], ids=["at the epoch's end", "at a snapshot"])
def test_weight_that_is_no_number_is_never_saved(tmp_path: Path, tiny: Path, snapshots: float) -> None:
    """A step with a finite loss can leave an infinite weight: the last good checkpoint must stay the newest."""
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=3), ROWS, snapshot_seconds=snapshots)
    t = prepare(folder, MessageWriter(None), StopSignal())
    per_epoch, usual, taken = t.steps_per_epoch, t.optimizer.step, []
    spoiled = 2 * per_epoch if snapshots > 1 else per_epoch + 1

    def step() -> None:
        usual()
        taken.append(1)
        if len(taken) == spoiled:
            next(iter(t.parameters.values())).data[0, 0] = float("inf")

    t.optimizer.step = step  # type: ignore[method-assign,assignment]
    message = (
        rf"A weight became NaN or infinite at step {spoiled}, .* The checkpoint of step {per_epoch} is intact "
        r"and is kept"
    )

    with pytest.raises(NotFinite, match=message):
        train(t, Progress())

    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{per_epoch}"]
    assert not (folder / "snapshots" / f"step-{spoiled}").exists()


def _rising(t: Training, usual: Any) -> Any:
    """Returns an optimizer's step that scales all weights up after each step, so that the loss rises."""

    def step() -> None:
        usual()
        with torch.no_grad():
            for parameter in t.parameters.values():
                parameter.mul_(1.5)

    return step


def test_validation_loss_that_is_no_number_ends_the_run(tmp_path: Path, tiny: Path) -> None:
    """Otherwise no step would be the best, and the last one would be exported instead."""
    folder = lay_out(tmp_path / "run", tiny, plan(select="best", n_epochs=2), ROWS, ROWS[:3])
    t = prepare(folder, MessageWriter(None), StopSignal())
    usual = t.objective.forward
    t.objective.forward = lambda batch, scale: tuple(
        value if t.objective.training else value * float("nan") for value in usual(batch, scale)
    )

    with pytest.raises(NotFinite, match="The validation loss became nan at step 3"):
        train(t, Progress())


def test_best_without_validation_rows_is_the_users_error(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(select="best"), ROWS)

    with pytest.raises(InvalidTrainingFile, match="validation file"):
        carry_out(folder, MessageWriter(None), StopSignal())


def test_run_goes_on_from_an_adapter(tmp_path: Path, tiny: Path) -> None:
    first = lay_out(tmp_path / "first", tiny, plan(n_epochs=3), ROWS)
    carry_out(first, MessageWriter(None), StopSignal())
    second = lay_out(tmp_path / "second", tiny, plan(), ROWS)
    (first / "out").rename(second / "adapter")

    t = prepare(second, MessageWriter(None), StopSignal())

    learnt = load_file(second / "adapter" / "adapter_model.safetensors")
    for name, parameter in t.parameters.items():
        stored = learnt[name.removeprefix("model.").replace(".default", "")]
        assert torch.equal(parameter, stored)


def test_rows_that_lose_their_end_are_named(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    rows = [*ROWS, chat(40, words=60)]
    rows[3] = {"messages": [rows[3]["messages"][0], {"role": "assistant", "content": "word " * 60}]}
    folder = lay_out(tmp_path / "run", tiny, plan(), rows)

    t = prepare(folder, MessageWriter(ear.descriptor), StopSignal())

    assert (t.rows.truncated, t.rows.unlearnable) == ((4,), (11,))
    assert t.warnings == (), "the job's validation has named these lines"


@pytest.mark.parametrize("cut_answers", ["limit", "drop"])
def test_rows_that_lose_a_part_of_their_answer_are_not_trained(
    cut_answers: str, tmp_path: Path, tiny: Path, ear: Ear
) -> None:
    rows = list(ROWS)
    rows[3] = {"messages": [rows[3]["messages"][0], {"role": "assistant", "content": "word " * 60}]}
    whole = prepare(lay_out(tmp_path / "whole", tiny, plan(), rows[:3] + rows[4:]), MessageWriter(None), StopSignal())

    folder = lay_out(tmp_path / "run", tiny, plan(cut_answers=cut_answers), rows)
    t = prepare(folder, MessageWriter(ear.descriptor), StopSignal())

    assert (t.rows.truncated, t.rows.unlearnable) == ((), (4,))
    assert [row.input_ids for row in t.rows.rows] == [row.input_ids for row in whole.rows.rows]
    assert [check.passed for check in previews.make(t).checks if check.name == "rows_of_the_run"] == [True]


def test_logits_that_are_more_than_a_product_take_the_textbooks_loss(tmp_path: Path, tiny: Path) -> None:
    """The loss is chosen by trial, because the next architecture may use a multiplier that no list has."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    batch = collate(t.rows.examples, [[0]], t.device)
    assert t.objective.chunked
    t.objective.causal.register_forward_hook(lambda _module, _args, out: out.__setitem__("logits", out.logits * 0.5))

    t.objective.verify_chunked_loss(batch)

    assert not t.objective.chunked


def test_the_chunked_loss_is_verified_on_few_tokens(tmp_path: Path, tiny: Path) -> None:
    """Three times the full logits of a row of 8,000 tokens, in fp32 with a vocabulary of 128,256, are 12 GB."""
    rows = [Row(list(range(count)), [-100, *range(1, count)]) for count in (VERIFIED + 40, VERIFIED + 90)]
    found = short_row(Rows(singles(rows)))
    assert (found.labelled, len(found)) == (VERIFIED, VERIFIED + 1)
    assert short_row(Rows(singles([rows[1], Row([1, 2, 3], [-100, 2, 3])]))) == Row([1, 2, 3], [-100, 2, 3])


def test_only_rank_0_touches_the_artifact(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a slower rank would delete what rank 0 has just written."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    (t.folder / ".out.partial").mkdir()
    sister = SimpleNamespace(is_main=False, count=2, lockstep=nullcontext, wait=lambda: None, any=lambda flag: flag)
    monkeypatch.setattr(t.stepper, "ranks", sister)

    artifact.write(t, Progress(step=1), None)

    assert (t.folder / ".out.partial").exists()
    assert not (t.folder / "out").exists()


def test_no_more_test_rows_than_the_plan_says_are_asked(tmp_path: Path, tiny: Path) -> None:
    scored = plan(evaluation=Evaluation(test_file="file-test", max_rows=3))
    t = prepare(lay_out(tmp_path / "run", tiny, scored, ROWS, test=ROWS[:5]), MessageWriter(None), StopSignal())

    assert [question.messages for question in comparison.questions(t)] == [row["messages"][:-1] for row in ROWS[:3]]


def test_packed_run_trains_on_every_token(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(packing=True), ROWS)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [started], [finished] = said(ear, "started"), said(ear, "finished")
    assert started.total_steps == 3
    assert finished.trained_tokens == started.train_tokens


@pytest.mark.slow
def test_artifact_needs_nothing_of_ours(tmp_path: Path, tiny: Path) -> None:
    """Plain peft loads it in an interpreter that cannot import this project."""
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS)
    carry_out(folder, MessageWriter(None), StopSignal())
    program = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as M\n"
        "m = PeftModel.from_pretrained(M.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('tunery', 'worker')]\n"
        "print(m(torch.tensor([[5, 6, 7]])).logits.shape)"
    )

    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tiny), str(folder / "out")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip

    assert "[1, 3, 260]" in done.stdout
