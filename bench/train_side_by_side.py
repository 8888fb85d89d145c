"""Compares Tunery with TRL on one GPU: same checkpoint, rows and order, one process each; writes all runs as JSON.

`python -m bench.train_side_by_side MODEL OUT.json [stack:method:ckpt ...]`; MODEL: a folder of make_model.py, whose
name is recorded.
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RUNS = ["ours:qlora:1", "trl:qlora:1", "ours:lora:0", "trl:lora:0", "ours:qlora:0", "trl:qlora:0", "ours:lora:1",
        "trl:lora:1"]  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel",
            "unsloth")  # fmt: skip


def run(model: str, stack: str, method: str, checkpointing: str) -> dict[str, object]:
    extra = {"trl-liger": ["--liger", "1"], "trl-unsloth": ["--unsloth"]}.get(stack, [])
    script = f"bench.train_{stack.partition('-')[0]}"
    command = [sys.executable, "-m", script, "--model", model, "--method", method, "--ckpt", checkpointing, *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, object] = json.loads(line.removeprefix("RESULT "))
            return found
    return {"stack": stack, "method": method, "ckpt": checkpointing, "error": done.stderr[-2000:]}


def hardware() -> dict[str, object]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    model, out, *chosen = sys.argv[1:]
    results = []
    for name in chosen or RUNS:
        results.append(run(model, *name.split(":")))
        short = {k: v for k, v in results[-1].items() if k not in ("losses", "grad_norms")}
        print(short, results[-1].get("losses", [])[:2], results[-1].get("grad_norms", [])[:2], flush=True)
        Path(out).write_text(json.dumps({"model": Path(model).name, **hardware(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
