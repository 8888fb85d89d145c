"""Asks with instructor's mode that reads calls which the model chose to make: python calls_instructor.py MODEL."""

from collections.abc import Iterable

from card import Card, report
from instructor import Mode
from instructor_modes import ask

report(**{mode: next(iter(cards)) for mode, cards in ask(Mode.PARALLEL_TOOLS, response_model=Iterable[Card]).items()})
