"""What can be wrong with files."""

from tunery.errors import Rejected


class FileInUse(Rejected):
    """File '{file}' is used by job '{job}', which has not ended. Cancel the job or wait for it, then
    delete the file."""

    code = "file_in_use"
