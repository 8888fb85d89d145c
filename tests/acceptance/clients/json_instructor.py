"""Asks with instructor's modes that put the schema in the prompt and parse the answer: json_instructor.py MODEL."""

from card import report
from instructor import Mode
from instructor_modes import ask

report(**ask(Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON))
