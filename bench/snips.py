"""Trains SNIPS with default settings on a GPU and measures its score and the loss of general ability.

`python -m bench.snips BASE DATA OUT.json`: BASE a converted SmolLM2-135M-Instruct, DATA a folder with
snips_{train,valid,test}.jsonl and general_mc.jsonl. Trains with the trainer itself, as a job does, then scores general
multiple choice (log-likelihood of ` <choice>` after `Question: <question>\\nAnswer:`) on the base and on the exported
adapter, loaded with plain peft.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.train_side_by_side import hardware
from tunery.planning import advice
from tunery.spec import Evaluation, Full, Lora, Plan, Qlora, Run

TECHNIQUES = {"full": Full(), "lora": Lora(), "qlora": Qlora()}


def lay_out(folder: Path, base: Path, data: Path, method: str, epochs: int, train: str, test: str) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    shutil.copyfile(data / train, folder / "data" / "train.jsonl")
    shutil.copyfile(data / test, folder / "data" / "test.jsonl")
    if (valid := data / train.replace("_train", "_valid")).exists() and valid.name != train:
        shutil.copyfile(valid, folder / "data" / "valid.jsonl")
    technique = TECHNIQUES[method]
    rate = advice.default_learning_rate(json.loads((base / "config.json").read_text())["hidden_size"], technique)
    answers = Evaluation(test_file=test, max_new_tokens=96 if "snips" in test else 32)
    plan = Plan(
        technique=technique, n_epochs=epochs, batch_size=advice.BATCH_SIZE, learning_rate=rate,
        learning_rate_multiplier=1, seed=0, evaluation=answers,
    )  # fmt: skip
    (folder / "spec.json").write_text(Run(job="bench", base_model="SmolLM2-135M-Instruct", plan=plan).model_dump_json())


def train(folder: Path, log: Path) -> list[dict[str, Any]]:
    """Runs the trainer in its own process and returns its messages, which are also written to `log` as they come."""
    with log.open("w") as file:
        subprocess.run([sys.executable, "-m", "worker.trainer", str(folder)], stdout=file, check=False)
    return [json.loads(line) for line in log.read_text().splitlines()]


def general(model: Any, tokenizer: Any, path: Path) -> float:
    """Returns the accuracy by the summed log-likelihood of the choices."""
    items = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = []
    for number, item in enumerate(items):
        prompt = tokenizer.encode(f"Question: {item['question']}\nAnswer:", add_special_tokens=False)
        for choice in item["choices"]:
            pairs.append((number, prompt, tokenizer.encode(f" {choice}", add_special_tokens=False)))
    scores: list[list[float]] = [[] for _ in items]
    for start in range(0, len(pairs), 64):
        chunk = pairs[start : start + 64]
        width = max(len(p) + len(c) for _, p, c in chunk)
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for _, p, c in chunk], device=model.device)
        with torch.no_grad():
            logs = model(input_ids=ids).logits.float().log_softmax(-1)
        for row, (number, p, c) in enumerate(chunk):
            places = torch.arange(len(p) - 1, len(p) + len(c) - 1)
            scores[number].append(float(logs[row, places, torch.tensor(c)].sum()))
    correct = sum(
        max(range(len(s)), key=s.__getitem__) == item["answer"] for s, item in zip(scores, items, strict=True)
    )
    return correct / len(items)


def main() -> None:
    base, data, out = map(Path, sys.argv[1:4])
    method = sys.argv[4] if len(sys.argv) > 4 else "lora"
    task = sys.argv[5] if len(sys.argv) > 5 else "snips"
    folder = Path(tempfile.mkdtemp()) / "run"
    epochs = int(sys.argv[6]) if len(sys.argv) > 6 else 3
    lay_out(folder, base, data, method, epochs, f"{task}_train.jsonl", f"{task}_test.jsonl")
    said = train(folder, out.with_suffix(".log.jsonl"))
    kinds = {message["type"]: message for message in said}
    steps = [m for m in said if m["type"] == "step"]
    found: dict[str, Any] = {
        "task": task,
        "method": method,
        "epochs": epochs,
        "failed": kinds.get("failed"),
        **hardware(),
    }
    if "finished" in kinds:
        tokenizer = AutoTokenizer.from_pretrained(base)
        where = folder / "out" if method == "full" else base
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to("cuda").eval()
        found["general_base"] = general(model, tokenizer, data / "general_mc.jsonl")
        tuned = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16).to("cuda")
        tuned = tuned if method == "full" else PeftModel.from_pretrained(tuned, str(folder / "out"))
        found["general_tuned"] = general(tuned.eval(), tokenizer, data / "general_mc.jsonl")
        score = {k: v for k, v in kinds["score"].items() if k != "samples"}
        found |= {
            "started": kinds["started"], "score": score, "samples": kinds["score"]["samples"],
            "evaluated": [m for m in said if m["type"] == "evaluated"], "finished": kinds["finished"],
            "train_seconds": round(sum(s["seconds"] for s in steps), 1),
            "losses": [round(s["train_loss"], 4) for s in steps[:: max(1, len(steps) // 40)]],
        }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")
    print({k: v for k, v in found.items() if k not in ("samples", "losses", "started", "evaluated")}, flush=True)


if __name__ == "__main__":
    main()
