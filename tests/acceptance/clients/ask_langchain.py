"""Asks for structured output of langchain-openai, at the environment's base URL: python ask_langchain.py MODEL."""

from card import ASK, MODEL, Card, report
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(model=MODEL, temperature=0)
responses = ChatOpenAI(model=MODEL, temperature=0, use_responses_api=True)
report(
    json_schema=chat.with_structured_output(Card, method="json_schema").invoke(ASK),
    function_calling=chat.with_structured_output(Card, method="function_calling").invoke(ASK),
    responses=responses.with_structured_output(Card).invoke(ASK),
)
