"""Asks pydantic-ai for output types, at the environment's base URL: python ask_pydantic_ai.py MODEL."""

from card import ASK, MODEL, Card, report
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

found = {}
for name, model in (("chat", OpenAIChatModel(MODEL)), ("responses", OpenAIResponsesModel(MODEL))):
    for way, output in (("tool", ToolOutput(Card)), ("native", NativeOutput(Card))):
        agent = Agent(model, output_type=output, model_settings={"temperature": 0})
        found[f"{name}_{way}"] = agent.run_sync(ASK).output
report(**found)
