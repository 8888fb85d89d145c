"""The database engine: what its errors say."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tunery import db


@pytest.mark.usefixtures("database")
def test_an_errors_text_holds_no_parameters() -> None:
    with pytest.raises(DBAPIError, match="division by zero") as caught, db.transaction() as session:
        session.execute(text("SELECT 1 / 0, CAST(:row AS text)"), {"row": "a customer's words"})
    assert "customer" not in str(caught.value)
