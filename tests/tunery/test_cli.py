"""The command line against a real API: what it sends, what it prints, and what it says when something is wrong."""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from commands import Run
from sqlalchemy import select
from teams import BASE, LINE, TRAIN

from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.cli import stack as stack_commands
from tunery.jobs import leases, ledger
from tunery.jobs.model import Checkpoint, HostDevice, Job, Metric
from tunery.jobs.states import State
from tunery.keys import auth, projects
from tunery.local import demo
from tunery.local.stack import Stack
from tunery.models import registry
from tunery.models.model import Model
from tunery.spec import Gate, Resources
from tunery.storage import open_storage


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(TRAIN)
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_bytes(TRAIN.replace(b'"q"', b'"another"'))
    return path


@pytest.fixture
def base(database: Database) -> str:
    with database.sessions.begin() as session:
        return rows.base(session, BASE).id


def _job(database: Database, state: State) -> str:
    with database.sessions.begin() as session:
        return rows.job(session, projects.find_project(session, "default"), state).id


# --- options ---


@pytest.mark.parametrize("limit", ["0", "-1"])
@pytest.mark.parametrize(
    "command",
    [
        ("jobs", "list"),
        ("jobs", "events", "job"),
        ("jobs", "metrics", "job"),
        ("jobs", "scorecard", "job", "--rows"),
        ("files", "list"),
        ("webhooks", "list"),
        ("captures", "list", BASE),
    ],
)
def test_a_limit_below_1_is_refused_with_the_allowed_range(tunery: Run, command: tuple[str, ...], limit: str) -> None:
    status, out, err = tunery(*command, "--limit", limit)
    assert (status, out) == (2, "")
    assert any(range in err for range in ("greater than or equal to 1 ", "between 1 and "))


@pytest.mark.parametrize(
    "command",
    [
        ("files", "content", "file-1", "--output"),
        ("files", "report", "train.jsonl", "--html"),
        ("files", "preview", "train.jsonl", "--model", ".", "--html"),
        ("files", "clean", "train.jsonl", "--recommended", "--output"),
        ("advise", "train.jsonl", "--html"),
    ],
)
def test_a_new_file_in_a_folder_that_does_not_exist_is_refused(tunery: Run, command: tuple[str, ...]) -> None:
    status, out, err = tunery(*command, "no/new.txt")
    assert (status, out) == (2, "")
    assert "the folder no does not exist" in err
    assert "is a folder" in tunery(*command, ".")[2]


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_goes_up_is_listed_comes_back_and_goes(tunery: Run, api: str, train: Path, tmp_path: Path) -> None:
    status, out, err = tunery("files", "upload", train)
    file = out.strip()
    assert (status, file[:5]) == (0, "file-")
    assert "train.jsonl" in err
    assert file in tunery("files", "list")[1]  # not shortened, although the terminal is narrow
    assert json.loads(tunery("files", "show", file)[1])["bytes"] == len(TRAIN)
    tunery("files", "content", file, "-o", tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == TRAIN
    assert tunery("files", "delete", file, "--yes")[0] == 0
    assert json.loads(tunery("files", "list", "--json")[1]) == []


def test_a_broken_line_is_named(tunery: Run, api: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(TRAIN + b"{not json}\n")
    status, _, err = tunery("files", "upload", tmp_path / "bad.jsonl")
    assert status == 1
    assert "Line 13" in err
    assert err.count("\n") == 1


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_create_uploads_files_and_sends_every_option(
    tunery: Run, api: str, train: Path, held_out: Path, database: Database
) -> None:
    with database.sessions.begin() as session:
        rows.base(session, BASE)
    options = ["--rank", 8, "--epochs", 2, "--batch-size", 4, "--suffix", "cli", "--seed", 3, "--set", "priority=5"]
    options += ["--set", 'schedule={"type": "linear"}', "--set", "select=last", "--test", held_out]
    status, out, err = tunery("jobs", "create", "-m", BASE, "--train", train, *options)
    assert (status, err) == (0, f"Next: tunery jobs watch {out}")
    job = json.loads(tunery("jobs", "show", out.strip(), "--json")[1])
    assert job["technique"]["type"] == "lora"
    assert job["technique"]["r"] == 8
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}
    assert (job["seed"], job["user_provided_suffix"], job["priority"]) == (3, "cli", 5)
    assert job["schedule"]["type"] == "linear"
    assert job["evaluation"]["test_file"].startswith("file-")
    assert out.strip() in tunery("jobs", "list")[1]
    assert BASE in tunery("jobs", "show", out.strip())[1]


def test_create_puts_flags_under_the_method(tunery: Run, api: str, base: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(12)))
    beta = ["--set", "method.dpo.hyperparameters.beta=0.3"]
    for named in (["--method", "dpo"], ["--set", "method.type=dpo"]):
        job = _created(tunery, "--train", pairs, *named, "--epochs", 2, *beta)
        knobs = job["method"]["dpo"]["hyperparameters"]
        assert (job["method"]["type"], knobs["n_epochs"], knobs["beta"]) == ("dpo", 2, 0.3)
        assert "dpo  beta=0.3  loss=sigmoid" in tunery("jobs", "show", job["id"])[1]
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", pairs)
    assert (status, "Use the method 'dpo'" in err) == (1, True)


def _created(tunery: Run, *arguments: object) -> dict[str, Any]:
    status, out, err = tunery("jobs", "create", "-m", BASE, *arguments)
    assert status == 0, err
    job: dict[str, Any] = json.loads(tunery("jobs", "show", out.strip(), "--json")[1])
    return job


def test_create_merges_settings_with_flags(tunery: Run, api: str, base: str, train: Path, held_out: Path) -> None:
    settings = ["--set", 'evaluation={"max_rows": 7}', "--set", "evaluation.max_new_tokens=9", "--set", "technique.r=4"]
    job = _created(tunery, "--train", train, "--test", held_out, "--alpha", 8, *settings)
    assert job["evaluation"]["test_file"].startswith("file-")
    assert (job["evaluation"]["max_rows"], job["evaluation"]["max_new_tokens"]) == (7, 9)
    assert (job["technique"]["r"], job["technique"]["alpha"]) == (4, 8)


def test_create_uploads_a_file_that_a_setting_names(
    tunery: Run, api: str, base: str, train: Path, held_out: Path
) -> None:
    job = _created(tunery, "--train", train, "--set", f"evaluation.test_file={held_out}")
    assert job["evaluation"]["test_file"].startswith("file-")


def test_create_uploads_a_file_of_general_rows(tunery: Run, api: str, base: str, train: Path, held_out: Path) -> None:
    held_out.write_bytes(held_out.read_bytes() + LINE.encode())  # a row of the task among them changes no score
    status, out, err = tunery(
        "jobs", "create", "-m", BASE, "--train", train, "--set", f"replay.source={held_out}", "--json"
    )
    assert (status, "too good" in err or "shares" in err) == (0, False), err
    source = json.loads(out)["replay"]["source"]
    assert tunery("files", "content", source)[1] == held_out.read_text()
    assert _created(tunery, "--train", train, "--set", "replay.source=self")["replay"]["source"] == "self"
    assert _created(tunery, "--train", train, "--set", f"replay.source={source}")["replay"]["source"] == source


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", 8, "--set", "technique.r=4"], ["--rank", "--set technique.r=4", "'technique.r'"]),
        (["--rank", 8, "--set", "technique=full"], ["--rank", "--set technique=full", "'technique'"]),
        (["--set", "technique=full", "--set", "technique.r=4"], ["--set technique=full", "--set technique.r=4"]),
        (["--suffix", "a", "--set", "suffix=b"], ["--suffix", "--set suffix=b", "'suffix'"]),
        (["--set", "seed=1", "--set", "seed=2"], ["--set seed=1", "--set seed=2"]),
    ],
)
def test_create_refuses_values_that_contradict(
    tunery: Run, api: str, base: str, train: Path, arguments: list[object], words: list[str]
) -> None:
    status, out, err = tunery("jobs", "create", "-m", BASE, "--train", train, *arguments)
    assert (status, out) == (1, "")
    assert all(word in err for word in [*words, "contradict"])


def test_create_takes_the_same_value_twice(tunery: Run, api: str, base: str, train: Path) -> None:
    assert _created(tunery, "--train", train, "--rank", 8, "--set", "technique.r=8")["technique"]["r"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", BASE, "--test", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["-m", "SmoLM"], "'SmoLM' does not exist"),
        (["-m", "SmolM2-135M-Instruct"], f"Did you mean '{BASE}'?"),
        (["-m", BASE, "--technique", "dora"], "'technique.type' ('dora'): should be full, lora or qlora"),
        (["-m", BASE, "--epochs", -1], "n_epochs"),
        (["-m", BASE, "--set", "sufix=x"], "Did you mean 'suffix'?"),
        (["-m", BASE, "--set", "technique.rank=8"], "Did you mean 'technique.r'?"),
        (["-m", BASE, "--set", "select=best"], "Send a validation_file too"),
        (["-m", BASE, "--valid", "one.csv"], "one.csv"),
        (["-m", BASE, "--set", "packing"], "name=value"),
        (["-m", BASE, "--set", "replay.source=nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["-m", BASE, "--set", "replay.source=one.csv"], "one.csv"),
        (["-m", BASE, "--test", "train.jsonl"], "train.jsonl equals the training file"),
        (["-m", "not-ready"], "'not-ready' is processing"),
        (["-m", "no-lora", "--rank", 4], "cannot be trained with lora: because"),
    ],
)
def test_create_uploads_nothing_when_it_refuses(
    tunery: Run, api: str, base: str, database: Database, train: Path, arguments: list[object], words: str
) -> None:
    (train.parent / "one.csv").write_text("colour,size\nred,4\n")
    with database.sessions.begin() as session:
        rows.base(session, "not-ready", status="processing")
        rows.base(session, "no-lora", model_info={**rows.MODEL_INFO, "techniques": {"lora": "because"}})
    status, out, err = tunery("jobs", "create", "--train", train, *arguments)
    assert (status, out) == (1, "")
    assert words in err
    assert json.loads(tunery("files", "list", "--json")[1]) == []


def test_create_refuses_a_training_file_of_one_row(tunery: Run, api: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(LINE)
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", "one.jsonl")
    assert status == 1
    assert "one.jsonl: Training file has 1 example(s), but must have at least 10" in err
    assert json.loads(tunery("files", "list", "--json")[1]) == []


def test_create_warns_of_test_rows_that_are_trained_on(
    tunery: Run, api: str, base: str, train: Path, held_out: Path
) -> None:
    held_out.write_bytes(held_out.read_bytes() + LINE.encode())
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", train, "--test", held_out)
    assert status == 0
    assert err.startswith(
        "Warning: held-out.jsonl: It shares 1 example(s) with the training file: line 13 (line 1 there)"
    )


def test_create_compares_with_files_on_the_server_before_it_uploads(
    tunery: Run, api: str, base: str, train: Path, held_out: Path
) -> None:
    shared = "shares 1 example(s) with the training file: line 13 (line 1 there)"
    held_out.write_bytes(held_out.read_bytes() + LINE.encode())
    there, also_there = (tunery("files", "upload", path)[1].strip() for path in (train, held_out))
    for test, name in ((held_out, "held-out.jsonl"), (also_there, also_there)):
        status, _, err = tunery("jobs", "create", "-m", BASE, "--train", there, "--test", test)
        assert status == 0
        assert err.startswith(f"Warning: {name}: It {shared}")
    before = tunery("files", "list", "--json")[1]
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", there, "--test", train)
    assert status == 1
    assert "equals the training file" in err
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", "file-typo", "--test", held_out)
    assert status == 1
    assert "file-typo" in err
    assert tunery("files", "list", "--json")[1] == before


def test_create_refuses_a_file_of_another_purpose_before_it_uploads(
    tunery: Run, api: str, base: str, train: Path, held_out: Path
) -> None:
    other = tunery("files", "upload", held_out, "--purpose", "user_data")[1].strip()
    before = tunery("files", "list", "--json")[1]
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", train, "--test", other)
    assert status == 1
    assert "cannot be used: it has the purpose 'user_data', not 'fine-tune'." in err
    assert tunery("files", "list", "--json")[1] == before


def test_create_scores_on_the_training_file_when_asked_to(tunery: Run, api: str, base: str, train: Path) -> None:
    job = _created(tunery, "--train", train, "--test", train, "--set", "allow_test_on_training_file=true")
    assert job["evaluation"]["test_file"] == job["training_file"]
    assert len(json.loads(tunery("files", "list", "--json")[1])) == 1


def test_wait_ends_with_the_warnings_and_status_1_after_a_failed_validation(
    tunery: Run, api: str, base: str, train: Path, database: Database
) -> None:
    def fail() -> None:
        with database.sessions.begin() as session:
            row = session.scalars(select(Job)).one()
            ledger.note(session, row.id, "Look at line 3", level="warn")
            values = {"error_code": "invalid_training_file", "error_message": "Line 2 is wrong."}
            ledger.move(session, row, State.FAILED, message="failed", **values)

    validation = threading.Timer(2, fail)
    validation.start()
    status, _, err = tunery("jobs", "create", "-m", BASE, "--train", train, "--wait")
    validation.join()
    assert status == 1
    assert "Warning: Look at line 3" in err
    assert "failed. Line 2 is wrong." in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--train", "file-nope"], "file-nope"),
        (["--train", "file-nope", "--set", "priority"], "name=value"),
        (["--train", "file-nope", "--technique", "full", "--rank", "8"], "r"),
    ],
)
def test_a_wrong_request_says_what_to_change(
    tunery: Run, api: str, database: Database, arguments: list[str], words: str
) -> None:
    with database.sessions.begin() as session:
        rows.base(session, BASE)
    status, out, err = tunery("jobs", "create", "-m", BASE, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")
    assert words in err
    assert err.count("\n") == 1


def test_cancel_pause_and_resume(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.QUEUED)
    assert tunery("jobs", "pause", job)[1] == f"{job} is paused\n"
    assert tunery("jobs", "resume", job)[1] == f"{job} is queued\n"
    assert tunery("jobs", "cancel", job)[1] == f"{job} is cancelled\n"
    status, _, err = tunery("jobs", "pause", job)
    assert status == 1
    assert "cancelled" in err


def test_events_come_oldest_first(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    lines = tunery("jobs", "events", job)[1].splitlines()
    assert "Created fine-tuning job" in lines[0]
    assert "ended" in lines[-1]


def test_watch_ends_with_the_job(tunery: Run, api: str, database: Database) -> None:
    good, bad = _job(database, State.SUCCEEDED), _job(database, State.FAILED)
    status, out, _ = tunery("jobs", "watch", good)
    assert status == 0
    assert "✓ ft:" in out
    status, _, err = tunery("jobs", "watch", bad)
    assert status == 1
    assert "failed. for the test" in err


def test_watch_reads_every_event_once_over_many_pages(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.RUNNING)
    with database.sessions.begin() as session:
        for step in range(1, 251):
            data = {"step": step, "train_loss": 1 / step, "total_steps": 250}
            ledger.note(session, job, f"Step {step}/250", type="metrics", data=data)
        row = ledger.find(session, projects.find_project(session, "default").id, job)
        ledger.move(session, row, State.CANCELLED, message="ended")
    assert "step 250/250" in tunery("jobs", "watch", job)[1]


@pytest.mark.parametrize("command", ["download", "logs"])
@pytest.mark.parametrize(
    ("state", "words"),
    [
        (State.FAILED, "it failed. for the test"),
        (State.RUNNING, "it is running."),
        (State.CANCELLED, "it is cancelled."),
    ],
)
def test_what_a_job_has_not_made_is_an_error(
    tunery: Run, api: str, database: Database, command: str, state: State, words: str
) -> None:
    job = _job(database, state)
    status, out, err = tunery("jobs", command, job)
    assert (status, out) == (1, "")
    assert words in err
    assert f"tunery jobs {'watch' if state is State.RUNNING else 'events'} {job}" in err


def test_show_says_how_far_a_job_is(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.RUNNING)
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.phase, row.step, row.total_steps, row.progress = "training", 7, 20, {"train_loss": 1.2345}
        row.estimated_finish = datetime.now(UTC) + timedelta(seconds=100)
        ledger.note(session, job, "The test file's scores will be too good.", level="warn")
    for name in ("show", "get"):
        status, out, err = tunery("jobs", name, job)
        assert status == 0
        shown = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert (shown["phase"].strip(), shown["step"].strip(), shown["loss"].strip()) == ("training", "7/20", "1.234")
        assert "left" in shown["time"]
        assert err == (f"Warning: The test file's scores will be too good.\nNext: tunery jobs watch {job}\n")


def test_show_says_what_a_job_waits_for(tunery: Run, api: str, database: Database) -> None:
    with database.sessions.begin() as session:
        row = rows.job(session, projects.find_project(session, "default"), State.QUEUED)
        row.plan, row.gpus = rows.plan(resources=Resources(gpus=2)).model_dump(mode="json"), 2
        job = row.id
    assert "waits for" in tunery("jobs", "show", job)[1]
    assert "a training worker: none has connected" in tunery("jobs", "show", job)[1]
    with database.sessions.begin() as session:
        device = HostDevice(id="h/cpu", host="h", gpu_index=None, device="cpu", memory_bytes=2**50, bf16=True)
        leases.show_device(session, device)
    assert "2 GPUs of one host; the largest worker has none" in tunery("jobs", "show", job)[1]


def test_metrics_checkpoints_and_scorecard(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    assert "has no metrics yet" in tunery("jobs", "metrics", job)[2]
    assert "has no checkpoint yet" in tunery("jobs", "checkpoints", job)[2]
    status, _, err = tunery("jobs", "scorecard", job)
    assert status == 1
    assert "has no test file" in err
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.scorecard = card = _scorecard()
        session.add(Metric(job_id=job, step=1, values={"train_loss": 2.5, "learning_rate": 0.001}))
        session.add(Checkpoint(id="ftckpt_1", job_id=job, step=1, model_id=str(row.tuned_model), metrics={}))
        model = str(row.tuned_model)
    assert tunery("jobs", "metrics", job)[1].split() == ["STEP", "TRAIN_LOSS", "LEARNING_RATE", "1", "2.5", "0.001"]
    assert model in tunery("jobs", "checkpoints", job)[1]
    shown = json.loads(tunery("jobs", "scorecard", job)[1])
    assert {name: shown[name] for name in card} == card


def test_a_withheld_model_is_shown_and_published(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    check = {"name": "max_kl", "limit": 0.1, "value": 0.5, "low": 0.4, "high": 0.6, "status": "failed"}
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.plan = {**(row.plan or {}), "gate": Gate(max_kl=0.1).model_dump()}
        row.gate = {"status": "failed", "withheld": True, "checks": [check]}
        model = str(row.tuned_model)
        session.get_one(Model, model).withheld = True
    assert f"failed, withholds {model} (max_kl 0.1: failed, 0.500 (0.400 to 0.600))" in tunery("jobs", "show", job)[1]
    status, out, err = tunery("jobs", "watch", job)
    assert (status, model in out) == (0, False)
    assert f"The gate withholds {model}" in err
    assert "it failed the gate" in tunery("jobs", "download", job)[2]
    assert tunery("jobs", "publish", job)[0] == 2, "without a reason"

    status, out, err = tunery("jobs", "publish", job, "--reason", "we route tickets")

    assert (status, model in out + err) == (0, True)
    assert "we route tickets" in tunery("jobs", "show", job)[1]
    assert "so it cannot be published" in tunery("jobs", "publish", job, "--reason", "again")[2]


def test_names_tokens_and_paths_are_printed_as_they_are(tunery: Run, api: str, database: Database) -> None:
    name = "ft:SmolLM2-135M-Instruct:tunery:bank:x"  # to rich `:bank:` is an emoji, and `[/INST]` the end of a style
    assert f"The model '{name}' does not exist" in tunery("models", "show", name)[2]
    job = _job(database, State.SUCCEEDED)
    first = {"row": 1, "place": "prompt", "position": 2, "trained": "[/INST]", "served": "[red]", "gap": None}
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.served = {"status": "differs", "withheld": True, "rows": 1, "first_difference": first}
        session.get_one(Model, str(row.tuned_model)).withheld = True
    status, _, err = tunery("jobs", "watch", job)
    assert (status, "token 2 of the prompt: `[red]` instead of `[/INST]`." in err) == (0, True)
    file = Path("[x]:bank:.jsonl")
    file.write_bytes(TRAIN)
    assert tunery("files", "upload", file)[2].startswith("[x]:bank:.jsonl: ")


def test_show_has_the_metrics_of_the_scorecard(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    with database.sessions.begin() as session:
        session.get_one(Job, job).scorecard = _scorecard()

    lines = [" ".join(line.split()) for line in tunery("jobs", "show", job)[1].splitlines()]

    assert lines[-5:] == [
        "scorecard 2 rows, task json, judged by field_f1, scored in nf4",
        "field_f1 0.0% -> 50.0%, gain +50.0 points (+10.0 to +50.0)",
        "exact 0.0% -> 25.0%, gain +25.0 points (+10.0 to +50.0)",
        "general 49.5% -> 47.5%, change -2.0 points (-9.0 to +5.0) on 100 questions of default",
        "forgetting KL 0.120 (0.100 to 0.140) nats per token, loss 2.310 -> 2.290 on 20 general prompts",
    ]


def test_show_has_both_precisions_of_the_scorecard(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    apart = {"difference": -0.05, "difference_low": -0.1, "difference_high": 0.02, "difference_p": 0.2}
    for other, wanted in (
        (
            {"metrics": {"field_f1": {**_scorecard()["metrics"]["field_f1"], **apart}}},
            [
                "in bfloat16 0.0% -> 50.0%, gain +50.0 points (+10.0 to +50.0)",
                "difference -5.0 points (-10.0 to +2.0) for the tuned model, from its field_f1 above",
            ],
        ),
        ({"left_out": "the device has no room"}, ["unquantised not scored: the device has no room"]),
    ):
        with database.sessions.begin() as session:
            session.get_one(Job, job).scorecard = {**_scorecard(), "unquantised": {"scored_in": "bfloat16", **other}}
        lines = [" ".join(line.split()) for line in tunery("jobs", "show", job)[1].splitlines()]
        assert lines[-2 - len(wanted) : -2] == wanted


def _scorecard() -> dict[str, Any]:
    """A stored scorecard of a task in JSON."""
    measured = {"base": 0.0, "low": 0.1, "high": 0.5, "p": 0.01}
    exact, f1 = ({**measured, "tuned": gain, "gain": gain} for gain in (0.25, 0.5))
    moved = {"prompts": 20, "tokens": 900, "kl": 0.12, "kl_low": 0.1, "kl_high": 0.14, "base_nll": 2.31,
             "tuned_nll": 2.29, "nll_change": -0.02, "nll_change_low": -0.03, "nll_change_high": -0.01}  # fmt: skip
    general = {"benchmark": "default", "items": 100, "base_accuracy": 0.495, "tuned_accuracy": 0.475, "change": -0.02,
               "change_low": -0.09, "change_high": 0.05, "p": 0.5, "base_accuracy_norm": 0.5,
               "tuned_accuracy_norm": 0.5, "forgetting": moved}  # fmt: skip
    return {"rows": 2, "base_exact": 0.0, "tuned_exact": 0.25, "gain": 0.25, "gain_low": 0.1, "gain_high": 0.5,
            "scored_in": "nf4", "task": "json", "primary": "field_f1", "metrics": {"exact": exact, "field_f1": f1},
            "general": general}  # fmt: skip


def test_rows_of_a_scorecard(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    assert "No such row." in tunery("jobs", "scorecard", job, "--rows")[2]
    asked = [{"role": "user", "content": "Where is it?"}]
    lines = [
        {"messages": asked, "wanted": "card", "base": "", "tuned": tuned, "base_right": False, "tuned_right": right}
        for tuned, right in (("card", True), ("pin", False))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with database.sessions.begin() as session:
        model = session.get_one(Model, str(session.get_one(Job, job).tuned_model))
        open_storage(database.settings).put(f"{model.prefix}/answers.jsonl", content)
        listed = ManifestFile(path="answers.jsonl", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        artifacts.record(session, model, Manifest(files=(listed,)))

    shown = [line.split() for line in tunery("jobs", "scorecard", job, "--rows")[1].splitlines()]

    assert shown[:2] == [["1", "Where", "is", "it?"], ["expected", "card"]]
    assert shown[2:4] == [["✗", "base", "(nothing)"], ["✓", "tuned", "card"]]
    assert shown[4][0] == "2"
    for flags, numbers in ((["--right"], [1]), (["--wrong"], [2]), (["--flipped"], [1]), (["--no-flipped"], [2])):
        found = json.loads(tunery("jobs", "scorecard", job, "--rows", *flags, "--json")[1])
        assert [row["number"] for row in found] == numbers


def test_logs(tunery: Run, api: str, database: Database) -> None:
    job = _job(database, State.SUCCEEDED)
    open_storage(database.settings).put(f"jobs/{job}/logs/0001-000001", b"one\ntwo\n")
    assert tunery("jobs", "logs", job, "--tail", 1)[1] == "two\n"


# --- keys and projects --------------------------------------------------------------------------------------------


def test_a_project_its_keys_and_their_end(tunery: Run, database: Database) -> None:
    first = tunery("projects", "create", "web", "--max-running", 2)[1].splitlines()[-1]
    second = tunery("keys", "create", "ci", "-p", "web")[1].strip()
    with database.sessions() as session:
        assert {auth.authenticate(session, secret).project_name for secret in (first, second)} == {"web"}
    listed = tunery("keys", "list", "-p", "web")[1]
    assert second not in listed
    assert second[:10] in listed
    id = next(line.split()[0] for line in listed.splitlines() if " ci " in line)
    assert tunery("keys", "revoke", id, "--yes") == (0, f"✓ {id} revoked\n", "")
    with database.sessions() as session, pytest.raises(Exception, match="revoked"):
        auth.authenticate(session, second)
    assert tunery("projects", "revoke", "web", "--yes")[0] == 0
    with database.sessions() as session, pytest.raises(Exception, match="revoked"):
        auth.authenticate(session, first)


# --- when something is wrong --------------------------------------------------------------------------------------


def test_no_key(tunery: Run) -> None:
    status, out, err = tunery("jobs", "list")
    assert (status, out) == (1, "")
    assert "TUNERY_API_KEY" in err


def test_nobody_answers(tunery: Run) -> None:
    status, _, err = tunery("--api-url", "http://127.0.0.1:1", "--key", "tnr_x", "jobs", "list")
    assert status == 1
    assert "No answer from http://127.0.0.1:1" in err


def test_a_proxy_is_not_asked_for_this_machine(tunery: Run, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for url in (api, api.replace("127.0.0.1", "localhost")):
        assert tunery("--api-url", url, "files", "list")[0] == 0
    stack = Stack(Path("home"))
    stack.api_url, stack.first_key = api, os.environ["TUNERY_API_KEY"]
    with demo._connect(stack) as client:
        assert client.files.list().data == []


def test_a_wrong_key(tunery: Run, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_API_KEY", "tnr_wrong")
    status, _, err = tunery("jobs", "list")
    assert status == 1
    assert err.startswith("Error: The API key")


def test_no_database(tunery: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_DATABASE_URL", "postgresql+psycopg://u:secret@127.0.0.1:1/x")
    from tunery import db
    from tunery.settings import get_settings

    get_settings.cache_clear()
    db.sessions.cache_clear()
    status, _, err = tunery("keys", "list")
    assert status == 1
    assert "TUNERY_DATABASE_URL" in err
    assert "secret" not in err


def test_a_database_that_is_not_migrated(
    tunery: Run, postgres: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNERY_DATABASE_URL", postgres("postgres"))
    from tunery import db
    from tunery.settings import get_settings

    get_settings.cache_clear()
    db.sessions.cache_clear()
    status, _, err = tunery("keys", "list")
    assert status == 1
    assert "it has not been migrated (`alembic upgrade head`)" in err


def test_down_where_nothing_runs(tunery: Run) -> None:
    assert tunery("down")[:2] == (0, "No stack runs in .tunery/up.\n")


def test_home_is_inherited_by_every_command(tunery: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tunery("--home", "other", "down")[:2] == (0, "No stack runs in other.\n")
    assert tunery("down", "--home", "third")[:2] == (0, "No stack runs in third.\n")
    started: list[Path] = []
    monkeypatch.setattr(stack_commands, "up", lambda home, **_: started.append(home))
    tunery("--home", "other", "up")
    tunery("up", "--home", "third")
    assert started == [Path("other"), Path("third")]


def test_version(tunery: Run) -> None:
    assert tunery("--version")[:2] == (0, f"tunery {metadata.version('tunery')}\n")


def test_limits_of_a_project_are_created_changed_and_shown(tunery: Run, database: Database) -> None:
    def stored() -> tuple[int | None, ...]:
        with database.sessions() as session:
            found = projects.find_project(session, "research")
        return (found.max_running, found.max_queued, found.requests_per_minute, found.tokens_per_minute)

    tunery("projects", "create", "research", "--max-running", 4, "--tokens-per-minute", 1000)
    assert stored() == (4, None, None, 1000)
    shown = tunery("projects", "limit", "research", "--max-queued", 0, "--max-running", 2)[1].split("\n", 1)
    assert shown[0] == "✓ project research"
    assert " ".join(shown[1].split()) == (
        "max running 2 max queued 0 requests per minute the settings' tokens per minute 1000"
    )
    assert stored() == (2, 0, None, 1000), "what is not named stays"
    assert " 1000 " in tunery("projects", "list")[1]
    tunery("projects", "limit", "research", "--max-running", "none", "--tokens-per-minute", "None")
    assert stored() == (None, 0, None, None)
    assert "max running" in tunery("projects", "limit", "research")[1]
    assert stored() == (None, 0, None, None)
    for wrong in ("-1", "2147483648", "1" * 5000, "many", "1.5", "²"):
        status, _, err = tunery("projects", "limit", "research", "--max-queued", wrong)
        assert status == 2
        assert "give a whole number from 0 to 2147483647, or none for no limit" in " ".join(
            err.replace("│", "").split()
        )
    assert tunery("projects", "create", "other", "--max-running", "-1")[0] == 2
    assert stored() == (None, 0, None, None)


def test_deleting_asks_first(tunery: Run, api: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.sessions.begin() as session:
        registry.add_alias(session, "gpt-4o", rows.base(session, "tiny"))
        owner = projects.find_project(session, "default")
        stored = rows.file(session, owner)
        file, name = stored.id, stored.filename
        tuned = rows.job(session, owner, State.SUCCEEDED, base_model="tiny").tuned_model
    endpoint = tunery("webhooks", "create", "https://example.com/hook")[2].split()[0]
    deleting = {
        ("files", "delete", file): f"Permanently delete {name} ({file})? [y/N]:",
        ("webhooks", "delete", endpoint): f"Permanently delete https://example.com/hook ({endpoint})? [y/N]:",
        ("models", "delete", tuned, "gpt-4o"): f"Permanently delete {tuned} (tuned) and gpt-4o (alias of tiny)? [y/N]:",
        ("models", "delete", "tiny"): "Permanently delete the base tiny, which all projects share? [y/N]:",
    }
    for command, question in deleting.items():
        monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
        status, out, err = tunery(*command)
        assert (status, out.strip()) == (1, "")
        assert question in err
        assert "Error" not in err
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        status, _, err = tunery(*command)
        assert status == 1
        assert "Nothing was deleted, as nobody confirmed it. Pass --yes to skip the question." in err
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        names = command[2:]
        status, out, _ = tunery(*command)
        assert (status, out.strip().splitlines()) == (0, [f"✓ {name} deleted" for name in names])


def test_what_is_missing_is_said_before_a_question(
    tunery: Run, api: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with database.sessions.begin() as session:
        owner = projects.find_project(session, "default")
        file = rows.file(session, owner).id
        job = rows.job(session, owner, State.SUCCEEDED)
        withheld = str(job.tuned_model)
        session.get_one(Model, withheld).withheld = True
    for command in (
        ("files", "delete", file, "file-nowhere"),
        ("webhooks", "delete", "we_nowhere"),
        ("models", "delete", "nowhere"),
        ("keys", "revoke", "key_nowhere"),
        ("projects", "revoke", "nowhere"),
    ):
        status, _, err = tunery(*command)
        assert status == 1
        assert f"'{command[-1]}'" in err
        assert "ermanently" not in err
    assert tunery("files", "show", file)[0] == 0
    assert f"Permanently delete {withheld} (withheld)?" in tunery("models", "delete", withheld)[2]


def test_revoking_asks_first(tunery: Run, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tunery("projects", "create", "web")[1].splitlines()[-1]
    with database.sessions() as session:
        project = projects.find_project(session, "web")
        (key,) = auth.list_keys(session, project)
    revoking = {
        ("keys", "revoke", key.id): f"Permanently revoke the key 'first key' ({key.prefix}...) of the project web?",
        ("projects", "revoke", "web"): f"Permanently revoke all keys of the project web ({project.id})?",
    }
    for command, question in revoking.items():
        for answer in ("n\n", ""):
            monkeypatch.setattr("sys.stdin", io.StringIO(answer))
            status, out, err = tunery(*command)
            assert (status, out.strip()) == (1, "")
            assert f"{question} [y/N]:" in err
        assert "Nothing was revoked, as nobody confirmed it. Pass --yes to skip the question." in err
        with database.sessions() as session:
            assert auth.authenticate(session, secret).project_id == project.id
    for command in revoking:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        assert tunery(*command)[0] == 0
    with database.sessions() as session, pytest.raises(Exception, match="revoked"):
        auth.authenticate(session, secret)


def test_erasing_a_project_asks_first_and_says_what_it_removed(
    tunery: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    storage = open_storage(database.settings)
    with database.sessions.begin() as session:
        for name in ("doomed", "other"):
            owner = rows.project(session, name)
            file = rows.file(session, owner)
            storage.put(file.key, b"x")
            rows.job(session, owner, State.QUEUED)
    status, out, _ = tunery("projects", "erase", "doomed")
    assert status == 1, "the answer was no"
    assert "files" in out
    assert len(list(storage.list("files/"))) == 2
    status, out, err = tunery("projects", "erase", "doomed", "--yes")
    assert (status, err) == (0, "")
    assert "erased" in out
    assert "7 rows and 1 object removed" in " ".join(out.split())
    assert len(list(storage.list("files/"))) == 1
    assert "other" in tunery("projects", "list")[1]
    assert "There is no project 'doomed'" in tunery("projects", "erase", "doomed", "--yes")[2]
