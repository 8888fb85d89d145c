"""Uses litellm's files, jobs and completions, at the environment's base URL: python drive_litellm.py MODEL FILE."""

import sys
import time
from pathlib import Path

import litellm
from openai_job import ASK, report

MODEL, FILE = sys.argv[1:]
upload = litellm.create_file(file=(Path(FILE).name, Path(FILE).read_bytes()), purpose="fine-tune",
                             custom_llm_provider="openai")  # fmt: skip
job = litellm.create_fine_tuning_job(
    model=MODEL, training_file=upload.id, hyperparameters={"n_epochs": 1, "batch_size": 8}, custom_llm_provider="openai"
)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.5)
    job = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, custom_llm_provider="openai")
# litellm takes the provider from the model's name: `ft:gpt-4o-mini-2024-07-18:...`.
reply = litellm.completion(
    model=job.fine_tuned_model, messages=[{"role": "user", "content": ASK}], temperature=0, max_tokens=8
)
report(job.model, job.fine_tuned_model, reply.choices[0].message.content)
