"""What can be wrong with files."""

from tunery.errors import Rejected
from tunery.rows.errors import InvalidRows


class FileInUse(Rejected):
    """File '{file}' is used by job '{job}', which has not ended. Cancel the job or wait for it, then
    delete the file."""

    code = "file_in_use"


class NoReport(Rejected):
    """File '{file}' has the purpose '{purpose}', so it has no report: upload it with the purpose 'fine-tune'."""

    code = "no_report"


class NoTrainingRows(InvalidRows):
    """The file cannot be trained from. {reason}"""

    code = "no_training_rows"


class CannotHoldOut(Rejected):
    """No rows can be held out: rows that ask nearly the same stay together, and of the {rows} that are left all do.
    Add other rows, or leave 'held_out' out."""

    code = "cannot_hold_out"


class NothingLeft(Rejected):
    """No row is left of the file's {rows}. Choose fewer actions, or correct the rows."""

    code = "nothing_left"
