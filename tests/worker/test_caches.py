"""A host's cached data of a file is removed with the file."""

from datetime import timedelta
from pathlib import Path

from sqlalchemy import func
from workshop import Workshop, training_rows

from tunery.datasets.model import File
from tunery.rows.encoding import CHATS
from tunery.rows.template import ChatTemplate
from worker import caches
from worker.io import validation
from worker.supervisor import staging
from worker.trainer import prepared


def test_what_a_host_keeps_of_a_file_goes_when_no_project_has_it(workshop: Workshop, tiny_base: Path) -> None:
    """The data of a deleted and of an expired file goes; that of a deleted file stays if another has its content."""
    models_dir, template = workshop.settings.models_dir, ChatTemplate.load(tiny_base)
    (models_dir / staging.PREPARED).mkdir(parents=True)
    contents = [training_rows(12), training_rows(13), training_rows(14)]
    ids = [workshop.file(content) for content in (*contents, contents[0])]
    entries = []
    for content, file_id in zip(contents, ids, strict=False):
        workshop.submit(file_id)
        assert validation.validate_next(workshop.settings, workshop.storage)
        path = workshop.settings.runs_dir / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        name = prepared.key(path, template, CHATS, "training", 128)
        assert name is not None
        entries.append(models_dir / staging.PREPARED / name)
        entries[-1].touch()
    unfinished = models_dir / staging.PREPARED / f"{prepared._PARTIAL}{name}"
    unfinished.touch()

    def kept() -> list[int]:
        caches.remove_orphans(models_dir)
        assert unfinished.exists(), "a run is writing it"
        assert len(list((models_dir / caches.FOLDERS[1]).iterdir())) == sum(entry.exists() for entry in entries)
        return [at for at, entry in enumerate(entries) if entry.exists()]

    assert kept() == [0, 1, 2]
    with workshop.session() as session:
        session.get_one(File, ids[0]).deleted_at = func.clock_timestamp()
        session.get_one(File, ids[1]).deleted_at = func.clock_timestamp()
        session.get_one(File, ids[2]).expires_at = func.clock_timestamp() - timedelta(seconds=1)
    assert kept() == [0]
    with workshop.session() as session:
        session.get_one(File, ids[3]).deleted_at = func.clock_timestamp()
    assert kept() == []
