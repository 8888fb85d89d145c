"""What can be wrong with files."""

from tunery.errors import Rejected


class FileInUse(Rejected):
    """File '{file}' is used by job '{job}', which has not ended. Cancel the job or wait for it, then
    delete the file."""

    code = "file_in_use"


class ReportUnavailable(Rejected):
    """A report needs packages that are not installed ('{package}' is missing). Install them:
    pip install 'tunery[report]'."""

    code = "report_unavailable"
