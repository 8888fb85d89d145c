"""Usage by day and model, read through the official client."""

from datetime import UTC, date, datetime, time
from typing import Any

import pytest
from cloned_databases import Database
from openai import OpenAI
from teams import Team

from tunery.traffic.model import ModelUsage


def unix(day: date) -> int:
    return int(datetime.combine(day, time(), UTC).timestamp())


@pytest.fixture
def client(team: Team, database: Database) -> OpenAI:
    """A client of a team that used two models on the first day of a month, and one on the third."""
    with database.sessions.begin() as session:
        for day, model, requests in ((1, "a", 1), (1, "b", 2), (3, "a", 4)):
            used = {"requests": requests, "prompt_tokens": 10 * requests, "completion_tokens": 5 * requests}
            session.add(ModelUsage(project_id=team.id, model_id=model, day=date(2026, 3, day), **used))
    return team.openai(strict=True, admin_api_key=team.key)


def ask(client: OpenAI, **options: Any) -> Any:
    return client.admin.organization.usage.completions(start_time=unix(date(2026, 3, 1)) + 3600, **options)


def test_days_are_buckets(client: OpenAI) -> None:
    found = ask(client, end_time=unix(date(2026, 3, 4)))
    assert [(bucket.start_time, bucket.end_time) for bucket in found.data] == [
        (unix(date(2026, 3, day)), unix(date(2026, 3, day + 1))) for day in (1, 2, 3)
    ]
    [first], second, [third] = (bucket.results for bucket in found.data)
    assert (first.input_tokens, first.output_tokens, first.num_model_requests, first.model) == (30, 15, 3, None)
    assert second == []
    assert third.num_model_requests == 4
    assert not found.has_more


def test_groups_and_filters(client: OpenAI, team: Team) -> None:
    end = unix(date(2026, 3, 2))
    [bucket] = ask(client, end_time=end, group_by=["model", "project_id"]).data
    assert [(one.model, one.project_id, one.num_model_requests) for one in bucket.results] == [
        ("a", team.id, 1),
        ("b", team.id, 2),
    ]
    [bucket] = ask(client, end_time=end, models=["b"]).data
    assert bucket.results[0].num_model_requests == 2
    [bucket] = ask(client, end_time=end, project_ids=["proj_other"]).data
    assert bucket.results == []


def test_pages(client: OpenAI) -> None:
    seen, page = [], {}
    while True:
        found = ask(client, end_time=unix(date(2026, 3, 4)), limit=2, **page)
        seen += [bucket.start_time for bucket in found.data]
        if not found.has_more:
            break
        page = {"page": found.next_page}
    assert seen == [unix(date(2026, 3, day)) for day in (1, 2, 3)]


def test_another_project_sees_nothing_of_it(client: OpenAI, make_team: Any) -> None:
    other = make_team("beta")
    found = ask(other.openai(admin_api_key=other.key), end_time=unix(date(2026, 3, 4)))
    assert [bucket.results for bucket in found.data] == [[], [], []]


@pytest.mark.parametrize(
    "query", ["", "?start_time=x", "?start_time=1&page=x", "?start_time=1&bucket_width=1m", "?start_time=999999999999"]
)
def test_wrong_queries(team: Team, query: str) -> None:
    answer = team.http.get(f"/v1/organization/usage/completions{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
