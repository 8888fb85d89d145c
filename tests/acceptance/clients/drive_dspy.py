"""Fine-tunes with dspy's own functions, at the environment's base URL: python drive_dspy.py MODEL FILE."""

import json
import sys
from pathlib import Path

import dspy
from dspy.clients.utils_finetune import TrainDataFormat
from openai_job import ASK, report

MODEL, FILE = sys.argv[1:]
rows = [json.loads(line) for line in Path(FILE).read_text().splitlines()]
dspy.settings.configure(experimental=True)
base = dspy.LM(f"openai/{MODEL}", temperature=0, max_tokens=8, cache=False)
job = base.finetune(train_data=rows, train_data_format=TrainDataFormat.CHAT, train_kwargs={"n_epochs": 1})
tuned = job.result()
if isinstance(tuned, Exception):
    raise tuned
report(MODEL, tuned.model.removeprefix("openai/"), tuned(ASK)[0])
