"""Measures how rounding in bf16 changes greedy answers: `python -m bench.rounding BASE OUT.json`.

The same prompts are answered in batches of sixteen and one by one. Where an answer changes, rounding has chosen between
its first two differing tokens; the bench records the gap between their logits. `worker/server/parity.py` counts such
tokens as ties.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench import service
from tunery.rows.template import ChatTemplate
from worker.trainer.decoding.ties import tie
from worker.trainer.replay import prompts

ROWS, TOKENS, BATCH = 28, 40, 16

Answer = tuple[list[int], list[torch.Tensor]]
"""The tokens of an answer, and the logits from which each was chosen."""


def answer(model: Any, asked: list[list[int]], stop: int) -> list[Answer]:
    """Answers prompts together, padded on the left."""
    width = max(map(len, asked))
    ids = torch.tensor([[stop] * (width - len(one)) + one for one in asked], device=model.device)
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=TOKENS, do_sample=False, pad_token_id=stop,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    logits = [step.float().cpu() for step in out.logits]
    return [(out.sequences[row, width:].tolist(), [step[row] for step in logits]) for row, _ in enumerate(asked)]


def compare(together: Answer, alone: Answer) -> dict[str, float] | None:
    """Returns the position of the first differing token, and the gap between both tokens' logits in `alone`."""
    pairs = enumerate(zip(together[0], alone[0], strict=False))
    place = next((place for place, (one, other) in pairs if one != other), None)
    if place is None:
        return None
    logits = alone[1][place]
    one, other = float(logits[together[0][place]]), float(logits[alone[0][place]])
    most = max(abs(one), abs(other))
    return {"token": place + 1, "gap": abs(one - other), "logit": most, "tie": tie(most, "bfloat16")}


def main() -> None:
    base, out = map(Path, sys.argv[1:3])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    template = ChatTemplate.load(base)
    asked = [prompt.ids for prompt in prompts.load(template, 256)[:ROWS]]
    stop = int(model.generation_config.pad_token_id or template.tokenizer.token_to_id("<|im_end|>"))
    together = [one for at in range(0, ROWS, BATCH) for one in answer(model, asked[at : at + BATCH], stop)]
    alone = [one for prompt in asked for one in answer(model, [prompt], stop)]
    found = [one for pair in zip(together, alone, strict=True) if (one := compare(*pair)) is not None]
    said = {
        "answers": ROWS,
        "changed": len(found),
        "nearer than 0.05": sum(one["gap"] < 0.05 for one in found),
        "ties": sum(one["gap"] <= one["tie"] for one in found),
    }
    print(said)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    out.write_text(json.dumps({**service.hardware(), "gpu": gpu, **said, "differences": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
