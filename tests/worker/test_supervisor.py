"""The supervisor's parts, each with real processes, pipes, PostgreSQL and directories."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fake_nvml
import pynvml
import pytest
import rows
from cloned_databases import Database
from sqlalchemy import Connection, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from workshop import Workshop

from tunery import db, dispatch, processes
from tunery import trainer_protocol as protocol
from tunery.artifacts import manifest
from tunery.artifacts.manifest import Manifest
from tunery.jobs import leases, ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.model import Attempt, Job, JobEvent
from tunery.jobs.states import State
from tunery.settings import Settings
from tunery.storage import CHUNK, Directory, Stored
from tunery.storage.errors import StorageFailed
from worker.io import programs
from worker.poller import Poller
from worker.pollers import start_pollers
from worker.supervisor import devices, staging, upload
from worker.supervisor import process as process_
from worker.supervisor.devices import Device, DriverFails
from worker.supervisor.drain import Drain
from worker.supervisor.lease import Interrupted, LeaseKeeper
from worker.supervisor.process import environment
from worker.supervisor.run_recorder import step_message
from worker.supervisor.slot import Slot
from worker.supervisor.staging import StoredFolder

SECRETS = {
    "TUNERY_DATABASE_URL": "postgresql://x",
    "TUNERY_BROKER_URL": "redis://x",
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "HF_TOKEN": "x",
    "PGPASSWORD": "x",
    "SOME_NEW_SECRET": "x",
}


def test_a_trainer_sees_no_secret_and_only_its_own_gpus() -> None:
    seen = environment((2, 5), "mark", {"PATH": "/bin", "LC_ALL": "C", "NCCL_DEBUG": "INFO", **SECRETS})
    assert seen["PATH"] == "/bin"
    assert seen["NCCL_DEBUG"] == "INFO"
    assert seen["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert SECRETS.keys().isdisjoint(seen)
    for name in ("TUNERY_PLUGINS", "TUNERY_PREPARED_FRACTION"):
        assert environment((), "mark", {name: "toy"})[name] == "toy"
    assert environment((), "mark", {})["CUDA_VISIBLE_DEVICES"] == ""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], process_.Trainer]:
    """Returns a function that starts a script of the test in place of `worker.trainer`."""

    def start(script: str) -> process_.Trainer:
        (tmp_path / "tree" / "worker").mkdir(parents=True)
        (tmp_path / "tree" / "worker" / "trainer.py").write_text(script)
        monkeypatch.setattr(process_, "ROOT", tmp_path / "tree")
        return process_.Trainer(tmp_path, (), "mark")

    return start


def test_a_log_tail_can_be_stored_whatever_they_are(stand_in: Callable[[str], process_.Trainer]) -> None:
    trainer = stand_in("import os; os.write(2, b'died of \\0 and \\xff')")
    assert trainer.wait() == 0
    assert trainer.log_tail() == "died of \ufffd and \ufffd"


BAR = "import sys, tqdm\nfor _ in tqdm.tqdm(range(3), mininterval=0): pass\n"
"""A progress bar as libraries draw it, which no setting of theirs turns off."""


def test_no_progress_bar_is_in_the_log_tail(stand_in: Callable[[str], process_.Trainer]) -> None:
    trainer = stand_in(f"{BAR}sys.stderr.write('0 %\\r50 %\\rhalf of it\\r\\nthe end')")
    assert trainer.wait() == 0
    assert trainer.log_tail() == "half of it\nthe end"


def test_a_conversion_that_breaks_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker/trainer").mkdir(parents=True)
    (tmp_path / "worker/trainer/convert.py").write_text(f"{BAR}raise ValueError('no such tensor.')")
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    reason = programs.run(["worker.trainer.convert"], tmp_path, Drain(), what="conversion")
    assert reason == "The conversion failed: ValueError: no such tensor. The worker's log has the details."


def test_a_program_that_is_not_watched_any_more_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker").mkdir()
    script = "import os, time\nopen('pid', 'w').write(f'{os.getpid()}.')\ntime.sleep(600)"
    (tmp_path / "worker/long.py").write_text(script)
    monkeypatch.setattr(programs, "ROOT", tmp_path)

    def fail_once_it_runs() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        programs.run(["worker.long"], tmp_path, Drain(), what="conversion", watch=fail_once_it_runs)
    assert not processes.is_alive(int((tmp_path / "pid").read_text()[:-1]))


def test_a_stray_line_that_cannot_be_written_down_does_not_end_the_listening(
    stand_in: Callable[[str], process_.Trainer], tmp_path: Path
) -> None:
    script = """
import os, pathlib
log = pathlib.Path(%r)
log.unlink()
log.mkdir()
os.write(1, b"stray\\n" + b'{"type": "phase", "phase": "loading"}\\n')
"""
    trainer = stand_in(script % str(tmp_path / "log.txt"))
    assert [said for said in trainer.messages(every=20) if said] == [protocol.Phase(phase="loading")]


WAITS = """
import os, pathlib, sys
assert sys.argv[1] == "--wait"
folder = pathlib.Path(sys.stdin.readline().rstrip("\\n"))
(folder / "log.txt").write_text("on GPU " + os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.fixture
def trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], process_.Trainers]:
    """Returns a function that makes a slot's trainers, one of which already waits and runs the given script."""

    def start(script: str) -> process_.Trainers:
        (tmp_path / "tree/worker").mkdir(parents=True)
        (tmp_path / "tree/worker/trainer.py").write_text(script)
        monkeypatch.setattr(process_, "ROOT", tmp_path / "tree")
        made = process_.Trainers("mark", (1,), tmp_path / "slots/waiting.log")
        made.make_ready()
        made.make_ready()
        return made

    return start


def _waiting(trainers: process_.Trainers) -> process_.Preloaded:
    assert trainers._next is not None
    return trainers._next


def test_a_run_goes_to_the_process_that_waits_for_it(
    trainers: Callable[[str], process_.Trainers], tmp_path: Path
) -> None:
    made = trainers(WAITS)
    waiting = _waiting(made)
    trainer = made.start(tmp_path, (1,))
    assert (trainer.wait(), trainer.pid, trainer.log_tail()) == (0, waiting.process.pid, "on GPU 1")
    assert made._next is None
    made.make_ready()
    assert _waiting(made) is not waiting
    _waiting(made).end()


def test_a_process_that_waits_for_other_gpus_is_ended(
    trainers: Callable[[str], process_.Trainers], tmp_path: Path
) -> None:
    made = trainers(WAITS)
    waiting = _waiting(made)
    trainer = made.start(tmp_path, (0, 2))
    assert waiting.process.returncode == -signal.SIGKILL
    assert (trainer.wait(), trainer.log_tail().splitlines()[-1]) == (1, "AssertionError")  # it got a folder
    made.make_ready()
    trainer = made.start(tmp_path, (0, 2))  # as the last job got
    assert (trainer.wait(), trainer.log_tail()) == (0, "on GPU 0,2")


def test_a_process_that_ended_while_it_waited_is_replaced(
    trainers: Callable[[str], process_.Trainers], tmp_path: Path
) -> None:
    made = trainers("import sys; sys.exit(sys.argv[1])")
    waiting = _waiting(made)
    waiting.process.wait()
    trainer = made.start(tmp_path, (1,))
    assert (trainer.wait(), trainer.log_tail()) == (1, str(tmp_path))


def test_a_runs_folder_that_was_cleared_stops_no_worker(
    trainers: Callable[[str], process_.Trainers], tmp_path: Path
) -> None:
    made = trainers(WAITS)
    (tmp_path / "slots/waiting.log").unlink()
    (tmp_path / "slots").rmdir()
    trainer = made.start(tmp_path, (1,))
    assert (trainer.wait(), trainer.log_tail()) == (0, "on GPU 1")
    made.make_ready()
    trainer = made.start(tmp_path, (1,))
    assert (trainer.wait(), trainer.log_tail()) == (0, "on GPU 1")


def test_what_breaks_the_imports_is_the_log_of_the_run(
    trainers: Callable[[str], process_.Trainers], tmp_path: Path
) -> None:
    made = trainers("import sys, time; time.sleep(1); sys.exit('no module named torch')")
    trainer = made.start(tmp_path, (1,))
    assert (trainer.wait(), trainer.log_tail()) == (1, "no module named torch")


# --- devices ------------------------------------------------------------------------------------------------------

THREE = [
    fake_nvml.gpu("GPU-aaaa"),
    fake_nvml.gpu("GPU-bbbb", processes=[7]),
    fake_nvml.gpu("GPU-cccc", "Tesla V100-SXM2-16GB", memory=16384, capability=[7, 0], mig=None),
]
"""Three GPUs, of which another program uses the second."""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that puts a fake driver library behind pynvml; its arguments are what the library knows."""
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def know(*gpus: dict[str, Any], fails: int = 0) -> None:
        fake_nvml.write(tmp_path / "driver.json", gpus, fails=fails)
        fake_nvml.install(tmp_path / "driver.json")

    return know


@pytest.fixture
def no_driver(driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the host one without the driver library."""

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(pynvml, "CDLL", load)


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_the_host_offers_its_cpu() -> None:
    (cpu,) = devices.found(None)
    assert (cpu.index, cpu.name) == (None, "CPU")
    assert cpu.memory_bytes > 2**28
    assert devices.idle_devices([cpu]) == [cpu]
    with pytest.raises(DriverFails, match="is missing"):
        devices.idle_devices([Device(0, "H200", 2**37, uuid="GPU-aaaa")])


def test_gpus_are_offered_but_for_the_servers_and_those_in_use(
    driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(*THREE)
    found = devices.found(None)
    assert [(gpu.index, gpu.bf16) for gpu in found] == [(0, True), (1, True), (2, False)]
    assert (found[0].name, found[0].memory_bytes) == ("NVIDIA H200", 143771 * 2**20)
    assert [gpu.index for gpu in devices.idle_devices(found)] == [0, 2]
    assert [gpu.index for gpu in devices.found(0)] == [1, 2]
    assert [gpu.index for gpu in devices.found(0, 1)] == [2], "one serves, and one is of the baselines"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-aaaa")
    assert [gpu.index for gpu in devices.found(None)] == [0, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.found(0) == [], "the only GPU serves: no training on the CPU by surprise"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [gpu.index for gpu in devices.found(None)] == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c89852c")
    assert devices.found(None) == [], "a part of a GPU is none, and no reason to train on the CPU"


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN, 12345]
)
def test_a_driver_that_fails_is_not_taken_for_a_host_without_gpus(
    driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    driver(*THREE, fails=code)
    with pytest.raises(DriverFails, match="Repair the driver"):
        devices.found(None)
    with pytest.raises(DriverFails):
        devices.idle_devices([Device(0, "H200", 2**37, uuid="GPU-aaaa")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [device.index for device in devices.found(None)] == [None]


def test_a_gpu_that_cannot_be_used_as_a_whole_is_left_out(
    driver: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    divided = fake_nvml.gpu("GPU-aaaa", "NVIDIA H100", mig=1)
    unknown = fake_nvml.gpu("GPU-bbbb", "NVIDIA GB10", memory=None, mig=None)
    driver(divided, unknown, fake_nvml.gpu("GPU-cccc"))
    assert [gpu.index for gpu in devices.found(None)] == [2]
    assert "GPU 0 (NVIDIA H100) is not used: it is partitioned by MIG" in caplog.text
    assert "GPU 1 (NVIDIA GB10) is not used: its driver does not report its memory" in caplog.text
    driver(divided, unknown)
    assert devices.found(None) == []


def test_a_driver_that_fails_at_the_claim_costs_nothing(
    database: Database, settings: Settings, driver: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    driver(*THREE)
    slot = Slot("train@h/0", settings, Drain(), devices.found(None))
    with database.sessions.begin() as session:
        job = rows.job(session, state=State.QUEUED)
    driver(*THREE, fails=pynvml.NVML_ERROR_GPU_IS_LOST)
    assert not slot.look()
    assert "no job is taken: the NVIDIA driver fails (GPU is lost)" in caplog.text
    with database.sessions.begin() as session:
        assert session.get_one(Job, job.id).state == "queued"


# --- the slot ---


def test_a_starting_slot_cleans_up_and_spares_a_run_that_begins_meanwhile(
    database: Database, settings: Settings
) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, state=State.QUEUED)
    dead, live = settings.runs_dir / job.id / "7" / "spec.json", settings.runs_dir / job.id / "1" / "spec.json"
    dead.parent.mkdir(parents=True)
    dead.touch()

    def begin(connection: object, cursor: object, statement: str, *_: object) -> None:
        """Claims the job as another slot of the host, just after this slot has asked which attempts are live."""
        if "FROM attempts" in statement and "attempts.number" in statement and not live.exists():
            live.parent.mkdir(parents=True)
            live.touch()
            with database.sessions.begin() as session:
                assert rows.claim(session)

    event.listen(database.engine, "after_cursor_execute", begin)
    assert not Slot("train@h/0", settings, Drain(), devices.found(None)).look()
    assert (dead.exists(), live.exists()) == (False, True)


# --- the lease ----------------------------------------------------------------------------------------------------


class _Process:
    """Records what a lease would do to a run's process."""

    def __init__(self) -> None:
        self.asked, self.killed = threading.Event(), threading.Event()

    def ask_to_stop(self) -> None:
        self.asked.set()

    def kill(self) -> None:
        self.killed.set()


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={"renew_seconds": 0.1, "stop_grace_seconds": 0.5})


@pytest.fixture
def lease(database: Database) -> leases.Lease:
    with database.sessions.begin() as session:
        rows.job(session, state=State.QUEUED)
        claimed = rows.claim(session)
    assert claimed is not None
    return claimed


def test_a_cancelled_job_kills_its_process_and_refuses_every_write(
    database: Database, lease: leases.Lease, quick: Settings
) -> None:
    process = _Process()
    with LeaseKeeper(lease, quick, Drain()) as keeper:
        keeper.watch(process)
        with database.sessions.begin() as session:
            job = leases.held(session, lease)
            ledger.cancel(session, job.project_id, job.id)
        assert process.killed.wait(20)
        assert not process.asked.is_set()
        with pytest.raises(LeaseLost):
            keeper.write(lambda session: leases.record_progress(session, lease, step=1))
        with pytest.raises(LeaseLost):
            keeper.check()


def test_a_pause_asks_first_and_kills_after_the_grace(database: Database, lease: leases.Lease, quick: Settings) -> None:
    process = _Process()
    with LeaseKeeper(lease, quick, Drain()) as keeper:
        keeper.watch(process)
        with database.sessions.begin() as session:
            job = leases.held(session, lease)
            ledger.pause(session, job.project_id, job.id)
        assert process.asked.wait(20)
        assert process.killed.wait(20)
        assert not keeper.lost


END_OURS = "SELECT pg_terminate_backend(pg_backend_pid())"
"""Makes the server end this connection, as it does when it restarts."""
SLEEP_IN_IT = "SET LOCAL idle_in_transaction_session_timeout = 1"
"""Makes the server end this connection, as it does when a client was suspended inside a transaction."""


@pytest.mark.parametrize("fault", [END_OURS, SLEEP_IN_IT])
def test_while_the_database_is_away_the_run_goes_on_and_its_write_is_done_when_it_is_back(
    database: Database, lease: leases.Lease, quick: Settings, fault: str
) -> None:
    process, tries = _Process(), 0

    def change(session: Session) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            backend = session.scalar(text("SELECT pg_backend_pid()"))
            session.execute(text(fault))
            _until_gone(database, backend)
        leases.record_progress(session, lease, step=7)
        return "done"

    with LeaseKeeper(lease, quick, Drain()) as keeper:
        keeper.watch(process)
        assert keeper.write(change) == "done"
        assert tries == 2
        assert not process.killed.is_set()
    with database.sessions.begin() as session:
        assert leases.held(session, lease).step == 7


def _until_gone(database: Database, backend: int | None) -> None:
    def is_gone() -> bool:
        with database.sessions() as other:
            query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
            return bool(other.scalar(query, {"pid": backend}) == 0)

    assert processes.wait_until(is_gone, seconds=20, alive=lambda: True)


def test_a_stop_while_the_database_is_silent_is_recorded_when_it_is_back(
    database: Database, lease: leases.Lease, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = Drain()
    drain.begin()
    reachable = db.transaction

    def silent() -> None:
        raise OperationalError("SELECT", None, ConnectionError("refused"))

    monkeypatch.setattr(db, "transaction", silent)
    with LeaseKeeper(lease, quick, drain) as keeper:
        for _ in range(2):
            with pytest.raises(OperationalError):
                keeper.write(lambda session: leases.record_progress(session, lease, step=7))
        assert keeper.stop_note.exists()
    monkeypatch.setattr(db, "transaction", reachable)

    other = quick.runs_dir / "ftjob-ended" / "3.stopped"
    other.parent.mkdir()
    other.touch()
    # The slot for which `rows.claim` claims comes back. It does not look for work, as there is a job.
    assert Slot("host/cpu", quick, Drain(), devices.found(None))._take_over()
    with database.sessions() as session:
        job = session.get_one(Job, lease.job_id)
        assert (job.losses, job.failures) == (0, 0)
        assert session.get_one(Attempt, lease.attempt_id).outcome == "preempted"
    assert list(quick.runs_dir.glob("*/*.stopped")) == []


@pytest.mark.parametrize("reached", [True, False])
def test_a_change_is_committed_once_though_the_answer_to_its_commit_was_lost(
    database: Database, lease: leases.Lease, quick: Settings, reached: bool
) -> None:
    """PostgreSQL knows whether the COMMIT reached it."""
    faults = [True]

    def cut_off(connection: Connection) -> None:
        if threading.current_thread() is threading.main_thread() and faults and faults.pop():
            if reached:
                connection.exec_driver_sql("COMMIT")
            raise OperationalError("COMMIT", None, ConnectionError("server closed the connection"))

    event.listen(database.engine, "commit", cut_off)
    with LeaseKeeper(lease, quick, Drain()) as keeper:
        answer = keeper.write(lambda session: ledger.note(session, lease.job_id, "once") or "noted")
    assert answer == "noted"
    with database.sessions() as session:
        messages = session.scalars(select(JobEvent.message).where(JobEvent.job_id == lease.job_id)).all()
    assert messages.count("once") == 1


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "objects")


def test_a_log_is_sent_in_whole_lines_and_whole_at_the_end(storage: Directory, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"first\nsec")
    with upload.LogShipper(storage, path, "jobs/j/logs/000001", every=0.02):
        sent = processes.wait_until(lambda: bool(list(storage.list("jobs/"))), seconds=20, alive=lambda: True)
        assert sent
        with path.open("ab") as file:
            file.write("ond\ndritte Zeile: ä".encode())
    parts = [b"".join(storage.read(key)) for key in sorted(storage.list("jobs/j/logs/"))]
    assert parts[0] == b"first\n"
    assert b"".join(parts) == path.read_bytes()


def test_publishing_again_after_a_lost_confirmation_is_publishing_once(storage: Directory, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    once = upload.publish(storage, "jobs/j/1/model", folder)
    assert upload.publish(storage, "jobs/j/1/model", folder) == once
    with pytest.raises(FileNotFoundError):
        upload.publish(storage, "jobs/j/1/none", tmp_path / "none")
    manifest.remove(storage, "jobs/j/1/model")
    assert list(storage.list("jobs/")) == []


def test_storage_that_fails_is_asked_again_until_somebody_gives_up() -> None:
    tries = 0

    def operation() -> Stored:
        nonlocal tries
        tries += 1
        if tries < 2:
            raise StorageFailed(action="write", reason="full")
        return Stored("k", 1, "0")

    assert upload.insist(operation, give_up=lambda: False).key == "k"
    tries = 0
    with pytest.raises(StorageFailed):
        upload.insist(operation, give_up=lambda: True)
    assert tries == 1


def test_a_base_is_fetched_once_a_host_and_used_in_place(storage: Directory, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    listed = upload.publish(storage, "models/m", source)
    found: list[Path] = []
    ask = lambda: found.append(staging.base_folder(tmp_path / "models", storage, "models/m", listed.sha256))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {tmp_path / "models" / listed.sha256}
    storage.delete("models/m/config.json")
    ask()
    assert (found[-1] / "config.json").read_text() == "{}"


def test_exports_of_a_model_stay_in_storage(storage: Directory, tmp_path: Path) -> None:
    for name in ("model.safetensors", "merged/model.safetensors", "gguf/model-f16.gguf", "merged.json"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    listed = upload.publish(storage, "models/m", tmp_path / "source")

    folder = staging.base_folder(tmp_path / "models", storage, "models/m", listed.sha256)

    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "merged.json", "model.safetensors"]


@pytest.fixture
def two_chunks(storage: Directory, tmp_path: Path) -> Manifest:
    """Stores a base whose one file comes in two chunks; returns its manifest."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(b"x" * (CHUNK + 1))
    return upload.publish(storage, "models/m", tmp_path / "source")


def test_a_fetch_of_a_base_is_broken_off_in_the_middle_of_a_file(
    storage: Directory, tmp_path: Path, two_chunks: Manifest
) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # call 1 is before the file, calls 2 and 3 are at its chunks
            raise Interrupted

    fetch = lambda: staging.base_folder(tmp_path / "models", storage, "models/m", two_chunks.sha256, check)  # noqa: E731
    with pytest.raises(Interrupted):
        fetch()
    assert list((tmp_path / "models" / two_chunks.sha256).iterdir()) == []
    assert (fetch() / "model.safetensors").stat().st_size == CHUNK + 1


def test_who_waits_for_anothers_fetch_can_be_called_off(
    storage: Directory, tmp_path: Path, two_chunks: Manifest
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        began.set()
        assert go_on.wait(20)

    def call_off() -> None:
        raise Interrupted

    fetch = lambda check: staging.base_folder(tmp_path / "models", storage, "models/m", two_chunks.sha256, check)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch, hold_up)
        assert began.wait(20)
        with pytest.raises(Interrupted):
            fetch(call_off)
        go_on.set()
        assert first.result(20).is_dir()


def test_a_snapshots_name_is_read_back() -> None:
    folder = StoredFolder("jobs/ftjob-x/3/snapshots/step-9", "ab" * 32)
    assert StoredFolder.parse(str(folder)) == folder


# --- messages and pollers--------------------------------------------------------------------------------------------


def test_a_steps_message_is_spelt_as_openai_spells_it() -> None:
    measured = {"train_loss": 0.1499, "valid_loss": 0.2657, "full_valid_loss": 0.4033}
    wanted = "Step 300/300: training loss=0.15, validation loss=0.27, full validation loss=0.40"
    assert step_message(300, 300, measured) == wanted
    assert step_message(1, 3, {}) == "Step 1/3"


def test_a_wake_up_that_finds_the_poller_busy_returns_at_once_and_is_not_lost() -> None:
    began, go_on, looks = threading.Event(), threading.Event(), []

    def look() -> bool:
        looks.append(threading.current_thread().name)
        if len(looks) == 1:
            began.set()
            assert go_on.wait(20)
        return False

    poller = Poller("test", look, poll_seconds=60, drain=Drain())
    worker = threading.Thread(target=poller.work, name="busy")
    worker.start()
    assert began.wait(20)
    poller.work()
    assert looks == ["busy"]
    go_on.set()
    worker.join(20)
    assert looks == ["busy", "busy"], "the working thread looked once more"


def test_the_sweeper_is_not_woken_by_the_wake_ups_that_it_sends(workshop: Workshop) -> None:
    """It would run in an endless loop as long as there is any work for which it sends wake-ups."""
    drain = Drain()
    drain.begin()
    pollers = start_pollers(dispatch.IO, "test", workshop.settings, drain, [])
    before_vllm = workshop.settings.model_copy(update={"server_backend": "vllm"})
    more = start_pollers(dispatch.IO, "test", before_vllm, drain, [])
    assert {poller.name for poller in more} - {poller.name for poller in pollers} == {"adapters"}
    assert {poller.name for poller in pollers if not poller.on_call} == {"sweeper", "caches"}

    looked, drain = {True: 0, False: 0}, Drain()

    def look(on_call: bool) -> bool:
        looked[on_call] += 1
        return False

    called, clocked = (
        Poller("test", partial(look, on_call), poll_seconds=60, drain=drain, on_call=on_call)
        for on_call in (True, False)
    )
    for poller in (clocked, called):
        poller.open()
    assert processes.wait_until(lambda: looked == {True: 1, False: 1}, seconds=20, alive=lambda: True)
    for poller in (clocked, called):
        poller.wake()
    assert processes.wait_until(lambda: looked[True] == 2, seconds=20, alive=lambda: True)
    assert looked[False] == 1
    drain.begin()
    called.wake()


def test_a_process_that_a_poller_started_outlives_its_drain() -> None:
    """A run may use a trainer that was made ready in another thread; Linux ends it with the thread that started it."""
    drain, started = Drain(), list[subprocess.Popen[bytes]]()

    def look() -> bool:
        if not started:
            command = [sys.executable, "-c", "input()"]
            dies = processes.dies_with_parent(signal.SIGKILL)
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=dies))
        return False

    poller = Poller("test", look, poll_seconds=0.01, drain=drain)
    poller.open()
    assert processes.wait_until(lambda: bool(started), seconds=20, alive=lambda: True)
    [process] = started
    drain.begin()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    finally:
        process.communicate(b"\n")
    assert process.returncode == 0


def test_a_fault_of_one_look_does_not_end_the_poller_and_a_drain_does(caplog: pytest.LogCaptureFixture) -> None:
    drain, looks = Drain(), 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("for the test")
        return looks < 3

    poller = Poller("test", look, poll_seconds=60, drain=drain)
    poller.work()
    assert "for the test" in caplog.text
    poller.work()
    assert looks == 3
    drain.begin()
    poller.work()
    assert looks == 3
