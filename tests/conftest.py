"""Registers the plugins of all tests: the service's fixtures only if its packages are installed.

A host that only trains lacks these packages, and `pytest tests/trainer` still runs there.
"""

from importlib.util import find_spec

import pytest

_SERVICE = ("boto3", "psycopg", "pydantic_settings", "redis", "sqlalchemy")
_INSTALLED = all(find_spec(name) for name in _SERVICE)

pytest_plugins = ("frozen_heap", "scheduling", *(("services", "receiver", "seaweed") if _INSTALLED else ()))


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Declares the options of missing plugins that pyproject.toml sets: `--strict-config` refuses unknown ones."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "Seconds a test may take, where pytest-timeout is installed")
