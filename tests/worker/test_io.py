"""The work of the I/O worker: it checks files, validates jobs, converts bases and sweeps."""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_models
from run_folders import chat
from sqlalchemy import select, update
from workshop import MODEL_INFO, Workshop, training_rows

from tunery import db
from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.datasets import rules
from tunery.datasets.model import File, Upload
from tunery.failures import InvalidTrainingFile
from tunery.jobs import leases, ledger
from tunery.jobs.model import Attempt, HostDevice, Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models import exports, registry
from tunery.models.model import Model
from tunery.planning.precision import decide
from tunery.spec import Export, Lora
from tunery.storage import Directory
from tunery.storage.errors import StorageFailed
from worker.io import checks, conversion, files, validation, verdicts
from worker.io import exports as io_exports
from worker.io.checks import Case, Findings
from worker.io.claims import advisory_lock
from worker.io.sweeper import Sweeper
from worker.supervisor.drain import Drain

TERSE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)


def _validate(workshop: Workshop) -> bool:
    return validation.validate_next(workshop.settings, workshop.storage)


def test_a_file_with_a_broken_line_ends_in_error_and_its_job_fails_before_a_gpu_is_held(workshop: Workshop) -> None:
    file_id = workshop.file(training_rows(11) + b'{"messages": \n', checked=False)
    job_id = workshop.submit(file_id)
    assert not _validate(workshop), "the job waits for its file"
    assert files.process_next(workshop.storage)
    assert not files.process_next(workshop.storage)
    with workshop.session() as session:
        file = session.get_one(File, file_id)
        assert file.status == "error"
        assert "Line 12" in str(file.status_details)
    assert _validate(workshop)
    job = workshop.job(job_id)
    assert (job.state, job.error_code, job.error_param) == ("failed", "invalid_training_file", "training_file")
    assert "Line 12" in str(job.error_message)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (training_rows(9), "invalid_n_examples", "Training file has 9 example(s)"),
        (training_rows(10) + b'{"messages": [{"role": "wizard", "content": "x"}]}\n', "invalid_training_file", "11"),
        (
            training_rows(10) + training_rows(1).replace(b"{", b'{"label": false, ', 1),
            "invalid_training_file",
            "Example 11 has the key 'label', which marks the answer as good or bad",
        ),
    ],
)
def test_faults_of_content_fail_the_job_and_name_the_line(
    workshop: Workshop, content: bytes, code: str, words: str
) -> None:
    job_id = workshop.submit(workshop.file(content))
    assert _validate(workshop)
    job = workshop.job(job_id)
    assert (job.state, job.error_code) == ("failed", code)
    assert words in str(job.error_message)


def test_a_good_job_is_planned_and_queued_once(workshop: Workshop) -> None:
    training = workshop.file(training_rows(12))
    held_out = workshop.file(training_rows(1, first=3) + training_rows(1, first=50))
    job_id = workshop.submit(training, held_out, technique=None, hyperparameters={}, resources={"gpus": 2})
    with workshop.session() as session:
        leases.show_device(
            session, HostDevice(id="h/cpu", host="h", gpu_index=None, device="CPU", memory_bytes=8 * 2**30, bf16=True)
        )
    assert _validate(workshop)
    assert not _validate(workshop)
    job = workshop.job(job_id)
    assert job.state == "queued"
    assert job.plan is not None
    plan = (job.plan["technique"]["type"], job.plan["n_epochs"], job.plan["batch_size"], job.gpus)
    assert plan == ("lora", 8, 8, 2)
    events = workshop.story(job_id)
    assert any("shares 1 example" in line for line in events)
    assert "No host here can take the job. It waits for 2 GPUs of one host; the largest worker has none." in events


@pytest.mark.parametrize(("asked", "limit", "warned"), [("auto", 18, 0), (64, 64, 0), (1, 1, 1)])
def test_answers_may_be_as_long_as_the_longest_wanted_one(
    workshop: Workshop, asked: int | str, limit: int, warned: int
) -> None:
    training, test = workshop.file(training_rows(12)), workshop.file(training_rows(2, 20))
    job_id = workshop.submit(training, test=test, evaluation={"max_new_tokens": asked})

    assert _validate(workshop)

    job, events = workshop.job(job_id), workshop.story(job_id)
    assert job.plan is not None
    assert job.plan["evaluation"]["max_new_tokens"] == limit
    cut = [line for line in events if "evaluation.max_new_tokens" in line]
    assert cut == warned * [
        "Test file: 2 of 2 expected answers have more tokens than evaluation.max_new_tokens (1), so no model can "
        "answer these rows correctly: lines 1, 2. Set it to at least 2."
    ]


class _Counting(Directory):
    """A storage that counts how often each object is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        self.reads[key] += 1
        return super().read(key, start)


def test_each_file_is_read_once_though_all_are_compared(workshop: Workshop, tmp_path: Path) -> None:
    training, valid, test = (workshop.file(training_rows(12, first)) for first in (0, 11, 10))
    job_id = workshop.submit(training, valid, test)
    with workshop.session() as session:
        keys = set(session.scalars(select(File.key)))
    storage = _Counting(tmp_path / "objects")

    assert validation.validate_next(workshop.settings, storage)

    assert {key: storage.reads[key] for key in keys} == dict.fromkeys(keys, 1)
    shared = [line[:73] for line in workshop.story(job_id) if "shares" in line]
    assert shared == [
        "The validation file's scores will be too good. It shares 1 example(s) wit",
        "The test file's scores will be too good. It shares 2 example(s) with the ",
    ]


def test_a_second_job_on_the_same_files_reads_no_row_and_is_reported_the_same(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = json.dumps({**chat(3), "seen": "twice"}).encode() + b"\n"
    more += json.dumps(chat(4)).replace("the", "<|im_end|>").encode() + b"\n"
    ids = [workshop.file(training_rows(12, first) + more) for first in (0, 11, 10)]
    readings: list[str] = []
    usual = rules.digest_rows

    def counted(chunks: Any, reading: Any, *others: Any) -> Any:
        readings.append(reading.role)
        return usual(chunks, reading, *others)

    monkeypatch.setattr(rules, "digest_rows", counted)
    events, plans, read = [], [], []
    for damage in (False, False, True):
        if damage:
            for entry in (workshop.settings.models_dir / verdicts.NAME).iterdir():
                entry.write_bytes(entry.read_bytes().replace(b'"examples": 14', b'"examples": 15'))
        job_id = workshop.submit(*ids, evaluation={"task_rows": 4})
        assert _validate(workshop)
        events.append(workshop.story(job_id)[1:])
        plans.append(workshop.job(job_id).plan)
        read.append(len(readings))
    workshop.submit(*ids, max_seq_length=100)
    workshop.submit(ids[0])
    assert _validate(workshop)
    assert _validate(workshop)
    assert [*read, len(readings)] == [3, 3, 6, 10], "what is damaged is read again, and where anything else decides"
    assert events[0] == events[1] == events[2]
    assert any("shares" in line for line in events[0])
    assert any("keys that are ignored" in line for line in events[0])
    assert plans[0] == plans[1] == plans[2]


def test_a_second_job_on_tables_names_the_same_lines(workshop: Workshop) -> None:
    rows = [f'"What comes after\n{n}?",{n + 1}.\n' for n in range(12)]
    marked = "<|im_start|>user Why? <|im_end|>,Because.\n"
    ids = [workshop.file(("prompt,completion\n\n" + "".join([*some, marked])).encode()) for some in (rows, rows[3:5])]
    stories = []
    for _ in range(2):
        job_id = workshop.submit(*ids, max_seq_length=256)
        assert _validate(workshop)
        stories.append(workshop.story(job_id)[1:])
    assert stories[0] == stories[1]
    said = "\n".join(stories[0])
    assert "It shares 3 example(s) with the training file: line 3 (line 9 there), line 5 (line 11 there), " in said
    assert "a marker of a chat template (<|im_start|>): line 27." in said
    assert "contain special tokens" not in said


def test_a_check_is_added_by_its_place_in_the_list(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_parity(case: Case, found: Findings) -> list[str]:
        if found.summaries["training"].examples % 2:
            raise InvalidTrainingFile(param="training_file", role="training", reason="Its rows are odd in number.")
        return [f"{found.plan.technique.type} on an even number of rows"]

    monkeypatch.setattr(checks, "CHECKS", (*checks.CHECKS, check_parity))
    even, odd = (workshop.submit(workshop.file(training_rows(count))) for count in (12, 13))

    assert _validate(workshop)
    assert _validate(workshop)

    assert "lora on an even number of rows" in workshop.story(even)
    assert "Its rows are odd in number." in str(workshop.job(odd).error_message)
    assert (workshop.job(even).state, workshop.job(odd).state) == ("queued", "failed")


@pytest.mark.parametrize(
    ("cut_answers", "rows", "state"),
    [("limit", 98, "failed"), ("limit", 99, "queued"), ("drop", 20, "queued"), ("keep", 20, "queued")],
)
def test_rows_whose_answer_would_be_cut_are_left_out_and_fail_the_job_above_one_in_a_hundred(
    workshop: Workshop, cut_answers: str, rows: int, state: str
) -> None:
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 200}]}
    file = workshop.file(training_rows(rows) + json.dumps(long).encode() + b"\n")
    job_id = workshop.submit(file, cut_answers=cut_answers)
    assert _validate(workshop)
    job = workshop.job(job_id)
    assert (job.state, job.error_code) == (state, "answers_cut" if state == "failed" else None)
    events = [*workshop.story(job_id), str(job.error_message)]
    kept = ["are longer than 128 tokens and are truncated" in line for line in events]
    left_out = [f"1 of {rows + 1} examples lose part of" in line and f"line {rows + 1}." in line for line in events]
    assert (any(kept), any(left_out)) == (cut_answers == "keep", cut_answers != "keep")


def test_what_a_file_should_not_have_is_named_once_in_the_jobs_story(workshop: Workshop) -> None:
    silent = b'{"source": 1, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}\n'
    job_id = workshop.submit(workshop.file(training_rows(10) + silent * 2))

    assert _validate(workshop)

    assert workshop.job(job_id).state == "queued"
    story = workshop.story(job_id)
    [unread] = [line for line in story if "keys that are ignored" in line]
    assert unread == "Training file: The rows have keys that are ignored in training: 'source'."
    assert ["lines 11, 12" in line for line in story if "empty or blank" in line] == [True]


def test_a_model_too_large_for_every_device_fails_with_what_would_fit(workshop: Workshop) -> None:
    large = MODEL_INFO | {"params": 13_000_000_000, "hidden_size": 5120, "intermediate_size": 13824}
    large |= {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000}
    with workshop.session() as session:
        session.execute(update(Model).values(model_info=large))
        card = HostDevice(id="h/gpu0", host="h", gpu_index=0, device="RTX 4090", memory_bytes=24 * 2**30, bf16=True)
        leases.show_device(session, card)
    workshop.base_alias = "gpt-4o-mini-2024-07-18"
    refused = workshop.submit(workshop.file(training_rows(12)), technique={"type": "full"})
    chosen = workshop.submit(workshop.file(training_rows(12)), technique=None)
    assert _validate(workshop)
    assert _validate(workshop)
    job = workshop.job(refused)
    assert (job.state, job.error_code) == ("failed", "does_not_fit")
    assert "Use the technique 'qlora'" in str(job.error_message)
    assert "A full fine-tune of gpt-4o-mini-2024-07-18 (" in str(job.error_message)
    plan = workshop.job(chosen).plan
    assert plan is not None
    assert plan["technique"]["type"] == "qlora"


@pytest.fixture
def seventy(workshop: Workshop) -> None:
    """Makes the base one of 70 billion weights."""
    large = MODEL_INFO | {"params": 70_000_000_000, "hidden_size": 8192, "intermediate_size": 28672}
    large |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256}
    with workshop.session() as session:
        session.execute(update(Model).values(model_info=large))


def _show(workshop: Workshop, index: int | None, gib: int) -> None:
    name = "cpu" if index is None else f"gpu{index}"
    with workshop.session() as session:
        leases.show_device(
            session,
            HostDevice(id=f"h/{name}", host="h", gpu_index=index, device=name, memory_bytes=gib * 2**30, bf16=True),
        )


@pytest.mark.usefixtures("seventy")
def test_a_hosts_memory_is_no_measure_where_there_are_gpus(workshop: Workshop) -> None:
    job_id = workshop.submit(workshop.file(training_rows(12)))
    _show(workshop, None, 512)
    _show(workshop, 0, 24)
    assert _validate(workshop)
    job = workshop.job(job_id)
    assert (job.state, job.error_code) == ("failed", "does_not_fit")
    assert "the largest GPU here has 24.0 GiB" in str(job.error_message)


@pytest.mark.usefixtures("seventy")
def test_a_forced_job_waits_for_the_largest_device_that_there_is(workshop: Workshop) -> None:
    refused = workshop.submit(workshop.file(training_rows(12)))
    forced = workshop.submit(workshop.file(training_rows(12)), resources={"force": True})
    _show(workshop, 0, 24)
    assert _validate(workshop)
    assert _validate(workshop)
    assert workshop.job(refused).error_code == "does_not_fit"
    assert (workshop.job(forced).state, workshop.job(forced).gpu_bytes) == ("queued", 24 * 2**30)


@pytest.mark.parametrize(("r", "count", "said"), [(1, 3000, "too small"), (256, 10, "can memorise the rows")])
def test_an_adapter_is_compared_with_the_tokens_that_its_job_learns(
    workshop: Workshop, r: int, count: int, said: str
) -> None:
    """They are counted with the base's own tokenizer and template; an end token is learned with each answer."""
    job_id = workshop.submit(workshop.file(training_rows(count)), technique={"type": "lora", "r": r})
    assert _validate(workshop)
    [line] = [line for line in workshop.story(job_id) if said in line]
    answers = sum(len(str(number + 1)) for number in range(count))  # one token per byte
    found = re.search(r"the answers have about ([\d,]+) tokens", line)
    assert found is not None
    assert answers < int(found[1].replace(",", "")) <= answers + 2 * count


@pytest.mark.usefixtures("seventy")
@pytest.mark.parametrize(("index", "wanted"), [(0, (True, False)), (None, (True, True))])
def test_a_job_knows_the_memory_that_its_claim_must_bring(
    workshop: Workshop, index: int | None, wanted: tuple[bool, bool]
) -> None:
    job_id = workshop.submit(workshop.file(training_rows(12)), resources={"gpus": 2})
    _show(workshop, index, 600)
    _show(workshop, 7, 24) if index is not None else None
    assert _validate(workshop)
    job = workshop.job(job_id)
    assert (job.gpu_bytes > 140e9, (job.cpu_bytes or 0) > 280e9) == wanted
    has = "none" if index is None else "2, not all of them with that memory"
    assert any(f"the largest worker has {has}" in line for line in workshop.story(job_id))


@pytest.mark.usefixtures("seventy")
def test_a_model_that_no_gpu_holds_is_cut_over_those_that_a_job_asks_for(workshop: Workshop) -> None:
    asked: dict[str, Any] = {"technique": {"type": "lora"}}
    cut = workshop.submit(workshop.file(training_rows(12)), **asked, resources={"gpus": 2})
    copied = workshop.submit(workshop.file(training_rows(12)), **asked, resources={"gpus": 2, "sharding": "replicate"})
    _show(workshop, 0, 100)
    _show(workshop, 1, 100)
    assert _validate(workshop)
    assert _validate(workshop)
    found, refused = workshop.job(cut), workshop.job(copied)
    assert found.state == "queued"
    assert found.plan is not None
    assert found.plan["resources"] == {"gpus": 2, "sharding": "full_shard", "force": False}
    assert 70e9 < found.gpu_bytes < 100 * 2**30
    assert (refused.state, refused.error_code) == ("failed", "does_not_fit")
    assert "Set resources.gpus to 2 and resources.sharding to 'auto', which needs about " in str(refused.error_message)


def test_before_any_worker_has_come_a_job_is_reported_what_it_waits_for(workshop: Workshop) -> None:
    job_id = workshop.submit(workshop.file(training_rows(12)))
    assert _validate(workshop)
    assert workshop.job(job_id).state == "queued"
    assert any("the job waits for one with a GPU with 0.5 GiB" in line for line in workshop.story(job_id))


def test_a_lost_object_fails_its_job_and_holds_no_other_up(workshop: Workshop) -> None:
    lost = workshop.file(training_rows(12))
    first, second = workshop.submit(lost), workshop.submit(workshop.file(training_rows(12)))
    workshop.storage.delete(f"files/{lost}")
    assert _validate(workshop)
    assert _validate(workshop)
    assert (workshop.job(first).state, workshop.job(second).state) == ("failed", "queued")
    assert "is missing from storage" in str(workshop.job(first).error_message)


def test_a_spec_that_is_not_understood_any_more_fails_its_job_and_holds_no_other_up(workshop: Workshop) -> None:
    first, second = (workshop.submit(workshop.file(training_rows(12))) for _ in range(2))
    with workshop.session() as session:
        session.execute(update(Job).where(Job.id == first).values(spec={"technique": {"type": "of yore"}}))
    assert _validate(workshop)
    assert _validate(workshop)
    assert (workshop.job(first).error_code, workshop.job(second).state) == ("validation_broke", "queued")
    assert "of yore" not in str(workshop.job(first).error_message)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_job_that_ends_its_validating_worker_three_times_fails_and_holds_no_other_up(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, other = (workshop.submit(workshop.file(training_rows(12))) for _ in range(2))
    monkeypatch.setattr(validation, "_verdict", lambda *_: os._exit(9))
    for _ in range(validation.MAX_VALIDATIONS):
        pid = os.fork()
        if pid == 0:
            _forget_connections()
            _validate(workshop)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    monkeypatch.undo()
    assert _validate(workshop)
    job = workshop.job(poison)
    assert (job.state, job.error_code, job.validations) == ("failed", "validation_lost", 3)
    assert "stopped 3 times" in str(job.error_message)
    assert _validate(workshop)
    assert workshop.job(other).state == "queued"


def _forget_connections() -> None:
    db.sessions().kw["bind"].dispose(close=False)


def test_an_outage_is_not_counted_against_the_job_that_it_interrupts(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.submit(workshop.file(training_rows(12)))

    def fail(*_: object) -> None:
        raise StorageFailed(action="read", reason="out for lunch")

    monkeypatch.setattr(validation, "judge", fail)
    for _ in range(validation.MAX_VALIDATIONS + 2):
        with pytest.raises(StorageFailed):
            _validate(workshop)
    monkeypatch.undo()
    assert _validate(workshop)
    assert (workshop.job(job_id).state, workshop.job(job_id).validations) == ("queued", 1)


def test_while_one_process_validates_a_job_another_passes_it_by_and_its_owner_may_cancel(workshop: Workshop) -> None:
    job_id = workshop.submit(workshop.file(training_rows(12)))
    with advisory_lock(f"validate {job_id}") as mine:
        assert mine
        with workshop.session() as session:
            # As another process reads it, on its own connection.
            assert not _validate(workshop)
            ledger.cancel(session, workshop.project_id, job_id)
    assert not _validate(workshop)
    assert workshop.job(job_id).state == "cancelled"


def test_only_one_holds_a_claim_and_it_is_free_again_afterwards(workshop: Workshop) -> None:
    with advisory_lock("x") as first, advisory_lock("x") as second, advisory_lock("y") as other:
        assert (first, second, other) == (True, False, True)
    with advisory_lock("x") as again:
        assert again


@pytest.mark.slow
def test_a_registered_base_is_converted_published_and_kept_as_this_hosts_copy(
    workshop: Workshop, tiny_base: Path
) -> None:
    with workshop.session() as session:
        registry.register_base(session, name="mine", source=str(tiny_base))
        registry.register_base(session, name="nothing", source=str(tiny_base / "absent"))
        registry.register_base(session, name="terse", source=str(tiny_base), chat_template=TERSE)
    drain = Drain()
    while conversion.convert_next(workshop.settings, workshop.storage, drain):
        pass
    with workshop.session() as session:
        good, bad = session.get_one(Model, "mine"), session.get_one(Model, "nothing")
    assert (good.status, bad.status) == ("ready", "error"), good.status_details
    assert "cannot be used as a base model" in str(bad.status_details)
    with workshop.session() as session:
        terse = session.get_one(Model, "terse")
    assert terse.status == "ready", terse.status_details
    assert terse.model_info["chat_template_sha256"] == hashlib.sha256(TERSE.encode()).hexdigest()
    assert good.model_info["hidden_size"] == 32
    kept = workshop.settings.models_dir / str(good.manifest_sha256)
    assert (kept / "model.safetensors").stat().st_size == workshop.storage.stat(f"{good.prefix}/model.safetensors")
    assert [path.name for path in workshop.settings.models_dir.glob(".converting-*")] == []


def stored(workshop: Workshop, folder: Path, prefix: str) -> dict[str, Any]:
    """Stores the folder's files; returns the columns of a model that has them."""
    listed, sha256 = manifest.publish(workshop.storage, prefix, folder)
    return {"prefix": prefix, "manifest": listed.model_dump(mode="json"), "manifest_sha256": sha256}


def tuned_model(workshop: Workshop, base: Path, folder: Path) -> str:
    """Creates the adapter of a succeeded job; returns its id."""
    tiny_models.lora(folder, base)
    precision = {"precision": dataclasses.asdict(decide(Lora(), "cpu"))}
    (folder / "training_config.json").write_text(json.dumps(precision))
    content = b"".join(json.dumps(chat(i, words=6)).encode() + b"\n" for i in range(8))
    file_id = workshop.file(content)
    with workshop.session() as session:
        served = rows.base(session, **stored(workshop, base, "models/base"))
        owner = session.get_one(Project, session.get_one(File, file_id).project_id)
        job = rows.job(session, owner, State.SUCCEEDED, base_model=served.id, training_file=file_id)
        model = session.get_one(Model, job.tuned_model)
        for name, value in stored(workshop, folder, model.prefix).items():
            setattr(model, name, value)
        return model.id


@pytest.mark.slow
def test_model_is_exported_by_a_process_and_its_files_are_added(workshop: Workshop, tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "tied", bf16=True, never_said=tuple(range(6, 260)))
    name = tuned_model(workshop, base, tmp_path / "adapter")
    with workshop.session() as session:
        exports.ask(session, session.get_one(Model, name), Export(merged=True, gguf=["f16"]))

    assert io_exports.export_next(workshop.settings, workshop.storage, Drain())

    assert not io_exports.export_next(workshop.settings, workshop.storage, Drain())
    with workshop.session() as session:
        model = session.get_one(Model, name)
        found = {file.path: file for file in artifacts.list_for(session, name)}
    assert model.export is not None
    assert [(each["path"], each["is_refused"]) for each in model.export["results"]] == [
        ("merged", False),
        ("gguf/model-f16.gguf", False),
    ], model.export
    assert (model.export["status"], model.export["error"]) == ("succeeded", None)
    assert {"merged/model.safetensors", "merged/merge.json", "gguf/model-f16.gguf", "gguf/Modelfile"} <= found.keys()
    merged = found["merged/model.safetensors"]
    assert workshop.storage.stat(merged.key) == merged.bytes
    assert not list(workshop.settings.models_dir.glob(".exporting-*"))


def test_export_that_breaks_says_why(workshop: Workshop, tiny_base: Path, tmp_path: Path) -> None:
    name = tuned_model(workshop, tiny_base, tmp_path / "adapter")
    with workshop.session() as session:
        model = session.get_one(Model, name)
        exports.ask(session, model, Export(merged=True))
        session.get_one(Model, model.base_id).manifest_sha256 = "5" * 64

    assert io_exports.export_next(workshop.settings, workshop.storage, Drain())

    with workshop.session() as session:
        asked = session.get_one(Model, name).export
    assert asked is not None
    assert asked["status"] == "failed"
    assert asked["error"].startswith("It could not be exported: ")


def test_the_sweeper_pardons_once_and_then_ends_expired_leases(workshop: Workshop) -> None:
    with workshop.session() as session:
        job = rows.job(session, state=State.QUEUED)
        assert rows.claim(session)
        session.execute(update(Attempt).values(lease_until=rows.LONG_AGO))
    sweeper = Sweeper(workshop.settings, workshop.storage)
    sweeper.round()
    assert workshop.job(job.id).state == "running", "the living may speak first"
    with workshop.session() as session:
        session.execute(update(Attempt).values(lease_until=rows.LONG_AGO))
    with advisory_lock("sweep"):
        sweeper.round()
    assert workshop.job(job.id).state == "running", "another process sweeps"
    sweeper.round()
    assert workshop.job(job.id).state == "queued"
    assert workshop.attempts(job.id)[0].outcome == "lost"


def _store(workshop: Workshop, *keys: str) -> list[str]:
    for key in keys:
        workshop.storage.put(key, b"{}")
    return sorted(keys)


def test_of_an_ended_job_only_what_a_row_names_and_its_log_stay(workshop: Workshop) -> None:
    with workshop.session() as session:
        job = rows.job(session, state=State.SUCCEEDED)
        deleted, checkpoint = rows.tuned(session, job), rows.tuned(session, job)
        deleted.prefix, checkpoint.prefix = f"jobs/{job.id}/2/model", f"jobs/{job.id}/1/checkpoints/step-5"
        registry.delete(session, deleted)
        job.snapshot = f"jobs/{job.id}/2/snapshots/step-9@{'0' * 64}"
    at = f"jobs/{job.id}"
    named = _store(
        workshop,
        *(f"{at}/{folder}/{name}" for folder in ("1/model", "2/model", "1/checkpoints/step-5") for name in "ab"),
        f"{at}/1/model/manifest.json",
        f"{at}/logs/000001-000000",
        f"jobs/{job.id}x/1/model/a",
        f"files/{job.id}",
    )
    _store(
        workshop,
        f"{at}/1/checkpoints/step-50/a",
        f"{at}/1/checkpoints/step-50/manifest.json",
        f"{at}/1/model-half/a",
        f"{at}/2/snapshots/step-9/state.json",
        f"{at}/1/snapshots/step-5/state.json",
        f"{at}/3/model/a",
    )
    Sweeper(workshop.settings, workshop.storage).round()
    left = [key for key in workshop.storage.list("") if not key.startswith("models/")]
    assert sorted(left) == named
    assert (workshop.job(job.id).snapshot, workshop.job(job.id).storage_cleaned) == (None, True)


def test_nothing_is_tidied_away_before_a_jobs_end_or_under_a_living_attempt(workshop: Workshop) -> None:
    with workshop.session() as session:
        cancelled = rows.job(session, state=State.QUEUED)
        lease = rows.claim(session)
        assert lease
        ledger.cancel(session, cancelled.project_id, cancelled.id)
        others = [rows.job(session, state=state) for state in (State.PAUSED, State.QUEUED, State.VALIDATING)]
    kept = _store(workshop, *(f"jobs/{job.id}/1/snapshots/step-5/state.json" for job in (cancelled, *others)))
    sweeper = Sweeper(workshop.settings, workshop.storage)
    sweeper.round()
    assert sorted(workshop.storage.list("jobs/")) == kept
    assert workshop.job(cancelled.id).actual is None
    with workshop.session() as session:
        leases.end_attempt(session, lease, "dropped")
    sweeper.round()
    assert sorted(workshop.storage.list("jobs/")) == [key for key in kept if cancelled.id not in key]
    found = workshop.job(cancelled.id).actual
    assert found is not None
    assert (found["device"], found["of_quoted"]) == ("CPU", None)


class _NoDelete(Directory):
    """A storage that cannot delete anything."""

    def delete(self, key: str) -> None:
        raise StorageFailed(action="delete", reason="for the test")


def test_storage_that_fails_puts_off_one_step_and_no_other(workshop: Workshop, tmp_path: Path) -> None:
    with workshop.session() as session:
        ended, live = rows.job(session, state=State.CANCELLED), rows.job(session, state=State.QUEUED)
        values = {"project_id": ended.project_id, "purpose": "fine-tune", "filename": "x", "mime_type": "text/plain"}
        session.add(Upload(id="upload_old", bytes=1, expires_at=rows.LONG_AGO, **values))
    _store(workshop, f"jobs/{ended.id}/1/model/a")
    Sweeper(workshop.settings, _NoDelete(tmp_path / "objects")).round()
    assert not workshop.job(ended.id).storage_cleaned
    assert live.state == "queued"
    with workshop.session() as session:
        assert session.get_one(Upload, "upload_old").status == "expired"
    Sweeper(workshop.settings, workshop.storage).round()
    assert workshop.job(ended.id).storage_cleaned
