"""Finds rows with a wrong order of roles, and with calls that do not fit their tools."""

from collections.abc import Iterator, Sequence
from typing import get_args

from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import SYSTEM, Turn
from tunery.rows.messages import Role

_KNOWN = frozenset(get_args(Role))
_TOOL = frozenset({"tool", "function"})
_ACTION = "Correct the roles or the order of the messages."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows with an unknown role, without a final answer, or with turns that do not alternate."""
    for row in case.rows:
        if row.turns and not row.is_plain and (why := describe(row.turns)):
            yield Finding("wrong_roles", [row.line], 1.0, why, _ACTION)


def find_calls(case: Case) -> Iterator[Finding]:
    """Finds rows that would teach a call which cannot be made, or a result that answers no call."""
    for row in case.rows:
        if row.misfit:
            yield Finding("wrong_calls", [row.line], 1.0, row.misfit, "Correct the call or the tools, or drop the row.")


def describe(turns: Sequence[Turn]) -> str | None:
    """Returns what is wrong with the roles of a conversation."""
    roles = [turn.role for turn in turns]
    if unknown := next((role for role in roles if role not in _KNOWN), None):
        return f"Has the unknown role '{unknown}'."
    if "assistant" not in roles:
        return "Has no assistant message."
    spoken = [turn for turn in turns if turn.role not in SYSTEM]
    if any(role in SYSTEM for role in roles[len(roles) - len(spoken) :]):
        return "Has a system message after the first turn."
    if spoken[0].role != "user":
        return f"The first message has the role '{spoken[0].role}', but the user must speak first."
    if spoken[-1].role != "assistant":
        return f"The last message has the role '{spoken[-1].role}', so its answer is missing."
    return next(filter(None, map(_follows, spoken, spoken[1:])), None)


def _follows(before: Turn, after: Turn) -> str | None:
    """Returns what is wrong with a turn after another one."""
    if after.role in _TOOL:
        fine = before.calls or before.role in _TOOL
        return (
            None if fine else f"Has a tool result after a message with the role '{before.role}', which called no tool."
        )
    if after.role == before.role:
        return f"Has two messages with the role '{after.role}' in a row."
    return None
