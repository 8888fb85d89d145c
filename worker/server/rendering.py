"""Turns messages into prompts and tokens into text, shared by all models with the same tokenizer and template files."""

from collections import deque
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from llguidance import LLTokenizer

from tunery.artifacts import manifest
from tunery.artifacts.manifest import Manifest
from tunery.rows.calls import CallSpelling
from tunery.rows.template import ChatTemplate
from worker.server import grammar

_PREFIXES = (
    "tokenizer",
    "special_tokens_map.json",
    "chat_template",
    "additional_chat_templates/",
    "config.json",
    "generation_config.json",
)
"""Prefixes of the paths of files from which a template is loaded."""
_RECENT = 4
"""Renderings that are held although no model or answer uses them."""


class Rendering:
    """A tokenizer and chat template, and what is derived from them. Safe to share between threads."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.eos_ids = frozenset(template.eos_ids)
        self._vocabularies: dict[int, LLTokenizer] = {}
        self._lock = Lock()

    def vocabulary(self, size: int) -> LLTokenizer:
        """Returns the vocabulary for grammars, created when first needed. `size`: how many logits the model has."""
        with self._lock:
            if size not in self._vocabularies:
                self._vocabularies[size] = grammar.read_vocabulary(self.template.tokenizer, size, self.eos_ids)
            return self._vocabularies[size]

    @cached_property
    def spelling(self) -> CallSpelling | None:
        """How the template writes tool calls; None if it writes none that can be read."""
        return CallSpelling.find(self.template)


class Renderings:
    """The renderings in use. They are shared, as a tokenizer takes as much memory as many adapters, and most have their
    base's.
    """

    def __init__(self, now: datetime | None = None) -> None:
        """`now`: the time that templates see; None: that of each request."""
        self._now = now
        self._known: WeakValueDictionary[str, Rendering] = WeakValueDictionary()
        # Otherwise a rendering is dropped between two requests that do not overlap, and read again by each.
        self._recent: deque[Rendering] = deque(maxlen=_RECENT)
        self._lock = Lock()

    def of(self, folder: Path) -> Rendering:
        """Returns the rendering of a model's folder. Raises CannotRender."""
        key = _key(folder)
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = Rendering(ChatTemplate.load(folder, now=self._now))
            with self._lock:
                found = self._known.setdefault(key, found)
        with self._lock:
            if found not in self._recent:
                self._recent.append(found)
        return found


def _key(folder: Path) -> str:
    listed = Manifest.model_validate_json((folder / manifest.NAME).read_bytes())
    return Manifest(files=tuple(file for file in listed.files if file.path.startswith(_PREFIXES))).sha256
