"""Fine-tunes, then asks the model by pydantic-ai, at the environment's base URL: drive_pydantic_ai.py MODEL FILE."""

from openai import OpenAI
from openai_job import ASK, report, tune
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

asked, model = tune(OpenAI())
agent = Agent(OpenAIChatModel(str(model)), model_settings={"temperature": 0, "max_tokens": 8})
report(asked, model, agent.run_sync(ASK).output)
