"""Trains each technique on one base with the demo's rows: what it learns, how fast, and whether plain libraries agree.

`python -m bench.techniques BASE OUT.json [ROWS [TEST_ROWS [TECHNIQUE ...]]]`: BASE a converted model. Trains with the
trainer itself, as a job does, one epoch of ROWS rows (320) with default settings, and scores TEST_ROWS (100) held-out
rows. Then plain transformers and peft answer the scored rows again from the exported files. Runs on a GPU or a CPU.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from bench.train_side_by_side import hardware
from tunery.planning import advice
from tunery.spec import Evaluation, Full, Lora, Plan, Qlora, Run, Technique

EXAMPLES = Path(__file__).parents[1] / "examples"
TECHNIQUES: dict[str, Technique] = {"lora": Lora(), "qlora": Qlora(), "full": Full()}
MAX_NEW_TOKENS = 20
HEAD = (
    "technique", "steps", "first loss", "last loss", "exact, base", "exact, tuned", "train s", "peak GiB",
    "same in plain",
)  # fmt: skip


def lay_out(folder: Path, base: Path, technique: Technique, rows: int, test_rows: int) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    for name, most in (("train", rows), ("valid", 40), ("test", test_rows)):
        lines = (EXAMPLES / f"banking_{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"data/{name}.jsonl").write_text("".join(lines[:most]))
    hidden = json.loads((base / "facts.json").read_text())["hidden_size"]
    plan = Plan(
        technique=technique, n_epochs=1, batch_size=advice.BATCH_SIZE, seed=7, learning_rate_multiplier=1,
        learning_rate=advice.default_learning_rate(hidden, technique),
        evaluation=Evaluation(test_file="test", max_new_tokens=MAX_NEW_TOKENS, max_rows=test_rows),
    )  # fmt: skip
    (folder / "spec.json").write_text(Run(job="bench", base_model=base.name, plan=plan).model_dump_json())


def train(folder: Path) -> list[dict[str, Any]]:
    """Runs the trainer in its own process and returns its messages; its log goes to this process's standard error."""
    done = subprocess.run([sys.executable, "-m", "worker.trainer", str(folder)], stdout=subprocess.PIPE, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


def load_plain(name: str, folder: Path) -> Any:
    """Returns the exported model as plain transformers and peft load it, in the base precision that the run used."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name == "full":
        return AutoModelForCausalLM.from_pretrained(folder / "out", dtype=dtype).to(device).eval()
    options: dict[str, Any] = {"dtype": dtype}
    if name == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(folder / "base", device_map={"": device}, **options)
    if (folder / "out/generation_config.json").exists():
        base.generation_config = GenerationConfig.from_pretrained(folder / "out")
    return PeftModel.from_pretrained(base, str(folder / "out")).eval()


def same_in_plain(name: str, folder: Path) -> str:
    """Counts the scored rows that plain `generate` answers as in the scorecard, stopping where the files say."""
    scored = [json.loads(line) for line in (folder / "out/answers.jsonl").read_text().splitlines()]
    model = load_plain(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    same = 0
    for row in scored:
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        same += answer == row["tuned"]
    return f"{same} of {len(scored)}"


def measure(name: str, base: Path, rows: int, test_rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "run"
        lay_out(folder, base, TECHNIQUES[name], rows, test_rows)
        said = train(folder)
        kinds = {message["type"]: message for message in said}
        if "finished" not in kinds:
            return {"technique": name, "failed": kinds.get("failed", "no word from the trainer")}
        steps = [message for message in said if message["type"] == "step"]
        return {
            "technique": name,
            "device": kinds["started"]["device"],
            "losses": [step["train_loss"] for step in steps],
            "seconds": sum(step["seconds"] for step in steps),
            "peak_bytes": kinds["finished"]["peak_memory_bytes"],
            "score": {key: value for key, value in kinds["score"].items() if key != "samples"},
            "same_in_plain": same_in_plain(name, folder),
        }


def line(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"| {found['technique']} | failed: {found['failed']} |"
    losses, score, peak = found["losses"], found["score"], found["peak_bytes"]
    cells = [
        found["technique"], len(losses), f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{score['base_exact']:.1%}",
        f"{score['tuned_exact']:.1%}", f"{found['seconds']:.1f}", f"{peak / 2**30:.2f}" if peak else "",
        found["same_in_plain"],
    ]  # fmt: skip
    return row(cells)


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    base, out = map(Path, sys.argv[1:3])
    rows, test_rows = (int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((3, 320), (4, 100)))
    found = [measure(name, base, rows, test_rows) for name in sys.argv[5:] or TECHNIQUES]
    out.write_text(json.dumps({"base": base.name, "rows": rows, **hardware(), "techniques": found}, indent=1) + "\n")
    print("\n".join([row(HEAD), row(["---"] * len(HEAD)), *map(line, found)]), flush=True)


if __name__ == "__main__":
    main()
