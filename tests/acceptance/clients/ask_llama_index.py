"""Asks llama-index's structured LLM, at the environment's base URL: python ask_llama_index.py MODEL."""

from card import ASK, MODEL, Card, report
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI

llm = OpenAI(model=MODEL, temperature=0)
report(structured=llm.as_structured_llm(Card).chat([ChatMessage(role="user", content=ASK)]).raw)
