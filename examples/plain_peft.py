"""Use a downloaded adapter with plain transformers and peft: nothing of Tunery is imported here.

    python plain_peft.py BASE_DIR ADAPTER_DIR [MAX_NEW_TOKENS] < questions.jsonl > answers.jsonl

A question is `{"messages": [...]}` a line; its answer is one JSON string a line, greedy, in fp32 on the CPU.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # both folders are complete: nothing is to be looked up

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging


def main(base_dir: str, adapter_dir: str, max_new_tokens: int = 32) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if (Path(adapter_dir) / "generation_config.json").exists():
        base.generation_config = GenerationConfig.from_pretrained(adapter_dir)  # where the adapter learned to stop
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    for line in sys.stdin:
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
