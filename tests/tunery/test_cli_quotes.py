"""What the command line shows of a job's quote."""

import rows
from cloned_databases import Database
from commands import Run

from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys import projects
from tunery.local.terminal import duration
from tunery.planning import prices, quote
from tunery.planning.shape import Shape
from tunery.planning.workload import Workload
from tunery.settings import Settings
from tunery.spec import Lora


def test_show_says_what_a_job_was_quoted_and_took(tunery: Run, api: str, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, projects.find_project(session, "default"), State.SUCCEEDED).id
    assert "quoted" not in tunery("jobs", "show", job)[1]
    work = Workload(Lora(), Shape.of(rows.MODEL_INFO), steps=100, tokens=10**8)
    asked = Settings(gpu_hour_prices={"H200": 3.6})
    made = quote.make(work, "NVIDIA H200", [], asked)
    assert made is not None
    assert made.cost is not None
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.quote = made.model_dump(mode="json")
        row.actual = quote.compare(made, "NVIDIA H200", 1, 90, asked).model_dump(mode="json")
    _, out, _ = tunery("jobs", "show", job)
    shown = " ".join(out.split())
    low, expected, high = (duration(value) for value in made.seconds.model_dump().values())
    assert f"quoted {expected} ({low} to {high}), 0.01 GPU hours, {prices.say(made.cost.expected)} USD (" in shown
    assert "estimated" in shown
    assert f"took 1:30, 0.03 GPU hours, 0.09 USD: {90 / made.seconds.expected:.2f} times the quote" in shown
