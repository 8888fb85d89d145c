"""Compares the memory estimate with recorded peaks: `python -m bench.memory_errors [RUNS.json ...]`.

RUNS are files of bench/memory.py, judged in place of the recorded ones. Two constants follow from no code: cuBLAS's
workspace and the process on a CPU. They are fitted on every other record and judged on the rest; all else is counted.
Prints every record with its error, and the range of errors of both halves.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tunery.planning import memory, peak
from tunery.planning.expected import CPU_MICRO_BATCH, PROCESS_BYTES
from tunery.planning.peak import Estimate, Setting, Step
from tunery.spec import Technique

RESULTS = Path(__file__).parent / "results"
RUNS = ("memory_cpu.json", "memory_h200.json")
MIB, MB = 2**20, 10**6
_TECHNIQUE: TypeAdapter[Technique] = TypeAdapter(Technique)
_BESIDE = 10
"""Tokens of a row that are not learned, in files of bench/memory.py that do not say how many are."""
_PROMPT = 30
"""Tokens of such a row before its first learned one."""


def load(*paths: Path) -> list[dict[str, Any]]:
    """Returns the records, each with its base's model info; with `paths`, only those of these files."""
    said = json.loads((RESULTS / "memory_records.json").read_text())
    gathered = [{**record, "facts": said["bases"][record["base"]]} for record in said["records"]]
    files = paths or [RESULTS / name for name in RUNS if (RESULTS / name).exists()]
    measured = [of_run(run) for path in files for run in json.loads(path.read_text())["runs"] if "failed" not in run]
    records = measured if paths else gathered + measured
    return [record | {"missed": said["missed"].get(record["name"])} for record in records]


def of_run(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a run of bench/memory.py, whose examples all have about the same length."""
    asked, longest = run["run"], run["longest"]
    sharded = asked["sharding"] == "full_shard"
    whole = -(-run["step_tokens"] // asked["gpus"])
    plan = dict(re.findall(r"(\w+)=(\w+)", run["memory_plan"][0]))
    most = max(longest, int(plan["max_tokens"]) if run["device"] == "cuda" else CPU_MICRO_BATCH)
    tokens = min(whole, most // longest * longest)
    small = run["facts"]["params"] <= peak.MOST_CHECKED and not sharded
    step = {
        "tokens": tokens,
        "labels": min(tokens, run["labels"]),
        "recompute": _layers(plan["recompute"]),
        "offload": plan.get("offload") == "True",
        "host_embedding": plan.get("host_embedding") == "True",
        "graphs": plan["graphs"] == "True",
        "accumulates": whole > tokens,
        "prompt": run.get("prompt", _PROMPT) if small else 0,
        "shortest": run.get("shortest", longest - _BESIDE),
    }
    return {
        "name": run["kind"],
        "device": run["device"],
        "facts": run["facts"],
        "technique": run["technique"],
        "optimizer": asked["options"].get("optimizer", "adamw"),
        "ranks": asked["gpus"] if sharded else 1,
        "step": step,
        "measured": run["peak_bytes"],
    }


def _layers(said: str) -> int | bool:
    """Returns how many layers a log says are recomputed; older ones only say whether all are."""
    return said == "True" if said in {"True", "False"} else int(said)


def setting(record: dict[str, Any]) -> Setting:
    device, optimizer = record.get("device", "cuda"), record.get("optimizer", "adamw")
    technique = _TECHNIQUE.validate_python(record["technique"])
    return Setting.of(record["facts"], technique, device, optimizer, record.get("ranks", 1))


def estimate(record: dict[str, Any]) -> Estimate:
    """Estimates the peak of the step that the record's run took; on a CPU with the process, which was measured too."""
    of, step = setting(record), record["step"]
    if step.get("recompute") is True:  # all of them
        step = step | {"recompute": of.shape.layers}
    found = peak.peak(of, Step(**step))
    return found if of.device == "cuda" else Estimate(found.parts | {"fixed": PROCESS_BYTES["cpu"]})


def error(record: dict[str, Any]) -> float:
    """Returns the estimate's relative error: negative where it is below the measured peak."""
    return estimate(record).bytes / record["measured"] - 1


def bound(record: dict[str, Any]) -> int:
    """Returns the estimate for a run with one token a row, the least possible, counted as the record was measured."""
    of = setting(record)
    found = memory.estimate(
        record["facts"],
        of.technique,
        max_seq_length=1,
        device=of.device,
        optimizer=record.get("optimizer", "adamw"),
        ranks=of.ranks,
    )
    return found.bytes - (found.parts["fixed"] if of.device == "cuda" else 0)


def fit(records: list[dict[str, Any]], device: str) -> int:
    """Returns a device's constant in bytes, in steps of 8 MB or MiB, with the smallest sum of squared errors."""
    own = [record for record in records if record.get("device", "cuda") == device]
    before = peak.WORKSPACE, PROCESS_BYTES["cpu"]
    found = {}
    for size in range(0, 104 * MIB, 8 * MIB) if device == "cuda" else range(400 * MB, 800 * MB, 8 * MB):
        if device == "cuda":
            peak.WORKSPACE = size
        else:
            PROCESS_BYTES["cpu"] = size
        found[size] = sum(error(record) ** 2 for record in own)
    peak.WORKSPACE, PROCESS_BYTES["cpu"] = before
    return min(found, key=lambda size: found[size])


def main() -> None:
    records = load(*map(Path, sys.argv[1:]))
    print("| run | measured GiB | estimate GiB | error | half |\n| --- | --- | --- | --- | --- |")
    for number, record in enumerate(records):
        sizes = f"{record['measured'] / 2**30:.2f} | {estimate(record).bytes / 2**30:.2f}"
        half = "missed" if record["missed"] else "judged" if number % 2 else "fitted"
        print(f"| {record['name']} | {sizes} | {error(record):+.1%} | {half} |")
    for name, half_of in (("fitted", records[0::2]), ("judged", records[1::2])):
        for device in ("cuda", "cpu"):
            own = [one for one in half_of if one.get("device", "cuda") == device and not one["missed"]]
            if errors := [error(record) for record in own]:
                print(f"{name}, {device}: {len(errors)} records, {min(errors):+.1%} to {max(errors):+.1%}")
    workspace, process = fit(records[0::2], "cuda") // MIB, fit(records[0::2], "cpu") // MB
    print(f"a workspace, fitted: {workspace} MiB; used: {peak.WORKSPACE // MIB} MiB")
    print(f"a process on a CPU, fitted: {process} MB; used: {PROCESS_BYTES['cpu'] // MB} MB")


if __name__ == "__main__":
    main()
