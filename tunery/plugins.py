"""Plug-ins: modules that the operator names in TUNERY_PLUGINS, and that add to the registries of this code.

Every service and every trainer imports NAME, which must be light: the API has no torch. Where NAME is a package, its
submodule NAME.api, NAME.cli, NAME.worker, NAME.trainer or NAME.server is imported by that kind of process alone.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Literal

from tunery.errors import PluginFailed

Process = Literal["api", "cli", "worker", "trainer", "server"]
VARIABLE = "TUNERY_PLUGINS"


def load(names: Iterable[str], process: Process) -> None:
    """Imports the plug-ins in order, each with its submodule for this kind of process. Raises PluginFailed."""
    for name in names:
        try:
            package = hasattr(importlib.import_module(name), "__path__")
            if package and importlib.util.find_spec(f"{name}.{process}"):
                importlib.import_module(f"{name}.{process}")
        except Exception as error:
            raise PluginFailed(name=name, reason=f"{type(error).__name__}: {error}") from error


def names() -> tuple[str, ...]:
    """Returns the plug-ins that the environment names; for the trainer, which has no settings."""
    return split(os.environ.get(VARIABLE, ""))


def split(value: str) -> tuple[str, ...]:
    """Returns the parts of a comma-separated value, without blanks and empty ones."""
    return tuple(part.strip() for part in value.split(",") if part.strip())
