"""A report as one HTML page: no script, nothing to load, and short whatever the file's size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tunery.datasets.report.titles import TITLES
from tunery.rows import readers

_SHOWN = 20
"""Findings of a kind that are shown in full."""
_LINES = 12
_ALL_LINES = 400
_LANGUAGES = 4
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
"""The page's HTTP headers, so that text in it cannot run as script."""
_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Section:
    """The findings of one kind. `all_lines`: the rows that they name, where not every finding is shown."""

    kind: str
    title: str
    count: int
    share: float
    action: str
    shown: list[dict[str, Any]]
    all_lines: str


def render(name: str, said: Mapping[str, Any], *, state: Mapping[str, Any] | None = None) -> str:
    """The page on the file called `name`. `said`: the report, empty while there is none; `state`: how far it is."""
    sections, figures = list(_sections(said.get("findings", ()))), said.get("figures", {})
    return _TEMPLATE.render(
        name=name,
        said=said,
        state=state or {"status": "ready", "progress": 1.0, "error": None},
        sections=sections,
        diversity=figures.get("diversity"),
        languages=mixes(figures),
        described=describe(said) if said else "",
        tokens=figures.get("tokens"),
        answers=figures.get("answers"),
        other=figures.get("against"),
    )


def describe(said: Mapping[str, Any]) -> str:
    """Returns a file's format, what its columns become, and what its line numbers are where they are no lines."""
    parts = [said["format"], said["shape"]] if said["shape"] else [said["format"]]
    if not readers.counts_lines(said["format"]):
        parts.append("lines are counted by rows")
    return "; ".join(parts)


def _sections(findings: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for finding in findings:
        by_kind.setdefault(finding["kind"], []).append(finding)
    most = max(map(len, by_kind.values()), default=1)
    for kind in sorted(by_kind, key=lambda kind: (list(TITLES).index(kind) if kind in TITLES else len(TITLES), kind)):
        found = by_kind[kind]
        best = sorted(found, key=lambda finding: -finding["score"])[:_SHOWN]
        shown = [
            {
                "rows": "line" if len(finding["lines"]) == 1 else "lines",
                "lines": places(finding["lines"], _LINES),
                "against": places(finding.get("against") or (), _LINES),
                "why": finding["why"],
                "score": finding["score"],
            }
            for finding in best
        ]
        every = sorted({line for finding in found for line in finding["lines"]}) if len(found) > _SHOWN else []
        title = TITLES.get(kind, kind)
        lines = places(every, _ALL_LINES)
        yield Section(kind, title, len(found), len(found) / most, found[0]["action"], shown, lines)


def mixes(figures: Mapping[str, Any]) -> dict[str, str]:
    """The languages of the questions and of the answers, with shares, for people; empty where none was identified."""
    said = figures.get("languages") or {}
    return {f"{part}s": found for part in ("question", "answer") if (found := _mix(said.get(part, {})))}


def _mix(counts: Mapping[str, int]) -> str:
    known = {language: count for language, count in counts.items() if language != "unknown"}
    fractions = [(language, count / sum(known.values())) for language, count in known.items()]
    return ", ".join(f"{language} {fraction:.1%}" for language, fraction in fractions[:_LANGUAGES])


def places(lines: Sequence[int], most: int) -> str:
    """Formats line numbers, at most `most`."""
    more = f" and {len(lines) - most:,} more" if len(lines) > most else ""
    return ", ".join(map(str, lines[:most])) + more
