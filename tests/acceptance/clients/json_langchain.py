"""Asks with langchain-openai's JSON mode, whose caller describes the schema: python json_langchain.py MODEL."""

from card import ASK, MODEL, Card, report
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(model=MODEL, temperature=0)
report(json_mode=chat.with_structured_output(Card, method="json_mode").invoke(f"{ASK} Answer in JSON: colour, lost."))
