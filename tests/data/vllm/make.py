"""Records vLLM's responses in responses.json: `make .vendor/clients/vllm/installed`, then
`PYTHONPATH=.:tests/fixtures .venv/bin/python tests/data/vllm/make.py`.

The server has a tiny random model whose tokens are bytes, so that tests can decode the recorded answers.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import httpx2
import real_vllm
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate

HERE = Path(__file__).parent
BASE = "tiny-base"
RANK = 8
ADAPTER = "a" * 64
QUESTION = "Where is my card?"
SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32


def adapter(folder: Path, base: Path, **config: Any) -> Path:
    """Writes a random adapter with the options of `config`; returns its folder."""
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **config}
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    made.save_pretrained(str(folder))
    return folder


def greedy(base: Path, adapter: Path | None, prompt: list[int], tokens: int) -> list[int]:
    """Returns the greedy answer of plain transformers and peft."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    made = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer


class Recorder:
    """Sends requests to a server and records its responses. `hidden`: a folder whose name is not recorded."""

    def __init__(self, port: int, hidden: Path) -> None:
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300)
        self._hidden = hidden
        self.kept: dict[str, dict[str, Any]] = {}

    def ask(self, name: str, path: str, body: dict[str, Any] | None = None) -> str:
        answer = self._client.get(path) if body is None else self._client.post(path, json=body)
        text = answer.text.replace(str(self._hidden), "/models")
        self.kept[name] = {
            "path": path,
            "request": None if body is None else json.loads(json.dumps(body).replace(str(self._hidden), "/models")),
            "status": answer.status_code,
            "type": answer.headers.get("content-type", ""),
            "body": text,
        }
        return answer.text

    def load(self, name: str, folder: Path, adapter: str = ADAPTER) -> None:
        self.ask(name, "/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        self.ask(name, "/v1/unload_lora_adapter", {"lora_name": ADAPTER})


def ids_of(text: str) -> list[int]:
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return [token for event in events for choice in event["choices"] for token in choice["token_ids"]]


def main() -> None:
    root = Path(tempfile.mkdtemp())
    base = tiny_models.llama(root / "base", seed=1, **SHAPE)
    folders = {
        "plain": adapter(root / "plain", base),
        "rank": adapter(root / "rank", base, r=16),
        "dora": adapter(root / "dora", base, use_dora=True),
        "saved": adapter(root / "saved", base, modules_to_save=["lm_head"]),
        "tokens": adapter(root / "tokens", base, trainable_token_indices=[5, 6]),
    }
    question = [Message.model_validate({"role": "user", "content": QUESTION})]
    prompt = ChatTemplate.load(base).encode_prompt(question, None)
    body: dict[str, Any] = {
        "prompt": prompt,
        "stream": True,
        "max_tokens": 24,
        "temperature": 0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [2],
        "return_token_ids": True,
    }
    with real_vllm.serving(base, BASE, root, max_lora_rank=RANK, dtype="float32") as port:
        to = Recorder(port, root)
        path = "/v1/completions"
        to.ask("models", "/v1/models")
        to.ask("unknown", path, {**body, "model": ADAPTER})
        to.load("load", folders["plain"])
        to.load("load_twice", folders["plain"])
        for kind in ("rank", "dora", "saved", "tokens"):
            to.load(f"load_{kind}", folders[kind], kind)
        to.load("load_missing", root / "missing", "missing")
        to.ask("models_with_adapter", "/v1/models")
        said = ids_of(to.ask("stream_adapter", path, {**body, "model": ADAPTER}))
        assert said == greedy(base, folders["plain"], prompt, 24), "vLLM and peft differ"
        assert ids_of(to.ask("stream_base", path, {**body, "model": BASE})) == greedy(base, None, prompt, 24)
        wide = {"logprobs": 2, "return_tokens_as_token_ids": True, "max_tokens": 3}
        to.ask("stream_logprobs", path, {**body, **wide, "model": ADAPTER})
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        to.ask("stream_schema", path, {**body, "model": BASE, "structured_outputs": {"json": schema}})
        broken = {"json": {"type": "nonsense"}}
        to.ask("bad_schema", path, {**body, "model": BASE, "structured_outputs": broken})
        to.ask("too_long", path, {**body, "model": BASE, "max_tokens": 3000})
        to.unload("unload")
        to.unload("unload_twice")
    (HERE / "responses.json").write_text(json.dumps(to.kept, indent=1) + "\n")
    print(f"{len(to.kept)} answers; both greedy answers are those of plain peft")


if __name__ == "__main__":
    main()
