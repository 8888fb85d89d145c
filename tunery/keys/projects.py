"""Creates, finds and revokes projects."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import ids
from tunery.errors import InvalidValue, NotFound
from tunery.keys.model import Project


def create_project(session: Session, name: str, **caps: int | None) -> Project:
    """Creates a project. `caps`: values of its limit columns. Raises InvalidValue if a live project has the name."""
    if session.scalar(select(Project).where(Project.name == name, Project.revoked_at.is_(None))):
        raise InvalidValue(param="name", reason=f"A project named '{name}' already exists. Choose another name.")
    project = Project(id=ids.new(ids.PROJECT), name=name, **caps)
    session.add(project)
    session.flush()
    return project


def find_project(session: Session, name_or_id: str) -> Project:
    """Returns a live project by name or id. Raises NotFound."""
    project = session.scalar(
        select(Project).where((Project.name == name_or_id) | (Project.id == name_or_id), Project.revoked_at.is_(None))
    )
    if project is None:
        raise NotFound(kind="project", id=name_or_id)
    return project


def list_projects(session: Session) -> list[Project]:
    return list(session.scalars(select(Project).order_by(Project.created_at)))


def set_limits(session: Session, project: Project, **limits: int | None) -> None:
    """Sets the project's limits by their columns; None means no limit, or that of the settings for all projects."""
    for name, limit in limits.items():
        setattr(project, name, limit)
    session.flush()


def revoke_project(session: Session, project: Project) -> None:
    """Revokes all access to the project at once. Its objects stay."""
    project.revoked_at = func.now()
    session.flush()
