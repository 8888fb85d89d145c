"""The README's Modelfile renders a chat as the chat template does."""

from pathlib import Path

import go_templates
import pytest
import tiny_models

from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from worker.trainer.export import readme

CHATS = (
    [("user", "How much?")],
    [("system", "Be brief."), ("user", "How much?"), ("assistant", "12"), ("user", "Why?")],
)


def template(folder: Path, source: str) -> ChatTemplate:
    tiny_models.tokenizer(folder, source)
    return ChatTemplate.load(folder)


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + tiny_models.CHATML
)


@pytest.mark.parametrize("source", [tiny_models.CHATML, DEFAULT_SYSTEM], ids=["plain", "default system"])
@pytest.mark.parametrize("chat", CHATS)
def test_modelfile_writes_what_the_template_writes(tmp_path: Path, source: str, chat: list[tuple[str, str]]) -> None:
    made = template(tmp_path, source)
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in chat]

    text = readme.modelfile(made, "./model.gguf")

    written = text.split('TEMPLATE """')[1].split('"""')[0]
    assert go_templates.render(written, chat) == made.render(messages, add_generation_prompt=True)
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_template_that_is_more_than_texts_is_left_to_ollama(tmp_path: Path) -> None:
    numbered = tiny_models.CHATML.replace("{{ message.role }}", "{{ message.role }} {{ loop.index }}")

    assert "TEMPLATE" not in readme.modelfile(template(tmp_path, numbered), "./model.gguf")
