"""Fine-tunes by llama-index-finetuning, at the environment's base URL: python drive_llama_index.py MODEL FILE."""

import sys
import time
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import llama_index
from openai_job import ASK, report

# The package without its __init__, which imports torch for embeddings, which are not tested here.
spec = PathFinder.find_spec("llama_index.finetuning", llama_index.__path__)
assert spec is not None
sys.modules["llama_index.finetuning"] = module_from_spec(spec)
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.finetuning.openai import OpenAIFinetuneEngine  # noqa: E402

MODEL, FILE = sys.argv[1:]
engine = OpenAIFinetuneEngine(MODEL, FILE, validate_json=False)  # its check downloads an encoding
engine.finetune()
while (job := engine.get_current_job()).status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.5)
llm = engine.get_finetuned_model(temperature=0, max_tokens=8)
report(job.model, job.fine_tuned_model, llm.chat([ChatMessage(role="user", content=ASK)]).message.content)
