"""Explains what is wrong with `TUNERY_*` variables: names each, and says what to change, without its value.

A value may be a secret, or a URL with a password.
"""

import difflib
import errno
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic_core import ErrorDetails

from tunery import field_errors
from tunery.errors import WrongSettings

PREFIX = "TUNERY_"
_OF_COMMANDS = ("TUNERY_API_KEY", "TUNERY_API_URL")
"""Variables of the commands, which are no settings."""
_CLOSE = 0.8


def explain(faults: Iterable[ErrorDetails]) -> WrongSettings:
    """Returns the error for pydantic's `faults`, with one line for each variable."""
    reasons: dict[str, list[str]] = {}
    for fault in faults:
        reasons.setdefault(_variable(fault["loc"]), []).append(field_errors.of_value(dict(fault)))
    lines = (f"{name} {', or '.join(dict.fromkeys(said))}.".lstrip() for name, said in reasons.items())
    return WrongSettings(lines="\n".join(lines))


def _variable(place: tuple[int | str, ...]) -> str:
    """Returns the variable at a fault's place; nothing for a fault of several settings, which names them itself."""
    name = str(place[0]) if place else ""
    return name if not name or name.isupper() else f"{PREFIX}{name.upper()}"


@contextmanager
def making_folder(setting: str, folder: Path) -> Iterator[None]:
    """Raises WrongSettings where the block cannot create the directory that `setting` names, or nothing can be written
    to it, as to one that another user made or that is mounted read-only.
    """
    try:
        yield
        _try_writing(folder)
    except (OSError, ValueError) as error:  # a ValueError: a null character in the path
        where = f"'{error.filename}': " if isinstance(error, OSError) and error.filename else ""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        needed = "should name a directory that this service can create and write to"
        raise WrongSettings(lines=f"{PREFIX}{setting.upper()} {needed} ({where}{reason}).") from error


def _try_writing(folder: Path) -> None:
    """Raises OSError, but not for a full disk, which may have space again and which workers themselves clear."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(folder)
            raise


def misspelt(variables: Iterable[str], settings: Sequence[str]) -> Iterator[str]:
    """Yields a warning for each variable that is no setting but nearly has the name of one."""
    known = {*(f"{PREFIX}{name.upper()}" for name in settings), *_OF_COMMANDS}
    names = {name.removeprefix(PREFIX) for name in known}
    for variable in sorted(variables):
        name = variable.upper()
        if name.startswith(PREFIX) and name not in known:
            for close in difflib.get_close_matches(name.removeprefix(PREFIX), names, n=1, cutoff=_CLOSE):
                yield f"{variable} is no setting and has no effect. Did you mean {PREFIX}{close}?"
