"""What no file of the project says: addresses of package registries, and paths of somebody's own machine."""

import re
from pathlib import Path

# Written in pieces, or this file would be the first to be found.
REGISTRIES = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".org",
    "deb.debian" + ".org",
    "download.pytorch" + ".org",
)
PLACES = re.compile(r"(?<![\w.-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me)/\w")


def _sayings(texts: dict[Path, str], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number} {line.strip()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_registry_is_named(texts: dict[Path, str]) -> None:
    """A closed network has a mirror of its own, set once in pip's configuration."""
    assert _sayings(texts, re.compile("|".join(map(re.escape, REGISTRIES)))) == []


def test_no_path_of_one_machine_is_named(texts: dict[Path, str]) -> None:
    assert _sayings(texts, PLACES) == []
