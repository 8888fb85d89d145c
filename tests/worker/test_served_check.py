"""The supervisor's side of the check of a served model: what it starts, and how it handles a check that fails."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tunery import processes
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.settings import Settings
from tunery.trainer_protocol import GREEDY, Served
from worker.io import programs
from worker.supervisor import served
from worker.supervisor.drain import Drain
from worker.supervisor.lease import LeaseKeeper

Start = Callable[[str], Path]
WAITS = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Returns a function that replaces the check by a script and returns the run directory, in which it runs."""

    def put(script: str) -> Path:
        (tmp_path / "worker" / "server").mkdir(parents=True)
        (tmp_path / "worker" / "server" / "parity.py").write_text(script)
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(programs, "ROOT", tmp_path)
        return tmp_path

    return put


def _keeper(settings: Settings) -> LeaseKeeper:
    return LeaseKeeper(Lease("ftjob-a", 1, 1, (3,)), settings, Drain())


def test_the_verdict_is_that_of_the_program(start: Start, settings: Settings) -> None:
    verdict = Served(status="equal", rows=2, equal=2).model_dump_json()
    run_dir = start(
        "import os, sys\nassert sys.argv[2:] == ['5', '6'] and os.environ['CUDA_VISIBLE_DEVICES'] == '3'\n"
        f"open(sys.argv[1] + '/out/served.json', 'w').write({verdict!r})"
    )
    quick = settings.model_copy(update={"served_check_rows": 5, "served_check_tokens": 6})
    assert served.check(_keeper(quick), run_dir, quick, "mark") == Served(status="equal", rows=2, equal=2)


def test_a_check_that_breaks_withholds_nothing(start: Start, settings: Settings) -> None:
    found = served.check(_keeper(settings), start("raise MemoryError('none left')"), settings, "mark")
    assert (found.status, found.withheld) == ("not_compared", False)
    assert "MemoryError: none left" in str(found.reason)


def test_a_check_that_takes_too_long_is_ended(start: Start, settings: Settings) -> None:
    quick = settings.model_copy(update={"served_check_seconds": 0.1})
    found = served.check(_keeper(quick), start(WAITS), quick, "mark")
    assert (found.status, found.withheld) == ("not_compared", False)
    assert "TUNERY_SERVED_CHECK_SECONDS" in str(found.reason)


def test_a_lost_lease_ends_the_program(start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, keeper = start(WAITS), _keeper(settings)

    def lose_once_it_runs() -> None:
        if (run_dir / "pid").exists() and (run_dir / "pid").read_text():
            raise LeaseLost(job="ftjob-a", attempt=1)

    monkeypatch.setattr(keeper, "check_lost", lose_once_it_runs)
    with pytest.raises(LeaseLost):
        served.check(keeper, run_dir, settings, "mark")
    pid = int((run_dir / "pid").read_text())
    assert processes.wait_until(lambda: not processes.is_alive(pid), seconds=20, alive=lambda: True)


@pytest.mark.parametrize(("rows", "answered", "due"), [(32, True, True), (0, True, False), (32, False, False)])
def test_it_is_due_where_rows_were_answered_and_the_operator_wants_it(
    tmp_path: Path, settings: Settings, rows: int, answered: bool, due: bool
) -> None:
    if answered:
        (tmp_path / GREEDY).touch()
    assert served.is_due(tmp_path, settings.model_copy(update={"served_check_rows": rows})) == due
