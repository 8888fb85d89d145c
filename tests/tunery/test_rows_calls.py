"""Tool calls are read in the spelling of each template."""

import pytest
import templates

from tunery.rows.calls import CallSpelling
from tunery.rows.messages import FunctionCall

FIRST, SECOND = FunctionCall(name="find_card", arguments='{"n": 3}'), FunctionCall(name="stop", arguments="{}")


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "find_card", "arguments": {"n": 3}}\n</tool_call>', [FIRST]),
        ("qwen3", '<tool_call>\n{"name": "find_card", "arguments": {"n": 3}}\n</tool_call>', [FIRST]),
        ("llama3_1", '{"name": "find_card", "parameters": {"n": 3}}', [FIRST]),
        ("mistral_v3", '[TOOL_CALLS] [{"name": "find_card", "arguments": {"n": 3}, "id": "a1B2c3D4e"}]', [FIRST]),
        (
            "qwen2_5",
            '<tool_call>\n{"name": "find_card", "arguments": {"n": 3}}\n</tool_call>\n'
            '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
            [FIRST, SECOND],
        ),
        (
            "mistral_v3",
            '[TOOL_CALLS] [{"name": "find_card", "arguments": {"n": 3}, "id": "a1B2c3D4e"}, '
            '{"name": "stop", "arguments": {}, "id": "123456789"}]',
            [FIRST, SECOND],
        ),
        ("qwen2_5", '<tool_call>\n{"name": "find_card","arguments":{"n": 3}}</tool_call>', [FIRST]),
        ("qwen2_5", '<tool_call>\n{"name": "find_card", "arguments": {"n": 3}}\n</tool_call> and more', None),
        ("qwen2_5", '<tool_call>\n{"name": "find_card", "arguments": {"n": ', None),
        ("qwen2_5", '<tool_call>\n{"name": "find_card"}\n</tool_call>', None),
    ],
)
def test_calls_are_read_as_the_template_writes_them(family: str, text: str, calls: list[FunctionCall] | None) -> None:
    spelling = CallSpelling.find(templates.family(family))
    assert spelling is not None
    assert text.startswith(spelling.before)
    assert spelling.read(text) == calls


@pytest.mark.parametrize("family", ["chatml", "llama3", "phi3", "gemma3"])
def test_a_template_without_calls_has_no_spelling_of_them(family: str) -> None:
    assert CallSpelling.find(templates.family(family)) is None
