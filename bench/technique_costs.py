"""Measures the time per trained token of techniques and methods: `python -m bench.technique_costs BASE OUT.json`.

BASE as in `bench.memory`. Every technique trains the same random model once in each round, on rows of about 120 tokens;
the trainers measure processor time (`bench.cpu_clock`) on a CPU with one thread. A quote scales a run of another
technique by these ratios.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench import memory, service
from bench.memory_kinds import Kind
from tunery.spec import Dpo, Full, Lora, Qlora
from tunery.trainer_protocol import Finished, parse

SHAPE, ROUNDS = "llama-57m-tied", 3
KINDS = {
    "lora": Kind(SHAPE, Lora(), words=120, steps=5),
    "qlora": Kind(SHAPE, Qlora(compute_dtype="float32"), words=120, steps=5),
    "full": Kind(SHAPE, Full(), words=120, steps=5),
    "dora": Kind(SHAPE, Lora(use_dora=True), words=120, steps=5),
    "lora, pairs": Kind(SHAPE, Lora(), Dpo(), words=60, steps=5),
}


def seconds_a_token(folder: Path, base: Path, kind: Kind) -> float:
    """Trains; returns the seconds of all steps but the first, divided by their tokens."""
    memory.lay_out(folder, base, kind)
    names = os.environ | {"TUNERY_PLUGINS": "bench.cpu_clock", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "worker.trainer", str(folder)], env=names, capture_output=True)
    said = parse(done.stdout.splitlines()[-1])
    assert isinstance(said, Finished), done.stderr.decode()
    assert said.step_times is not None
    return said.step_times.seconds / said.step_times.tokens


def main() -> None:
    source, out = sys.argv[1:]
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as holder:
        base = memory.make_base(Path(holder) / "base", Path(source), SHAPE)
        for number in range(ROUNDS):
            for name, kind in KINDS.items():
                found[name].append(seconds_a_token(Path(holder) / f"{name}-{number}", base, kind))
                print(name, found[name][-1], flush=True)
    ratios = {name: [each / lora for each, lora in zip(found[name], found["lora"], strict=True)] for name in KINDS}
    service.write(out, {
        "what": "processor seconds of a trained token on a CPU, by technique, over those of LoRA in the same round",
        "base": f"random weights of the shape {SHAPE}",
        "seconds_a_token": found,
        "ratios": {name: round(median(each), 3) for name, each in ratios.items()},
    })  # fmt: skip


if __name__ == "__main__":
    main()
