"""The table of models' files, with which listing and downloading need no query to the storage."""

from collections.abc import Iterable, Sequence

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.db import Base
from tunery.models.model import Model


class Artifact(Base):
    """One file of a model. `path` is its name inside the model's folder, `key` that of its bytes in storage."""

    __tablename__ = "artifacts"
    __table_args__ = (
        UniqueConstraint("model_id", "path"),
        CheckConstraint("bytes >= 0", name="bytes"),
        CheckConstraint("length(sha256) = 64", name="sha256"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    path: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str]


def record(session: Session, model: Model, manifest: Manifest) -> list[Artifact]:
    """Adds a row for each file of the manifest. Call it once, in the transaction that publishes the model."""
    rows = [
        Artifact(model_id=model.id, path=f.path, bytes=f.bytes, sha256=f.sha256, key=f"{model.prefix}/{f.path}")
        for f in manifest.files
    ]
    session.add_all(rows)
    session.flush()
    return rows


def add(session: Session, model: Model, files: Iterable[ManifestFile]) -> None:
    """Adds files to a published model, replacing those with the same path."""
    listed = tuple(files)
    session.execute(delete(Artifact).where(Artifact.model_id == model.id, Artifact.path.in_(f.path for f in listed)))
    record(session, model, Manifest(files=listed))


def list_for(session: Session, model_id: str) -> Sequence[Artifact]:
    """Returns a model's files by path. The caller has already found the model in its project."""
    return session.scalars(select(Artifact).where(Artifact.model_id == model_id).order_by(Artifact.path)).all()
