"""The memory estimate beside recorded peaks: `python -m bench.memory_errors [RECORDS.json]`.

Two constants stand in no code, cuBLAS's workspace and a CPU's process: they are fitted on every other record and judged
on the others; all else is counted. Prints every record with its error, and both halves' worst.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tunery.planning import memory, peak
from tunery.planning.expected import PROCESS_BYTES
from tunery.planning.peak import Estimate, Setting, Step
from tunery.spec import Technique

RECORDS = Path(__file__).parent / "results" / "memory_records.json"
MIB, MB = 2**20, 10**6
_TECHNIQUE: TypeAdapter[Technique] = TypeAdapter(Technique)


def load(path: Path = RECORDS) -> list[dict[str, Any]]:
    """The records, each with its base's facts."""
    said = json.loads(path.read_text())
    return [{**record, "facts": said["bases"][record["base"]]} for record in said["records"]]


def setting(record: dict[str, Any]) -> Setting:
    device, optimizer = record.get("device", "cuda"), record.get("optimizer", "adamw")
    technique = _TECHNIQUE.validate_python(record["technique"])
    return Setting.of(record["facts"], technique, device, optimizer, record.get("ranks", 1))


def estimate(record: dict[str, Any]) -> Estimate:
    """The peak of the step that the record's run took; on a CPU with its process, of which all was measured."""
    found = peak.peak(setting(record), Step(**record["step"]))
    return found if "device" not in record else Estimate(found.parts | {"fixed": PROCESS_BYTES[record["device"]]})


def error(record: dict[str, Any]) -> float:
    """The share by which the estimate is above the measured peak; below 0 where it is under it."""
    return estimate(record).bytes / record["measured"] - 1


def bound(record: dict[str, Any]) -> int:
    """The least that a run with one token a row would have, measured as the record was."""
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
    """A device's constant in bytes, of whole 8 MB or MiB, with the smallest sum of squared errors."""
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
    records = load(Path(sys.argv[1])) if len(sys.argv) > 1 else load()
    fitted_on, judged_on = records[0::2], records[1::2]
    print("| run | measured GiB | estimate GiB | error | half |\n| --- | --- | --- | --- | --- |")
    for number, record in enumerate(records):
        sizes = f"{record['measured'] / 2**30:.2f} | {estimate(record).bytes / 2**30:.2f}"
        print(f"| {record['name']} | {sizes} | {error(record):+.1%} | {'judged' if number % 2 else 'fitted'} |")
    for name, half in (("fitted", fitted_on), ("judged", judged_on)):
        errors = [error(record) for record in half]
        print(f"{name}: {len(half)} records, {min(errors):+.1%} to {max(errors):+.1%}")
    workspace, process = fit(fitted_on, "cuda") // MIB, fit(fitted_on, "cpu") // MB
    print(f"a workspace, fitted: {workspace} MiB; used: {peak.WORKSPACE // MIB} MiB")
    print(f"a process on a CPU, fitted: {process} MB; used: {PROCESS_BYTES['cpu'] // MB} MB")


if __name__ == "__main__":
    main()
