"""Chat templates that become expensive once a base is in use: their jobs fail, and other jobs continue."""

import shutil
import time
from pathlib import Path

import pytest
import rows
import tiny_models
from workshop import MODEL_INFO, Workshop, training_rows

from tunery.artifacts import manifest
from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows.template import ChatTemplate

HUGE = "{% set x = ('f' * 4000000) | int(base=16) %}{% set y = ('f' * 2000000) | int(base=16) %}"
COSTLY = {
    "squares": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "quotients": HUGE + "{% set z = x // y %}" * 300,
    "remainders": "{% set ns = namespace() %}" + HUGE + "{% set ns.z = x - x // y * y %}" * 300,
    "rounds": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "long rounds": "{% set s = 'ab ' * 5000000 %}{% for i in range(99999) %}{% set t = s | title %}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{% set t = range(99999) | list | sort(reverse=true) %}{% endfor %}",
    "calls": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "lists": "{% set ns = namespace(x=[]) %}{% for i in range(9) %}{% set ns.x = [ns.x, [1] * 16000000] %}{% endfor %}",
    "texts": "{% for i in range(90000) %}{{ 'x' * 9999 }}{% endfor %}",
    "indents": "{{ ('a\n' * 10 ** 6) | indent(10 ** 4) }}",
    "spaces": "{{ [[1]] | tojson(indent=10 ** 6) }}",
    "replacements": "{{ ('x' * 9999999) | replace('x', 'y' * 9999999) }}",
    "times": "{{ strftime_now('%A' * 9999999) }}",
    "filler": "{{ 'x'.zfill(10 ** 7).ljust(10 ** 7).center(10 ** 7) * 2 ~ 'x' }}" * 40,
}
"""Templates that are expensive in one row of the file, but not in the trial conversations."""


def _on_demand(costly: str) -> str:
    return "{% if messages[0].content == 'What comes after 3?' %}" + costly + "{% endif %}" + tiny_models.CHATML


@pytest.fixture
def slowest(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hostile"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(_on_demand(COSTLY["quotients"]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_row_ends_its_file_soon(name: str, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(_on_demand(COSTLY[name]))
    template = ChatTemplate.load(tmp_path / "base")
    began = time.monotonic()

    with pytest.raises(InvalidTrainingFile, match=r"Example 4: .*template"):
        check_examples([training_rows(4) + training_rows(1, first=3) * 30], template=template)

    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_the_worker_goes_on_with_other_projects_jobs(workshop: Workshop, slowest: Path) -> None:
    listed, sha256 = manifest.publish(workshop.storage, "models/hostile", slowest)
    with workshop.session() as session:
        values = {"manifest": listed.model_dump(mode="json"), "manifest_sha256": sha256, "model_info": MODEL_INFO}
        rows.base(session, "hostile", prefix="models/hostile", **values)
    good_project, good_base = workshop.project_id, workshop.base_id
    with workshop.session() as session:
        workshop.project_id, workshop.base_id = rows.project(session).id, "hostile"
    hostile = [workshop.submit(workshop.file(training_rows(40))) for _ in range(2)]
    workshop.project_id, workshop.base_id = good_project, good_base
    good = workshop.submit(workshop.file(training_rows(12)))
    workshop.start("io")

    workshop.until_state(good, "queued", seconds=120)

    for job_id in hostile:
        job = workshop.job(job_id)
        assert (job.state, job.error_code, job.validations) == ("failed", "invalid_training_file", 1)
        assert "runs too long" in str(job.error_message)
