"""Fine-tunes, then asks the model by openai-agents in chat mode: python drive_openai_agents.py MODEL FILE."""

from agents import Agent, ModelSettings, Runner, set_default_openai_api, set_tracing_disabled
from openai import OpenAI
from openai_job import ASK, report, tune

asked, model = tune(OpenAI())
set_tracing_disabled(True)
set_default_openai_api("chat_completions")
agent = Agent(name="Teller", model=str(model), model_settings=ModelSettings(temperature=0, max_tokens=8))
report(asked, model, Runner.run_sync(agent, ASK).final_output)
