"""Trial conversations that a chat template must render before its base is added."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.rows.dialect import LimitExceeded
from tunery.rows.errors import CannotRender
from tunery.rows.messages import FunctionCall, Message, Tool, ToolCall
from tunery.rows.template import ChatTemplate


@dataclass(frozen=True)
class Trial:
    """A conversation. `is_required`: without it nothing can be trained; a template may refuse the others."""

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    is_required: bool = False


_USER = Message(role="user", content="Which words rhyme?\n\n1. 'day' & \"way\" <b>2</b> {{ 3 }} 🗼 日本")
_ASSISTANT = Message(role="assistant", content="The first two.")
_CALL = ToolCall(id="abcdef123", function=FunctionCall(name="find_rhymes", arguments='{"word": "day", "count": 2}'))
_TOOL = Tool.model_validate(
    {
        "function": {
            "name": "find_rhymes",
            "description": "Finds words that rhyme",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        }
    }
)
_LONG = Message(role="user", content="line\n" * 20_000)

TRIALS = (
    Trial([_USER], is_required=True),
    Trial([_USER, _ASSISTANT], is_required=True),
    Trial([Message(role="system", content="Be brief."), _USER, _ASSISTANT]),
    Trial([_USER, _ASSISTANT] * 50),
    Trial([_LONG, Message(role="assistant", content="word " * 20_000)]),
    Trial([_USER, Message(role="assistant", content="Two.", reasoning_content="Day and way.")]),
    Trial([_USER, Message(role="assistant", content="")]),
    Trial([_USER, _ASSISTANT, _USER], [_TOOL]),
    Trial(
        [
            _USER,
            Message(role="assistant", tool_calls=[_CALL]),
            Message(role="tool", tool_call_id="abcdef123", content='["way"]'),
            _ASSISTANT,
        ],
        [_TOOL],
    ),
)


def render_trials(template: ChatTemplate) -> None:
    """Renders each of TRIALS, with and without the generation prompt.

    Raises CannotRender if a required one fails, or if any exceeds the budget of a rendering.
    """
    for trial in TRIALS:
        for prompts in (False, True):
            try:
                template.render(trial.messages, trial.tools, add_generation_prompt=prompts)
            except CannotRender as error:
                if trial.is_required or isinstance(error.__cause__, LimitExceeded):
                    raise
