"""Every guard that `docs/traps.md` names exists."""

import re
from pathlib import Path

ROW = re.compile(r"^\| (\d+) \| .* \| .* \| (.*) \|$", re.MULTILINE)


def test_every_trap_has_a_guard_that_exists(root: Path) -> None:
    rows = {int(number): here for number, here in ROW.findall((root / "docs" / "traps.md").read_text())}
    mutants = {path.stem for path in (root / "tests" / "mutants").glob("*.patch")}

    assert list(rows) == list(range(1, 47))
    for number, here in rows.items():
        named = re.findall(r"`([^`]+)`", here)
        assert named or "*later*" in here or "no option" in here, number
        for name in named:
            assert (root / name).exists() if "/" in name else name in mutants, (number, name)
