"""instructor's modes that show the schema in the prompt and read JSON from the answer: json_instructor.py MODEL."""

from typing import Any

import instructor
from card import ASK, MODEL, Card, report
from instructor import Mode
from openai import OpenAI

MODES = (Mode.JSON, Mode.JSON_SCHEMA)
found: dict[str, Any] = {}
for mode in MODES:
    client = instructor.from_openai(OpenAI(), mode=mode)
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "temperature": 0}
    found[mode.name.lower()] = client.chat.completions.create(response_model=Card, max_retries=0, **asked)
report(**found)
