"""Fine-tunes, then asks the model by langchain-openai, at the environment's base URL: drive_langchain.py MODEL FILE."""

from langchain_openai import ChatOpenAI
from openai import OpenAI
from openai_job import ASK, report, tune

asked, model = tune(OpenAI())
chat = ChatOpenAI(model=str(model), temperature=0, max_completion_tokens=8)
answer = chat.invoke(ASK).content
streamed = "".join(str(piece.content) for piece in chat.stream(ASK))
assert streamed == answer, (streamed, answer)
report(asked, model, answer)
