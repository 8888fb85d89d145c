"""How the files beside this script were made. Nothing runs it for you; it is here so that the rows can be traced.

    python make_examples.py DIR

DIR holds the published rows as chat messages (`{"id", "messages"}` a line): `snips_{train,valid,test}.jsonl` and
`banking12_{train,test}.jsonl`. SNIPS is taken as it is. Banking is published without a validation set, so 200 rows are
drawn from its training file with a fixed seed. The `id` of each row is kept: it says which published row it is.
"""

import random
import sys
from pathlib import Path

SEED = 20260101
HELD_OUT = 200


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def write(path: Path, rows: list[str]) -> None:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def main(source: Path, target: Path) -> None:
    for split in ("train", "valid", "test"):
        write(target / f"snips_{split}.jsonl", lines(source / f"snips_{split}.jsonl"))
    rows = lines(source / "banking12_train.jsonl")
    held_out = set(random.Random(SEED).sample(range(len(rows)), HELD_OUT))  # noqa: S311  (a split, not a secret)
    write(target / "banking_train.jsonl", [row for number, row in enumerate(rows) if number not in held_out])
    write(target / "banking_valid.jsonl", [row for number, row in enumerate(rows) if number in held_out])
    write(target / "banking_test.jsonl", lines(source / "banking12_test.jsonl"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
