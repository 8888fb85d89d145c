"""Finds answers that refuse, in the words of an assistant's safety training."""

import re
from collections.abc import Iterator

from tunery.datasets.report.case import Case, Finding

_HEAD = 200
"""Characters of an answer within which it refuses: what it says later is about something else."""
_REFUSAL = re.compile(
    r"\bas an ai\b|\bas a (?:large )?language model\b"
    r"|\bi(?:'m| am) (?:very |so )?sorry,? but i (?:can(?:'t|not)|am (?:not able|unable)|won't)"
    r"|\bi(?: can(?:'t|not)| won't|(?: am|'m) (?:unable|not able) to)"
    r" (?:help|assist|provide|comply|fulfil|create|generate|support)\b"
    r"|\bi must decline\b",
    re.IGNORECASE,
)
_ACTION = "Keep it if such a question should be refused; otherwise write the answer, or drop the row."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer begins with a refusal."""
    for row in case.answered:
        found = _REFUSAL.search(row.answer[:_HEAD].replace("\u2019", "'"))
        if found is not None:
            score = 1 - found.start() / _HEAD
            yield Finding("refusal", [row.line], score, f"The answer refuses: '{found[0]}'.", _ACTION)
