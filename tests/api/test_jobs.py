"""Creating jobs over the wire."""

from teams import BASE, TRAIN, Team


def test_smallest_real_path(team: Team, base: str) -> None:
    client = team.openai(strict=True)
    file = client.files.create(file=("train.jsonl", TRAIN), purpose="fine-tune")
    assert file.status == "processed"
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert job.status == "validating_files"
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert [model.id for model in client.models.list()] == [BASE]
