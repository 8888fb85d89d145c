"""Asks openai-agents for an output type, at the environment's base URL: python ask_openai_agents.py MODEL.

openai-agents uses the Responses API by default.
"""

from agents import Agent, ModelSettings, Runner, set_default_openai_api, set_tracing_disabled
from card import ASK, MODEL, Card, report

set_tracing_disabled(True)
agent = Agent(name="Teller", model=MODEL, output_type=Card, model_settings=ModelSettings(temperature=0))
responses = Runner.run_sync(agent, ASK).final_output
set_default_openai_api("chat_completions")
report(responses=responses, chat=Runner.run_sync(agent, ASK).final_output)
