"""The supervisor's side of the check of a served model: what it starts and when, and what a failing check does."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from workshop import Workshop

from tunery import processes
from tunery.jobs import ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.settings import Settings
from tunery.trainer_protocol import GREEDY, Served
from worker.io import programs
from worker.supervisor import attempt, process, served
from worker.supervisor.drain import Drain
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.process import Trainers
from worker.supervisor.run_recorder import RunRecorder

Start = Callable[..., Path]
CHECK = """
import json, os, sys, time
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
line = sys.stdin.readline() if sys.argv[1:] == ["--wait"] else json.dumps(sys.argv[1:])
if not line:
    time.sleep(600)  # the end of its worker's pipe would end the real one, too
run_dir, rows, tokens = json.loads(line)
assert (rows, tokens, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TUNERY_SLOT"]) == ("5", "6", "3", "mark")
"""
"""A check of five rows and six tokens that appends its process id to a file; it goes on as a test says."""
SAYS_EQUAL = """
with open(run_dir + "/out/served.json", "w") as file:
    json.dump({"status": "equal", "rows": 2, "equal": 2, "tokens": os.getpid()}, file)
"""
WAITS = "time.sleep(600)"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Returns a function that replaces the check, and perhaps the trainer, by scripts, and returns the run directory.

    The check's has what `CHECK` says above it.
    """

    def put(check: str, trainer: str | None = None) -> Path:
        (tmp_path / "worker" / "server").mkdir(parents=True)
        (tmp_path / "worker" / "server" / "check.py").write_text(CHECK + check)
        (tmp_path / "worker" / "trainer.py").write_text(trainer or "")
        (tmp_path / "out").mkdir()
        (tmp_path / GREEDY).touch()
        for module in (programs, process):
            monkeypatch.setattr(module, "ROOT", tmp_path)
        return tmp_path

    return put


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Returns settings for the check that the scripts expect."""
    return settings.model_copy(update={"served_check_rows": 5, "served_check_tokens": 6, "renew_seconds": 0.2})


def _keeper(settings: Settings) -> LeaseKeeper:
    return LeaseKeeper(Lease("ftjob-a", 1, 1, (3,)), settings, Drain())


def _check(run_dir: Path, settings: Settings, keeper: LeaseKeeper | None = None) -> served.Check:
    return served.Check(keeper or _keeper(settings), run_dir, settings, "mark")


def _pids(folder: Path, count: int = 1) -> list[int]:
    """Returns the ids of the checks' processes once there are so many."""
    path = folder / "pids"

    def all_there() -> bool:
        return path.exists() and path.read_text().count("\n") >= count

    assert processes.wait_until(all_there, seconds=30, alive=lambda: True)
    return [int(line) for line in path.read_text().split()]


def _ends(pid: int) -> bool:
    return processes.wait_until(lambda: not processes.is_alive(pid), seconds=20, alive=lambda: True)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_verdict_is_that_of_the_program(start: Start, settings: Settings, ahead: bool) -> None:
    run_dir = start(SAYS_EQUAL)
    with _check(run_dir, settings) as check:
        if ahead:
            check.make_ready()
            [waiting] = _pids(run_dir)
            check.make_ready()
            assert processes.is_alive(waiting)
        found = check.run()
    assert _pids(run_dir) == [found.tokens], "one process, which may have waited"
    assert found == Served(status="equal", rows=2, equal=2, tokens=found.tokens)


def test_a_process_that_ended_while_it_waited_is_replaced(start: Start, settings: Settings) -> None:
    run_dir = start(SAYS_EQUAL)
    with _check(run_dir, settings) as check:
        check.make_ready()
        [waiting] = _pids(run_dir)
        os.kill(waiting, signal.SIGKILL)
        assert _ends(waiting)
        check.make_ready()
        found = check.run()
    assert found.status == "equal"
    assert _pids(run_dir) == [waiting, found.tokens]


def test_a_process_that_cannot_be_started_is_tried_again_at_the_end(start: Start, settings: Settings) -> None:
    run_dir = start(SAYS_EQUAL)
    (run_dir / "errors.txt").mkdir()
    with _check(run_dir, settings) as check:
        check.make_ready()
        (run_dir / "errors.txt").rmdir()
        assert check.run().status == "equal"


def test_a_check_that_cannot_be_started_withholds_nothing(start: Start, settings: Settings) -> None:
    run_dir = start(SAYS_EQUAL)
    (run_dir / "errors.txt").mkdir()
    with _check(run_dir, settings) as check:
        check.make_ready()
        found = check.run()
    reason = "The check of the served model could not be started: Is a directory."
    assert found == Served(status="not_compared", reason=reason)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_check_that_breaks_withholds_nothing(start: Start, settings: Settings, ahead: bool) -> None:
    with _check(start("raise MemoryError('none left')"), settings) as check:
        if ahead:
            check.make_ready()
        found = check.run()
    assert (found.status, found.withheld) == ("not_compared", False)
    assert "MemoryError: none left" in str(found.reason)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_check_that_is_killed_is_not_explained_by_a_warning(start: Start, settings: Settings, ahead: bool) -> None:
    says = "print('FutureWarning: x is deprecated', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    run_dir = start(says)
    with _check(run_dir, settings) as check:
        if ahead:
            check.make_ready()
        found = check.run()
    assert (found.status, found.withheld) == ("not_compared", False)
    assert found.reason == (
        "The check of the served model failed: it was killed by signal 9 (the host may have run out of memory). "
        "The worker's log has the details."
    )
    assert Served.model_validate_json((run_dir / "out" / "served.json").read_bytes()) == found
    assert (run_dir / "out" / "README.md").read_text() == f"\n## Served\n\n{found.summary}\n"


@pytest.mark.parametrize(
    ("free", "why"),
    [(4096, "its worker's disk is full: ask the operator to free space there"), (2**30, "printed nothing")],
)
def test_a_check_that_cannot_even_print_names_the_full_disk(
    start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch, free: int, why: str
) -> None:
    monkeypatch.setattr(programs.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with _check(start("sys.exit(1)"), settings) as check:
        found = check.run()
    said = f"The check of the served model failed: it exited with status 1 and {why}. The worker's log has the details."
    assert (found.status, found.reason) == ("not_compared", said)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_check_that_takes_too_long_is_ended(start: Start, settings: Settings, ahead: bool) -> None:
    quick = settings.model_copy(update={"served_check_seconds": 0.1})
    with _check(start(WAITS), quick) as check:
        if ahead:
            check.make_ready()
        found = check.run()
    assert (found.status, found.withheld) == ("not_compared", False)
    assert "TUNERY_SERVED_CHECK_SECONDS" in str(found.reason)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_lost_lease_ends_the_program(
    start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    run_dir, keeper = start(WAITS), _keeper(settings)

    def lose_once_it_runs() -> None:
        if (run_dir / "pids").exists() and (run_dir / "pids").read_text():
            raise LeaseLost(job="ftjob-a", attempt=1)

    monkeypatch.setattr(keeper, "check_lost", lose_once_it_runs)
    with _check(run_dir, settings, keeper) as check:
        if ahead:
            check.make_ready()
        with pytest.raises(LeaseLost):
            check.run()
    [pid] = _pids(run_dir)
    assert _ends(pid)


@pytest.mark.parametrize(("rows", "answered", "due"), [(32, True, True), (0, True, False), (32, False, False)])
def test_it_is_due_where_rows_were_answered_and_the_operator_wants_it(
    start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch, rows: int, answered: bool, due: bool
) -> None:
    run_dir, begun = start(WAITS), list[Any]()

    def begin(*given: Any, **_: Any) -> Any:
        begun.append(given)
        return given

    monkeypatch.setattr(served, "Program", begin)
    if not answered:
        (run_dir / GREEDY).unlink()
    check = _check(run_dir, settings.model_copy(update={"served_check_rows": rows}))
    check.make_ready()
    check.make_ready()
    assert (check.is_due, len(begun)) == (due, due)


# --- in an attempt ------------------------------------------------------------------------------------------------

TRAINER = """
import json, os, pathlib, sys, time
run_dir = pathlib.Path(sys.argv[1])

def say(**message):
    print(json.dumps(message), flush=True)

(run_dir / "out").mkdir()
(run_dir / "out" / "adapter_model.safetensors").write_bytes(b"weights")
(run_dir / "out" / "results.csv").write_bytes(b"step")
(run_dir / "greedy.jsonl").touch()
say(type="phase", phase="evaluating")
late = time.monotonic() + 15
while not pathlib.Path("pids").exists():
    assert time.monotonic() < late, "nothing waits"
    time.sleep(0.05)
"""
"""A trainer that has answered rows, and ends, as a test says, once the check's process waits."""
FINISHES = 'say(type="finished", step=1, steps=1, trained_tokens=10, seconds=1)'
FAILS = 'say(type="failed", kind="user_error", code="invalid_spec", message="No."); sys.exit(65)'
CHANGES: dict[str, Callable[..., object]] = {"cancelled": ledger.cancel, "paused": ledger.pause}
PAUSES = 'say(type="paused", step=1, path=None); sys.exit(75)'


@pytest.fixture
def lease(lease: Lease) -> Lease:
    """Returns the lease with the device that the scripts expect."""
    return Lease(lease.job_id, lease.attempt_id, lease.number, (3,))


def _run(workshop: Workshop, lease: Lease, settings: Settings, drain: Drain | None = None) -> None:
    attempt.run(lease, settings=settings, storage=workshop.storage, drain=drain or Drain(), trainers=Trainers("mark"))


def test_the_process_that_waits_for_a_run_checks_it(
    workshop: Workshop, lease: Lease, start: Start, settings: Settings
) -> None:
    folder = start(SAYS_EQUAL, TRAINER + FINISHES)
    _run(workshop, lease, settings)
    job = workshop.job(lease.job_id)
    assert (job.state, job.served and job.served["status"]) == ("succeeded", "equal")
    assert _pids(folder) == [job.served and job.served["tokens"]], "it was there before the trainer ended"


@pytest.mark.parametrize(
    ("ending", "state"), [(FAILS, "failed"), ("sys.exit(1)", "queued"), (PAUSES, "queued")],
    ids=["it fails", "it crashes", "it pauses"],
)  # fmt: skip
def test_a_run_that_does_not_finish_ends_the_process_that_waits_for_it(
    workshop: Workshop, lease: Lease, start: Start, settings: Settings, ending: str, state: str
) -> None:
    folder = start(SAYS_EQUAL, TRAINER + ending)
    _run(workshop, lease, settings)
    assert workshop.job(lease.job_id).state == state
    [waiting] = _pids(folder)
    assert not processes.is_alive(waiting)


@pytest.mark.parametrize(
    ("event", "state"),
    [("cancelled", "cancelled"), ("paused", "paused"), ("drains", "queued"), ("breaks", "queued")],
)
def test_a_run_that_is_stopped_ends_the_process_that_waits_for_it(
    workshop: Workshop, lease: Lease, start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch,
    event: str, state: str,
) -> None:  # fmt: skip
    folder, drain, record = start(SAYS_EQUAL, TRAINER + WAITS), Drain(), RunRecorder.record

    def happen() -> None:
        _pids(folder)
        if event == "drains":
            drain.begin()
        if event in CHANGES:
            with workshop.session() as session:
                CHANGES[event](session, workshop.project_id, lease.job_id)

    def break_once_it_waits(recorder: RunRecorder, message: Any) -> None:
        record(recorder, message)
        if event == "breaks" and (folder / "pids").exists():
            raise ZeroDivisionError

    monkeypatch.setattr(RunRecorder, "record", break_once_it_waits)
    other = threading.Thread(target=happen)
    other.start()
    _run(workshop, lease, settings, drain)
    other.join()
    assert workshop.job(lease.job_id).state == state
    [waiting] = _pids(folder)
    assert not processes.is_alive(waiting)
