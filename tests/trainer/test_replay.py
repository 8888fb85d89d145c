"""Replay adds general rows to the task's rows without replacing any of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from run_folders import Ear, Interrupting, chat, lay_out, plan, said, steps_of

from tunery.rows.errors import CannotRender
from tunery.rows.template import ChatTemplate
from tunery.spec import Full, Lora, Qlora, Replay
from worker.trainer import data
from worker.trainer.data import Example, Row, Rows
from worker.trainer.general import benchmark
from worker.trainer.replay import kept, mixing, own, prompts
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import Stopped, StopSignal

ROWS = [chat(i) for i in range(10)]
REPLAY = Replay(share=0.3, max_new_tokens=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a random base with a content hash, about every third token of which is a stop token."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("replay") / "base", max_position_embeddings=512)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keeps only the shortest of the shipped prompts: with one token a byte, the others would be slow."""
    lines = sorted(prompts.PROMPTS.read_text().splitlines(keepends=True), key=len)[:48]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(lines))
    monkeypatch.setattr(prompts, "PROMPTS", path)
    return path


def rows_of(count: int, start: int = 0) -> list[Example]:
    return [Example((Row([1, 2, start + i], [-100, -100, start + i]),)) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "replay", "share"), [(100, 300, 0.1), (37, 20, 0.25), (10, 2, 0.5), (1215, 415, 0.03)]
)
def test_a_run_takes_every_task_row_as_without_replay_and_its_share_beside_them(
    count: int, replay: int, share: float
) -> None:
    plain, epochs, batch = Rows(rows_of(count)), 4, 8
    mixed = mixing.mix(plain, rows_of(replay, 1000), share)
    an_epoch = min(replay, round(count * share / (1 - share)))
    uses: Counter[int] = Counter()
    for epoch in range(epochs):
        of_epoch: list[int] = []
        for place in range(data.steps_per_epoch(count, batch)):
            step = epoch * data.steps_per_epoch(count, batch) + place + 1
            drawn = mixing.examples_of_step(mixed, step, batch, seed=5)
            alone = mixing.examples_of_step(plain, step, batch, seed=5)
            assert drawn[: len(alone)] == alone == data.rows_of_step(count, step, batch, 5)
            of_epoch += drawn[len(alone) :]
            due = min(count, (place + 1) * batch) * an_epoch / count
            assert due - 1 < len(of_epoch) <= due, "evenly over the steps"
            assert len(drawn) <= mixing.most_of_a_step(mixed, batch)
        assert len(of_epoch) == len(set(of_epoch)) == an_epoch, "none twice in an epoch"
        uses.update(of_epoch)
    assert min(uses) >= count
    assert max(uses.values()) - min(uses.get(i, 0) for i in range(count, count + replay)) <= 1, "none more often"


def test_the_seed_orders_replay() -> None:
    mixed = mixing.mix(Rows(rows_of(40)), rows_of(40, 1000), 0.4)
    orders = {seed: tuple(mixing.examples_of_step(mixed, 2, 8, seed)[8:]) for seed in (0, 0, 1)}
    assert orders[0] != orders[1]


def test_an_epochs_tokens_count_replay_as_it_is_taken() -> None:
    mixed = mixing.mix(Rows(rows_of(9)), rows_of(30, 1000), 0.25)
    assert (mixed.count, mixed.replayed, mixed.replayed_an_epoch, mixed.tokens) == (9, 30, 3, 9 * 3 + 3 * 3)


def test_no_shipped_prompt_is_measured_with() -> None:
    mine = [json.loads(line) for line in prompts.PROMPTS.read_text().splitlines()]
    held_out = benchmark._read("prompts.jsonl")
    assert len(mine) == len({entry["id"] for entry in mine}) == 918
    assert {entry["id"] for entry in mine}.isdisjoint(entry["id"] for entry in held_out)
    asked = {json.dumps(entry["messages"]) for entry in mine}
    assert asked.isdisjoint(json.dumps(entry["messages"][:-1]) for entry in held_out)
    assert all(entry["messages"][-1]["role"] == "user" and entry["licence"] for entry in mine)


def trained(folder: Path) -> Any:
    ear = Ear()
    try:
        assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())
        [started], [finished] = said(ear, "started"), said(ear, "finished")
    finally:
        ear.close()
    sampled = started.replay.prompts if started.replay and started.replay.source == "self" else None
    assert (finished.spent["replay"].units if "replay" in finished.spent else None) == sampled
    return started


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("technique", "packing"),
    [
        pytest.param(Lora(r=4, alpha=8), False, id="lora"),
        pytest.param(Full(), True, id="full packed"),
        pytest.param(Lora(r=4, alpha=8), True, id="lora packed", marks=pytest.mark.slow),
        pytest.param(Qlora(r=4, alpha=8), False, id="qlora", marks=pytest.mark.slow),
    ],
)
def test_a_run_says_what_it_replays_and_trains_on_it(base: Path, tmp_path: Path, technique: Any, packing: bool) -> None:
    options = {"technique": technique, "n_epochs": 2, "packing": packing, "max_seq_length": 256}
    started = trained(lay_out(tmp_path / "with", base, plan(**options, replay=REPLAY), ROWS))
    without = trained(lay_out(tmp_path / "without", base, plan(**options), ROWS))
    assert (started.examples, started.total_steps) == (without.examples, without.total_steps) == (10, 6)
    assert without.replay is None
    replay = started.replay
    assert replay.rows_an_epoch == 4
    assert replay.rows == 4 <= replay.ended < replay.prompts
    assert replay.share == pytest.approx(4 / 14)
    assert started.train_tokens > without.train_tokens
    described = json.loads((tmp_path / "with" / "out" / "training_config.json").read_text())
    assert described["replay"] == replay.model_dump()
    first, second = (steps_of(tmp_path / name) for name in ("with", "without"))
    assert [step["epoch"] for step in first] == [step["epoch"] for step in second]
    assert first[0]["train_loss"] != second[0]["train_loss"]
    last = [[step for step in steps if step["type"] == "step"][-1] for steps in (first, second)]
    assert [step["tokens"] for step in last] == [2 * started.train_tokens, 2 * without.train_tokens]


def test_rows_are_the_bases_own_ended_answers_in_its_template(base: Path, few: Path, tmp_path: Path) -> None:
    t = prepare(
        lay_out(tmp_path / "run", base, plan(replay=REPLAY, max_seq_length=256), ROWS),
        MessageWriter(None),
        StopSignal(),
    )
    replayed = t.rows.examples[t.rows.count :]
    asked = [json.loads(line)["messages"] for line in few.read_text().splitlines()]
    texts = [t.template.tokenizer.decode(example.rows[0].input_ids, skip_special_tokens=False) for example in replayed]
    assert len(replayed) == 4
    answers = json.loads(kept.path(t.folder).read_text())["answers"]
    for text, example in zip(texts, replayed, strict=True):
        [prompt] = [p for p in (t.template.render([data_message(m) for m in each], None, True) for each in asked)
                    if text.startswith(p)]  # fmt: skip
        [row] = example.rows
        learned = [label for label in row.labels if label != data.IGNORED]
        assert t.template.tokenizer.decode(learned, skip_special_tokens=False) == text[len(prompt) :].rstrip("\n")
        assert learned[-1] in t.template.eos_ids
        assert text[len(prompt) :] in {f"{answer}<|im_end|>\n" for answer in answers}


def data_message(message: dict[str, str]) -> Any:
    from tunery.rows.messages import Message

    return Message.model_validate(message)


@pytest.mark.usefixtures("few")
def test_answers_are_the_bases_whatever_adapter_the_run_goes_on_from(base: Path, tmp_path: Path) -> None:
    adapter = tiny_models.lora(tmp_path / "adapter", base)
    settled = plan(technique=Lora(r=4, alpha=8), replay=REPLAY, max_seq_length=256)
    fresh, going_on = (lay_out(tmp_path / name, base, settled, ROWS) for name in ("fresh", "resuming"))
    (going_on / "adapter").symlink_to(adapter)
    found = [prepare(folder, MessageWriter(None), StopSignal()).rows.examples for folder in (fresh, going_on)]
    assert found[0] == found[1]


@pytest.mark.usefixtures("few")
def test_sampling_draws_none_of_the_runs_numbers(base: Path, tmp_path: Path) -> None:
    adapters = []
    for name, replay in (("with", REPLAY), ("without", None)):
        t = prepare(
            lay_out(tmp_path / name, base, plan(replay=replay, max_seq_length=256), ROWS),
            MessageWriter(None),
            StopSignal(),
        )
        adapters.append(t.parameters)
        numbers = torch.rand(1)
    again = torch.rand(1)
    assert numbers != again
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])


@pytest.mark.usefixtures("few")
def test_answers_whose_rows_do_not_fit_are_made_up_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, refused = ChatTemplate.encode_all, []

    def encode(template: ChatTemplate, example: Any, *given: Any) -> Any:
        if "last_assistant" in given and len(refused) < 3:
            refused.append(example)
            raise CannotRender(reason="the template refuses it")
        return usual(template, example, *given)

    monkeypatch.setattr(ChatTemplate, "encode_all", encode)
    t = prepare(
        lay_out(tmp_path / "run", base, plan(replay=REPLAY, max_seq_length=256), ROWS),
        MessageWriter(None),
        StopSignal(),
    )
    assert len(refused) == 3
    assert t.replayed is not None
    assert (t.replayed.rows_an_epoch, t.rows.replayed) == (4, 4)
    assert t.replayed.ended >= 7


def test_an_answer_that_the_limit_cuts_off_is_not_used(base: Path) -> None:
    template = ChatTemplate.load(base)
    [stop] = template.eos_ids
    assert own._ended(template, [70, 71, stop, 0]) == template.answer_text([70, 71])
    assert own._ended(template, [70, 71]) is None
    assert own._ended(template, [stop, stop]) is None, "it says nothing"


@pytest.mark.usefixtures("few")
def test_the_host_answers_once_and_more_only_where_more_is_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, blocks, usual = tmp_path / "scores", [], own._block
    scores.mkdir()

    def block(*given: Any, seed: int) -> Any:
        blocks.append(seed)
        return usual(*given, seed=seed)

    monkeypatch.setattr(own, "_block", block)

    def answers(name: str, share: float, **changes: Any) -> list[Example]:
        replay = REPLAY.model_copy(update={"share": share} | changes)
        folder = lay_out(tmp_path / name, base, plan(replay=replay, max_seq_length=256), ROWS)
        (folder / "scores").symlink_to(scores)
        rows = prepare(folder, MessageWriter(None), StopSignal()).rows
        return rows.examples[rows.count :]

    few_rows = answers("first", 0.1)
    assert blocks == [0]
    assert answers("second", 0.1) == few_rows
    assert blocks == [0]
    more = answers("third", 0.5)
    assert blocks[:2] == [0, 16]
    assert more[:1] == few_rows
    before = len(blocks)
    answers("fourth", 0.1, max_new_tokens=65)
    assert len(blocks) == before + 1


@pytest.mark.usefixtures("few")
def test_too_few_answers_are_said_and_none_is_taken_twice(base: Path, tmp_path: Path) -> None:
    replay = Replay(share=0.5, max_new_tokens=16)
    rows = [chat(i) for i in range(60)]
    started = trained(lay_out(tmp_path / "run", base, plan(replay=replay, max_seq_length=256), rows))
    assert started.replay.prompts == 48
    assert 0 < started.replay.rows_an_epoch == started.replay.rows <= started.replay.ended < 48
    [warning] = [text for text in started.warnings if text.startswith("Replay is ")]
    assert f"the base completed {started.replay.ended} of 48 answers" in warning


def test_a_users_file_is_replayed_as_it_is(base: Path, tmp_path: Path) -> None:
    general = [chat(100 + i) for i in range(6)]
    replay = Replay(share=0.2, source="file-general")
    folder = lay_out(tmp_path / "run", base, plan(replay=replay), ROWS)
    (folder / "data" / "replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    started = trained(folder)
    assert started.replay.model_dump() | {"share": 0} == {
        "source": "file-general", "prompts": 6, "ended": 6, "rows": 2, "rows_an_epoch": 2, "share": 0,
    }  # fmt: skip
    assert started.warnings == []


def test_a_file_with_too_few_rows_is_told_what_helps(base: Path, tmp_path: Path) -> None:
    """No setting of the base's own answers changes a file."""
    replay = Replay(share=0.5, source="file-general")
    folder = lay_out(tmp_path / "run", base, plan(replay=replay), ROWS)
    (folder / "data" / "replay.jsonl").write_text("".join(json.dumps(chat(100 + i)) + "\n" for i in range(2)))
    [warning] = trained(folder).warnings
    assert "the replay file gives 2 rows, and an epoch uses each at most once" in warning
    assert warning.endswith("Lower replay.share, or add rows to the file.")


@pytest.mark.usefixtures("few")
def test_a_run_goes_on_with_the_same_rows_though_its_host_would_answer_otherwise(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = plan(replay=REPLAY, n_epochs=2, max_seq_length=256)
    whole, broken = (
        lay_out(tmp_path / name, base, settled, ROWS, snapshot_seconds=1e-9) for name in ("whole", "broken")
    )
    assert carry_out(whole, MessageWriter(None), StopSignal())
    with pytest.raises(ConnectionError):
        carry_out(broken, Interrupting(2), StopSignal())
    elsewhere = lay_out(tmp_path / "elsewhere", base, settled, ROWS)
    (elsewhere / "resume").symlink_to(broken / "snapshots" / "step-1")
    monkeypatch.setattr(own, "_block", lambda *_given, **_options: pytest.fail("they are in the snapshot"))
    assert carry_out(elsewhere, MessageWriter(None), StopSignal())
    assert steps_of(whole) == steps_of(elsewhere)
    name = "adapter_model.safetensors"
    assert (whole / "out" / name).read_bytes() == (elsewhere / "out" / name).read_bytes()


@pytest.mark.usefixtures("few")
def test_a_stop_between_blocks_keeps_what_was_answered(base: Path, tmp_path: Path) -> None:
    stop_signal = StopSignal()

    class Stopping(MessageWriter):
        def write(self, message: Any) -> None:
            stop_signal.received = stop_signal.received or getattr(message, "phase", "") == "sampling replay answers"

    replay = Replay(share=0.5, max_new_tokens=16)
    folder = lay_out(tmp_path / "run", base, plan(replay=replay, max_seq_length=256), [chat(i) for i in range(60)])
    with pytest.raises(Stopped):
        prepare(folder, Stopping(None), stop_signal)
    assert len(json.loads(kept.path(folder).read_text())["answers"]) == own.BLOCK["cpu"]
