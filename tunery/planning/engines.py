"""One command for each engine that runs what a model's folder holds, as `tunery models download` leaves it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunery.planning.servable import AdapterTraits, Limits, why_not

BASE = "base"
"""The folder of an adapter's base, inside that of the adapter."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ADAPTER = "adapter_config.json"
_GREETING = "[{'role': 'user', 'content': 'Hello'}]"
_STOPS = "generation_config.json"
_PLAIN = (
    "from {library} import {kind} as Model; from transformers import AutoTokenizer as Tokenizer, GenerationConfig; "
    "t, m = Tokenizer.from_pretrained('{folder}'), Model.from_pretrained('{folder}'); "
    "{stops}"
    "p = t.apply_chat_template({greeting}, add_generation_prompt=True, return_dict=True, return_tensors='pt'); "
    "print(t.decode(m.generate(**p, max_new_tokens=64)[0, p['input_ids'].shape[1]:], skip_special_tokens=True))"
)


@dataclass(frozen=True)
class Command:
    """What starts an engine on `files`, a path below the model's folder. Empty: the folder itself."""

    engine: str
    files: str
    command: str


def is_adapter(paths: Sequence[str]) -> bool:
    """Whether these files are an adapter, which needs its base."""
    return ADAPTER in paths


def download(model: str, folder: str, paths: Sequence[str]) -> str:
    """Returns the command that fetches the files, and the base of an adapter."""
    base = " --with-base" if is_adapter(paths) else ""
    return f"tunery models download {shlex.quote(model)}{base} -o {shlex.quote(folder)}"


def commands(paths: Sequence[str], folder: str, config: Mapping[str, Any]) -> list[Command]:
    """Returns the engines' commands, in the folder above `folder`, a plain name. `config`: an adapter's."""
    found = _of_adapter(folder, config, _STOPS in paths) if is_adapter(paths) else _of_whole("", folder)
    for kind in ("merged", "fp8"):
        if f"{kind}/config.json" in paths:
            found += _of_whole(kind, f"{folder}/{kind}")
    names = sorted(path for path in paths if path.endswith(".gguf"))
    wholes = [name for name in names if name.startswith("gguf/model-")]
    found += [Command("llama.cpp", name, f"llama-server -m {folder}/{name} --jinja") for name in wholes]
    for name in names:
        if name.startswith("gguf/adapter-"):
            command = f"llama-server -m BASE.gguf --lora {folder}/{name} --jinja"
            found.append(Command("llama.cpp", name, command))
    if wholes and "gguf/Modelfile" in paths:
        made = f"ollama create {folder} -f {folder}/gguf/Modelfile && ollama run {folder}"
        found.append(Command("ollama", "gguf/Modelfile", made))
    return found


def _of_adapter(folder: str, config: Mapping[str, Any], has_stops: bool) -> list[Command]:
    traits = AdapterTraits.of_config(config, on_four_bits=False)
    limit = next((each for each in VLLM_RANKS if each >= traits.rank), VLLM_RANKS[-1])
    served = (
        f"vllm serve {folder}/{BASE} --enable-lora --max-lora-rank {limit} --lora-modules {folder}={folder} "
        f"--chat-template {folder}/chat_template.jinja"
    ) + (f" --generation-config {folder}" if has_stops else "")
    # Both read the base's stop tokens otherwise, which need not be those that the adapter learned.
    stops = f"m.generation_config = GenerationConfig.from_pretrained('{folder}'); " if has_stops else ""
    found = [Command("peft", "", _plain("peft", "AutoPeftModelForCausalLM", folder, stops))]
    can_serve = why_not(traits, Limits(max_rank=limit, four_bits_on_the_base=True)) is None
    return [*found, Command("vllm", "", served)] if can_serve else found


def _of_whole(files: str, folder: str) -> list[Command]:
    served = f"vllm serve {folder} --served-model-name {folder.partition('/')[0]}"
    return [
        Command("transformers", files, _plain("transformers", "AutoModelForCausalLM", folder)),
        Command("vllm", files, served),
    ]


def _plain(library: str, kind: str, folder: str, stops: str = "") -> str:
    program = _PLAIN.format(library=library, kind=kind, folder=folder, stops=stops, greeting=_GREETING)
    return f'python -c "{program}"'
