"""Limits how often a part of the stack is restarted before the whole stack stops."""

import time
from collections import defaultdict, deque

MOST = 5
WITHIN_SECONDS = 300.0


class Restarts:
    """Counts restarts by name."""

    def __init__(self) -> None:
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def allow(self, name: str) -> bool:
        """Counts a restart; returns False if there have been MOST within WITHIN_SECONDS."""
        times, now = self._times[name], time.monotonic()
        while times and times[0] < now - WITHIN_SECONDS:
            times.popleft()
        if len(times) >= MOST:
            return False
        times.append(now)
        return True
