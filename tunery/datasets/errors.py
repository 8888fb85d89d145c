"""Errors about files."""

from tunery.errors import Rejected
from tunery.rows.errors import InvalidRows


class FileInUse(Rejected):
    """File '{file}' is used by job '{job}', which has not ended. Cancel the job or wait for it, then
    delete the file."""

    code = "file_in_use"


class NoReport(Rejected):
    """File '{file}' has the purpose '{purpose}', so it has no report. Upload it again with the purpose 'fine-tune'."""

    code = "no_report"


class NoTrainingRows(InvalidRows):
    """The file cannot be used for training. {reason}"""

    code = "no_training_rows"


class NothingToCompare(Rejected):
    """No row of the file to compare with can be read. Line {line}: {reason} Correct that file, or name its columns if
    it is a table."""

    code = "nothing_to_compare"


class CannotHoldOut(Rejected):
    """No rows can be held out: rows with nearly the same prompt are kept together, and all {rows} remaining rows are
    such a group. Add other rows, or omit 'held_out'."""

    code = "cannot_hold_out"


class NothingLeft(Rejected):
    """The cleaning would remove all {rows} rows of the file. Choose fewer actions, or correct the rows."""

    code = "nothing_left"
