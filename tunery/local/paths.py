"""Finds the checkout that `api`, `worker` and `migrations` run from: they are not in the wheel."""

from collections.abc import Mapping
from pathlib import Path

from tunery.errors import TuneryError

LOOPBACK = "127.0.0.1/32"
UNPROXIED: Mapping[str, None] = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))
"""For httpx2's `mounts`: without these, httpx2 would use HTTP_PROXY for this machine too."""


class NotACheckout(TuneryError):
    """{folder} does not contain `api` and `worker`. Run this from a checkout of Tunery after `make setup`."""

    code = "not_a_checkout"


def root() -> Path:
    """Returns the checkout that this package was imported from. Raises NotACheckout."""
    folder = Path(__file__).resolve().parents[2]
    if not all((folder / name).is_dir() for name in ("api", "worker", "migrations")):
        raise NotACheckout(folder=folder)
    return folder
