"""Checks a training file during its upload: its syntax, and whether its first rows can be trained on."""

from tunery.datasets.errors import NoTrainingRows
from tunery.datasets.model import File
from tunery.datasets.report.verdict import ANY_METHOD
from tunery.errors import WrongState
from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.formats import SourceRow
from tunery.rows.shapes import FileShape, can_be_named

FIRST = 100
"""Rows that are parsed during the upload. The report parses all of them, without making the upload wait."""


class ArrivalCheck:
    """Reads a file's bytes as they arrive, in constant memory."""

    def __init__(self) -> None:
        self._checker = readers.Checker(self._see)
        self._shape = FileShape()
        self._seen = 0
        self._fault: InvalidTrainingFile | None = None
        self._is_trainable = False

    def feed(self, chunk: bytes) -> None:
        """Reads the next bytes. Raises InvalidRows if they are not rows, NoTrainingRows after FIRST bad rows."""
        self._checker.feed(chunk)

    def close(self) -> None:
        """Ends the file. Raises InvalidRows, also for a file without rows, and NoTrainingRows."""
        self._checker.close()
        self._refuse()

    def _see(self, row: SourceRow) -> None:
        if self._is_trainable or self._seen == FIRST:
            return
        self._seen += 1
        try:
            ANY_METHOD.parse(row._replace(shape=self._shape), "training")
            self._is_trainable = True
        except InvalidTrainingFile as fault:
            self._is_trainable = can_be_named(str(fault.fields["reason"]))  # by a later job
            self._fault = self._fault or fault
        if self._seen == FIRST:
            self._refuse()

    def _refuse(self) -> None:
        if not self._is_trainable and self._fault is not None:
            raise NoTrainingRows(param="file", reason=self._fault.fields["reason"]) from self._fault


def check_written(file: File) -> None:
    """Raises WrongState for a file that a worker has not written yet."""
    if not file.sha256:
        state = "still being written" if file.status == "uploaded" else "without content"
        instead = file.status_details or "Wait until its status is 'processed'."
        raise WrongState(kind="File", id=file.id, state=state, action="read", instead=instead)
