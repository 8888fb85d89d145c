"""A job's states and the allowed transitions. docs/jobs.md shows them; a test compares the two."""

from enum import StrEnum


class State(StrEnum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.RUNNING, State.PAUSED, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.PAUSED, State.QUEUED}),
    State.PAUSED: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

FINAL = frozenset(state for state, targets in TRANSITIONS.items() if not targets)
LIVE = frozenset(TRANSITIONS) - FINAL


def mermaid() -> str:
    """Returns the diagram of TRANSITIONS, in Mermaid's stateDiagram-v2."""
    edges = [f"    {source} --> {target}" for source, targets in TRANSITIONS.items() for target in sorted(targets)]
    ends = [f"    {state} --> [*]" for state in TRANSITIONS if state in FINAL]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.VALIDATING}", *edges, *ends])
