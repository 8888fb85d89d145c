"""Writes how to serve a job's model: the artifact's README.md, and an ollama Modelfile beside its GGUF files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunery.planning import engines
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.spec import Lora, Plan
from worker.trainer import model_card
from worker.trainer.training import Training

_USER, _ANSWER, _SYSTEM = "Tq1u", "Tq2a", "Tq3s"
"""Marker texts that no template contains."""
_FOLDER = "tuned"


@dataclass(frozen=True)
class Turns:
    """A template as the texts around each message. `head`: the text before them if there is no system message."""

    head: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        texts = [f"{around[each.role][0]}{each.content}{around[each.role][1]}" for each in messages]
        return ("" if messages[0].role == "system" else self.head) + "".join(texts) + self.prompt

    def in_go(self) -> str:
        """Returns the template in Go's template language, which Modelfiles use."""
        system = f"{self.system[0]}{{{{ .System }}}}{self.system[1]}"
        user, answer = (f"{before}{{{{ .Content }}}}{after}" for before, after in (self.user, self.assistant))
        return (
            f"{{{{ if .System }}}}{system}{{{{ else }}}}{self.head}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
            f"{{{{ end }}}}{self.prompt}"
        )


def _message(role: str, content: str) -> Message:
    return Message.model_validate({"role": role, "content": content})


USER, ANSWER, SYSTEM = _message("user", _USER), _message("assistant", _ANSWER), _message("system", _SYSTEM)
_CHATS = ((USER,), (SYSTEM, USER), (USER, ANSWER, USER), (SYSTEM, USER, ANSWER, USER, ANSWER, USER))


def turns(template: ChatTemplate) -> Turns | None:
    """Returns the template's turns; None if it is more than texts around messages."""
    try:
        found = _take_apart(template)
        texts = [template.render(chat, add_generation_prompt=True) for chat in _CHATS]
    except (CannotRender, ValueError):
        return None
    is_whole = all(text == found.render(chat) for chat, text in zip(_CHATS, texts, strict=True))
    return found if is_whole and "{{" not in found.render(_CHATS[-1]) + found.head else None


def _take_apart(template: ChatTemplate) -> Turns:
    """Splits the template. Raises ValueError if a text is not where expected, CannotRender if it refuses a chat."""
    asked = template.render([USER])
    prompt = template.render([USER], add_generation_prompt=True).removeprefix(asked)
    before, after_user = asked.split(_USER)
    _, answered = template.render([USER, ANSWER]).split(_USER)
    before_answer, after_answer = answered.removeprefix(after_user).split(_ANSWER)
    _, again, _ = template.render([USER, ANSWER, USER]).split(_USER)
    before_user = again.split(_ANSWER)[1].removeprefix(after_answer)
    before_system, rest = template.render([SYSTEM, USER]).split(_SYSTEM)
    after_system = rest.split(_USER)[0].removesuffix(before_user)
    return Turns(
        head=before.removesuffix(before_user),
        system=(before_system, after_system),
        user=(before_user, after_user),
        assistant=(before_answer, after_answer),
        prompt=prompt,
    )


def modelfile(template: ChatTemplate, model: str, adapter: str | None = None) -> str:
    """Returns an ollama Modelfile. A template that is more than texts around messages is left to ollama, which
    recognises many by their text in the GGUF file.
    """
    found = turns(template)
    stops = [template.tokenizer.id_to_token(number) for number in template.eos_ids]
    lines = [f"FROM {model}", *([f"ADAPTER {adapter}"] if adapter else [])]
    lines += [f'TEMPLATE """{found.in_go()}"""'] if found else ["# ollama takes the chat template from the GGUF file."]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops), ""])


def write_modelfile(template: ChatTemplate, folder: Path) -> None:
    """Writes `gguf/Modelfile` if there are GGUF files."""
    models, adapters = _gguf(folder)
    if models:
        text = modelfile(template, f"./{models[0]}")
    elif adapters:
        text = modelfile(template, "./BASE.gguf", f"./{adapters[0]}")
    else:
        return
    (folder / "gguf" / "Modelfile").write_text(text, encoding="utf-8")


def _gguf(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the files of whole models and of adapters."""
    models, adapters = (
        sorted(path.name for path in folder.glob(f"gguf/{kind}-*.gguf")) for kind in ("model", "adapter")
    )
    return models, adapters


def write(t: Training, artifact: Path) -> None:
    """Writes README.md."""
    (artifact / "README.md").write_text(_readme(t, artifact), encoding="utf-8")


def _readme(t: Training, artifact: Path) -> str:
    content = t.run.facts.get("base_manifest_sha256")
    trained = f"Trained from `{t.run.base_model}`" + (f" (manifest sha256 `{content}`)." if content else ".")
    parts = [f"# {t.run.job}", trained, _settings(t.plan), *_use(t, artifact), *model_card.sections(artifact)]
    return "\n\n".join(parts) + "\n"


def _settings(plan: Plan) -> str:
    technique = plan.technique
    rank = f", r {technique.r}, alpha {technique.alpha:g}" if isinstance(technique, Lora) else ""
    return (
        f"Settings: technique {technique.type}{rank}, method {plan.method.type}, epochs {plan.n_epochs}, batch size "
        f"{plan.batch_size}, learning rate {plan.learning_rate:.2e}, seed {plan.seed}. `training_config.json` has all "
        "of them, the versions, and the sha256 of the files."
    )


def _use(t: Training, artifact: Path) -> Iterator[str]:
    """Yields the paragraphs on running the model elsewhere."""
    paths = [path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()]
    with_base = " --with-base" if isinstance(t.plan.technique, Lora) else ""
    if with_base:
        yield (
            "This folder contains an adapter. It gives its trained answers only on exactly this base, with the "
            "tokenizer and chat template of this folder."
        )
    else:
        yield "This folder contains a whole model."
    if "merged/merge.json" in paths:
        yield "`merged/` contains a whole model, verified by `merged/merge.json`."
    yield (
        f"Download the files to a folder named {_FOLDER}, and run a command in the folder that contains it:\n\n    "
        f"tunery jobs download {t.run.job}{with_base} -o {_FOLDER}"
    )
    config = json.loads((artifact / engines.ADAPTER).read_text()) if engines.is_adapter(paths) else {}
    for each in engines.commands(paths, _FOLDER, config):
        yield f"{each.engine}" + (f", `{each.files}`" if each.files else "") + f":\n\n    {each.command}"
