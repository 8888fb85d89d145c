"""Asks with instructor's modes for OpenAI: python ask_instructor.py MODEL."""

from card import report
from instructor import Mode
from instructor_modes import ask

report(**ask(Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS))
