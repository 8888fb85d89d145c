"""Names of models: each is given once, across the tables of models and of aliases."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import rows
from cloned_databases import Database
from sqlalchemy.orm import Session

from tunery import db
from tunery.errors import InvalidValue
from tunery.models import registry
from tunery.models.model import Alias, Model


def _as_base(session: Session) -> object:
    return registry.register_base(session, name="twin", source="org/model")


def _as_alias(session: Session) -> object:
    return registry.add_alias(session, "twin", session.get_one(Model, "base"))


def _one_after_the_other(first: Callable[[Session], object], second: Callable[[Session], object]) -> None:
    """Starts the second action before the first is committed: it must wait for it, and then proceeds."""

    def go() -> object:
        with db.transaction() as session:
            return second(session)

    with ThreadPoolExecutor(1) as pool:
        with db.transaction() as session:
            first(session)
            later = pool.submit(go)
            with pytest.raises(TimeoutError):
                later.result(timeout=0.3)
        later.result()


@pytest.mark.parametrize(("first", "second"), [(_as_base, _as_base), (_as_base, _as_alias), (_as_alias, _as_base)])
def test_a_name_that_is_just_being_given_is_taken(
    database: Database, first: Callable[[Session], object], second: Callable[[Session], object]
) -> None:
    with db.transaction() as session:
        rows.base(session, "base")

    with pytest.raises(InvalidValue, match="Choose another"):
        _one_after_the_other(first, second)


def test_of_two_who_point_one_alias_the_later_wins(database: Database) -> None:
    with db.transaction() as session:
        for name in ("base", "other"):
            rows.base(session, name)

    _one_after_the_other(
        _as_alias, lambda session: registry.add_alias(session, "twin", session.get_one(Model, "other"))
    )

    with db.transaction() as session:
        assert session.get_one(Alias, "twin").model_id == "other"
