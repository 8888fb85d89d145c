"""A fine-tuning script for OpenAI's API. To run it on your own machine, one line changed: `base_url`.

The model is called SmolLM2-135M-Instruct here; `tunery models alias gpt-4o-mini-2024-07-18 SmolLM2-135M-Instruct` lets
even that line stay as it was.
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),  # the one line
)


def upload(name: str) -> str:
    with (HERE / name).open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


job = client.fine_tuning.jobs.create(
    model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
    training_file=upload(sys.argv[1] if len(sys.argv) > 1 else "banking_train.jsonl"),
    validation_file=upload(sys.argv[2] if len(sys.argv) > 2 else "banking_valid.jsonl"),
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    suffix="banking",
)
print(f"{job.id}: {job.status}")

seen: set[str] = set()
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=20).data):
        if event.id not in seen:
            seen.add(event.id)
            print(event.message)

if job.status != "succeeded" or job.fine_tuned_model is None:
    sys.exit(f"{job.id}: {job.status}: {job.error.message if job.error else ''}")

question = "I lost my card on the bus this morning"
answer = client.chat.completions.create(
    model=job.fine_tuned_model,
    messages=[
        {
            "role": "system",
            "content": 'You route messages for a bank. Reply with JSON only: {"intent": "<label>"}. The label is one '
            "of: age_limit, apple_pay_or_google_pay, atm_support, card_arrival, change_pin, edit_personal_details, "
            "exchange_rate, getting_spare_card, lost_or_stolen_card, request_refund, terminate_account, "
            "verify_my_identity.",
        },
        {"role": "user", "content": question},
    ],
    temperature=0,
    max_completion_tokens=32,
)
print(f"{job.fine_tuned_model}\n{question} -> {answer.choices[0].message.content}")
