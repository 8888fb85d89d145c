"""Fine-tunes through the official client, for libraries that depend on it and have no fine-tuning of their own."""

import json
import sys
import time
from pathlib import Path

from openai import OpenAI

ASK = "Question 99 about my cash"


def tune(client: OpenAI) -> tuple[str, str | None]:
    """Trains the model of the program's first argument on the file of the second; returns the job's and tuned model."""
    model, file = sys.argv[1:]
    upload = client.files.create(file=Path(file), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=upload.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job.model, job.fine_tuned_model


def report(asked: str, model: str | None, answer: object) -> None:
    """Prints the last line of a driver's output, which the test compares."""
    print(json.dumps({"asked": [asked], "model": model, "answer": answer}))
